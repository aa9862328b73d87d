"""Codes on disk, in no program's format: quantize once, export to several formats without quantizing again.

A directory: ``codes.safetensors`` holds for every weight ``X`` a bit stream ``X.codes`` uint32 ``[out, words]``,
``X.scales`` bfloat16 ``[out, groups]`` and, where asymmetric, ``X.zeros`` uint8; tuned tensors lie there as float32 under
their own name.
``g2kit.codes.json`` says how to read them. Written in one transaction that an interrupted run continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..convert.open import Checkpoint
from ..formats import manifest as manifests
from ..formats import safetensors, strict_json
from ..formats.base import Array, Slot, Source
from ..formats.dtypes import BF16, F32
from ..formats.errors import FormatError, NotFoundError, ShapeError, UsageError
from ..formats.manifest import Manifest
from ..formats.names import listing
from ..formats.output import Output
from ..formats.packed.bits import pack, unpack, words_for
from ..formats.packed.uniform import narrowed
from ..model.config_formats import to_plain
from .scheme import BITS, GROUP_SIZES, Codes, Scheme

NAME, SCHEMA, VERSION = "g2kit.codes.json", "g2kit.codes", 1
_STEM = "codes"
_U32, _U8 = np.dtype(np.uint32), np.dtype(np.uint8)
Shape = tuple[int, ...]


def _parts(name: str, shape: Shape, scheme: Scheme | None) -> list[Slot]:
    """What a tensor is stored as; None means float32 under its own name."""
    if scheme is None:
        return [Slot(name, F32, shape)]
    out, columns = shape
    groups = (out, columns // scheme.width(columns))
    slots = [
        Slot(f"{name}.codes", _U32, (out, words_for(columns, scheme.bits))),
        Slot(f"{name}.scales", BF16, groups),
    ]
    return slots if scheme.symmetric else [*slots, Slot(f"{name}.zeros", _U8, groups)]


class CodesWriter:
    """Writes a codes directory, tensor by tensor, in any order; a context manager.

    Args:
        dst: directory to make.
        schemes: canonical name -> scheme, or None for tensors kept as floats.
        checkpoint: what is quantized; gives shapes and configuration.
        identity: what decides the codes, as words for the user -> value; an interrupted run with the same is continued.
        source_fingerprint: of the checkpoint, if known; an export compares it.
        overwrite: replace an existing directory.
        resume: continue an interrupted run.

    Raises:
        UsageError: a scheme does not fit its tensor.
        ConflictError: ``dst`` exists, or belongs to another run.
    """

    def __init__(
        self,
        dst: str | Path,
        schemes: Mapping[str, Scheme | None],
        checkpoint: Checkpoint,
        *,
        identity: Mapping[str, str] | None = None,
        source_fingerprint: str | None = None,
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        self._schemes = dict(schemes)
        self._shapes = {n: checkpoint.tensors[n].shape for n in self._schemes}
        slots = [s for n, scheme in schemes.items() for s in _parts(n, self._shapes[n], scheme)]
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "source_fingerprint": source_fingerprint,
            "config": to_plain(checkpoint.config),
            "tensors": {n: _described(self._shapes[n], s) for n, s in self._schemes.items()},
        }
        self._config = checkpoint.config
        self._fingerprint = source_fingerprint
        files = checkpoint.source.files
        self._out = Output(
            Path(dst),
            safetensors.plan(slots, stem=_STEM, metadata={"schema": SCHEMA}),
            slots,
            {"g2kit's version": __version__, **(identity or {})},
            overwrite=overwrite,
            resume=resume,
            sources=(checkpoint.path, *files) if files else (),
            extra={NAME: json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"},
        )

    @property
    def done(self) -> frozenset[str]:
        """Tensors that an interrupted run wrote; they need not be added again."""
        return frozenset(self._out.done)

    def record(self, name: str) -> Mapping[str, Any]:
        """What :meth:`add` was given for a tensor that is :attr:`done`."""
        return self._out.done[name]

    def __enter__(self) -> Self:
        self._out.__enter__()
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._out.__exit__(t, e, tb)

    def add(
        self, name: str, value: Codes | Tensor, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write one tensor; durable together with ``record`` before it counts as done.

        Raises:
            UsageError: not of the scheme that was announced.
            ShapeError: not of the checkpoint's shape.
        """
        scheme = self._schemes.get(name, None)
        found = value.scheme if isinstance(value, Codes) else None
        if name not in self._schemes or found != scheme:
            raise UsageError(
                f"announced as {scheme or 'float32'}, got {found or 'floats'}.", tensor=name
            )
        shape = tuple((value.codes if isinstance(value, Codes) else value).shape)
        if shape != self._shapes[name]:
            raise ShapeError(f"it is {shape}, expected {self._shapes[name]}.", tensor=name)
        for slot, array in _arrays(name, value).items():
            self._out.write(slot, (0,) * array.ndim, array)
        self._out.complete(name, dict(record or {}))

    def finish(self, notes: tuple[str, ...] = ()) -> None:
        """Make the directory appear.

        Raises:
            LayoutError: a tensor was never added.
        """
        self._out.finish(
            Manifest(
                tool_version=__version__,
                format="safetensors",
                layout="codes",
                dtype="mixed",
                source_fingerprint=self._fingerprint or "g2:sha256:" + 64 * "0",
                tensors={},
                files={},
                notes=notes,
                config=to_plain(self._config),
            )
        )


def _described(shape: Shape, scheme: Scheme | None) -> dict[str, Any]:
    out: dict[str, Any] = {"shape": list(shape)}
    if scheme is not None:
        out |= {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
        }
    return out


