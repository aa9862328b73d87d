"""Scales and zeros of groups, chosen so that rounding loses least where it matters.

The loss of a group is ``sum_i h_i (w_i - w'_i)^2`` with ``h`` the Hessian's diagonal. Every candidate
scale is refitted in closed form to the codes it gives (least squares), brought onto the grid of scales that can be
stored, and judged with those codes: three sums per candidate decide all of it. The best one goes on with the codes nearest
to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Scheme, on_grid

STEPS = 26  # candidate sizes of the range
SHRINK = 0.55  # the smallest, relative to what holds every weight
POLISH = 2  # times that the best scale is refitted to the codes nearest to it
_ELEMENTS = 1 << 17  # searched at a time: what is gone over a hundred times stays in the cache


def plain_grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales that hold the largest weight, as textbooks have them.

    Args:
        weight: float32 ``[out_features, in_features]``.
        scheme: bits, groups, symmetry.

    Returns:
        ``(scales, zeros)``, each ``[out_features, groups]``; zeros None when symmetric.
    """
    w = _grouped(weight, scheme)
    if scheme.symmetric:
        return on_grid(w.abs().amax(-1) / (scheme.middle - 0.5)), None
    low, high = _range(w, scheme)
    scale = on_grid((high - low) / (scheme.levels - 1))
    return scale, _zero(low, scale, scheme)


def search_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of least weighted error.

    Args:
        weight: float32 ``[out_features, in_features]``.
        scheme: bits, groups, symmetry.
        importance: weight of each column's squared error ``[in_features]`` or of each element; None weighs all alike.

    Returns:
        As :func:`plain_grid`.
    """
    h = (
        torch.ones_like(weight[:1])
        if importance is None
        else importance.to(weight).view(-1, weight.shape[1])
    )
    rows = max(1, _ELEMENTS // weight.shape[1])
    search = _search_symmetric if scheme.symmetric else _search_asymmetric
    parts = [
        search(
            _grouped(part, scheme), _grouped(h if len(h) == 1 else h[a : a + rows], scheme), scheme
        )
        for a, part in enumerate_rows(weight, rows)
    ]
    scales = torch.cat([s for s, _ in parts])
    zeros = [z for _, z in parts if z is not None]
    return scales, torch.cat(zeros) if zeros else None


def enumerate_rows(x: Tensor, rows: int) -> list[tuple[int, Tensor]]:
    """``(first row, rows)`` in pieces."""
    return [(a, x[a : a + rows]) for a in range(0, len(x), rows)]


def quantize_to(weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest codes, uint8 ``[out_features, in_features]``."""
    w = _grouped(weight, scheme)
    return _nearest(w, scales, zeros, scheme).to(torch.uint8).view(weight.shape)


def _grouped(x: Tensor, scheme: Scheme) -> Tensor:
    return x.reshape(len(x), -1, scheme.width(x.shape[1]))


