"""Fields into ggml's bytes and back, every bit as llama.cpp lays it out.

Pieces of a block are named in the order they are stored; weights of a nibble lie half a run apart (ggml's SIMD order).
Source: ggml-common.h (structs), ggml-quants.c (bit orders) of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import BlockFormat, Fields

Parts = dict[str, Tensor]  # uint8 [blocks, bytes]


def pack(fields: Fields) -> Tensor:
    """The native bytes, uint8 ``[out_features, row_bytes]``."""
    f = fields.format
    out, width = fields.codes.shape
    row_bytes = f.row_bytes(width)
    parts = _LAYOUTS[f.name].pack(_Raw.of(fields))
    packed = torch.cat([parts[name] for name, _ in _LAYOUTS[f.name].pieces], 1)
    return packed.view(out, row_bytes)


def unpack(data: Tensor, f: BlockFormat) -> Fields:
    """Fields of native bytes ``[out_features, row_bytes]``."""
    out = len(data)
    layout = _LAYOUTS[f.name]
    sizes = [size for _, size in layout.pieces]
    blocks = data.reshape(-1, f.nbytes)
    parts = dict(
        zip([name for name, _ in layout.pieces], torch.split(blocks, sizes, 1), strict=True)
    )
    raw = layout.unpack(parts)
    return Fields(
        f,
        raw.codes.reshape(out, -1),
        raw.d.reshape(out, -1),
        None if raw.sc is None else raw.sc.reshape(out, -1),
        None if raw.dmin is None else raw.dmin.reshape(out, -1),
        None if raw.m is None else raw.m.reshape(out, -1),
    )


@dataclass(frozen=True, eq=False)
class _Raw:
    """Fields block by block: codes uint8 ``[blocks, weights]``, d ``[blocks]``, sc and m int16 ``[blocks, sub-blocks]``."""

    codes: Tensor
    d: Tensor
    sc: Tensor | None = None
    dmin: Tensor | None = None
    m: Tensor | None = None

    @classmethod
    def of(cls, x: Fields) -> _Raw:
        f = x.format
        codes = x.codes.reshape(-1, f.weights)
        sc, m = (None if t is None else t.reshape(-1, f.subs).to(torch.int16) for t in (x.sc, x.m))
        return cls(codes, x.d.reshape(-1), sc, None if x.dmin is None else x.dmin.reshape(-1), m)

    def integers(self) -> tuple[Tensor, Tensor]:
        assert self.sc is not None
        assert self.m is not None
        return self.sc, self.m


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).view(torch.uint8).view(-1, 2)


def _float(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float().view(-1)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Pairs ``run`` weights apart in one byte, the first one low."""
    pairs = codes.view(len(codes), -1, 2, run)
    return ((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).reshape(len(codes), -1)


def _from_nibbles(qs: Tensor, run: int) -> Tensor:
    halves = qs.view(len(qs), -1, 1, run)
    return torch.cat([halves & 15, halves >> 4], 2).reshape(len(qs), -1)


def _planes(bits: Tensor, shifts: Sequence[int]) -> Tensor:
    """``[blocks, n, planes, run]`` small numbers, plane p shifted by shifts[p], into bytes ``[blocks, n * run]``."""
    total = torch.zeros_like(bits[:, :, 0])
    for plane, shift in enumerate(shifts):
        total = total | (bits[:, :, plane] << shift)
    return total.reshape(len(bits), -1)


def _from_planes(data: Tensor, shifts: Sequence[int], run: int, mask: int) -> Tensor:
    wide = data.reshape(len(data), -1, run)
    return torch.stack([(wide >> shift) & mask for shift in shifts], 2).reshape(len(data), -1)


# int8 and codes counted from -128 differ in the highest bit only
def _pack_q8_0(x: _Raw) -> Parts:
    return {"d": _half(x.d), "qs": x.codes ^ 128}


def _unpack_q8_0(p: Parts) -> _Raw:
    return _Raw(p["qs"] ^ 128, _float(p["d"]))


def _pack_q4(x: _Raw) -> Parts:
    parts = {"d": _half(x.d), "qs": _nibbles(x.codes, 16)}
    return parts if x.dmin is None else parts | {"m": _half(-x.dmin)}


def _unpack_q4(p: Parts) -> _Raw:
    dmin = -_float(p["m"]) if "m" in p else None
    return _Raw(_from_nibbles(p["qs"], 16), _float(p["d"]), dmin=dmin)


def _pack_scales(x: _Raw) -> Tensor:
    """Eight pairs of 6 bits in 12 bytes: low pairs whole, the upper pairs' high bits above them, their low bits behind."""
    sc, m = (t.to(torch.uint8) for t in x.integers())
    low = [t[:, :4] | ((t[:, 4:] >> 4) << 6) for t in (sc, m)]
    return torch.cat([*low, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _unpack_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = torch.split(raw, 4, 1)
    sc = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], 1)
    m = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], 1)
    return sc.to(torch.int16), m.to(torch.int16)


