"""What an export quantizes, and the checkpoint as the converter shall see it: in-memory tensors in place of the old ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor as TorchTensor

from ..convert.layout import Placement, Reorder
from ..convert.open import Checkpoint, LazyTensor
from ..convert.sidecar_files import CONFIG
from ..formats.base import Array, Index, Tensor
from ..formats.dtypes import BF16, F16, F32
from ..formats.errors import ConflictError, NonFiniteError, ShapeError, UsageError
from ..formats.names import listing
from ..formats.packed.table import require
from ..formats.packed.uniform import Grid
from ..model import canonical
from .export_targets import TARGETS, Target
from .scheme import Codes, Scheme

Value = Codes | TorchTensor
_OURS = ("quantization_config", "compression_config", "quantization")


def schemes_of(codes: Mapping[str, Value], checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Canonical name -> scheme of what is quantized, in forward order.

    Raises:
        UsageError: names the model does not have, nothing quantized, or something that is no matrix.
        ShapeError: codes of another shape than the model's tensor.
    """
    if unknown := sorted(codes.keys() - checkpoint.tensors.keys()):
        raise UsageError(
            f"{len(unknown)} names are no tensors of this model: {listing(unknown)}.",
            where=checkpoint.path,
            fix="pass the checkpoint that was quantized.",
        )
    ask: Callable[[str], Scheme | None] | None = getattr(codes, "scheme_of", None)
    out = {}
    for name in checkpoint.tensors:
        if name not in codes:
            continue
        scheme = ask(name) if ask else _scheme(codes[name])
        if not ask:
            _require_shape(name, codes[name], checkpoint.tensors[name].shape)
        if scheme is not None:
            out[name] = scheme
    if not out:
        raise UsageError("nothing is quantized.", where=checkpoint.path)
    linears = {*canonical.linears(checkpoint.tensors), canonical.EMBED}
    if odd := [n for n in out if n not in linears]:
        raise UsageError(
            f"only linear weights and the embedding are quantized, not {listing(odd)}."
        )
    return out


def _scheme(value: Value) -> Scheme | None:
    return value.scheme if isinstance(value, Codes) else None


def _require_shape(name: str, value: Value, shape: tuple[int, ...]) -> None:
    found = tuple((value.codes if isinstance(value, Codes) else value).shape)
    if found != shape:
        raise ShapeError(
            f"it is {list(found)}, the checkpoint's {list(shape)}.",
            tensor=name,
            fix="pass the checkpoint that was quantized.",
        )


