"""The simple types exactly as llama.cpp encodes them without importance, bit for bit.

Source: quantize_row_q8_0_ref, quantize_row_q4_0_ref, quantize_row_q4_1_ref in ggml-quants.c. Every operation is one
float32 operation there and here, so codes agree too, except where C converts NaN or infinity to an integer: rows of
denormals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .types import FORMATS, Fields, to_half


def _q8_0(w: Tensor) -> tuple[Tensor, Tensor, None]:
    d = w.abs().amax(-1) / 127
    x = w * _inverse(d)[..., None]
    # half away from zero, as C's roundf
    q = torch.trunc(x + torch.copysign(torch.tensor(0.5), x))
    # the addition itself may round up where the fraction is just below one half
    q = torch.where((x - torch.trunc(x)).abs() < 0.5, torch.trunc(x), q)
    return q.clamp_(-127, 127) + 128, d, None


def _q4_0(w: Tensor) -> tuple[Tensor, Tensor, None]:
    # the first of equally large weights decides, with its sign; zeros have none
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    d = torch.where(largest == 0, torch.zeros_like(largest), largest) / -8
    return torch.trunc(w * _inverse(d)[..., None] + 8.5).clamp_(0, 15), d, None


def _q4_1(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = w.gather(-1, w.argmin(-1, keepdim=True))[..., 0]  # of two zeros the first, with its sign
    d = (w.amax(-1) - low) / 15
    return torch.trunc((w - low[..., None]) * _inverse(d)[..., None] + 0.5).clamp_(0, 15), d, low


_ENCODERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}
PLAIN = frozenset(_ENCODERS)


def encode_plain(weight: Tensor, name: str) -> Fields:
    """Fields as llama.cpp chooses them.

    Args:
        weight: float32 ``[out_features, in_features]``, finite.
        name: one of :data:`PLAIN`.
    """
    f = FORMATS[name]
    w = weight.view(len(weight), -1, f.weights)
    codes, d, low = _ENCODERS[name](w)
    d = to_half(d)
    dmin = None if low is None else -to_half(low)
    return Fields(f, codes.to(torch.uint8).view(weight.shape), d, dmin=dmin)


def _inverse(d: Tensor) -> Tensor:
    """As in C; but where that is infinite (denormals, whose float16 scale is 0), codes do not matter and are those of zero."""
    x = 1 / d
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))
