"""What earlier rounding did to a layer's inputs, so that the layer can make up for it (``gptq+``).

A rounded weight is judged by ``|| W X - W' X~ ||``, ``X`` the original model's inputs and ``X~`` those behind what is rounded
already. With ``e = W - W'`` that is ``e H e^T + 2 W C e^T`` and a constant, ``H = X~ X~^T``, ``C = (X - X~) X~^T``: the loss of
rounding another weight, ``W + W C H^-1`` (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). All of that step fits the noise
of the calibration too, so a share of it is taken: the one of least error on held-out inputs, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .hessian import Collector, EnoughError

_ROWS = 512  # held-out inputs at a time


class Beside:
    """The original block running beside the rounded one.

    Args:
        run: the original block for inputs and a linear layer, as :func:`g2kit.model.torch_gemma.block` takes one.
        collector: of the rounded block.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Callable[[str, Tensor, Tensor], Tensor]], object],
        collector: Collector,
    ) -> None:
        self._run = run
        self._stages = {m.names[0]: m for m in collector.moments}
        self._last = collector.moments[-1].names[0]
        self._batches: Iterator[Tensor] = iter(())
        self._seen: dict[str, Tensor] = {}
        self._cross: dict[str, Tensor] = {}
        self._held: dict[str, list[Tensor]] = {}

    def follow(self, batches: Iterator[Tensor]) -> None:
        """Take the original's hidden states from here, batch for batch with the rounded ones'."""
        self._batches = batches

    def next(self) -> None:
        """Run the next batch."""

        def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
            if name in self._stages:
                self._seen[name] = x
            if name == self._last:
                raise EnoughError
            return torch.nn.functional.linear(x, weight)

        try:
            self._run(next(self._batches), linear)
        except EnoughError:
            return

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """The rounded block's input of a stage, and the first layer's output on it."""
        moments = self._stages[name]
        rows, original = moments.rows(x, y), moments.rows(self._seen.pop(name), y)
        if name not in self._cross:
            n = rows.shape[1]
            self._cross[name] = torch.zeros(n, n, device=rows.device)
        self._cross[name].addmm_((original - rows).T, rows)

    def hold(self, name: str, x: Tensor, y: Tensor, count: int) -> None:
        """As :meth:`add`, held out; of the first ``count``."""
        original = self._stages[name].rows(self._seen.pop(name), y)[:count]
        self._held.setdefault(name, []).append(original.clone())

    def cross(self, name: str, tokens: int) -> Tensor:
        """``mean((x - x~) x~^T)`` ``[in_features, in_features]``, given up."""
        return self._cross.pop(name).div_(max(1, tokens))

    def held(self, name: str) -> Tensor:
        """The original's held-out inputs ``[rows, in_features]``."""
        return torch.cat(self._held.pop(name))


def correction(weight: Tensor, cross: Tensor, hessian: Tensor) -> Tensor | None:
    """``W C H^-1``, float32 ``[out_features, in_features]``.

    Args:
        weight: ``[out_features, in_features]``.
        cross: ``C`` of :class:`Beside`.
        hessian: damped; not changed.

    Returns:
        None where the Hessian has no Cholesky factor, or the step is not finite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    step = torch.cholesky_solve((weight @ cross).T, lower).T
    return step.contiguous() if bool(torch.isfinite(step).all()) else None


def share(weight: Tensor, step: Tensor, held: Tensor, original: Tensor) -> float:
    """How much of a correction is best on held-out inputs, 0 to 1.

    Args:
        weight: ``[out_features, in_features]``.
        step: of :func:`correction`.
        held: the rounded model's inputs ``[rows, in_features]``.
        original: the original's.
    """
    wanted = power = 0.0
    for a in range(0, len(held), _ROWS):
        x = held[a : a + _ROWS]
        missing, given = (original[a : a + _ROWS] - x) @ weight.T, x @ step.T
        wanted += float((missing * given).sum(dtype=torch.float64))
        power += float(given.square().sum(dtype=torch.float64))
    return min(1.0, max(0.0, wanted / power)) if power > 0 else 0.0
