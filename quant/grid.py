"""Scales and zeros of groups, chosen so that rounding loses least where it matters.

The loss of a group is ``sum_i h_i (w_i - w'_i)^2`` with ``h`` the Hessian's diagonal. Every candidate
scale is refitted in closed form to the codes it gives (least squares), brought onto the grid of scales that can be
stored, and judged with the codes it gives then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Scheme, on_grid

STEPS = 26  # candidate sizes of the range
SHRINK = 0.55  # the smallest, relative to what holds every weight
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
    low, high = _range(w)
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


def _search_symmetric(w: Tensor, h: Tensor, scheme: Scheme) -> tuple[Tensor, None]:
    at = w.abs().argmax(-1, keepdim=True)
    largest = w.gather(-1, at)[..., 0]  # with its sign: it maps to code 0, the far end
    best = on_grid(largest / -scheme.middle)
    least = _error(w, h, best, None, scheme)
    hw = h * w
    for k in range(STEPS):
        size = 1.0 + 0.5 / scheme.middle - (1.0 - SHRINK) * k / (STEPS - 1)
        for sign in (-1.0, 1.0):
            start = largest * (sign * size / scheme.middle)
            q = _nearest(w, _nonzero(start), None, scheme).sub_(scheme.middle)
            over = (hw * q).sum(-1)
            fitted = over / q.square_().mul_(h).sum(-1).clamp_min(1e-30)
            candidate = on_grid(torch.where(fitted == 0, start, fitted))
            error = _error(w, h, candidate, None, scheme)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best, None


def _search_asymmetric(w: Tensor, h: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    low, high = _range(w)
    best = on_grid((high - low) / (scheme.levels - 1))
    zero = _zero(low, best, scheme)
    least = _error(w, h, best, zero, scheme)
    total = h.sum(-1).clamp_min(1e-30)
    for k in range(STEPS):
        size = 1.05 - (1.05 - SHRINK) * k / (STEPS - 1)
        start = _nonzero((high - low) * size / (scheme.levels - 1))
        for shift in (0.0, 0.5, 1.0):  # which end is cut
            begin = low + (high - low) * (1.0 - size) * shift
            z = _zero(begin, start, scheme)
            q = _nearest(w, start, z, scheme)
            # least squares for w ~ s q + m, then the nearest zero, then s again for that zero
            qm, wm = (h * q).sum(-1) / total, (h * w).sum(-1) / total
            spread = (h * q * q).sum(-1) / total - qm * qm
            s = ((h * w * q).sum(-1) / total - wm * qm) / spread.clamp_min(1e-30)
            s = torch.where((s > 0) & torch.isfinite(s), s, start)
            z = torch.round(qm - wm / s).clamp(0, scheme.levels - 1)
            c = q - z[..., None]
            fitted = (h * w * c).sum(-1) / (h * c * c).sum(-1).clamp_min(1e-30)
            candidate = on_grid(torch.where(fitted > 0, fitted, s))
            error = _error(w, h, candidate, z, scheme)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
            zero = torch.where(better, z.to(zero), zero)
    return best, zero


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight; zero always lies between, so that it is a code."""
    return w.amin(-1).clamp_max(0.0), w.amax(-1).clamp_min(0.0)


def _zero(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    return torch.round(-low / scale).clamp(0, scheme.levels - 1).to(torch.uint8)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.full_like(scale, 2.0**-14), scale)
