"""The verifier's own test: known mistakes are made in a model, and every one must be noticed, and at the right place.

The reference runs once; every mutant runs in lockstep with what was kept of it, from the first block on that it changes
(:mod:`.branch`), and is judged by the same claims and the same floor as a real comparison: over few tokens, and over more
where those do not show it. What is not noticed is a hole in the evidence, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..convert.open import Checkpoint
from ..convert.progress import SILENT, Tick
from ..formats.errors import UsageError
from ..model.bootstrap import ratio_interval
from ..model.config import GemmaConfig
from ..model.logits_stats import Stats
from .batches import ProbeLike
from .branch import EXACT, Branch, Change, Remembered
from .claims import FAIL, Claim, Evidence, Limits, Measured, judge
from .divergence import Divergence, Inside, divergent, inside, shortest_showing
from .floor import Floor, floor_probes
from .hypotheses import hypotheses
from .identity import Identity, compare_identity
from .lockstep import LockstepResult, run_lockstep
from .mutants import Mutant, mutants
from .runners import open_runner
from .runners.base import Array
from .side import Side
from .taps import TapPair
from .weights import compare_weights

if TYPE_CHECKING:
    from .runners.torch_runner import TorchRunner

Judge = Callable[[Evidence], Sequence[Claim]]
BUDGETS = (
    48,
    384,
)  # tokens for mistakes that show anywhere: few, and more where few do not show it
FUNCTION = {"L1", "L2", "X1", "Q1", "Q2"}  # claims about what is computed
SCAN = 128  # tokens for looking into every block


@dataclass(frozen=True)
class Trial:
    """What one mutant led to.

    Attributes:
        mutant: what was done.
        result: of the comparison; positions at which nothing differs are left out.
        positions: that were compared.
        found: layers beyond the floor.
        inside: what the first divergent block shows inside.
        scan: blocks with an intermediate beyond the floor, looked for where no block's output is.
        claims: verdicts.
        hypothesis: the first sentence of the rule table, "" where there is none.
    """

    mutant: Mutant
    result: LockstepResult
    positions: int
    found: list[Divergence]
    inside: Inside | None
    scan: list[Inside]
    claims: Sequence[Claim]
    hypothesis: str

    @property
    def caught_by(self) -> list[str]:
        """Claims that failed."""
        return [c.id for c in self.claims if c.verdict == FAIL]

    def found_layer(self, floor: Floor) -> int | None:
        """Where the models part: a layer number, one more than the final norm's for the head, None where they do not."""
        if self.found:
            return self.found[0].layer
        if self.inside is not None:
            return self.inside.layer
        limit = floor.threshold("kl_max")
        beyond = limit is not None and any(
            (~(r.stats.kl <= limit)).any() for r in self.result.records
        )
        return self.result.blocks[-1].layer + 2 if beyond else None

    def right_place(self, floor: Floor) -> bool:
        """The layer found is the one changed, and no block differs by itself that was not changed.

        Where a change is in many layers it may be too small to show in some of them.
        """
        at, wanted = self.found_layer(floor), self.mutant
        blocks = {d.layer for d in self.found if d.kind in ("local", "global")}
        blocks |= {i.layer for i in self.scan}
        if not wanted.layers:
            return at == wanted.place
        whole = wanted.kind != "weight" or wanted.all_layers
        first = at in wanted.layers if whole else at == wanted.place
        return first and blocks <= set(wanted.layers) and (whole or blocks == set(wanted.layers))

    def to_json(self, floor: Floor) -> dict[str, Any]:
        """The report's row."""
        stats = Stats.join([r.stats for r in self.result.records])
        kl = stats.kl[stats.finite]
        return {
            "id": self.mutant.id,
            "title": self.mutant.title,
            "kind": self.mutant.kind,
            "caught_by": self.caught_by,
            "claims": {c.id: c.verdict for c in self.claims},
            "kl_max": float(kl.max()) if len(kl) else None,
            "kl_mean": math.fsum(kl.tolist()) / self.positions if len(kl) else None,
            "expected_layers": list(self.mutant.layers) or [self.mutant.place],
            "found_layer": self.found_layer(floor),
            "tap": None if self.inside is None else self.inside.tap,
            "right_place": self.right_place(floor),
            "hypothesis": self.hypothesis,
        }


