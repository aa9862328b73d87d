"""Scales of blocks, chosen so that rounding loses least where it matters.

First every sub-block alone: candidate ranges, each with its least-squares scale (and offset) for the codes it gives, judged by
``sum_i h_i (w_i - w'_i)^2``. Then the block: float16 ``d`` (and ``dmin``) and integer
scales, which are searched in the neighbourhood of the free ones with codes rounded anew for each, in turn with ``d``
refitted to them.

Weights come in units of a power of two per row, so that squares neither overflow nor vanish; ``unit`` tells which,
because float16's grid depends on it.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .types import TINY, BlockFormat, Fields, inverse, to_half

SIZES = tuple(
    1.12 - 0.03 * k for k in range(20)
)  # of the range, relative to what holds every weight


def search(
    weight: Tensor, f: BlockFormat, importance: Tensor, unit: Tensor, passes: int = 2
) -> Fields:
    """Fields of least weighted error, nearest codes.

    Args:
        weight: float32 ``[out_features, in_features]``, in units of ``unit``.
        f: the block type.
        importance: positive weight of each column's squared error ``[in_features]``.
        unit: power of two of every row ``[out_features, 1]``.
        passes: over the integer scales.
    """
    out = len(weight)
    w = weight.view(out, -1, f.sub)
    h = importance.to(weight).view(1, -1, f.sub)
    free = _free_offset(w, h, f) if f.offset else (_free_scale(w, h, f), None)
    if f.scale_range is None:
        d, dmin = to_half(free[0], unit), None if free[1] is None else to_half(free[1], unit)
        fields = Fields(f, _codes(w, d, dmin, f), d, dmin=dmin)
    else:
        fields = _two_levels(w, h, f, free, unit, passes)
    return fields


def _levels(w: Tensor, step: Tensor, offset: Tensor | None, f: BlockFormat) -> Tensor:
    """Nearest levels, shape of ``w``."""
    shifted = w if offset is None else w + offset[..., None]
    return f.level_of(shifted * inverse(step)[..., None])


def _codes(w: Tensor, step: Tensor, offset: Tensor | None, f: BlockFormat) -> Tensor:
    shifted = w if offset is None else w + offset[..., None]
    return f.code_of(shifted * inverse(step)[..., None]).view(len(w), -1)


def _error(w: Tensor, h: Tensor, step: Tensor, offset: Tensor | None, f: BlockFormat) -> Tensor:
    """Weighted squared error of every sub-block."""
    back = _levels(w, step, offset, f) * step[..., None]
    if offset is not None:
        back -= offset[..., None]
    return (h * (w - back).square_()).sum(-1)


def _free_scale(w: Tensor, h: Tensor, f: BlockFormat) -> Tensor:
    """Best scale of either sign for every sub-block."""
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best, gain = torch.zeros_like(largest[..., 0]), torch.zeros_like(largest[..., 0])
    hw = h * w
    for end, size in product((f.low, f.high), SIZES):
        q = f.level_of(w * inverse(largest * (size / end)))
        a, b = (hw * q).sum(-1), (h * q * q).sum(-1).clamp_min(TINY)
        better = a * a / b > gain  # what least squares takes off the loss
        gain = torch.where(better, a * a / b, gain)
        best = torch.where(better, a / b, best)
    return best


def _free_offset(w: Tensor, h: Tensor, f: BlockFormat) -> tuple[Tensor, Tensor]:
    """Best scale, not negative, and offset for every sub-block."""
    one_sign = f.offset == "integer"
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if one_sign:
        low = low.clamp_max(0.0)
    hw = h * w
    sums = (h.sum(-1).expand(w.shape[:2]), hw.sum(-1), (hw * w).sum(-1))
    best, offset = torch.zeros_like(low[..., 0]), -low[..., 0]
    least = _loss(
        best, offset, *sums, torch.zeros_like(best), torch.zeros_like(best), torch.zeros_like(best)
    )
    for size, shift in product(SIZES, (0.0, 0.5, 1.0)):
        start = (high - low) * (size / f.high)
        begin = low + (high - low) * ((1.0 - size) * shift)
        q = f.level_of((w - begin) * inverse(start))
        hq = h * q
        qs = (hq.sum(-1), (hq * w).sum(-1), (hq * q).sum(-1))
        s, o = _fit(*sums, *qs, one_sign)
        loss = _loss(s, o, *sums, *qs)
        better = loss < least
        least, best, offset = (
            torch.where(better, a, b) for a, b in ((loss, least), (s, best), (o, offset))
        )
    return best, offset


def _fit(
    n: Tensor, x: Tensor, xx: Tensor, q: Tensor, qx: Tensor, qq: Tensor, one_sign: bool
) -> tuple[Tensor, Tensor]:
    """Least squares for ``w ~ s q - o`` from weighted sums; without offset where that would be negative."""
    det = n * qq - q * q
    s = (n * qx - q * x) / det.clamp_min(TINY)
    flat = det <= 1e-7 * n * qq
    s = torch.where(flat | (s < 0), torch.zeros_like(s), s)
    o = (s * q - x) / n
    if one_sign:
        s = torch.where(o < 0, (qx / qq.clamp_min(TINY)).clamp_min(0.0), s)
        o = o.clamp_min(0.0)
    return s, o


def _loss(
    s: Tensor, o: Tensor, n: Tensor, x: Tensor, xx: Tensor, q: Tensor, qx: Tensor, qq: Tensor
) -> Tensor:
    return xx - 2 * s * qx + 2 * o * x + s * s * qq - 2 * s * o * q + o * o * n


def _two_levels(
    w: Tensor,
    h: Tensor,
    f: BlockFormat,
    free: tuple[Tensor, Tensor | None],
    unit: Tensor,
    passes: int,
) -> Fields:
    out = len(w)
    starts = _starts(free, f, unit)
    best: tuple[Tensor, ...] | None = None
    for d, dmin in starts:
        state = _settle(w, h, f, free, d, dmin)
        if best is None:
            best = state
        else:
            better = state[-1].view(out, -1, f.subs).sum(-1) < best[-1].view(out, -1, f.subs).sum(
                -1
            )
            best = tuple(_pick(better, a, b, f) for a, b in zip(state, best, strict=True))
    assert best is not None
    d, dmin, sc, m, error = best
    for _ in range(passes):
        d2, dmin2 = _refit(w, h, f, d, dmin, sc, m, unit)
        # float16 and clipping may make the refit worse than what it began with
        e2 = _error(w, h, _times(d2, sc, f), _times(dmin2, m, f) if f.offset else None, f)
        keep = e2.view(out, -1, f.subs).sum(-1) < error.view(out, -1, f.subs).sum(-1)
        d, dmin = torch.where(keep, d2, d), torch.where(keep, dmin2, dmin)
        error = torch.where(keep.repeat_interleave(f.subs, 1), e2, error)
        sc, m, error = _neighbours(w, h, f, d, dmin, sc, m, error)
    offset = _times(dmin, m, f) if f.offset else None
    codes = _codes(w, _times(d, sc, f), offset, f)
    integers = (sc.to(torch.int16), m.to(torch.int16))
    if f.offset is None:
        return Fields(f, codes, d, integers[0])
    return Fields(f, codes, d, integers[0], dmin, integers[1])


def _pick(blocks: Tensor, yes: Tensor, no: Tensor, f: BlockFormat) -> Tensor:
    return torch.where(
        blocks if yes.shape == blocks.shape else blocks.repeat_interleave(f.subs, 1), yes, no
    )


def _times(half: Tensor, integers: Tensor, f: BlockFormat) -> Tensor:
    return half.repeat_interleave(f.subs, 1) * integers


def _starts(
    free: tuple[Tensor, Tensor | None], f: BlockFormat, unit: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Candidates for d and dmin of every block: the largest scale at the far end of the integers, or a little inside."""
    assert f.scale_range is not None
    scale, offset = free
    grouped = scale.view(len(scale), -1, f.subs)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0]
    if offset is None:
        ends = [e for far in f.scale_range for e in (far, far * 0.96, far * 0.9)]
        zero = torch.zeros_like(largest)
        return [(to_half(largest / end, unit), zero) for end in ends]
    top = offset.view(len(scale), -1, f.subs).amax(-1)
    high = f.scale_range[1]
    return [
        (to_half(largest / (high * a), unit), to_half(top / (63 * b), unit))
        for a, b in product((1.0, 0.94), repeat=2)
    ]


