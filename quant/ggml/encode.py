"""Weights into ggml blocks: plain, weighted by an importance matrix, or rounded with the inputs' Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...formats.errors import LossyError, NonFiniteError, ShapeError
from ..factor import Factor, damped
from . import hessian as hessian_rounding
from . import layout
from .plain import PLAIN, encode_plain
from .search import search
from .types import BlockFormat, Fields, block_format

_ELEMENTS = 1 << 21  # searched at once


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight in native blocks.

    Attributes:
        format: the block type.
        data: uint8 ``[out_features, row_bytes]``, as the file holds it.
    """

    format: BlockFormat
    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        rows, row_bytes = self.data.shape
        return rows, row_bytes // self.format.nbytes * self.format.weights

    def fields(self) -> Fields:
        """Codes and scales."""
        return layout.unpack(self.data, self.format)

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``, the bits that llama.cpp and gguf decode."""
        return self.fields().dequantize()


def encode(
    weight: Tensor,
    name: str,
    *,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    factor: Factor | None = None,
    rounds: int = 3,
    sweeps: int = 2,
) -> Blocks:
    """Quantize a weight to a block type.

    Args:
        weight: ``[out_features, in_features]``, any float dtype.
        name: one of :data:`.types.FORMATS`, in either case.
        importance: weight of each column's squared error ``[in_features]``, such as an imatrix; ignored with a Hessian.
        hessian: second moments of the inputs ``[in_features, in_features]``.
        factor: ``factor(hessian)``, required with a Hessian.
        rounds: of the refinement after LDLQ.
        sweeps: over the codes per round.

    Returns:
        Without importance and Hessian, Q8_0, Q4_0 and Q4_1 are llama.cpp's own bytes; the other types
        have the least squared error found.

    Raises:
        UsageError: no such type, or rows do not divide into its blocks.
        ShapeError: importance, Hessian or factor do not fit the weight.
        LossyError: a weight is larger than the type can hold.
        NonFiniteError: NaN or infinity in the weight, importance or Hessian.
    """
    f = block_format(name)
    _check(weight, f, importance, hessian, factor)
    w = weight.detach().float().contiguous()
    if hessian is None and importance is None and f.name in PLAIN:
        return Blocks(f, layout.pack(encode_plain(w, f.name)))
    unit = row_unit(w)
    scaled = w / unit
    h = hessian.diagonal() if hessian is not None else importance
    fields = _search(scaled, f, _positive(h, w), unit)
    if hessian is not None and factor is not None:
        fields = hessian_rounding.round_into(scaled, fields, factor)
        hessian = hessian.float()
        with damped(hessian, factor.damp):
            fields = hessian_rounding.refine(
                scaled, fields, hessian, unit, rounds=rounds, sweeps=sweeps
            )
    return Blocks(f, layout.pack(in_units(fields, unit)))


def in_units(fields: Fields, unit: Tensor) -> Fields:
    """Scales in units of ``unit`` as they are stored."""
    return replace(
        fields, d=fields.d * unit, dmin=None if fields.dmin is None else fields.dmin * unit
    )


def row_unit(weight: Tensor) -> Tensor:
    """A power of two near every row's largest weight, float32 ``[out_features, 1]``."""
    _, exponent = torch.frexp(weight.abs().amax(1, keepdim=True))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp_min(-100))


def _search(w: Tensor, f: BlockFormat, h: Tensor, unit: Tensor) -> Fields:
    rows = max(1, _ELEMENTS // w.shape[1])
    parts = [search(w[a : a + rows], f, h, unit[a : a + rows]) for a in range(0, len(w), rows)]

    def join(get: Callable[[Fields], Tensor | None]) -> Tensor | None:
        found = [x for x in map(get, parts) if x is not None]
        return torch.cat(found) if found else None

    codes, d = torch.cat([p.codes for p in parts]), torch.cat([p.d for p in parts])
    return Fields(f, codes, d, join(lambda p: p.sc), join(lambda p: p.dmin), join(lambda p: p.m))


def _positive(h: Tensor | None, w: Tensor) -> Tensor:
    """Mean 1, and nowhere nothing: a column that was never used still has a nearest value."""
    if h is None:
        return torch.ones(w.shape[1], device=w.device)
    h = h.double()
    mean = float(h.mean())
    if mean <= 0:
        return torch.ones(w.shape[1], device=w.device)
    return (h / mean).clamp_min(1e-6).float()


def _check(
    weight: Tensor,
    f: BlockFormat,
    importance: Tensor | None,
    hessian: Tensor | None,
    factor: Factor | None,
) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise ShapeError(
            f"a weight of shape {list(weight.shape)} cannot be quantized; expected [out, in]."
        )
    n = weight.shape[1]
    f.row_bytes(n)
    wanted = {"importance": (importance, (n,)), "Hessian": (hessian, (n, n))}
    for what, (x, shape) in (("weight", (weight, tuple(weight.shape))), *wanted.items()):
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ShapeError(f"the {what} has shape {list(x.shape)}, expected {list(shape)}.")
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError(f"the {what} holds NaN or infinity.")
    if (largest := float(weight.abs().max())) > f.limit:
        raise LossyError(
            f"weights as large as {largest:g}; {f.name} holds up to {f.limit:g}.",
            fix="keep this tensor in bf16 or f32.",
        )
    if hessian is not None and (factor is None or len(factor.order) != n):
        raise ShapeError(
            f"the Hessian's factor is missing or not of {n} columns.",
            fix="pass factor=factor(hessian).",
        )
