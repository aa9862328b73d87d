"""Two runners side by side over the same tokens, one block at a time, and how far apart they are at every step.

Memory is one block and one batch of hidden states of each. Logits come from the final hidden states and the embedding
tiled from the files, so never positions x vocabulary; where a runner keeps its head to itself (it is a consumer's own),
from its tiles. In the first case the products of the head are made in at least float32, whatever the runners compute in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..convert.progress import SILENT, Tick
from ..formats.errors import ConfigError, FormatError, UsageError
from ..model.logits_stats import Record, Stats, merge
from .batches import BATCH_TOKENS, ProbeLike, padded, plan_batches, targets
from .block_errors import (
    EMBEDDING,
    BlockError,
    Trace,
    block_errors,
    position_errors,
)  # fmt: skip
from .divergence import (
    Divergence,
    Inside,
    bisect_taps,
    divergent,
    first_divergent,
    look_inside,
    scan_taps,
    shortest_showing,
)
from .lockstep_logits import BLOCK_ROWS, SCRATCH, from_hidden, from_tiles, tables_of
from .runners.base import Runner

Array = np.ndarray[Any, np.dtype[Any]]
VERSION = 1
HEADS = ("hidden", "tiles", "top-k")


@dataclass(frozen=True)
class NonFinite:
    """Where a hidden state is NaN or infinite: the first layer of that probe and side, and the first position in it."""

    layer: int
    probe: str
    position: int
    side: str


@dataclass(frozen=True)
class LockstepResult:
    """What a run over some probes found.

    Attributes:
        records: logit statistics, one per probe; ``document`` is the probe's id.
        traces: errors of every block over every probe; empty where a runner has no hidden states.
        kinds: layer number -> ``embedding``, ``local``, ``global``, ``final``, in forward order.
        window: size of the sliding window, which parts near from far positions.
        head: ``hidden`` or ``tiles``, see the module; ``top-k`` where statistics are lower bounds (.recording_bound).
        non_finite: of hidden states, in the order of layers, probes, positions.
    """

    records: list[Record]
    traces: list[Trace]
    kinds: Mapping[int, str]
    window: int | None
    head: str
    non_finite: list[NonFinite] = field(default_factory=list)

    @cached_property
    def errors(self) -> list[BlockError]:
        """Embedding, blocks and final norm."""
        return block_errors(self.traces, self.kinds)

    @property
    def blocks(self) -> list[BlockError]:
        """Decoder blocks only."""
        return [e for e in self.errors if e.kind in ("local", "global")]

    @property
    def embedding(self) -> BlockError | None:
        """The embedded tokens."""
        return next((e for e in self.errors if e.kind == "embedding"), None)

    @property
    def final(self) -> BlockError | None:
        """After the final norm."""
        return next((e for e in self.errors if e.kind == "final"), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": VERSION,
            "records": [r.to_json() for r in self.records],
            "traces": [t.to_json() for t in self.traces],
            "kinds": [[layer, kind] for layer, kind in self.kinds.items()],
            "window": self.window,
            "head": self.head,
            "non_finite": [[n.layer, n.probe, n.position, n.side] for n in self.non_finite],
        }

    @staticmethod
    def from_json(data: Any) -> LockstepResult:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        try:
            if data["version"] != VERSION or data["head"] not in HEADS:
                raise ValueError
            return LockstepResult(
                records=[Record.from_json(r) for r in data["records"]],
                traces=[Trace.from_json(t) for t in data["traces"]],
                kinds={int(layer): str(kind) for layer, kind in data["kinds"]},
                window=None if data["window"] is None else int(data["window"]),
                head=data["head"],
                non_finite=[
                    NonFinite(int(n), str(p), int(at), str(s)) for n, p, at, s in data["non_finite"]
                ],
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FormatError(
                "not the result of a comparison: fields are missing or unknown."
            ) from None


def merge_results(results: Iterable[LockstepResult]) -> LockstepResult:
    """Results of shards of one set of probes as one, the same in whatever order they come.

    Raises:
        UsageError: none, of different models, or with a probe twice.
    """
    parts = list(results)
    if not parts or any(
        (p.kinds, p.window, p.head) != (parts[0].kinds, parts[0].window, parts[0].head)
        for p in parts
    ):
        raise UsageError("the parts to merge are none, or of different models or runners.")
    return LockstepResult(
        records=merge(p.records for p in parts),
        traces=sorted(
            (t for p in parts for t in p.traces), key=lambda t: (t.layer, t.kind, t.probe)
        ),
        kinds=parts[0].kinds,
        window=parts[0].window,
        head=parts[0].head,
        non_finite=sorted(
            (n for p in parts for n in p.non_finite),
            key=lambda n: (n.layer, n.probe, n.position, n.side),
        ),
    )


def run_lockstep(
    ref: Runner,
    cand: Runner,
    probes: Iterable[ProbeLike],
    *,
    batch_tokens: int = BATCH_TOKENS,
    block_rows: int = BLOCK_ROWS,
    scratch: int = SCRATCH,
    device: str = "cpu",
    isolated: bool = True,
    tiles: bool = False,
    only_different: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: Tick = SILENT,
) -> LockstepResult:
    """Compare two runners over the probes.

    Args:
        ref: the reference.
        cand: the candidate, another object; of the same sizes, else as it likes.
        probes: ids must be unique.
        batch_tokens: largest padded batch.
        block_rows: embedding rows at a time.
        scratch: bytes of logits at a time.
        device: torch's name of where the head's products and statistics are computed.
        isolated: run each of the candidate's blocks on the reference's input too, where it can.
        tiles: take the logits the runners make themselves even where their heads are known.
        only_different: leave out of the statistics what has equal final hidden states, but for one position of every
            probe; for two with one head, where nothing is to be learnt from the others.
        shard: ``(i, n)``: only batches i, i + n, i + 2 n, …; their numbers are those of the whole run.
        progress: called with tokens just done (a token counts once per layer and once for the head) and a place.

    Raises:
        ConfigError: vocabulary, depth or width differ.
        UsageError: the same object twice, or probes with the same id.
    """
    _check(ref, cand)
    chosen = list(probes)
    if len({p.id for p in chosen}) != len(chosen):
        raise UsageError("two probes have the same id.")
    walk = all("blocks" in r.gives for r in (ref, cand))
    tables = None if tiles or not walk else tables_of(ref, cand)
    window = ref.config.sliding_window
    run = _Run(ref, cand, isolated and "replay" in cand.gives, window, progress)
    records: list[Record] = []
    batches = plan_batches([len(p.tokens) for p in chosen], batch_tokens)
    for index in batches[shard[0] :: shard[1]]:
        members = [chosen[i] for i in index]
        tokens, real = padded([p.tokens for p in members], ref.config.filler)
        if walk:
            final = run.blocks(members, tokens, real)
        else:
            run.whole(tokens, real)
        goals = np.concatenate([targets(p) for p in members])
        sizes = [len(p.tokens) for p in members]
        if walk and only_different:
            final, goals, sizes = _different(final, goals)
        if walk and tables is not None:
            states = np.concatenate(final[0]), np.concatenate(final[1])
            configs = ref.config, cand.config
            stats = from_hidden(states, tables, configs, goals, block_rows, scratch, device)
        else:
            stats = from_tiles(ref, cand, real, goals, block_rows, scratch, device)
        records += _split(members, sizes, stats)
        progress(int(real.sum()), "logits")
    return merge_results([
        LockstepResult(
            records, run.traces, layer_kinds(ref) if walk else {}, window,
            "tiles" if tables is None else "hidden", run.bad,
        )
    ])  # fmt: skip


def layer_kinds(runner: Runner) -> dict[int, str]:
    """Layer number -> kind, in forward order."""
    count = runner.config.num_hidden_layers
    kinds = {i: "local" if runner.config.is_local(i) else "global" for i in range(count)}
    return {EMBEDDING: "embedding", **kinds, count: "final"}


def gives_table(runner: Runner) -> bool:
    """Whether its logits can be made from its hidden states and its embedding."""
    return runner.table() is not None


def _check(ref: Runner, cand: Runner) -> None:
    if ref is cand:
        raise UsageError("reference and candidate are one runner; open it twice.")
    names = ["vocab_size"]
    if all("blocks" in r.gives for r in (ref, cand)):
        names += ["num_hidden_layers", "hidden_size"]
    for name in names:
        a, b = getattr(ref.config, name), getattr(cand.config, name)
        if a != b:
            raise ConfigError(
                f"{name} is {a} in the reference and {b} in the candidate; they cannot run side by side.",
                fix="compare two checkpoints of the same model.",
            )


class _Run:
    """Both runners over one batch after the other; collects errors of blocks."""

    def __init__(
        self,
        ref: Runner,
        cand: Runner,
        isolated: bool,
        window: int | None,
        progress: Tick,
    ) -> None:
        self.ref, self.cand, self.isolated, self.window = ref, cand, isolated, window
        self.progress = progress
        self.traces: list[Trace] = []
        self.bad: list[NonFinite] = []

    def whole(self, tokens: Array, real: Array) -> None:
        """Run both to the end without looking."""
        for runner in (self.ref, self.cand):
            runner.start(tokens, real)
            runner.finish()

    def blocks(
        self, members: Sequence[ProbeLike], tokens: Array, real: Array
    ) -> tuple[list[Array], list[Array]]:
        """Both block by block; the final hidden states of the real tokens, per sequence."""
        self.members, self.real, self.seen = members, real, set[tuple[str, str]]()
        x, y = self.ref.start(tokens, real), self.cand.start(tokens, real)
        assert x is not None
        assert y is not None
        same = self.take(EMBEDDING, x, y)
        count = self.ref.config.num_hidden_layers
        for layer in range(count):
            before, x, y = x, self.ref.advance(), self.cand.advance()
            alone = None
            if self.isolated and not same:
                alone = self.cand.replay(before)
            del before
            same = self.take(layer, x, y, alone, same)
            self.progress(int(real.sum()), f"block {layer}")
        del x, y
        a, b = self.ref.final_hidden(), self.cand.final_hidden()
        self.take(count, a, b)
        return [v[m] for v, m in zip(a, real, strict=True)], [
            v[m] for v, m in zip(b, real, strict=True)
        ]

    def take(
        self, layer: int, x: Array, y: Array, alone: Array | None = None, same_input: bool = False
    ) -> bool:
        """Note the errors of a layer; whether its outputs are equal to the bit."""
        equal = True
        block = 0 <= layer < self.ref.config.num_hidden_layers
        for b, probe in enumerate(self.members):
            m = self.real[b]
            one, two = x[b][m], y[b][m]
            errors = position_errors(one, two)
            equal &= not errors.any()
            self.note(probe, layer, "accumulated", errors)
            if np.isnan(errors).any():
                self.note_non_finite(probe, layer, one, two)
            if alone is not None:
                self.note(probe, layer, "isolated", position_errors(one, alone[b][m]))
            elif self.isolated and block and same_input:
                self.note(probe, layer, "isolated", errors)
        return equal

    def note(self, probe: ProbeLike, layer: int, kind: str, errors: Array) -> None:
        self.traces.append(Trace.of(probe.id, layer, kind, errors, self.window))

    def note_non_finite(self, probe: ProbeLike, layer: int, one: Array, two: Array) -> None:
        for side, values in (("reference", one), ("candidate", two)):
            found = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(found) and (probe.id, side) not in self.seen:
                self.seen.add((probe.id, side))
                self.bad.append(NonFinite(layer, probe.id, int(found[0]), side))


def _different(
    final: tuple[list[Array], list[Array]], goals: Array
) -> tuple[tuple[list[Array], list[Array]], Array, list[int]]:
    """Positions whose final hidden states differ, at least the last of every sequence: states, targets, how many."""
    masks = [(a != b).any(1) for a, b in zip(*final, strict=True)]
    for m in masks:
        m[-1] = True
    one, two = ([x[m] for x, m in zip(side, masks, strict=True)] for side in final)
    return (one, two), goals[np.concatenate(masks)], [int(m.sum()) for m in masks]


def _split(members: Sequence[ProbeLike], sizes: Sequence[int], stats: Stats) -> Iterator[Record]:
    """Statistics of a batch's positions, one sequence behind the other, by probe."""
    at = 0
    for p, size in zip(members, sizes, strict=True):
        part = slice(at, at + size)
        yield Record(p.id, p.category, stats.select(part))
        at = part.stop


__all__ = [
    "BLOCK_ROWS", "EMBEDDING", "SCRATCH", "BlockError", "Divergence", "Inside", "LockstepResult",
    "NonFinite", "Trace", "bisect_taps", "divergent", "first_divergent", "gives_table", "layer_kinds",
    "look_inside", "merge_results", "run_lockstep", "scan_taps", "shortest_showing",
]  # fmt: skip
