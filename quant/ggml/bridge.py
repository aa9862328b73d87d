"""Uniform codes as ggml blocks, where both hold the same values: groups of 32 are Q4_0, Q4_1 and Q8_0 blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...formats.errors import LossyError, UsageError
from ..scheme import Codes, Scheme
from . import layout
from .encode import Blocks
from .types import FORMATS, Fields, to_half

_TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
FITTING = ", ".join(f"{Scheme(b, 32, s)} ({t})" for (b, s), t in _TYPES.items())
FORMATS_OF_CODES = tuple(f"gguf-{t.lower()}" for t in _TYPES.values())


def type_for(scheme: Scheme) -> str | None:
    """The block type that holds a scheme's values, or None."""
    return _TYPES.get((scheme.bits, scheme.symmetric)) if scheme.group_size == 32 else None


def blocks_of(codes: Codes, *, allow_rounding: bool = False) -> Blocks:
    """The same weight in blocks.

    Args:
        codes: 4 bits, or symmetric 8 bits, in groups of 32.
        allow_rounding: accept offsets (zero times scale) that float16 rounds, by 2**-12 of their size at most.

    Raises:
        UsageError: no block type holds the scheme.
        LossyError: an offset is not exact in float16.
    """
    s = codes.scheme
    name = type_for(s)
    if name is None:
        raise UsageError(
            f"no GGUF block type holds {s}.", fix=f"use {FITTING}, or quantize into a k-quant."
        )
    fields = Fields(FORMATS[name], codes.codes, codes.scales)
    if codes.zeros is not None:
        wanted = codes.zeros.float() * codes.scales
        stored = to_half(wanted)
        if (rounded := int(torch.count_nonzero(stored != wanted))) and not allow_rounding:
            raise LossyError(
                f"{rounded} of {stored.numel()} offsets (zero times scale) are not exact in Q4_1's float16.",
                fix="use symmetric codes (Q4_0), or quantize into a GGUF type.",
            )
        fields = Fields(FORMATS[name], codes.codes, codes.scales, dmin=stored)
    return Blocks(FORMATS[name], layout.pack(fields))


class BlocksOfCodes(Mapping[str, Any]):
    """Kept codes as the blocks that :func:`.export.export_gguf` takes, made when asked for.

    Args:
        codes: canonical name -> codes or floats, with ``scheme_of``; see :class:`..codes_file.CodesFile`.
        format: ``gguf-TYPE``, the type of most of them.
        where: of the codes, for messages.

    Raises:
        UsageError: a scheme that no block type holds, or ``format`` is another type's; names what fits.
    """

    def __init__(self, codes: Any, format: str, where: Path) -> None:
        self._codes = codes
        self.source_fingerprint = getattr(codes, "source_fingerprint", None)
        self._types: dict[str, str | None] = {}
        for name in codes:
            scheme = codes.scheme_of(name)
            found = None if scheme is None else type_for(scheme)
            if scheme is not None and found is None:
                raise UsageError(
                    f"{format} cannot hold {scheme}.", where=where, tensor=name, found=str(scheme),
                    fix=f"GGUF holds {FITTING}; use one of the other formats, or quantize into a GGUF type.",
                )  # fmt: skip
            self._types[name] = found
        common = Counter(t for t in self._types.values() if t).most_common(1)
        if common and f"gguf-{common[0][0].lower()}" != format:
            raise UsageError(
                f"{format} is another type than these codes, {common[0][0]}.", where=where,
                fix=f"use --format gguf-{common[0][0].lower()}.",
            )  # fmt: skip

    def type_of(self, name: str) -> str | None:
        """The block type of a weight, None for floats; without reading it."""
        return self._types[name]

    def __getitem__(self, name: str) -> Any:
        value = self._codes[name]
        return blocks_of(value) if isinstance(value, Codes) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)
