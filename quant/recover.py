"""What rounding lost, won back by gradient: first a block at a time, so that it gives what the original gives.

Block by block (the idea of BRECQ, OmniQuant, AutoRound and EfficientQAT: arXiv 2102.05426, 2308.13137, 2309.05516,
2407.11062), with codes that stay (``scales``) or move too (``codes``): the rounded block's output on the rounded stream is
pulled to the original block's output on the original stream, every token relative to its size. :mod:`.distill` does the
same with the whole model's output. Both watch calibration sequences that they do not tune on, and keep what was best
there: the start too, so nothing gets worse by that measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats.errors import NonFiniteError, UsageError
from .tunable import CODE, GAIN, NUMBER, Adam, Block, Shifts, arrays_of, copied, fill

RECOVERIES = ("none", "scales", "codes")
WATCHED = 0.125  # share of calibration sequences to stop early by


@dataclass(frozen=True)
class Tuning:
    """How far to tune.

    Attributes:
        steps: at most.
        every: steps between looks at the watched sequences.
        patience: looks without a gain before it ends.
        scale_rate: largest relative step of scales and offsets.
        gain_rate: of norm gains.
        code_rate: of codes, in codes.
        tokens: per step.
    """

    steps: int
    every: int
    patience: int = 3
    scale_rate: float = 1e-3
    gain_rate: float = 3e-4
    code_rate: float = 5e-3
    tokens: int = 1024

    @property
    def rates(self) -> dict[str, float]:
        """By kind of :mod:`.tunable`."""
        return {NUMBER: self.scale_rate, GAIN: self.gain_rate, CODE: self.code_rate}


BLOCKWISE = Tuning(steps=64, every=8)
END_TO_END = Tuning(steps=160, every=16, patience=4)


def require_recovery(recover: str) -> None:
    """Refuse an unknown one."""
    if recover not in RECOVERIES:
        raise UsageError(
            f"{recover!r} is not a recovery.", fix=f"use one of {', '.join(RECOVERIES)}."
        )


def recovered(report: Mapping[str, Any]) -> list[str]:
    """For the manifest: what a run's recovery changed."""
    found = report.get("recovery")
    if not found:
        return []
    end = found["end_to_end"]
    return [
        f"scales and {len(found['changed'])} norms were tuned to the original's output: block by block, then "
        f"{end['kept_step']} steps together, KL on watched calibration {end['before']:.4g} to {end['after']:.4g}"
    ]