def _nearest(w: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes as floats, shape of ``w`` ``[out, groups, width]``."""
    z = scheme.middle if zeros is None else zeros.to(w)[..., None]
    return (w / scales[..., None]).add_(z).round_().clamp_(0, scheme.levels - 1)


def _error(w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    z = scheme.middle if zeros is None else zeros.to(w)[..., None]
    back = _nearest(w, scales, zeros, scheme).sub_(z).mul_(scales[..., None])
    return back.sub_(w).square_().mul_(h).sum(-1)


class _Best:
    """The candidates of least error so far."""

    def __init__(self, scales: Tensor, zeros: Tensor | None, error: Tensor) -> None:
        self.scales, self.zeros, self.error = scales, zeros, error

    def offer(self, scales: Tensor, zeros: Tensor | None, error: Tensor) -> None:
        """Take them where they are better."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, scales, self.scales)
        if self.zeros is not None and zeros is not None:
            self.zeros = torch.where(better, zeros.to(self.zeros), self.zeros)


class _Sums:
    """What the error of codes depends on: with ``c = code - zero`` it is quadratic in the scale."""

    def __init__(self, w: Tensor, h: Tensor) -> None:
        self.h, self.hw = h, h * w
        self.hww = (self.hw * w).sum(-1)

    def of(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """``sum h w c`` and ``sum h c^2``; ``c`` is used up."""
        return (self.hw * c).sum(-1), c.square_().mul_(self.h).sum(-1)

    def error(self, s: Tensor, hwc: Tensor, hcc: Tensor) -> Tensor:
        """``sum h (w - s c)^2``."""
        return self.hww - s * (2.0 * hwc - s * hcc)


def _polished(
    w: Tensor, sums: _Sums, first: _Best, found: _Best, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """The better of two with the codes nearest to them, its scale refitted to those as long as that helps."""
    first.offer(found.scales, found.zeros, _error(w, sums.h, found.scales, found.zeros, scheme))
    for _ in range(POLISH):
        z = scheme.middle if first.zeros is None else first.zeros.to(w)[..., None]
        hwc, hcc = sums.of(_nearest(w, first.scales, first.zeros, scheme).sub_(z))
        fitted = hwc / hcc.clamp_min(1e-30)
        same = (fitted == 0) | (fitted * first.scales < 0)
        candidate = on_grid(torch.where(same, first.scales, fitted))
        first.offer(candidate, first.zeros, _error(w, sums.h, candidate, first.zeros, scheme))
    return first.scales, first.zeros


def _search_symmetric(w: Tensor, h: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    at = w.abs().argmax(-1, keepdim=True)
    largest = w.gather(-1, at)[..., 0]  # with its sign: it maps to code 0, the far end
    scale = on_grid(largest / -scheme.middle)
    sums = _Sums(w, h)
    first = _Best(scale, None, _error(w, h, scale, None, scheme))
    found = _Best(scale, None, torch.full_like(scale, torch.inf))
    low, high = -scheme.middle, scheme.middle - 1
    for k in range(STEPS):
        size = 1.0 + 0.5 / scheme.middle - (1.0 - SHRINK) * k / (STEPS - 1)
        for sign in (-1.0, 1.0):
            start = _nonzero(largest * (sign * size / scheme.middle))
            hwc, hcc = sums.of((w / start[..., None]).round_().clamp_(low, high))
            fitted = hwc / hcc.clamp_min(1e-30)
            candidate = on_grid(torch.where(fitted == 0, start, fitted))
            found.offer(candidate, None, sums.error(candidate, hwc, hcc))
    return _polished(w, sums, first, found, scheme)


def _search_asymmetric(w: Tensor, h: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    low, high = _range(w, scheme)
    top = scheme.levels - 1
    scale = on_grid((high - low) / top)
    zero = _zero(low, scale, scheme)
    sums = _Sums(w, h)
    first = _Best(scale, zero, _error(w, h, scale, zero, scheme))
    found = _Best(scale, zero, torch.full_like(scale, torch.inf))
    total = h.sum(-1).clamp_min(1e-30)
    hw = sums.hw.sum(-1)
    for k in range(STEPS):
        size = 1.05 - (1.05 - SHRINK) * k / (STEPS - 1)
        start = _nonzero((high - low) * size / top)
        for shift in (0.0, 0.5, 1.0):  # which end is cut
            begin = low + (high - low) * (1.0 - size) * shift
            q = _nearest(w, start, _zero(begin, start, scheme), scheme)
            hq = (h * q).sum(-1)
            hwq, hqq = sums.of(q)
            # least squares for w ~ s q + m, then the nearest zero, then s again for that zero
            spread = hqq - hq * hq / total
            s = (hwq - hw * hq / total) / spread.clamp_min(1e-30)
            s = torch.where((s > 0) & torch.isfinite(s), s, start)
            z = torch.round((hq - hw / s) / total).clamp(1, top)
            hwc, hcc = hwq - z * hw, hqq - z * (2.0 * hq - z * total)
            fitted = hwc / hcc.clamp_min(1e-30)
            candidate = on_grid(torch.where(fitted > 0, fitted, s))
            found.offer(candidate, z, sums.error(candidate, hwc, hcc))
    return _polished(w, sums, first, found, scheme)


def _range(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """What the codes shall reach: every weight, and a step below nothing, so that code 1 at least is zero."""
    high = w.amax(-1).clamp_min(0.0)
    return torch.minimum(w.amin(-1).clamp_max(0.0), -high / (scheme.levels - 2)), high


def _zero(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """From 1 on: GPTQ's files store zeros less one, and one set of codes shall fit every format."""
    return torch.round(-low / scale).clamp(1, scheme.levels - 1).to(torch.uint8)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.full_like(scale, 2.0**-14), scale)
