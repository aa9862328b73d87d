"""Rounding into blocks that knows the inputs: LDLQ in the searched grid, then coordinate descent over codes and scales.

The loss of a row is ``e H e^T``. Codes, integer scales and float16 scales are all coordinates of one lattice: moving one
changes the error along a fixed direction, the loss is quadratic on that line, and the best point of the lattice on it is
never worse than the one there is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..columns import descend_columns, ldlq_columns
from ..factor import Factor
from .types import TINY, BlockFormat, Fields, inverse, to_half

LEAST_GAIN = 2e-3  # of the loss; a round that gains less is the last
_STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)


class BlockGrid:
    """The values each column may take, for :mod:`..columns`."""

    def __init__(self, fields: Fields, dtype: torch.dtype = torch.float32) -> None:
        self.format = fields.format
        self.step = fields.step.t().to(dtype).contiguous()
        self.inverse = inverse(self.step)
        self.offset = None if fields.offset is None else fields.offset.t().to(dtype).contiguous()
        self.levels = self.format.levels.to(self.step)

    def nearest(self, column: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`..columns.Grid`."""
        f, sub = self.format, column // self.format.sub
        shifted = target if self.offset is None else target + self.offset[sub]
        u = shifted * self.inverse[sub]
        if f.table is not None:
            code = f.code_of(u)
            return code, self.levels.index_select(0, code.int()) * self.step[sub]
        level = f.level_of(u)
        value = level * self.step[sub]
        return level - f.first, value if self.offset is None else value - self.offset[sub]


def round_into(weight: Tensor, fields: Fields, factor: Factor) -> Fields:
    """LDLQ in the grid of ``fields``."""
    return replace(fields, codes=ldlq_columns(weight, BlockGrid(fields, factor.dtype), factor))


def refine(
    weight: Tensor,
    fields: Fields,
    hessian: Tensor,
    unit: Tensor,
    *,
    rounds: int = 3,
    sweeps: int = 2,
) -> Fields:
    """Alternate integer scales, float16 scales and codes, each with the others as they are.

    Args:
        weight: float32 ``[out_features, in_features]``, in units of ``unit``.
        fields: where to begin.
        hessian: ``[in_features, in_features]``, damped as wanted.
        unit: power of two of every row ``[out_features, 1]``.
        rounds: of all three; ends early when there is nothing to gain.
        sweeps: over the codes per round.
    """
    before = float(loss(weight, fields, hessian).sum())
    for _ in range(rounds):
        fields = rescale(weight, fields, hessian, unit)
        codes = descend_columns(weight, BlockGrid(fields), fields.dequantize(), hessian, sweeps)
        fields = replace(fields, codes=codes)
        after = float(loss(weight, fields, hessian).sum())
        if before - after <= LEAST_GAIN * before:
            break
        before = after
    return fields


def loss(weight: Tensor, fields: Fields, hessian: Tensor) -> Tensor:
    """``e H e^T`` of every row ``[out_features]``."""
    e = weight - fields.dequantize()
    return ((e @ hessian) * e).sum(1)