def _pack_k45(x: _Raw) -> Parts:
    assert x.dmin is not None
    high = _planes((x.codes >> 4).view(-1, 1, 8, 32), range(8))
    return {
        "d": _half(x.d), "dmin": _half(x.dmin), "scales": _pack_scales(x), "qh": high, "qs": _nibbles(x.codes, 32),
    }  # fmt: skip


def _unpack_k45(p: Parts) -> _Raw:
    codes = _from_nibbles(p["qs"], 32)
    if "qh" in p:
        codes = codes | (_from_planes(p["qh"], range(8), 32, 1) << 4)
    sc, m = _unpack_scales(p["scales"])
    return _Raw(codes, _float(p["d"]), sc, _float(p["dmin"]), m)


def _pack_q6_k(x: _Raw) -> Parts:
    assert x.sc is not None
    quarters = (x.codes >> 4).view(-1, 2, 4, 32)
    scales = x.sc.to(torch.int8).view(torch.uint8)
    return {
        "ql": _nibbles(x.codes, 64),
        "qh": _planes(quarters, (0, 2, 4, 6)),
        "scales": scales,
        "d": _half(x.d),
    }


def _unpack_q6_k(p: Parts) -> _Raw:
    codes = _from_nibbles(p["ql"], 64) | (_from_planes(p["qh"], (0, 2, 4, 6), 32, 3) << 4)
    return _Raw(codes, _float(p["d"]), p["scales"].contiguous().view(torch.int8).to(torch.int16))


def _pack_q3_k(x: _Raw) -> Parts:
    assert x.sc is not None
    s = (x.sc + 32).to(torch.uint8)
    low = (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4)
    high = _planes((s >> 4).view(-1, 1, 4, 4), (0, 2, 4, 6))
    return {
        "hmask": _planes((x.codes >> 2).view(-1, 1, 8, 32), range(8)),
        "qs": _planes((x.codes & 3).view(-1, 2, 4, 32), (0, 2, 4, 6)),
        "scales": torch.cat([low, high], 1), "d": _half(x.d),
    }  # fmt: skip


def _unpack_q3_k(p: Parts) -> _Raw:
    codes = _from_planes(p["qs"], (0, 2, 4, 6), 32, 3) | (
        _from_planes(p["hmask"], range(8), 32, 1) << 2
    )
    low, high = torch.split(p["scales"], [8, 4], 1)
    s = torch.cat([low & 15, low >> 4], 1) | (_from_planes(high, (0, 2, 4, 6), 4, 3) << 4)
    return _Raw(codes, _float(p["d"]), s.to(torch.int16) - 32)


def _pack_iq4_xs(x: _Raw) -> Parts:
    assert x.sc is not None
    s = (x.sc + 32).to(torch.uint8)
    high = (s >> 4).view(-1, 2, 4)
    scales_l = (s[:, 0::2] & 15) | ((s[:, 1::2] & 15) << 4)
    scales_h = torch.cat([_planes(high[:, k].view(-1, 1, 4, 1), (0, 2, 4, 6)) for k in range(2)], 1)
    return {
        "d": _half(x.d),
        "scales_h": scales_h,
        "scales_l": scales_l,
        "qs": _nibbles(x.codes, 16),
    }


def _unpack_iq4_xs(p: Parts) -> _Raw:
    low = torch.stack([p["scales_l"] & 15, p["scales_l"] >> 4], 2).reshape(-1, 8)
    high = _from_planes(p["scales_h"], (0, 2, 4, 6), 1, 3)
    return _Raw(
        _from_nibbles(p["qs"], 16), _float(p["d"]), (low | (high << 4)).to(torch.int16) - 32
    )


@dataclass(frozen=True)
class _Layout:
    pieces: tuple[tuple[str, int], ...]
    pack: Callable[[_Raw], Parts]
    unpack: Callable[[Parts], _Raw]


_K4 = (("d", 2), ("dmin", 2), ("scales", 12))
_LAYOUTS: dict[str, _Layout] = {
    "Q8_0": _Layout((("d", 2), ("qs", 32)), _pack_q8_0, _unpack_q8_0),
    "Q4_0": _Layout((("d", 2), ("qs", 16)), _pack_q4, _unpack_q4),
    "Q4_1": _Layout((("d", 2), ("m", 2), ("qs", 16)), _pack_q4, _unpack_q4),
    "Q4_K": _Layout((*_K4, ("qs", 128)), _pack_k45, _unpack_k45),
    "Q5_K": _Layout((*_K4, ("qh", 32), ("qs", 128)), _pack_k45, _unpack_k45),
    "Q6_K": _Layout((("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)), _pack_q6_k, _unpack_q6_k),
    "Q3_K": _Layout(
        (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)), _pack_q3_k, _unpack_q3_k
    ),
    "IQ4_XS": _Layout(
        (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)), _pack_iq4_xs, _unpack_iq4_xs
    ),
}