def embedding_scheme(
    target: Target, schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> dict[str, Scheme]:
    """The embedding, where the format wants it quantized and nobody did; refuses what its reader cannot load.

    Raises:
        UsageError: an embedding quantized for a format that keeps it, or linear layers left dense for one that does not.
    """
    if target.embedding == "dense" and canonical.EMBED in schemes:
        able = [t.name for t in TARGETS.values() if t.embedding != "dense"]
        raise UsageError(
            f"readers of {target.name} want the embedding unquantized.",
            tensor=canonical.EMBED,
            fix=f"leave it out, or use --format {' or '.join(able)}.",
        )
    if target.embedding != "quantized":
        return {}
    left = [n for n in canonical.linears(checkpoint.tensors) if n not in schemes]
    if left:
        able = [t.name for t in TARGETS.values() if t.embedding != "quantized"]
        raise UsageError(
            f"{target.name} has every linear layer quantized; {len(left)} are not: {listing(left, 3)}.",
            fix=f"quantize them too, or use --format {' or '.join(able)}.",
        )
    return {} if canonical.EMBED in schemes else {canonical.EMBED: Scheme(8, -1, True)}


def grids_of(
    target: Target, schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> dict[str, Grid]:
    """Canonical name -> size and scheme, all of which the format holds.

    Raises:
        UsageError: it cannot hold one; names the formats that can.
    """
    grids = {}
    for name, scheme in schemes.items():
        out, columns = checkpoint.tensors[name].shape
        grids[name] = Grid(out, columns, scheme.bits, scheme.width(columns), scheme.symmetric)
    require(target.name, grids)
    target.settings({n.removesuffix(".weight"): s for n, s in schemes.items()}, [])
    return grids


def require_same_source(codes: Any, found: str, checkpoint: Checkpoint) -> None:
    """Codes that know what they were made from are not put beside other norms and embeddings.

    Args:
        codes: what is exported; one with a ``source_fingerprint`` is held to it.
        found: fingerprint of the checkpoint's weights.
        checkpoint: for the message.

    Raises:
        ConflictError: they differ.
    """
    wanted = getattr(codes, "source_fingerprint", None)
    if wanted is not None and wanted != found:
        raise ConflictError(
            "the codes were made from other weights than this checkpoint's.",
            where=checkpoint.path,
            fix="pass the checkpoint that was quantized.",
            found=found,
            expected=wanted,
        )


# ---------------------------------------------------------------- the checkpoint as it will be


class _Computed(Tensor):
    """A whole array made on demand, under a dtype of its own."""

    def __init__(self, like: LazyTensor, dtype: np.dtype, make: Callable[[], Array]) -> None:
        super().__init__(like.name, dtype, like.shape, like.source.where, str(dtype))
        self._make = make

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`."""
        return np.asarray(self._make()[index], self.dtype, order="C")


def _standing_in(original: LazyTensor, dtype: np.dtype, make: Callable[[], Array]) -> LazyTensor:
    shape = original.shape
    order = tuple(range(len(shape)))
    placement = Placement(
        original.name, (0,) * len(shape), shape, (), Reorder(shape, order, shape, shape), None
    )
    return LazyTensor(_Computed(original, dtype, make), placement, None, original.config)


def effective(
    codes: Mapping[str, Value], schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with replaced tensors, as the converter's planner takes it, and notes on what was rounded for it.

    Quantized tensors keep their name and shape only; their values are never read through this view.
    """
    notes: list[str] = []
    tensors = dict(checkpoint.tensors)
    model = _dense_dtype(checkpoint)
    for name, original in checkpoint.tensors.items():
        if name in schemes and original.source.quantized is not None:
            tensors[name] = _standing_in(original, model, original.read)
        elif name in codes and name not in schemes:
            value = codes[name]
            assert isinstance(value, TorchTensor)
            _require_shape(name, value, original.shape)
            array = _array(name, value, original.dtype, notes)
            tensors[name] = _standing_in(original, original.dtype, lambda a=array: a)  # type: ignore[misc]
    return replace(checkpoint, tensors=tensors, sidecars=_plain_config(checkpoint)), notes


def _dense_dtype(checkpoint: Checkpoint) -> np.dtype:
    """The model's own element type, though its matrices may be packed."""
    told = (checkpoint.sidecars.config or {}).get("torch_dtype")
    names: dict[str, np.dtype] = {"bfloat16": BF16, "float16": F16, "float32": F32}
    dense = [t.dtype for t in checkpoint.tensors.values() if t.source.quantized is None]
    return names.get(str(told), dense[0] if dense else BF16)


def _array(name: str, value: TorchTensor, dtype: np.dtype, notes: list[str]) -> Array:
    wide = value.detach().float().cpu()
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError(
            "a value is NaN or infinite.", tensor=name, fix="nothing was written; tune it again."
        )
    array = wide.numpy().astype(dtype)
    if not np.array_equal(array.astype(np.float32), wide.numpy()):
        notes.append(f"{name} is rounded to {dtype}")
    return np.asarray(array)


def _plain_config(checkpoint: Checkpoint) -> Any:
    """The sidecars with a config.json that says nothing of an earlier quantization: ours takes its place."""
    sidecars = copy.copy(checkpoint.sidecars)
    config = sidecars.config
    if config is None or not config.keys() & set(_OURS):
        return checkpoint.sidecars
    kept = {k: v for k, v in config.items() if k not in _OURS}
    return sidecars.with_content(CONFIG, json.dumps(kept, sort_keys=True).encode())