def self_test(
    checkpoint: Checkpoint,
    probes: Iterable[ProbeLike],
    floor: Floor,
    judge: Judge = judge,
    *,
    device: str | None = None,
    budgets: Sequence[int] = BUDGETS,
    only: Sequence[str] = (),
    progress: Tick = SILENT,
) -> dict[str, Any]:
    """Make every known mistake and see which claims notice.

    Args:
        checkpoint: the model, opened.
        probes: of which some are taken: one that crosses the window, and short ones.
        floor: of the model in float32.
        judge: the claims.
        device: of the torch runner.
        budgets: tokens for mistakes that show anywhere, ascending; the first that shows one is enough.
        only: ids of :mod:`.mutants` to try; default all.
        progress: called with tokens just done and a place.

    Returns:
        The report's ``self_test`` object: ``mutants`` (rows), ``caught``, ``of``, ``layers`` (blocks of the model).

    Raises:
        UsageError: no such mutant, or the floor is not one of an exact type.
    """
    rows = [
        t.to_json(floor)
        for t in trials(
            checkpoint, probes, floor, judge,
            device=device, budgets=budgets, only=only, progress=progress,
        )
    ]  # fmt: skip
    caught = sum(bool(r["caught_by"]) for r in rows)
    layers = checkpoint.config.num_hidden_layers
    return {"mutants": rows, "caught": caught, "of": len(rows), "layers": layers}


def trials(
    checkpoint: Checkpoint,
    probes: Iterable[ProbeLike],
    floor: Floor,
    judge: Judge = judge,
    *,
    device: str | None = None,
    budgets: Sequence[int] = BUDGETS,
    only: Sequence[str] = (),
    progress: Tick = SILENT,
) -> Iterator[Trial]:
    """See :func:`self_test`; one result after the other."""
    if floor.dtype not in EXACT:
        raise UsageError(
            f"the self-test needs a float32 floor, this is one of {floor.dtype}: in it most mistakes are lost in rounding."
        )
    require_known(checkpoint, only)
    chosen = list(mutants(checkpoint))
    probes = list(probes)
    few = [floor_probes(probes, n) for n in budgets]
    crossing = crossing_probes(probes, checkpoint.config)
    with open_runner("torch", checkpoint, dtype=floor.dtype, device=device) as base:
        ref = Remembered(cast("TorchRunner", base))
        for m in chosen:
            if not only or m.id in only:
                sets = [crossing] if m.window and crossing else few
                yield _first_showing(m, checkpoint, ref, sets, floor, judge, device, progress)


def crossing_probes(probes: Iterable[ProbeLike], config: GemmaConfig) -> list[ProbeLike]:
    """The shortest probe with at least two queries that cannot see all keys; none without a window or such a probe."""
    window = config.sliding_window
    long = [p for p in probes if window is not None and len(p.tokens) >= window + 2]
    return [min(long, key=lambda p: (len(p.tokens), p.id))] if long else []


def require_known(checkpoint: Checkpoint, only: Sequence[str]) -> None:
    """Raise UsageError unless these are ids of mistakes that the model can have."""
    known = [m.id for m in mutants(checkpoint)]
    if unknown := sorted(set(only) - set(known)):
        raise UsageError(
            f"no mutant is called {unknown[0]!r}.", fix=f"use some of {', '.join(known)}."
        )


def _first_showing(
    m: Mutant,
    checkpoint: Checkpoint,
    ref: Remembered,
    sets: Sequence[list[ProbeLike]],
    floor: Floor,
    *rest: Any,
) -> Trial:
    """The trial over the first set of probes that shows the mistake where it is, else over the last."""
    for probes in sets:
        found = _try(m, checkpoint, ref, probes, floor, *rest)
        if set(found.caught_by) & FUNCTION and found.right_place(floor):
            break
    return found


def _try(
    m: Mutant,
    checkpoint: Checkpoint,
    ref: Remembered,
    probes: list[ProbeLike],
    floor: Floor,
    judge: Judge,
    device: str | None,
    progress: Tick,
) -> Trial:
    identity = compare_identity(_side(checkpoint), _side(m.checkpoint))
    change = Change.between(checkpoint, m.checkpoint, code=m.activation is not None)
    with Branch(ref, _open(m, floor.dtype, device), change) as cand:
        result = run_lockstep(ref, cand, probes, only_different=not change.head, progress=progress)
        found = divergent(result, floor)
        within, scan = None, []
        if not found:
            scan = _scan(ref, cand, probes[0].tokens[:SCAN], floor)
            within = scan[0] if scan else None
        elif 0 <= found[0].layer < checkpoint.config.num_hidden_layers:
            tokens = shortest_showing(result, probes, found[0])
            if tokens is not None:
                within = _look(ref, cand, tokens, found[0].layer, floor)
    evidence = _evidence(checkpoint, m.checkpoint, identity, result, found, within, floor)
    reasons = hypotheses(
        result,
        floor,
        inside=within,
        scan=scan,
        differences=[d.to_json() for d in identity.differences],
    )
    text = reasons[0].text if reasons else ""
    positions = sum(len(p.tokens) for p in probes)
    return Trial(m, result, positions, found, within, scan, judge(evidence), text)


