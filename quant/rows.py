"""Codes out of an opened checkpoint.

Any uniform layout gives back the codes that went in, so quantized formats convert into each other exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..convert.open import Checkpoint, LazyTensor
from ..formats.base import Array
from ..formats.dtypes import F32
from ..formats.errors import ChecksumError, UsageError
from ..formats.fingerprint import TensorHasher
from ..formats.packed.torch_int8 import TorchInt8Weight
from ..formats.packed.uniform import UniformWeight
from .scheme import BITS, GROUP_SIZES, Codes, Scheme


@dataclass(frozen=True)
class Rows:
    """Some rows of a uniform weight.

    Attributes:
        codes: uint8 ``[rows, in]``.
        scales: float32 ``[rows, groups]``.
        zeros: uint8 ``[rows, groups]``.
    """

    codes: Array
    scales: Array
    zeros: Array

    @classmethod
    def of(cls, codes: Codes, start: int, stop: int) -> Rows:
        """Rows ``start:stop`` of codes in memory."""
        scales = codes.scales[start:stop].numpy()
        zeros = np.full(scales.shape, codes.scheme.middle, np.uint8)
        if codes.zeros is not None:
            zeros = codes.zeros[start:stop].numpy()
        return cls(codes.codes[start:stop].numpy(), scales, zeros)

    @property
    def centred(self) -> Array:
        """``code - zero`` as int16, which together with the scales is the weight."""
        grouped = self.codes.reshape(*self.scales.shape, -1).astype(np.int16)
        return (grouped - self.zeros[..., None].astype(np.int16)).reshape(self.codes.shape)

    def same(self, other: Rows) -> bool:
        """Whether both are the same weights, code for code and scale for scale."""
        return np.array_equal(self.scales, other.scales) and np.array_equal(
            self.centred, other.centred
        )


def read_rows(tensor: LazyTensor, start: int, stop: int) -> Rows:
    """Rows of an opened weight, as codes.

    Raises:
        UsageError: it is no uniform weight, or its groups are not runs of columns.
    """
    packed = tensor.source.quantized
    _, index, _ = tensor.placement.rows(start, stop)  # q, k and v may lie in one matrix
    rows = (index[0],)
    if isinstance(packed, TorchInt8Weight):
        codes = packed.codes.read(rows).view(np.uint8) ^ np.uint8(0x80)
        scales = packed.scales.read(rows).astype(np.float32)[:, None]
        return Rows(codes, scales, np.full(scales.shape, 128, np.uint8))
    weight = _uniform(tensor)
    scales = weight.scales.read(rows).astype(np.float32)
    zeros = np.full(scales.shape, weight.grid.middle, np.uint8)
    if weight.zeros is not None:
        zeros = weight.zeros.read(rows)
    return Rows(weight.codes.read(rows), scales, zeros)


def _uniform(tensor: LazyTensor) -> UniformWeight:
    packed = tensor.source.quantized
    if not isinstance(packed, UniformWeight) or packed.group_of is not None:
        how = (
            "by activation order" if isinstance(packed, UniformWeight) else "not in uniform groups"
        )
        raise UsageError(
            f"stored as {tensor.source.stored}, {how}: there are no codes to keep.",
            where=tensor.source.where,
            tensor=tensor.name,
            fix="quantize it again with g2quant --allow-requantize.",
        )
    return packed


def scheme_of(tensor: LazyTensor, *, symmetric: bool) -> Scheme:
    """The scheme a uniform weight was stored in.

    Raises:
        UsageError: not one that g2quant has.
    """
    if isinstance(tensor.source.quantized, TorchInt8Weight):
        return Scheme(8, -1, True)
    grid = _uniform(tensor).grid
    group = -1 if grid.groups == 1 and grid.group_size not in GROUP_SIZES else grid.group_size
    if grid.bits not in BITS or group not in GROUP_SIZES:
        raise UsageError(
            f"stored as {tensor.source.stored}; g2quant has {BITS} bits and group sizes {GROUP_SIZES}.",
            where=tensor.source.where,
            tensor=tensor.name,
        )
    return Scheme(grid.bits, group, symmetric)


class CheckpointCodes(Mapping[str, Codes | Tensor]):
    """The quantized weights of an opened checkpoint, read when asked for; what :func:`g2kit.quant.export.export` takes.

    Args:
        checkpoint: of any uniform layout.

    Raises:
        UsageError: it holds no quantized weights, or such that have no codes (GGUF's k-quants).
        ChecksumError: on reading a weight that is not the one of the checkpoint's manifest.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = {n: checkpoint.tensors[n] for n in checkpoint.quantized}
        self._entries = checkpoint.sidecars.manifest_tensors or {}
        if not self._tensors:
            raise UsageError(
                "nothing in this checkpoint is quantized.",
                where=checkpoint.path,
                fix="quantize it with g2quant first.",
            )
        self._schemes = {n: self._scheme(t) for n, t in self._tensors.items()}

    @staticmethod
    def _scheme(tensor: LazyTensor) -> Scheme:
        scheme = scheme_of(tensor, symmetric=True)
        packed = tensor.source.quantized
        if isinstance(packed, UniformWeight) and packed.zeros is not None:
            zeros = packed.zeros.read()  # GPTQ, AWQ and MLX store the middle too
            symmetric = bool((zeros == scheme.middle).all())
            return scheme if symmetric else scheme_of(tensor, symmetric=False)
        return scheme

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a weight, without reading its codes."""
        return self._schemes[name]

    def __getitem__(self, name: str) -> Codes:
        tensor, scheme = self._tensors[name], self._schemes[name]
        rows = read_rows(tensor, 0, tensor.shape[0])
        zeros = None if scheme.symmetric else torch.from_numpy(rows.zeros.copy())
        codes = Codes(scheme, torch.from_numpy(rows.codes), torch.from_numpy(rows.scales), zeros)
        self._require_promised(name, codes)
        return codes

    def _require_promised(self, name: str, codes: Codes) -> None:
        """The weight whose hash the checkpoint's own manifest has, where it has one."""
        entry = self._entries.get(name)
        if entry is None:
            return
        hasher = TensorHasher(name, F32, tuple(codes.codes.shape))
        hasher.update(codes.dequantize().numpy() + np.float32(0))  # -0 is 0, as readers have it
        if hasher.hexdigest() != entry.sha256:
            raise ChecksumError(
                "its codes are not those that the checkpoint's manifest names; a file was damaged or exchanged.",
                where=self._tensors[name].source.where,
                tensor=name,
                fix="get the checkpoint again.",
                found=hasher.hexdigest(),
                expected=entry.sha256,
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
