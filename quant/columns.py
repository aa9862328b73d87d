"""Rounding one column after another, whatever values a column may take: LDLQ and coordinate descent.

Both work on transposed matrices ``[in_features, out_features]``, so that a column is one run of memory. What a column's
values are is the grid's business: uniform groups (:mod:`.gptq`) and ggml's blocks (:mod:`.ggml`) share these loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .factor import Factor

BLOCK = 128  # columns corrected for all before them by one product
INNER = 32  # of those, by a smaller one


class Grid(Protocol):
    """The values every column of every row may take."""

    def nearest(self, column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (as floats) and their values nearest to ``target`` ``[out_features]``, in its dtype."""


def ldlq_columns(weight: Tensor, grid: Grid, f: Factor) -> Tensor:
    """Round every column knowing the errors of those before it.

    Args:
        weight: float32 ``[out_features, in_features]``.
        grid: the values there are.
        f: the factored Hessian.

    Returns:
        Codes, uint8 ``[out_features, in_features]``.
    """
    n, order, unit = weight.shape[1], f.order.tolist(), f.unit.t()
    error = weight.t()[f.order].to(f.dtype)  # the weights, until their turn comes
    codes = torch.empty(error.shape, dtype=torch.uint8, device=error.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        target = torch.addmm(error[start:stop], unit[start:stop, :start], error[:start])
        for a, b in _parts(start, stop):
            if a > start:
                target[a - start : b - start].addmm_(unit[a:b, start:a], error[start:a])
            for k in range(a, b):
                t = target[k - start]
                if k > a:
                    t = torch.addmv(t, error[a:k].t(), unit[k, a:k])
                q, value = grid.nearest(order[k], t)
                codes[order[k]].copy_(q)
                error[k].sub_(value)
    return codes.t().contiguous()


def _parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A block in pieces so small that what is gone over for every column stays in the processor's cache."""
    for a in range(start, stop, INNER):
        yield a, min(a + INNER, stop)


def descend_columns(
    weight: Tensor,
    grid: Grid,
    values: Tensor,
    hessian: Tensor,
    sweeps: int,
) -> Tensor:
    """Round each column again with all others as they are; never raises the loss (QuantEase, arXiv 2309.01885).

    Args:
        weight: float32 ``[out_features, in_features]``.
        grid: the values there are.
        values: where to begin, shape of ``weight``; values of the grid.
        hessian: symmetric ``[in_features, in_features]``.
        sweeps: passes over all columns, fewer when nothing changes.

    Returns:
        Codes, uint8 ``[out_features, in_features]``.
    """
    n = weight.shape[1]
    now = values.t().contiguous()
    e = weight.t() - now
    codes = torch.empty(now.shape, dtype=torch.uint8, device=now.device)
    moved = torch.empty(BLOCK, len(weight), dtype=now.dtype, device=now.device)
    curvature = hessian.diagonal().clamp_min(1e-20).tolist()
    for _ in range(max(sweeps, 1)):
        changed = False
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            g = hessian[start:stop] @ e
            for a, b in _parts(start, stop):
                if a > start:
                    g[a - start : b - start].addmm_(hessian[a:b, start:a], moved[: a - start])
                for k in range(a, b):
                    slope = g[k - start]
                    if k > a:
                        slope = torch.addmv(
                            slope, moved[a - start : k - start].t(), hessian[k, a:k]
                        )
                    # the loss is quadratic in e_k: the best value is the one now plus slope over curvature
                    target = torch.add(now[k], slope, alpha=1.0 / curvature[k])
                    q, value = grid.nearest(k, target)
                    codes[k].copy_(q)
                    torch.sub(now[k], value, out=moved[k - start])
                    now[k] = value
            e[start:stop] += moved[: stop - start]
            changed = bool(moved[: stop - start].any()) or changed
        if not changed:
            break
    return codes.t().contiguous()
