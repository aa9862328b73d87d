"""Every layout of uniform weights, which of them holds what, and how a checkpoint's configuration tells them apart on reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product
from typing import Any

from ..base import Source, Tensor
from ..dtypes import FLOATS, I8
from ..errors import (
    ExtraTensorError,
    FormatError,
    InputError,
    LimitError,
    MissingTensorError,
    UsageError,
    printable,
)
from ..names import listing
from . import awq, compressed_tensors, gptq, mlx, torch_int8
from .uniform import Grid, Options, PackedFormat, Parts, UniformTensor, UniformWeight


def _opened_by_combine(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    raise NotImplementedError("torch_int8.combine opens these; no configuration says what they are")


TORCH_INT8 = PackedFormat(
    "torch-int8",
    (".weight", ".weight_scaler"),
    (),
    torch_int8.fault,
    torch_int8.layout,
    torch_int8.pack,
    _opened_by_combine,
)
FORMATS: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        compressed_tensors.PACK_QUANTIZED,
        compressed_tensors.INT_QUANTIZED,
        gptq.FORMAT,
        awq.FORMAT,
        mlx.FORMAT,
        TORCH_INT8,
    )
}


def require(name: str, grids: Mapping[str, Grid]) -> None:
    """Refuse a format that cannot hold these weights, naming those that can.

    Args:
        name: of the format.
        grids: tensor name -> size and scheme.

    Raises:
        UsageError: no such format, or it cannot hold one of them.
    """
    if name not in FORMATS:
        raise UsageError(
            f"{printable(name, 60)} is not a format of uniform weights.",
            fix=f"use one of {', '.join(FORMATS)}.",
        )
    faults = {n: why for n, grid in grids.items() if (why := FORMATS[name].fault(grid))}
    if not faults:
        return
    tensor, why = next(iter(faults.items()))
    also = f" (and {len(faults) - 1} more tensors)" if len(faults) > 1 else ""
    able = [f.name for f in FORMATS.values() if not any(f.fault(grid) for grid in grids.values())]
    ways = [f"--format {' or '.join(able)}"] if able else []
    if held := _held_scheme(name, grids):
        ways.append(f"{held}, which {name} holds")
    raise UsageError(
        f"{name} cannot hold {grids[tensor]} [{grids[tensor].out_features}, {grids[tensor].in_features}]: {why}{also}.",
        tensor=tensor,
        fix=f"use {', or '.join(ways) or 'another scheme'}.",
        found=str(grids[tensor]),
        expected=able,
    )


def _held_scheme(name: str, grids: Mapping[str, Grid]) -> str:
    """Options of a scheme near the wanted ones that a format holds for all these weights; empty where there is none."""
    wanted = next(iter(grids.values()))
    schemes = product((8, 4, 3, 2), (32, 64, 128, -1), (True, False))
    near = sorted(
        schemes,
        key=lambda s: (
            s[2] != wanted.symmetric,
            abs(s[0] - wanted.bits),
            s[1] != wanted.group_size,
        ),
    )
    for bits, size, symmetric in near:
        if size > 0 and any(g.in_features % size for g in grids.values()):
            continue
        tried = (
            dataclasses.replace(
                g, bits=bits, group_size=g.in_features if size < 0 else size, symmetric=symmetric
            )
            for g in grids.values()
        )
        if not any(FORMATS[name].fault(g) for g in tried):
            return f"--bits {bits} --group-size {size} {'--sym' if symmetric else '--asym'}"
    return ""


# ---------------------------------------------------------------- reading

# quant_method -> layouts its checkpoints are made of
_METHODS: dict[str, tuple[PackedFormat, ...]] = {
    "compressed-tensors": (compressed_tensors.PACK_QUANTIZED, compressed_tensors.INT_QUANTIZED),
    "gptq": (gptq.FORMAT,),
    "awq": (awq.FORMAT,),
    "mlx": (mlx.FORMAT,),
}
_CT_FORMATS = ("pack-quantized", "int-quantized", "mixed-precision", "dense")
_LEADS = tuple({f.suffixes[0] for formats in _METHODS.values() for f in formats} - {".weight"})
_MAX_TENSORS = 1_000_000


def looks_packed(source: Source) -> bool:
    """Whether tensors are there that only a quantized checkpoint has: integers, or names of packed weights."""
    return named_packed(source) or any(
        t.dtype not in FLOATS and name.endswith(".weight") for name, t in source.tensors.items()
    )


def named_packed(source: Source) -> bool:
    """Whether there are names that only packed weights have."""
    return any(name.endswith(_LEADS) for name in source.tensors)


def quantization_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The method and its options that a config.json names; None where it names none.

    MLX writes ``quantization`` and repeats it as a ``quantization_config`` without ``quant_method``.
    """
    for key in ("quantization_config", "compression_config", "quantization"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        method = found.get("quant_method")
        if method is None and {"bits", "group_size"} <= found.keys():
            method = "mlx"
        elif method is None and "config_groups" in found:
            method = "compressed-tensors"
        return str(method), dict(found)
    return None


def combine(source: Source, config: Mapping[str, Any] | None) -> Source:
    """The source with every packed weight as one float32 tensor ``X.weight`` whose ``quantized`` is set.

    Headers decide; values are read, and judged, only when rows are.

    Args:
        source: an opened container that :func:`looks_packed`.
        config: the checkpoint's config.json, whose quantization_config says what it is; None where there is none.

    Raises:
        FormatError: no configuration, or a method, a version or a value that is not known; names what is.
        MissingTensorError: a part of a weight is absent.
        ExtraTensorError: parts without a weight, or a weight twice.
        ShapeError, DtypeError: a part is not what its layout says.
    """
    found = quantization_of(config or {})
    if found is None:
        raise FormatError(
            "the weights are packed, and no quantization_config says how.",
            where=source.path,
            fix="put the checkpoint's own config.json beside the weights; it has a quantization_config.",
        )
    method, options = found
    if method not in _METHODS:
        raise FormatError(
            f"quantized by {printable(method, 60)}; known are {', '.join(_METHODS)}, GGUF's types and "
            "gemma_pytorch's int8.",
            where=source.path,
            fix="open the unquantized checkpoint.",
        )
    kind = options.get("format")
    if method == "compressed-tensors" and kind not in _CT_FORMATS:
        raise FormatError(
            f"compressed-tensors of format {printable(str(kind), 60)}; known are {', '.join(_CT_FORMATS)}.",
            where=source.path,
            fix="open the unquantized checkpoint.",
        )
    return _combined(source, _METHODS[method], options)


def _combined(source: Source, formats: tuple[PackedFormat, ...], options: Options) -> Source:
    have = source.tensors
    if len(have) > _MAX_TENSORS:
        raise LimitError(f"{len(have)} tensors.", where=source.path)
    parts: dict[str, tuple[PackedFormat, dict[str, Tensor]]] = {}
    for form in formats:
        for prefix in _prefixes(have, form):
            held = {s: have[prefix + s] for s in form.suffixes if prefix + s in have}
            if prefix in parts:
                raise ExtraTensorError(
                    "this weight is there twice, packed in two ways.",
                    where=source.path,
                    tensor=prefix + ".weight",
                )
            parts[prefix] = form, held
    _require_whole(source, parts)
    opened = {}
    for prefix, (form, held) in parts.items():
        weight = form.open(prefix, held, options)
        opened[prefix + form.suffixes[0]] = UniformTensor(prefix + ".weight", weight)
    used = {prefix + s for prefix, (_, held) in parts.items() for s in held}
    _require_alone(source, formats, used, parts)
    tensors: dict[str, Tensor] = {}
    for name, tensor in have.items():
        if name in opened:
            tensors[opened[name].name] = opened[name]
        elif name not in used:
            tensors[name] = tensor
    return dataclasses.replace(source, tensors=tensors)


def _prefixes(have: Mapping[str, Tensor], form: PackedFormat) -> list[str]:
    lead = form.suffixes[0]
    names = [n for n in have if n.endswith(lead)]
    if lead == ".weight":  # plain weights are called so as well
        names = [n for n in names if have[n].dtype not in FLOATS]
        if form is compressed_tensors.INT_QUANTIZED:
            names = [n for n in names if have[n].dtype == I8]
    return [n.removesuffix(lead) for n in names]


def _require_whole(
    source: Source, parts: Mapping[str, tuple[PackedFormat, Mapping[str, Tensor]]]
) -> None:
    absent = [
        prefix + s
        for prefix, (form, held) in parts.items()
        for s in form.suffixes
        if s not in held and s not in form.optional
    ]
    if absent:
        raise MissingTensorError(
            f"{len(absent)} parts of packed weights are absent: {listing(absent)}.",
            where=source.path,
            fix="the checkpoint is not complete, or its config.json is another's; get it again.",
        )


def _require_alone(
    source: Source,
    formats: tuple[PackedFormat, ...],
    used: set[str],
    parts: Mapping[str, Any],
) -> None:
    """No part may be left over, and no weight be there packed and plain."""
    suffixes = tuple({s for form in formats for s in form.suffixes} - {".weight"})
    left = [n for n in source.tensors if n not in used and n.endswith(suffixes)]
    twice = [p + ".weight" for p in parts if p + ".weight" in source.tensors.keys() - used]
    error: InputError | None = None
    if left:
        error = ExtraTensorError(
            f"{len(left)} parts belong to no packed weight: {listing(left)}.",
            where=source.path,
            fix="the checkpoint mixes files of two models, or is not complete; get it again.",
        )
    elif twice:
        error = ExtraTensorError(
            f"{len(twice)} weights are there packed and plain: {listing(twice)}.",
            where=source.path,
            fix="remove one of the two.",
        )
    if error:
        raise error