def watched(count: int) -> set[int]:
    """Which of ``count`` sequences are watched, evenly spread; none where there are too few to spare one."""
    if count < 4:
        return set()
    n = max(1, round(count * WATCHED))
    return {(2 * j + 1) * count // (2 * n) for j in range(n)}


def batch_of(step: int, count: int, seed: int) -> int:
    """The batch of step 1, 2, …: passes over ``count`` of them, each in an order of its own, always the same."""
    again, at = divmod(step - 1, count)
    return int(np.random.default_rng([seed, again]).permutation(count)[at])


def rate_factor(step: int, steps: int) -> float:
    """Learning rate of step 1, 2, …: up over the first twentieth, then down to nothing."""
    return min(1.0, step / max(1, steps // 20)) * (1.0 - (step - 1) / steps)


@dataclass
class Fit:
    """A run of :class:`Adam` that ends when watched sequences gain no more.

    Attributes:
        shifts: what moves.
        adam: how.
        tuning: how far.
        step: steps done.
        history: ``[step, loss on watched sequences]``, the start first.
        best: shifts of the least loss.
    """

    shifts: Shifts
    adam: Adam
    tuning: Tuning
    step: int = 0
    history: list[list[float]] = field(default_factory=list)
    best: Shifts = field(default_factory=dict)

    @classmethod
    def begin(cls, shifts: Shifts, kinds: Mapping[str, list[str]], tuning: Tuning) -> Fit:
        """From these shifts, of these kinds; see :class:`.tunable.Block`."""
        return cls(shifts, Adam(shifts, kinds, tuning.rates), tuning)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
        if self.step >= self.tuning.steps:
            return True
        losses = [loss for _, loss in self.history]
        last = len(losses) - 1
        return last - losses.index(min(losses)) >= self.tuning.patience if losses else False

    def look(self, loss: float, name: str) -> None:
        """Note the loss on watched sequences.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        if not np.isfinite(loss):
            raise NonFiniteError(
                f"tuning gives a loss of {loss} at step {self.step}.",
                tensor=name,
                fix="use --recover none, and check the model with `g2verify compare`; nothing was written.",
            )
        if not self.history or loss < min(x for _, x in self.history):
            self.best = copied(self.shifts)
        self.history.append([self.step, loss])

    def run(
        self,
        gradient: Callable[[int], None],
        loss: Callable[[], float],
        name: str,
        looked: Callable[[], None] = lambda: None,
    ) -> None:
        """Go on to the end.

        Args:
            gradient: does the step of that number: computes gradients and has :attr:`adam` move.
            loss: on watched sequences.
            name: for messages.
            looked: called after each look but the last.
        """
        if not self.history:
            self.look(loss(), name)
        while not self.ended:
            self.step += 1
            gradient(self.step)
            if self.step % self.tuning.every == 0 or self.step == self.tuning.steps:
                self.look(loss(), name)
                if not self.ended:
                    looked()

    @property
    def told(self) -> dict[str, Any]:
        """JSON values for the report."""
        losses = [x for _, x in self.history]
        at = losses.index(min(losses))
        return {
            "steps": self.step,
            "kept_step": int(self.history[at][0]),
            "before": losses[0],
            "after": losses[at],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a file of arrays."""
        parts = {
            "now": self.shifts, "first": self.adam.first, "second": self.adam.second,
            "best": self.best,
        }  # fmt: skip
        out = {k: a for prefix, s in parts.items() for k, a in arrays_of(prefix, s).items()}
        return out | {"history": np.array(self.history, np.float64), "step": np.array(self.step)}

    def take_up(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from :meth:`arrays`."""
        self.best = copied(self.shifts)
        parts = {
            "now": self.shifts, "first": self.adam.first, "second": self.adam.second,
            "best": self.best,
        }  # fmt: skip
        for prefix, shifts in parts.items():
            fill(shifts, prefix, arrays)
        self.history = [[int(s), float(x)] for s, x in arrays["history"]]
        self.step = int(arrays["step"])


Run = Callable[[Tensor, Shifts], Tensor]
Pair = tuple[Tensor, Tensor]  # input of the rounded block, output of the original one


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of every token relative to its size, summed."""
    power = wanted.square().sum(-1).clamp_min(1e-30)
    return ((found - wanted).square().sum(-1) / power).sum()


def tune_block(
    block: Block, run: Run, pairs: Callable[[int], Pair], train: Sequence[int],
    watch: Sequence[int], tuning: Tuning = BLOCKWISE, *, layer: int = 0,
) -> tuple[Shifts, dict[str, Any]]:  # fmt: skip
    """Tune one block.

    Args:
        block: what can move.
        run: the block's output for an input ``[batch, length, hidden]`` under shifts.
        pairs: input and wanted output of a batch.
        train: batches to tune on.
        watch: batches to stop early by; without any, those to tune on.
        tuning: how far.
        layer: seeds the order.

    Returns:
        The shifts that lost least on ``watch`` (none at all, if those do), and what to report: relative squared error there
        before and after, steps.
    """
    fit = Fit.begin(block.begin(), block.kinds(), tuning)
    names = list(fit.shifts)
    watch = watch or train

    def gradient(step: int) -> None:
        x, wanted = pairs(train[batch_of(step, len(train), layer)])
        leaves = leaves_of(fit.shifts, names)
        with torch.enable_grad():
            loss = relative_error(run(x, leaves), wanted) / wanted[..., 0].numel()
            loss.backward()  # type: ignore[no-untyped-call]
        fit.adam.step(names, gradients(leaves), step, rate_factor(step, tuning.steps))

    @torch.no_grad()
    def loss() -> float:
        total = count = 0.0
        for i in watch:
            x, wanted = pairs(i)
            total += float(relative_error(run(x, fit.shifts), wanted).double())
            count += wanted[..., 0].numel()
        return total / count

    fit.run(gradient, loss, f"model.layers.{layer}")
    return fit.best, fit.told


def leaves_of(shifts: Shifts, names: Sequence[str]) -> Shifts:
    """Some shifts as variables of their own that collect gradients."""
    return {n: [t.detach().clone().requires_grad_() for t in shifts[n]] for n in names}


def gradients(leaves: Shifts) -> Shifts:
    """Of each leaf; zero where nothing reached it."""
    return {
        n: [torch.zeros_like(t) if t.grad is None else t.grad for t in ts]
        for n, ts in leaves.items()
    }
