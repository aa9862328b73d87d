"""After the last block of a run with recovery: all blocks tuned together, and the result measured once more.

Resumable like the blocks: the state of the optimiser is kept at every look at the watched sequences, as one file that
replaces the one before; what follows from it is computed again to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..convert.progress import Tick
from ..formats.errors import ConflictError
from ..model import canonical
from ..model import torch_gemma as tg
from .choose import Rounded
from .distill import Distillation, Sequences, Spill
from .recover import watched
from .states import States
from .tunable import Block, Gain, Shifts, placed
from .weights import Weights, read

if TYPE_CHECKING:
    from .pipeline import Pipeline


class _OnDisk(Spill):
    """Hidden states between blocks in a file."""

    def __init__(self, states: States, tokens: int) -> None:
        self._states, self._tokens = states, tokens
        self._shape, self._device = torch.Size(), torch.device("cpu")

    def put(self, layer: int, x: Tensor) -> None:
        self._shape = x.shape
        self._device = x.device
        self._states.write(layer * self._tokens, x.cpu())

    def get(self, layer: int) -> Tensor:
        start = layer * self._tokens
        rows = self._states.read(start, start + self._shape[:-1].numel())
        return rows.view(self._shape).to(self._device)


class Finish:
    """The end-to-end stage of a run.

    Args:
        pipeline: whose blocks are all done.
        weights: of the original.
        wanted: the original's final states of some of the calibration's rows.
    """

    def __init__(
        self, pipeline: Pipeline, weights: Weights, wanted: Callable[[int, int], Tensor]
    ) -> None:
        self._pipeline, self._weights = pipeline, weights
        self._config, self._work = pipeline.config, pipeline.work
        self._tensors = pipeline.checkpoint.tensors
        self._wanted = wanted
        self._device = pipeline.options.device
        norm = self._tensors[canonical.FINAL_NORM]
        self._norm = Gain(self._read(canonical.FINAL_NORM), norm.dtype.name)
        self._left = pipeline.options.memory
        self._kept: dict[int, Block] = {}
        self._measured: dict[str, Any] = {}

    # ---- blocks

    def _read(self, name: str) -> Tensor:
        return read(self._tensors[name]).to(self._device)

    def _names(self, layer: int) -> list[str]:
        names = canonical.layer_names(self._config, layer)
        return [n for n in names if n in self._pipeline.targets]

    def _dense(self, layer: int) -> dict[str, Tensor]:
        """The original's weights that are no targets; nothing reads the others."""
        names = canonical.layer_names(self._config, layer)
        nothing = torch.empty(0, device=self._device)
        return {n: nothing if n in self._pipeline.targets else self._read(n) for n in names}

    def _block(self, layer: int) -> Block:
        """What can move in a block; kept while there is memory."""
        if layer in self._kept:
            return self._kept[layer]
        targets = self._pipeline.targets
        values: dict[str, Rounded] = {
            n: placed(self._work.load(layer, n, targets[n]), self._device)
            for n in self._names(layer)
        }
        floats = {n: x.to(self._device) for n, x in self._work.floats(layer).items()}
        block = Block(values, self._pipeline.gains(layer, self._dense(layer) | floats))
        size = sum(8 * self._tensors[n].shape[0] * self._tensors[n].shape[1] for n in values)
        if size <= self._left:
            self._left -= size
            self._kept[layer] = block
        return block

    # ---- tuning

    def run(self, meter: Tick) -> None:
        """Tune what is not tuned yet, then measure."""
        if self._work.tuned is None:
            self._tune(meter)
            self._kept.clear()
        self._measured = self._measure()

    def _sequences(self) -> tuple[list[Sequences], list[Sequences]]:
        """Batches to tune on, and those watched."""
        train = self._pipeline.calibration.train
        found, first = [], 0
        for b in self._pipeline.tuned:
            ids = torch.stack([torch.from_numpy(x) for x in train[first : first + b.count]])
            first += b.count
            found.append(Sequences(ids, lambda b=b: self._wanted(b.start, b.stop).to(self._device)))  # type: ignore[misc]
        watch = watched(len(found))
        return (
            [x for i, x in enumerate(found) if i not in watch],
            [found[i] for i in sorted(watch)],
        )

    def _tune(self, meter: Tick) -> None:
        tokens = max(b.stop - b.start for b in self._pipeline.tuned)
        layers, width = self._config.num_hidden_layers, self._config.hidden_size
        spill, states = Spill(), None
        if not self._pipeline.options.keep_states:
            path = self._work.path / "spill.bin"
            states = States(path, layers * tokens, width, keep=False, create=True)
            spill = _OnDisk(states, tokens)
        tuning = self._pipeline.options.end_to_end
        job = Distillation(
            self._config, self._dense, self._block, self._norm, self._weights.embed,
            self._weights.table, *self._sequences(), spill=spill, tuning=tuning,
        )  # fmt: skip
        fit = job.begin()
        if (kept := self._work.tuning()) is not None:
            try:
                fit.take_up(kept)
            except (KeyError, ValueError, RuntimeError) as e:
                raise ConflictError(
                    "what the interrupted run kept is damaged.",
                    where=self._work.path,
                    fix="start afresh with --no-resume.",
                ) from e
        share = self._pipeline.tuning_bytes // tuning.steps
        try:
            job.run(
                fit,
                lambda f: self._work.keep_tuning(f.arrays()),
                lambda: meter(share, "tuning all blocks together"),
            )
        finally:
            if states is not None:
                states.close()
                states.path.unlink(missing_ok=True)
        self._work.finish_tuning(dict(self._numbers(fit.best)), {"end_to_end": fit.told})

    @torch.no_grad()
    def _numbers(self, shifts: Shifts) -> Iterator[tuple[str, list[Tensor]]]:
        """Name -> what is stored."""
        for layer in range(self._config.num_hidden_layers):
            block = self._block(layer)
            for name in (*block.values, *block.gains):
                yield name, [x.clone() for x in block.numbers(name, shifts)]
        moved = self._norm.moved(shifts[canonical.FINAL_NORM][0])
        yield canonical.FINAL_NORM, [self._norm.snap(moved)]

    # ---- measuring

    @torch.no_grad()
    def _measure(self) -> dict[str, Any]:
        """Errors behind every block and the divergence, of the weights as they are written."""
        judge = self._pipeline.judge
        held = judge.held
        rows = sum(map(len, held))
        path = self._work.path / "held.bin"
        states = States(
            path, 2 * rows, self._config.hidden_size,
            keep=self._pipeline.options.keep_states, create=True,
        )  # fmt: skip
        try:
            row = 0
            for ids in (*held, *held):
                states.write(row, self._weights.embed(torch.from_numpy(ids)).cpu())
                row += len(ids)
            errors = [self._layer(i, states) for i in range(self._config.num_hidden_layers)]
            norm = self._work.tuned_numbers(canonical.FINAL_NORM)[0]
            return {
                "errors": errors,
                "quality": judge.quality(judge.pairs(states), norm),
            }
        finally:
            states.close()
            path.unlink(missing_ok=True)

    def _layer(self, layer: int, states: States) -> float:
        """Move held-out states on by one block, original and tuned; the error behind it."""
        names, targets = self._names(layer), self._pipeline.targets
        original = self._weights.block(layer)
        tuned = dict(original)
        for name in names:
            value = placed(self._work.final(layer, name, targets[name]), self._device)
            tuned[name] = value.dequantize()
        for name in self._work.floats(layer):
            tuned[name] = self._work.tuned_numbers(name)[0].to(self._device)
        row = 0
        for weights in (tuned, original):
            for ids in self._pipeline.judge.held:
                x = states.read(row, row + len(ids))[None].to(self._device)
                positions = torch.arange(len(ids), device=x.device)[None]
                states.write(row, tg.block(x, weights, layer, self._config, positions)[0].cpu())
                row += len(ids)
        return self._pipeline.judge.error(self._pipeline.judge.pairs(states))

    def report(self, found: dict[str, Any]) -> dict[str, Any]:
        """The report of the blocks with what became of it."""
        assert self._work.tuned is not None
        errors = zip(found["blocks"], self._measured["errors"], strict=True)
        blocks = [b | {"error_before": b["error"], "error": e} for b, e in errors]
        return found | {
            "blocks": blocks,
            "quality": self._measured["quality"],
            "recovery": {
                "end_to_end": self._work.tuned["end_to_end"],
                "kl_before": found["quality"]["kl"],
                "changed": self._changed(),
            },
        }

    def _changed(self) -> list[str]:
        """Names of tuned tensors that are not what they were."""
        found = self._work.final_floats(self._config.num_hidden_layers)
        return sorted(n for n, x in found.items() if not torch.equal(x, read(self._tensors[n])))
