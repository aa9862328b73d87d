"""Rounding one column after another, whatever values a column may take: LDLQ and coordinate descent.

Both work on transposed matrices ``[in_features, out_features]``, so that a column is one run of memory. What a column's
values are is the grid's business: uniform groups (:mod:`.gptq`) and ggml's blocks (:mod:`.ggml`) share these loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .gptq import Factor

BLOCK = 128


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
    n, order, unit = weight.shape[1], f.order.tolist(), f.unit
    w = weight.t()[f.order].to(f.dtype)
    error, codes = torch.zeros_like(w), torch.empty(w.shape, dtype=torch.uint8)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        target = w[start:stop] + unit[:start, start:stop].t() @ error[:start]
        for k in range(start, stop):
            t = target[k - start]
            if k > start:
                t = t + unit[start:k, k] @ error[start:k]
            q, value = grid.nearest(order[k], t)
            codes[order[k]] = q.to(torch.uint8)
            error[k] = w[k] - value
    return codes.t().contiguous()


def descend_columns(
    weight: Tensor,
    grid: Grid,
    values: Tensor,
    hessian: Tensor,
    sweeps: int,
    linear: Tensor | None = None,
) -> Tensor:
    """Round each column again with all others as they are; never raises the loss (QuantEase, arXiv 2309.01885).

    Args:
        weight: float32 ``[out_features, in_features]``.
        grid: the values there are.
        values: where to begin, shape of ``weight``; values of the grid.
        hessian: symmetric ``[in_features, in_features]``.
        sweeps: passes over all columns, fewer when nothing changes.
        linear: extra term, shape of ``weight``: the loss is ``e H e^T + 2 linear e^T``.

    Returns:
        Codes, uint8 ``[out_features, in_features]``.
    """
    n = weight.shape[1]
    w, now = weight.t().contiguous(), values.t().contiguous()
    e = w - now
    codes = torch.empty(w.shape, dtype=torch.uint8)
    diagonal = hessian.diagonal().clamp_min(1e-20)
    for _ in range(max(sweeps, 1)):
        changed = False
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            block = hessian[start:stop, start:stop]
            g = hessian[start:stop] @ e
            if linear is not None:
                g += linear[:, start:stop].t()
            for k in range(start, stop):
                j = k - start
                # the loss is quadratic in e_k with slope g_k: the best value is the one now plus g_k / H_kk
                q, value = grid.nearest(k, now[k] + g[j] / diagonal[k])
                codes[k] = q.to(torch.uint8)
                moved = now[k] - value  # change of the error
                if bool(moved.any()):
                    changed = True
                    now[k] = value
                    e[k] += moved
                    g[j:] += torch.outer(block[j, j:], moved)
        if not changed:
            break
    return codes.t().contiguous()