def _arrays(name: str, value: Codes | Tensor) -> dict[str, Array]:
    if isinstance(value, Tensor):
        return {name: value.detach().float().contiguous().numpy()}
    out = {
        f"{name}.codes": pack(value.codes.numpy(), value.scheme.bits),
        f"{name}.scales": narrowed(value.scales.numpy(), BF16, "scales"),
    }
    return out if value.zeros is None else out | {f"{name}.zeros": value.zeros.numpy()}


def write_codes(
    dst: str | Path,
    codes: Mapping[str, Codes | Tensor],
    checkpoint: Checkpoint,
    *,
    notes: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """Write codes that are there already; notes go into the manifest, other options as :class:`CodesWriter`."""
    schemes = {n: v.scheme if isinstance(v, Codes) else None for n, v in codes.items()}
    with CodesWriter(dst, schemes, checkpoint, **options) as writer:
        for name, value in codes.items():
            if name not in writer.done:
                writer.add(name, value)
        writer.finish(notes)
    return Path(dst)


class CodesFile(Mapping[str, Codes | Tensor]):
    """An opened codes directory: canonical name -> codes or floats, read when asked for; a context manager.

    Args:
        path: the directory.

    Attributes:
        source_fingerprint: of the weights that were quantized, or None.
        config: the model's, as plain JSON.

    Raises:
        NotFoundError: no codes directory.
        FormatError: not what it says it is.
        ShapeError: arrays that do not fit each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        where = self.path / NAME
        if not where.is_file():
            raise NotFoundError(
                f"there is no {NAME} here.",
                where=self.path,
                fix="pass a directory that g2quant wrote with --keep-codes.",
            )
        document = strict_json.load_object(where)
        if document.get("schema") != SCHEMA or document.get("version") != VERSION:
            raise FormatError(
                f"not codes of version {VERSION}.", where=where, fix="use the g2kit that wrote it."
            )
        fingerprint, config = document.get("source_fingerprint"), document.get("config")
        self.source_fingerprint = fingerprint if isinstance(fingerprint, str) else None
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        self._schemes, self._shapes = _described_tensors(document.get("tensors"), where)
        weights = self.path / f"{_STEM}.safetensors"
        if not weights.is_file():
            raise NotFoundError(
                f"{NAME} is here, {weights.name} is not.",
                where=self.path,
                fix="copy the whole directory, or quantize again.",
            )
        self._source: Source = safetensors.open_source(weights)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        wanted = {
            slot.name: slot
            for name, scheme in self._schemes.items()
            for slot in _parts(name, self._shapes[name], scheme)
        }
        have = self._source.tensors
        if odd := wanted.keys() ^ have.keys():
            raise FormatError(
                f"{NAME} and the tensors differ: {listing(sorted(odd))}.",
                where=self.path,
                fix="the directory is damaged; quantize again.",
            )
        wrong = [
            n for n, s in wanted.items() if (have[n].dtype, have[n].shape) != (s.dtype, s.shape)
        ]
        if wrong:
            raise ShapeError(
                f"of another type or shape than {NAME} says: {listing(wrong)}.", where=self.path
            )

    def check(self) -> None:
        """Compare every file with the manifest, byte for byte.

        Raises:
            FormatError: there is no manifest.
            ChecksumError: a file is not what was written; names it.
        """
        at = manifests.path_for(self.path)
        if not at.is_file():
            raise FormatError(
                f"there is no {manifests.NAME}: the directory is not complete.",
                where=self.path,
                fix="copy the whole directory, or quantize again.",
            )
        manifests.check_files(self.path, manifests.load(at))

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a weight, None for floats; without reading it."""
        return self._schemes[name]

    def __getitem__(self, name: str) -> Codes | Tensor:
        scheme, have = self._schemes[name], self._source.tensors
        if scheme is None:
            return torch.from_numpy(have[name].read())
        columns = self._shapes[name][1]
        codes = unpack(have[f"{name}.codes"].read(), scheme.bits, columns)
        scales = have[f"{name}.scales"].read().astype(np.float32)
        zeros = None if scheme.symmetric else torch.from_numpy(have[f"{name}.zeros"].read())
        return Codes(scheme, torch.from_numpy(codes), torch.from_numpy(scales), zeros)

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _described_tensors(
    value: Any, where: Path
) -> tuple[dict[str, Scheme | None], dict[str, Shape]]:
    if not isinstance(value, dict) or not value:
        raise FormatError("it lists no tensors.", where=where)
    schemes: dict[str, Scheme | None] = {}
    shapes: dict[str, Shape] = {}
    for name, entry in value.items():
        shape: Any = entry.get("shape") if isinstance(entry, dict) else None
        if not _is_shape(shape):
            raise FormatError("its shape is not a list of sizes.", where=where, tensor=name)
        shapes[name] = tuple(shape)
        schemes[name] = _scheme(entry, shapes[name], where, name) if "bits" in entry else None
    return schemes, shapes


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 1 << 31 for n in value)


def _scheme(entry: Mapping[str, Any], shape: Shape, where: Path, name: str) -> Scheme:
    bits, group, symmetric = (entry.get(k) for k in ("bits", "group_size", "symmetric"))
    good = (
        type(bits) is int
        and bits in BITS
        and type(group) is int
        and group in GROUP_SIZES
        and isinstance(symmetric, bool)
        and len(shape) == 2
        and shape[1] % max(group, 1) == 0
    )
    if not good:
        raise FormatError(
            "its bits, group_size and symmetric are no scheme.", where=where, tensor=name
        )
    return Scheme(int(bits), int(group), bool(symmetric))  # type: ignore[arg-type]
