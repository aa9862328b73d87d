"""Rounding that knows the inputs: codes that keep ``tr(E H E^T)`` small, ``E`` the weights' error, ``H`` the inputs' moments.

GPTQ (arXiv 2210.17323) in its LDLQ form (arXiv 2307.13304, section 3): with ``H = U U^T``, U upper triangular and its
columns divided by their diagonal, column k is rounded to the nearest of ``w_k + sum_{j<k} e_j U_jk``. The same codes as
with the inverse's Cholesky factor, for one factorization and no inverse. Afterwards two steps that never raise the loss
alternate: columns are rounded again with all others fixed (coordinate descent), and scales are refitted to their codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .columns import descend_columns, ldlq_columns
from .factor import DAMP_LADDER, Factor, damped, factor
from .grid import quantize_to, search_grid
from .scheme import Codes, Scheme, on_grid

_SYSTEMS = 1 << 21  # elements of the linear systems that scales are fitted by, at a time
_PRODUCTS = 1 << 20  # of the products behind them


class UniformGrid:
    """The values of uniform groups, for :mod:`.columns`."""

    def __init__(
        self,
        in_features: int,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.width = scheme.width(in_features)
        self.top = scheme.levels - 1
        self.scales = scales.t().to(dtype).contiguous()
        whole = torch.full_like(self.scales, scheme.middle)
        self.zeros = whole if zeros is None else zeros.t().to(dtype).contiguous()

    def nearest(self, column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`.columns.Grid`."""
        group = column // self.width
        s, z = self.scales[group], self.zeros[group]
        q = (target / s).add_(z).round_().clamp_(0, self.top)
        return q, (q - z).mul_(s)


def ldlq(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, f: Factor) -> Codes:
    """Round every column knowing the errors of those before it.

    Args:
        weight: float32 ``[out_features, in_features]``.
        scales: the grid, fixed before (static groups, so that any order needs no g_idx).
        zeros: its zeros, or None.
        scheme: how codes are read.
        f: the factored Hessian.
    """
    codes = ldlq_columns(weight, UniformGrid(weight.shape[1], scales, zeros, scheme, f.dtype), f)
    return Codes(scheme, codes, scales, zeros)


def loss(weight: Tensor, codes: Codes, hessian: Tensor) -> Tensor:
    """``e H e^T`` of every row ``[out_features]``."""
    e = weight - codes.dequantize()
    return ((e @ hessian) * e).sum(1)


def refine(
    weight: Tensor, codes: Codes, hessian: Tensor, *, rounds: int = 4, sweeps: int = 1
) -> Codes:
    """Alternate scales refitted to the codes, and codes rounded again one column at a time.

    Args:
        weight: float32 ``[out_features, in_features]``.
        codes: where to begin.
        hessian: damped as wanted; not changed.
        rounds: of both; ends early when no row gains.
        sweeps: over all columns per round.

    Returns:
        Codes whose loss is, row by row, at most that of the ones given.
    """
    product = weight @ hessian  # the same in every round
    before = loss(weight, codes, hessian)
    for _ in range(rounds):
        better = descend(weight, refit(codes, product, hessian), hessian, sweeps)
        after = loss(weight, better, hessian)
        gains = after < before
        codes = choose(gains, better, codes)
        gained = float((before - after)[gains].sum())
        if gained <= 1e-4 * float(before.abs().sum()):
            break
        before = torch.where(gains, after, before)
    return codes


def choose(rows: Tensor, yes: Codes, no: Codes) -> Codes:
    """Row by row the one or the other."""
    pick = rows[:, None]
    zeros = (
        None if yes.zeros is None or no.zeros is None else torch.where(pick, yes.zeros, no.zeros)
    )
    return replace(
        no,
        codes=torch.where(pick, yes.codes, no.codes),
        scales=torch.where(pick, yes.scales, no.scales),
        zeros=zeros,
    )


def refit(codes: Codes, product: Tensor, hessian: Tensor) -> Codes:
    """Scales of least loss for given codes: one small linear system per row, then onto the grid.

    Args:
        codes: of a weight.
        product: the weight times the Hessian ``[out_features, in_features]``.
        hessian: ``[in_features, in_features]``.
    """
    out, groups = codes.scales.shape
    rows = max(1, min(_SYSTEMS // (groups * groups), _PRODUCTS // len(hessian)))
    parts = [_refit(codes, product, hessian, slice(a, a + rows)) for a in range(0, out, rows)]
    return codes.with_scales(torch.cat(parts))


def _refit(codes: Codes, product: Tensor, hessian: Tensor, rows: slice) -> Tensor:
    """Scales of some rows, before they are brought onto the grid."""
    old = codes.scales[rows]
    out, groups = old.shape
    zeros = codes.scheme.middle if codes.zeros is None else codes.zeros[rows].float()[..., None]
    c = codes.codes[rows].view(out, groups, -1).float() - zeros
    width = c.shape[-1]
    flat = c.view(out, -1)
    b = (product[rows].view(out, groups, width) * c).sum(-1)
    a = torch.empty(out, groups, groups, device=old.device)
    for g in range(groups):
        at = g * width  # what lies before is known from the groups before
        crossed = (c[:, g] @ hessian[at : at + width, at:]).mul_(flat[:, at:])
        a[:, g, g:] = crossed.view(out, groups - g, width).sum(-1)
        a[:, g:, g] = a[:, g, g:]
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-20)
    fitted, failed = torch.linalg.solve_ex(a, b)
    # a scale that vanished or changed its sign would be another grid: keep the old one
    bad = ~torch.isfinite(fitted) | (fitted * old <= 0) | (failed != 0)[:, None]
    return torch.where(bad, old, fitted)


def descend(weight: Tensor, codes: Codes, hessian: Tensor, sweeps: int) -> Codes:
    """Round each column again with all others as they are; never raises the loss (QuantEase, arXiv 2309.01885)."""
    grid = UniformGrid(weight.shape[1], codes.scales, codes.zeros, codes.scheme)
    return replace(codes, codes=descend_columns(weight, grid, codes.dequantize(), hessian, sweeps))


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    f: Factor,
    *,
    rounds: int = 4,
    sweeps: int = 1,
    grid: tuple[Tensor, Tensor | None] | None = None,
) -> Codes:
    """Grid by weighted search, LDLQ, refinement.

    Args:
        weight: float32 ``[out_features, in_features]``.
        hessian: ``[in_features, in_features]``, second moments of the inputs.
        scheme: what to quantize to.
        f: ``factor(hessian)``.
        rounds: of :func:`refine`; 0 for none.
        sweeps: of :func:`refine`.
        grid: scales and zeros to begin with, where they are known already.
    """
    scales, zeros = grid or search_grid(weight, scheme, hessian.diagonal())
    codes = ldlq(weight, scales, zeros, scheme, f)
    if not rounds:
        return codes
    with damped(hessian, f.damp):
        return refine(weight, codes, hessian, rounds=rounds, sweeps=sweeps)


def rtn(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Codes:
    """Nearest codes on the best grid."""
    scales, zeros = search_grid(weight, scheme, importance)
    return Codes(scheme, quantize_to(weight, scales, zeros, scheme), on_grid(scales), zeros)


__all__ = ["DAMP_LADDER", "Factor", "factor"]
