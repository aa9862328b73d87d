"""Quantize block after block: gather inputs, round, go on with what the rounded block gives.

One block is in memory. Its inputs come from the blocks before it as they were rounded, so later blocks make up for earlier
ones' errors. Within a block the stages (q k v, o, gate up, down) are rounded in order, each on what the ones before give
now. Held-out sequences run along twice, rounded and original: they choose between methods, and give the error behind every
block and the divergence at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from ..model.logits import compare
from ..model.logits_stats import Record
from ..model.logits_summary import Summary, summarise
from .calibration import Calibration, Ids
from .choose import Choice, Inputs, Rounded, Target, choose, inputs_of
from .hessian import HELD_ROWS, STAGES, Collector, Stage
from .weights import Weights
from .work import States, Work

BATCH_TOKENS = 2048


class Meter(Protocol):
    """Progress: bytes of weights done, and of which."""

    def __call__(self, nbytes: int, name: str) -> None:
        """``nbytes`` more."""


@dataclass(frozen=True)
class Options:
    """How to go about it.

    Attributes:
        method: of :func:`.choose.choose`.
        sequential: gather every stage's inputs behind the rounded stages before it; else a block's all at once, which
            runs the block once where the other runs it about three times.
        keep_states: hold hidden states in memory; they lie on disk either way.
        batch_tokens: tokens at a time.
        held_rows: held-out inputs kept per stage.
    """

    method: str = "gptq"
    sequential: bool = True
    keep_states: bool = True
    batch_tokens: int = BATCH_TOKENS
    held_rows: int = HELD_ROWS


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, which lie one behind the other.

    Attributes:
        start: their first row among the hidden states.
        count: sequences.
        length: tokens of each.
    """

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        """Behind their last row."""
        return self.start + self.count * self.length


def batches(sequences: Sequence[Ids], start: int, tokens: int) -> list[Batch]:
    """Neighbours of equal length together, at most ``tokens`` at a time (at least one sequence)."""
    out: list[Batch] = []
    for ids in sequences:
        n, last = len(ids), out[-1] if out else None
        if last and last.length == n and (last.count + 1) * n <= tokens:
            out[-1] = Batch(last.start, last.count + 1, n)
        else:
            out.append(Batch(last.stop if last else start, 1, n))
    return out