def _integers(x: Tensor, half: Tensor, f: BlockFormat, low: int, high: int) -> Tensor:
    return torch.round(x * inverse(half).repeat_interleave(f.subs, 1)).clamp_(low, high)


def _settle(
    w: Tensor,
    h: Tensor,
    f: BlockFormat,
    free: tuple[Tensor, Tensor | None],
    d: Tensor,
    dmin: Tensor,
) -> tuple[Tensor, ...]:
    """Integers nearest to the free scales, and the error then: ``(d, dmin, sc, m, error)``."""
    assert f.scale_range is not None
    sc = _integers(free[0], d, f, *f.scale_range)
    if free[1] is None:
        m, offset = torch.zeros_like(sc), None
    else:
        m = _integers(free[1], dmin, f, 0, 63)
        offset = _times(dmin, m, f)
    return d, dmin, sc, m, _error(w, h, _times(d, sc, f), offset, f)


def _neighbours(
    w: Tensor,
    h: Tensor,
    f: BlockFormat,
    d: Tensor,
    dmin: Tensor,
    sc: Tensor,
    m: Tensor,
    error: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the integer scales one step around, codes rounded anew for each."""
    assert f.scale_range is not None
    low, high = f.scale_range
    best_sc, best_m = sc, m
    for ds, dm in product((-1, 0, 1), (-1, 0, 1) if f.offset else (0,)):
        if ds == dm == 0:
            continue
        s2, m2 = (sc + ds).clamp(low, high), (m + dm).clamp(0, 63)
        e = _error(w, h, _times(d, s2, f), _times(dmin, m2, f) if f.offset else None, f)
        better = e < error
        best_sc, best_m = torch.where(better, s2, best_sc), torch.where(better, m2, best_m)
        error = torch.where(better, e, error)
    return best_sc, best_m, error


def _refit(
    w: Tensor,
    h: Tensor,
    f: BlockFormat,
    d: Tensor,
    dmin: Tensor,
    sc: Tensor,
    m: Tensor,
    unit: Tensor,
) -> tuple[Tensor, Tensor]:
    """Least-squares d (and dmin) for the codes and integers there are."""
    out = len(w)
    offset = _times(dmin, m, f) if f.offset else None
    u = _levels(w, _times(d, sc, f), offset, f) * sc[..., None]

    def total(x: Tensor) -> Tensor:
        return x.sum(-1).view(out, -1, f.subs).sum(-1)

    hu = h * u
    uu, uw = total(hu * u), total(hu * w)
    if offset is None:
        return to_half(torch.where(uu > 0, uw / uu.clamp_min(TINY), d), unit), dmin
    v = m[..., None]
    vv, uv, vw = total((h * v * v).expand_as(w)), total(hu * v), total(h * v * w)
    det = uu * vv - uv * uv
    good = det > 1e-6 * uu * vv
    s = torch.where(good, (uw * vv - uv * vw) / det.clamp_min(TINY), d)
    o = torch.where(good, (uw * uv - vw * uu) / det.clamp_min(TINY), dmin)
    good &= (s > 0) & (o >= 0)
    return torch.where(good, to_half(s, unit), d), torch.where(good, to_half(o, unit), dmin)