def _scan(ref: Remembered, cand: Branch, tokens: Array, floor: Floor) -> list[Inside]:
    """As :func:`.divergence.scan_taps`, of the blocks that can differ."""
    found = [_look(ref, cand, tokens, layer, floor) for layer in sorted(cand.change.blocks)]
    return [f for f in found if f is not None]


def _look(ref: Remembered, cand: Branch, tokens: Array, layer: int, floor: Floor) -> Inside | None:
    """As :func:`.divergence.look_inside`, on states that are kept and at positions that can differ."""
    start = min(cand.change.start, len(tokens) - 1)
    before, pair = ref.prefix(tokens)[layer], TapPair(start)
    for runner, tap in ((ref.base, pair.keep), (cand.own, pair.compare)):
        runner.start(tokens)
        runner.block(layer, before, start, tap)
    found = inside(pair.errors, layer, floor)
    return None if found is None else replace(found, position=found.position + start)


def _side(checkpoint: Checkpoint) -> Side:
    return Side(Path(checkpoint.path), checkpoint, None)


def _open(m: Mutant, dtype: str, device: str | None) -> Any:
    options: dict[str, Any] = {}
    if m.activation is not None:
        from . import rounding

        options["linear"] = rounding.GeluLinear(getattr(rounding, m.activation))
    return open_runner("torch", m.checkpoint, dtype=dtype, device=device, **options)


def _evidence(
    ref: Checkpoint,
    cand: Checkpoint,
    identity: Identity,
    result: LockstepResult,
    found: list[Divergence],
    inside: Inside | None,
    floor: Floor,
) -> Evidence:
    touched = {n: t for n, t in cand.tensors.items() if t is not ref.tensors[n]}
    rows = compare_weights(_only(ref, touched), _only(cand, touched)) if touched else []
    limits = Limits(
        floor.threshold("kl_max"), floor.threshold("rms_logit"), f"{floor.k:.3g} x floor",
        root_source=f"{math.sqrt(floor.k):.3g} x floor",
    )  # fmt: skip
    return Evidence(
        identity, rows, dtypes=(floor.dtype, floor.dtype), measured=_measured(result, found, inside), limits=limits
    )  # fmt: skip


def _only(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    return replace(checkpoint, tensors={n: checkpoint.tensors[n] for n in names})


def _measured(result: LockstepResult, found: list[Divergence], inside: Inside | None) -> Measured:
    stats = Stats.join([r.stats for r in result.records])
    good = stats.select(stats.finite)
    sums = [math.fsum(r.stats.kl[r.stats.finite].tolist()) for r in result.records]
    sizes = [int(r.stats.finite.sum()) for r in result.records]
    bad = result.non_finite[0] if result.non_finite else None
    at: Divergence | Inside | None = found[0] if found else inside
    place = None
    if found:
        place = f"{found[0].kind} layer {found[0].layer} at position {found[0].position}"
    elif inside is not None:
        place = f"layer {inside.layer} in {inside.tap} at position {inside.position}"
    return Measured(
        documents=len(result.records),
        positions=len(stats),
        kl_max=float(good.kl.max()) if len(good) else None,
        kl=ratio_interval(sums, sizes),
        rms_max=float(good.rms_diff.max()) if len(good) else None,
        tv=float(np.mean(good.tv)) if len(good) else None,
        non_finite=_where(bad, stats),
        divergent=place,
        block_error=None if at is None else at.error,
        block_threshold=None if at is None else at.threshold,
    )


def _where(bad: Any, stats: Stats) -> str | None:
    if bad is not None:
        return f"layer {bad.layer} of the {bad.side}, position {bad.position} of {bad.probe}"
    return None if stats.finite.all() else "logits"