def rescale(weight: Tensor, fields: Fields, hessian: Tensor, unit: Tensor) -> Fields:
    """Scales and offsets of least loss for the codes there are, block by block."""
    f = fields.format
    state = _State(weight, fields, hessian)
    for block in range(weight.shape[1] // f.weights):
        if f.scale_range is not None:
            for sub in range(block * f.subs, (block + 1) * f.subs):
                _move_integers(state, sub)
        _move_halves(state, block, unit)
    return state.fields()


class _State:
    """Everything transposed: columns are rows of memory."""

    def __init__(self, weight: Tensor, fields: Fields, hessian: Tensor) -> None:
        self.format: BlockFormat = fields.format
        self.given = fields
        self.h = hessian
        self.level = fields.level().reshape(weight.shape).t().contiguous()
        self.e = (weight - fields.dequantize()).t().contiguous()
        self.d = fields.d.t().contiguous()
        self.sc = None if fields.sc is None else fields.sc.t().float().contiguous()
        self.dmin = None if fields.dmin is None else fields.dmin.t().contiguous()
        self.m = None if fields.m is None else fields.m.t().float().contiguous()

    def fields(self) -> Fields:
        def back(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if x is None else x.t().to(dtype).contiguous()

        g = self.given
        return Fields(
            self.format, g.codes, self.d.t().contiguous(), back(self.sc, torch.int16), back(self.dmin, torch.float32),
            back(self.m, torch.int16),
        )  # fmt: skip


def _quadratic(state: _State, columns: slice, u: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
    """``(a, b, uu, uv, vv)``: slopes along the directions u and v, and their Gram matrix under H, for every row."""
    g = state.h[columns] @ state.e
    block = state.h[columns, columns]
    hu = block @ u
    a, uu = (u * g).sum(0), (u * hu).sum(0)
    if v is None:
        zero = torch.zeros_like(a)
        return a, zero, uu, zero, zero
    hv = block @ v
    return a, (v * g).sum(0), uu, (v * hu).sum(0), (v * hv).sum(0)


def _optimum(a: Tensor, b: Tensor, uu: Tensor, uv: Tensor, vv: Tensor) -> tuple[Tensor, Tensor]:
    """The best real steps along u and v."""
    det = uu * vv - uv * uv
    good = det > 1e-6 * uu * vv
    alone = a / uu.clamp_min(TINY)
    x = torch.where(good, (a * vv - b * uv) / det.clamp_min(TINY), alone)
    y = torch.where(good, (b * uu - a * uv) / det.clamp_min(TINY), torch.zeros_like(b))
    return torch.where(uu > 0, x, torch.zeros_like(x)), y


def _change(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, uu: Tensor, uv: Tensor, vv: Tensor
) -> Tensor:
    """What steps x and y add to the loss."""
    return x * x * uu + 2 * x * y * uv + y * y * vv - 2 * (x * a + y * b)


def _move_integers(state: _State, sub: int) -> None:
    f = state.format
    assert f.scale_range is not None
    assert state.sc is not None
    columns = slice(sub * f.sub, (sub + 1) * f.sub)
    block = sub // f.subs
    u = state.level[columns] * state.d[block]
    v = None if state.dmin is None else -state.dmin[block].expand_as(u)
    q = _quadratic(state, columns, u, v)
    sc = state.sc[sub]
    x0, _ = _optimum(*q)
    best_x, best_y = torch.zeros_like(sc), torch.zeros_like(sc)
    least = torch.zeros_like(sc)
    _, b, _, uv, vv = q
    for delta in _STEPS:
        x = torch.round(sc + x0 + delta).clamp(*f.scale_range) - sc
        y = torch.zeros_like(x)
        if state.m is not None:
            m = state.m[sub]
            y = torch.round(m + (b - x * uv) / vv.clamp_min(TINY)).clamp(0, 63) - m
            y = torch.where(vv > 0, y, torch.zeros_like(y))
        change = _change(x, y, *q)
        better = change < least
        least, best_x, best_y = (
            torch.where(better, p, r) for p, r in ((change, least), (x, best_x), (y, best_y))
        )
    state.sc[sub] += best_x
    moved = u * best_x
    if v is not None and state.m is not None:
        state.m[sub] += best_y
        moved += v * best_y
    state.e[columns] -= moved


def _move_halves(state: _State, block: int, unit: Tensor) -> None:
    f = state.format
    columns = slice(block * f.weights, (block + 1) * f.weights)
    subs = slice(block * f.subs, (block + 1) * f.subs)
    u = state.level[columns]
    if state.sc is not None:
        u = u * state.sc[subs].repeat_interleave(f.sub, 0)
    v = None
    if state.dmin is not None:
        m = torch.ones_like(u) if state.m is None else state.m[subs].repeat_interleave(f.sub, 0)
        v = -m
    q = _quadratic(state, columns, u, v)
    x0, y0 = _optimum(*q)
    d, row_unit = state.d[block], unit[:, 0]
    x = to_half(d + x0, row_unit) - d
    y = torch.zeros_like(x)
    if state.dmin is not None:
        o = state.dmin[block]
        new = to_half(o + y0, row_unit)
        y = (new.clamp_min(0.0) if f.offset == "integer" else new) - o
    better = _change(x, y, *q) < 0
    x, y = torch.where(better, x, torch.zeros_like(x)), torch.where(better, y, torch.zeros_like(y))
    state.d[block] += x
    state.e[columns] -= u * x
    if v is not None and state.dmin is not None:
        state.dmin[block] += y
        state.e[columns] -= v * y
