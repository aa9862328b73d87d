"""Quantize block after block: gather inputs, round, go on with what the rounded block gives.

One block is in memory. Its inputs come from the blocks before it as they were rounded, so later blocks make up for earlier
ones' errors. Within a block the stages (q k v, o, gate up, down) are rounded in order, each on what the ones before give
now. Held-out sequences run along twice, rounded and original: they choose between methods, and give the error behind every
block and the divergence at the end. With a recovery the calibration sequences run along twice too: scales and gains of every
rounded block are tuned to the original's output (:mod:`.recover`), and at the end all blocks together (:mod:`.finish`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..convert.open import Checkpoint
from ..convert.progress import Tick
from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from .calibration import Calibration, Ids
from .choose import Choice, Inputs, Rounded, Target, choose, inputs_of
from .finish import Finish
from .hessian import HELD_ROWS, STAGES, Collector, Stage
from .judge import Judge
from .mismatch import Beside
from .recover import BLOCKWISE, END_TO_END, Pair, Tuning, tune_block, watched
from .states import States
from .tunable import Block, Gain, Shifts
from .weights import Weights
from .work import Work

if TYPE_CHECKING:
    from .moments import Merged

BATCH_TOKENS = 2048


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
        recover: of :data:`.recover.RECOVERIES`.
        blockwise: how each block is tuned.
        end_to_end: how all blocks are.
        memory: bytes that the end-to-end stage may keep blocks in.
        device: where blocks run and weights are rounded; hidden states stay in memory or on disk.
        merged: moments gathered before, in place of calibration sequences.
    """

    method: str = "gptq"
    sequential: bool = True
    keep_states: bool = True
    batch_tokens: int = BATCH_TOKENS
    held_rows: int = HELD_ROWS
    recover: str = "none"
    blockwise: Tuning = BLOCKWISE
    end_to_end: Tuning = END_TO_END
    memory: int = 1 << 30
    device: str = "cpu"
    merged: Merged | None = None

    def described(self) -> list[str]:
        """For the manifest."""
        return [f"method: {self.method}{', stage after stage' if self.sequential else ''}"]


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
        self._weights = Weights(checkpoint, device=options.device)
        n = calibration.tokens
        self._train = batches(calibration.train, 0, options.batch_tokens)
        # the first half of the held-out sequences chooses, the second measures; one alone does both
        held = [*calibration.held[::2], *calibration.held[1::2]]
        half = (len(held) + 1) // 2
        self.judge = Judge(checkpoint, held, half % len(held))
        chooses = batches(held[:half], n, options.batch_tokens)
        self._choosing = len(chooses)
        self._held = [*chooses, *batches(held[half:], chooses[-1].stop, options.batch_tokens)]
        self._held_tokens = calibration.held_tokens
        # rows: train, held as the rounded blocks give them, held and train as the original blocks do
        self._doubled = options.recover != "none" or options.method == "gptq+"
        self._rows = n + 2 * self._held_tokens + (n if self._doubled else 0)
        step = min(options.blockwise.tokens, max(1, n // 8))
        self.tuned = batches(calibration.train, 0, step)

    @property
    def tuning_bytes(self) -> int:
        """What the meter is told of tuning all blocks together: as much as of all weights."""
        shapes = [self.checkpoint.tensors[n].shape for n in self.targets]
        return sum(4 * s[0] * s[1] for s in shapes) if self.options.recover != "none" else 0

    @torch.no_grad()
    def run(self, meter: Tick) -> dict[str, Any]:
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
            before = self.judge.quality(self._pairs(states))
            finish = self._finish(states, meter) if self.options.recover != "none" else None
        lines = [self.work.layers[i] for i in range(self.config.num_hidden_layers)]
        records = {n: r for line in lines for n, r in line["linears"].items()}
        report = {
            "linears": {n: records[n] for n in self.targets},
            "blocks": [{"layer": i, **line["block"]} for i, line in enumerate(lines)],
            "quality": before,
        }
        return report if finish is None else finish.report(report)

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
            states = self._states(done, stack, create=False)
            states.require(self.work.layers[done - 1]["states"])
            return states
        states = self._states(0, stack, create=True)
        row = 0
        train, held = self.calibration.train, self.judge.held
        for ids in (*train, *held, *held, *(train if self._doubled else ())):
            states.write(row, self._weights.embed(torch.from_numpy(ids)))
            row += len(ids)
        return states

    def _inputs(self, states: States, parts: Sequence[Batch], shift: int = 0) -> Iterator[Tensor]:
        for b in parts:
            rows = states.read(b.start + shift, b.stop + shift)
            yield rows.view(b.count, b.length, self.config.hidden_size).to(self.options.device)

    def _forward(
        self, layer: int, weights: Mapping[str, Tensor], linear: tg.Linear = tg.plain_linear
    ) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            return tg.block(x, weights, layer, self.config, positions, linear=linear)[0]

        return run

    # ---- one block

    def _layer(self, layer: int, states: States, stack: ExitStack, meter: Tick) -> States:
        began = time.monotonic()
        original = self._weights.block(layer)
        now = dict(original)
        values: dict[str, Rounded] = {}
        records: dict[str, Any] = {}
        squares: dict[str, Tensor] = {}
        took = {"gather": 0.0, "round": 0.0, "forward": 0.0}
        for group in self._groups(layer):
            at = time.monotonic()
            collector = self._gather(layer, group, original, now, states)
            squares |= {n: m.mean_squares() for m in collector.moments for n in m.names}
            took["gather"] += time.monotonic() - at
            for name, choice in self._round(collector, original):
                now[name] = choice.value.dequantize()
                values[name] = choice.value
                records[name] = choice.record | {"seconds": round(choice.seconds, 4)}
                took["round"] += choice.seconds
                meter(original[name].numel() * 4, name)
        at = time.monotonic()
        after = self._states(layer + 1, stack, create=True)
        self._advance(layer, states, after, original, self._held, self._held_tokens)
        gains: dict[str, Tensor] = {}
        told: dict[str, Any] = {}
        if self._doubled:
            self._advance(layer, states, after, original, self._train, self._original)
        took["forward"], at = time.monotonic() - at, time.monotonic()
        if self.options.recover != "none":
            values, gains, told = self._tune(layer, states, after, original, values)
            now |= {n: v.dequantize() for n, v in values.items()} | gains
            took["tune"], at = time.monotonic() - at, time.monotonic()
        self._advance(layer, states, after, now, [*self._train, *self._held], 0)
        after.sync()
        took["forward"] += time.monotonic() - at
        took["all"] = time.monotonic() - began
        block = {"error": self.judge.error(self._pairs(after)), **told, "seconds": took}
        kept = {"linears": records, "block": block, "states": after.checksum()}
        self.work.finish_layer(layer, values, kept, gains, squares)
        states.close()
        return after

    def _groups(self, layer: int) -> list[list[Stage]]:
        """Stages whose inputs are gathered in one pass."""
        wanted = [s for s in STAGES if any(n in self.targets for n in s.names(layer))]
        if self.options.sequential:
            return [[s] for s in wanted]
        return [wanted] if wanted else []

    def _gather(
        self, layer: int, group: Sequence[Stage], original: Mapping[str, Tensor],
        now: dict[str, Tensor], states: States,
    ) -> Collector:  # fmt: skip
        collector = Collector(group, layer, self.config, now, self.options.held_rows)
        run = self._forward(layer, now, collector)
        if self.options.method == "gptq+":
            collector.beside = Beside(lambda x, f: self._forward(layer, original, f)(x), collector)
        passes = (
            (self._train, False, self._original),
            (self._held[: self._choosing], True, self._held_tokens),
        )
        for parts, holding, move in passes:
            if collector.beside is not None:
                collector.beside.follow(self._inputs(states, parts, move))
            collector.watch(run, self._inputs(states, parts), holding=holding)
        if self.options.merged is not None:
            self.options.merged.fill(layer, collector)
        return collector

    def _round(
        self, collector: Collector, original: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Choice]]:
        beside = collector.beside
        while collector.moments:
            moments = collector.moments.pop(0)
            held, hessian = moments.held(), moments.hessian()
            factored = self.options.method != "rtn"
            cross = None if beside is None else beside.cross(moments.names[0], moments.tokens)
            wanted = None if beside is None else beside.held(moments.names[0])
            inputs: Inputs = inputs_of(
                hessian, held, moments.tokens, factored=factored, cross=cross, original=wanted
            )
            for name in moments.names:
                if name in self.targets:
                    yield (
                        name,
                        choose(original[name], self.targets[name], inputs, self.options.method),
                    )

    @property
    def _original(self) -> int:
        """From a calibration sequence's rows to those of the original blocks."""
        return self.calibration.tokens + 2 * self._held_tokens

    def _advance(
        self, layer: int, states: States, after: States, weights: Mapping[str, Tensor],
        parts: Sequence[Batch], move: int,
    ) -> None:  # fmt: skip
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

    def _tune(
        self, layer: int, states: States, after: States, original: Mapping[str, Tensor],
        values: dict[str, Rounded],
    ) -> tuple[dict[str, Rounded], dict[str, Tensor], dict[str, Any]]:  # fmt: skip
        """The block's weights and gains, tuned to the original's output; what to report."""
        moving = original if self.options.recover == "codes" else None
        block = Block(values, self.gains(layer, original), moving)

        def run(x: Tensor, shifts: Shifts) -> Tensor:
            weights = {**original, **block.norms(shifts)}
            return self._forward(layer, weights, block.linear(shifts))(x)

        def pairs(i: int) -> Pair:
            b, shape = self.tuned[i], (self.tuned[i].count, self.tuned[i].length, -1)
            rows = (
                states.read(b.start, b.stop),
                after.read(b.start + self._original, b.stop + self._original),
            )
            x, y = (r.view(shape).to(self.options.device) for r in rows)
            return x, y

        watch = watched(len(self.tuned))
        train = [i for i in range(len(self.tuned)) if i not in watch]
        shifts, told = tune_block(
            block, run, pairs, train, sorted(watch), self.options.blockwise, layer=layer
        )
        return *block.result(shifts), {"tuned": told}

    def gains(self, layer: int, weights: Mapping[str, Tensor]) -> dict[str, Gain]:
        """A block's norms with these weights, as parameters."""
        tensors = self.checkpoint.tensors
        names = canonical.layer_names(self.config, layer)
        return {
            n: Gain(weights[n], tensors[n].dtype.name) for n in names if len(tensors[n].shape) == 1
        }

    def _pairs(self, states: States) -> Iterator[tuple[Tensor, Tensor]]:
        return self.judge.pairs(states, self.calibration.tokens)

    def _finish(self, states: States, meter: Tick) -> Finish:
        def wanted(start: int, stop: int) -> Tensor:
            return states.read(start + self._original, stop + self._original)

        finish = Finish(self, self._weights, wanted)
        finish.run(meter)
        return finish