class Pipeline:
    """One run over all blocks.

    Args:
        checkpoint: what is quantized.
        targets: canonical name of a linear weight -> what it shall become; others stay as they are.
        calibration: sequences.
        work: where results go, block by block.
        options: how.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[str, Target],
        calibration: Calibration,
        work: Work,
        options: Options,
    ) -> None:
        self.checkpoint, self.targets, self.work = checkpoint, targets, work
        self.calibration, self.options = calibration, options
        self.config: GemmaConfig = checkpoint.config
        self._weights = Weights(checkpoint)
        n = calibration.tokens
        self._train = batches(calibration.train, 0, options.batch_tokens)
        self._held = batches(calibration.held, n, options.batch_tokens)
        self._held_tokens = calibration.held_tokens
        # rows: train, held as the rounded blocks give them, held as the original blocks do
        self._rows = n + 2 * self._held_tokens

    @torch.no_grad()
    def run(self, meter: Meter) -> dict[str, Any]:
        """Do what is not done yet.

        Returns:
            JSON-ready: ``linears`` (name -> record), ``blocks`` (error behind each), ``quality`` on held-out sequences.

        Raises:
            NonFiniteError: NaN or infinity in weights or activations; names where.
        """
        with ExitStack() as stack:
            states = self._begin(stack)
            for layer in range(len(self.work.layers), self.config.num_hidden_layers):
                states = self._layer(layer, states, stack, meter)
            summary = self._evaluate(states)
        lines = [self.work.layers[i] for i in range(self.config.num_hidden_layers)]
        records = {n: r for line in lines for n, r in line["linears"].items()}
        return {
            "linears": {n: records[n] for n in self.targets},
            "blocks": [{"layer": i, **line["block"]} for i, line in enumerate(lines)],
            "quality": quality(summary),
        }

    # ---- hidden states

    def _states(self, layer: int, stack: ExitStack, *, create: bool) -> States:
        found = States(
            self.work.states(layer), self._rows, self.config.hidden_size,
            keep=self.options.keep_states, create=create,
        )  # fmt: skip
        stack.callback(found.close)
        return found

    def _begin(self, stack: ExitStack) -> States:
        done = len(self.work.layers)
        if done:
            return self._states(done, stack, create=False)
        states = self._states(0, stack, create=True)
        row = 0
        for ids in (*self.calibration.train, *self.calibration.held, *self.calibration.held):
            states.write(row, self._weights.embed(torch.from_numpy(ids)))
            row += len(ids)
        return states

    def _inputs(self, states: States, parts: Sequence[Batch], shift: int = 0) -> Iterator[Tensor]:
        for b in parts:
            rows = states.read(b.start + shift, b.stop + shift)
            yield rows.view(b.count, b.length, self.config.hidden_size)

    def _forward(
        self, layer: int, weights: Mapping[str, Tensor], linear: tg.Linear = tg.plain_linear
    ) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1]).expand(x.shape[:2])
            return tg.block(x, weights, layer, self.config, positions, linear=linear)[0]

        return run

    # ---- one block

    def _layer(self, layer: int, states: States, stack: ExitStack, meter: Meter) -> States:
        began = time.monotonic()
        original = self._weights.block(layer)
        now = dict(original)
        values: dict[str, Rounded] = {}
        records: dict[str, Any] = {}
        took = {"gather": 0.0, "round": 0.0, "forward": 0.0}
        for group in self._groups(layer):
            at = time.monotonic()
            collector = self._gather(layer, group, now, states)
            took["gather"] += time.monotonic() - at
            for name, choice in self._round(collector, original):
                now[name] = choice.value.dequantize()
                values[name], records[name] = choice.value, choice.record
                took["round"] += choice.seconds
                meter(original[name].numel() * 4, name)
        at = time.monotonic()
        after = self._states(layer + 1, stack, create=True)
        self._advance(layer, states, after, original, now)
        after.sync()
        took["forward"] = time.monotonic() - at
        took["all"] = time.monotonic() - began
        block = {"error": self._error(after), "seconds": took}
        self.work.finish_layer(layer, values, {"linears": records, "block": block})
        states.close()
        return after

    def _groups(self, layer: int) -> list[list[Stage]]:
        """Stages whose inputs are gathered in one pass."""
        wanted = [s for s in STAGES if any(n in self.targets for n in s.names(layer))]
        if self.options.sequential:
            return [[s] for s in wanted]
        return [wanted] if wanted else []

    def _gather(
        self, layer: int, group: Sequence[Stage], now: dict[str, Tensor], states: States
    ) -> Collector:
        collector = Collector(group, layer, self.config, now, self.options.held_rows)
        run = self._forward(layer, now, collector)
        collector.watch(run, self._inputs(states, self._train), holding=False)
        collector.watch(run, self._inputs(states, self._held), holding=True)
        return collector

    def _round(
        self, collector: Collector, original: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Choice]]:
        while collector.moments:
            moments = collector.moments.pop(0)
            held, hessian = moments.held(), moments.hessian()
            factored = self.options.method != "rtn"
            inputs: Inputs = inputs_of(hessian, held, moments.tokens, factored=factored)
            for name in moments.names:
                if name in self.targets:
                    yield (
                        name,
                        choose(original[name], self.targets[name], inputs, self.options.method),
                    )

    def _advance(
        self, layer: int, states: States, after: States,
        original: Mapping[str, Tensor], now: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        shift = self._held_tokens
        passes = ((now, [*self._train, *self._held], 0), (original, self._held, shift))
        for weights, parts, move in passes:
            run = self._forward(layer, weights)
            for b, x in zip(parts, self._inputs(states, parts, move), strict=True):
                y = run(x)
                if not bool(torch.isfinite(y).all()):
                    raise NonFiniteError(
                        "the block's output is NaN or infinite on calibration text.",
                        tensor=canonical.DOWN.format(i=layer),
                        fix="check the model with `g2verify compare`; nothing was written.",
                    )
                after.write(b.start + move, y)

    def _pairs(self, states: States) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out sequences: states of the original, states of the rounded model ``[length, width]``."""
        row = self.calibration.tokens
        for ids in self.calibration.held:
            rounded = states.read(row, row + len(ids))
            at = row + self._held_tokens
            yield states.read(at, at + len(ids)), rounded
            row += len(ids)

    def _error(self, states: States) -> float:
        """Root mean square over held-out tokens of the states' relative difference."""
        total = 0.0
        for ref, rounded in self._pairs(states):
            power = ref.double().square().sum(1).clamp_min(1e-30)
            total += float(((rounded - ref).double().square().sum(1) / power).sum())
        return float((total / max(1, self._held_tokens)) ** 0.5)

    def _evaluate(self, states: States) -> Summary:
        norm, config = self._weights.final_norm(), self.config
        table = self.checkpoint.tensors[canonical.EMBED]
        records = []
        for i, (ref, rounded) in enumerate(self._pairs(states)):
            ids = torch.from_numpy(self.calibration.held[i])
            targets = torch.cat([ids[1:], torch.tensor([-1])])
            one, two = (tg.rms_norm(x, norm, config.rms_norm_eps) for x in (ref, rounded))
            stats = compare(
                one, two, table, cap=config.final_logit_softcapping, targets=targets,
                vocab=config.vocab_size, scratch=64 << 20,
            )  # fmt: skip
            records.append(Record(f"held/{i:05}", "held-out", stats))
        return summarise(records)


def quality(summary: Summary) -> dict[str, Any]:
    """The figures of a report: divergence from the original, agreement, perplexities, with 95 % intervals."""
    o, intervals = summary.overall, summary.intervals
    kl = o.metrics.get("kl")

    def interval(name: str) -> list[float | None] | None:
        found = intervals.get(name)
        return None if found is None or found.low is None else [found.low, found.high]

    return {
        "sequences": o.documents,
        "positions": o.positions,
        "kl": None if kl is None else kl.mean,
        "kl_interval": interval("kl"),
        "kl_percentiles": {} if kl is None else kl.percentiles,
        "top1_agreement": o.agreement,
        "top1_agreement_interval": interval("agreement"),
        "perplexity": o.perplexity_cand,
        "perplexity_original": o.perplexity_ref,
        "perplexity_ratio_interval": interval("perplexity_ratio"),
    }
