"""PyTorch checkpoints: ``pytorch_model.bin``, ``.ckpt``, ``.pt``; one file, shards with an index, or a directory.

torch itself is not needed and its loader is never called: :mod:`.torch_zip` checks the archive,
:mod:`.torch_unpickler` says what its pickle describes without running it, :mod:`.torch_tensor` checks the tensors, and
:mod:`.torch_plan` lays out archives that ``torch.load(weights_only=True, mmap=True)`` reads.

A checksum failure is raised no later than when the last row of a tensor is read; see :mod:`.checked_record`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import sharded
from .base import Source
from .errors import (
    ChecksumError,
    FileIOError,
    FormatError,
    G2Error,
    MissingTensorError,
    TruncatedError,
    UnsafeError,
    printable,
)
from .files import InputFile
from .names import check_tensor_name, chosen, listing
from .torch_globals import Opaque, TensorView
from .torch_plan import plan
from .torch_tensor import open_views
from .torch_unpickler import MAX_PICKLE, load, load_prefix
from .torch_zip import Archive, read_archive

__all__ = ["open_source", "plan"]

_INDEX = ".bin.index.json"
_USUAL = ("pytorch_model.bin", "pytorch_model" + _INDEX)
_KINDS = ((_INDEX,), (".ckpt",), (".pt", ".pth"))  # what else a directory may hold, best first
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.bin$")
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_MAX_WRAPPERS = 4
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickled magic number of torch < 1.6
_TEXT_PICKLE = re.compile(rb"\(*[ci][\w.]+\n[\w.]+\n")
_OTHERS = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` in the repository."),
    (0, b"GGUF", "a GGUF file", "pass it under its own name."),
    (0, b"\x89HDF", "an HDF5 file", "pass it under its own name."),
    (0, b"\x1f\x8b", "gzip data", "unpack it first."),
    (0, b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first."),
    (0, b"<", "an HTML or XML page, such as a failed download", "download the file again."),
    (8, b"{", "a safetensors file", "rename it to .safetensors."),
)
_RESAVE = (
    "re-save it: torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW) with a "
    "current torch."
)


def open_source(path: Path) -> Source:
    """Open a PyTorch checkpoint; only directories and pickles are read, nothing is executed.

    Args:
        path: a ``.bin``, ``.ckpt``, ``.pt`` or ``.pth`` file, a ``*.bin.index.json``, or a directory that has
            ``pytorch_model.bin``, its index, or exactly one other checkpoint.

    Returns:
        Tensors in the state dict's order under their names in it. ``metadata["wrapper"]`` is the key (``a.b`` if nested)
        that the state dict was found under, or None; ``metadata["prefix"]`` what was cut off every name;
        ``metadata["extra"]`` the names of everything else in the file, such as optimizer states. Tensors that share
        storage are all there, with a note.

    Raises:
        UnsafeError: its pickle uses any global but those of tensors, or it is a TorchScript or exported program.
        FormatError: not a torch archive, of another byte order, or an older format; doubled records or keys; headers
            that disagree; more than one state dict or checkpoint.
        TruncatedError: the file ends before the archive does.
        ChecksumError: the pickle is damaged (tensors: when they are read).
        LimitError: compressed records, storages or views that are larger than their records, or a huge pickle.
        LayoutError: records or views overlap, have holes, or leave their bounds.
        DtypeError: an element type g2kit does not move.
        MissingTensorError: no tensors, or one without data; or see :func:`.sharded.join`.
        ExtraTensorError: see :func:`.sharded.join`.
        UnsafePathError: the index names a file outside its directory, or a link leads there.
        FileIOError: not a readable regular file.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_path(path)
    source = _open_path(chosen(path, _choose(path)))
    source.path = path
    return source


def _open_path(path: Path) -> Source:
    if path.name.endswith(".json"):
        return sharded.join(path, _open_file, "torch_pickle")
    return _open_file(path)


def _choose(directory: Path) -> str:
    """The one checkpoint of a directory."""
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208 (names, not paths)
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=directory) from e
    visible = [n for n in names if not n.startswith(".")]
    groups = [[n for n in visible if n in _USUAL]]
    groups += [[n for n in visible if n.endswith(suffixes)] for suffixes in _KINDS]
    found = next((group for group in groups if group), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(
            f"ambiguous: several checkpoints are here: {listing(found)}.",
            where=directory,
            fix="pass the file you mean instead of the directory.",
        )
    if shards := [n for n in visible if _SHARD.search(n)]:
        raise FormatError(
            f"{listing(shards, 2)} are shards and their index is missing.",
            where=directory,
            fix=f"download {_USUAL[1]} too.",
        )
    raise FormatError(
        "no PyTorch checkpoint is here: no pytorch_model.bin, its index, .ckpt, .pt or .pth.",
        where=directory,
        fix="pass the file itself.",
    )


def _open_file(path: Path) -> Source:
    file = InputFile(path)
    try:
        _check_kind(file)
        archive = read_archive(file)
        _check_byte_order(file, archive)
        state, found = _unwrap(_load_pickle(file, archive), path)
        views, prefix = _strip_prefix(_views(state, found, path), path)
        tensors, notes = open_views(views, archive.records, path)
    except BaseException:
        file.close()
        raise
    if found["wrapper"] not in (None, _WRAPPERS[0]):
        notes.insert(0, f"the state dict is under {printable(found['wrapper'])}.")
    if prefix:
        notes.insert(0, f"{prefix} was cut off every name.")
    if not archive.has_checksums:
        notes.insert(0, "the archive was saved without checksums; damage cannot be noticed.")
    return Source(
        format="torch_pickle",
        path=path,
        tensors=dict(tensors),
        metadata={**found, "prefix": prefix},
        files=(path,),
        notes=notes,
        check_unchanged=file.check_unchanged,
        close=file.close,
    )


def _check_kind(file: InputFile) -> None:
    """Refuse what is not a zip archive, and say what it is."""
    start = file.read(0, min(file.size, 512))
    if start.startswith(b"PK"):
        return
    for at, magic, what, fix in _OTHERS:
        if start.startswith(magic, at):
            raise FormatError(f"this is {what}, not weights.", where=file.path, fix=fix)
    if start[257:262] == b"ustar":
        raise FormatError(
            "this is a tar archive, as torch wrote them until 0.1.", where=file.path, fix=_RESAVE
        )
    if start.startswith(b"\x80") or _TEXT_PICKLE.match(start):
        _refuse_pickle(file)
    if file.size < 22:  # of an empty zip archive
        raise TruncatedError(
            f"the file has {file.size} B; likely an interrupted download.",
            where=file.path,
            fix="download or copy the file again.",
        )
    raise FormatError(
        f"not a torch archive: it begins with {start[:8]!r}.",
        where=file.path,
        fix="pass a file that torch.save wrote.",
    )


def _refuse_pickle(file: InputFile) -> None:
    """A pickle outside of an archive: torch's old format, or worse."""
    data = file.read(0, min(file.size, MAX_PICKLE))
    at = 0
    try:
        for _ in range(5):  # magic number, protocol, system, state dict, storage keys
            if at < len(data):
                at = load_prefix(data, file.path, at)[1]
    except UnsafeError:
        raise
    except G2Error:
        pass  # damaged, foreign or cut off: refused below in any case
    old = data.startswith(_LEGACY)
    raise FormatError(
        "this is torch's format before 1.6, which is not read."
        if old
        else "this is a bare Python pickle, not a torch archive.",
        where=file.path,
        fix=_RESAVE,
    )


def _check_byte_order(file: InputFile, archive: Archive) -> None:
    record = archive.records.get("byteorder")
    order = record.read(16) if record else b"little"
    if order != b"little":
        raise FormatError(
            f"byte order {order.decode('latin-1')!r}; only little-endian archives are read.",
            where=file.path,
            fix="torch.load and torch.save it on a little-endian machine.",
        )


def _load_pickle(file: InputFile, archive: Archive) -> Any:
    record = archive.records["data.pkl"]
    data = record.read(MAX_PICKLE)
    damaged = record.stored_crc is not None and zlib.crc32(data) != record.stored_crc
    # hostile before damaged: a payload in front of a broken tail must be called what it is
    try:
        tree = load(data, file.path)
    except UnsafeError:
        raise
    except G2Error:
        if not damaged:
            raise
    if damaged:
        raise ChecksumError(
            "the checksum of data.pkl does not fit.",
            where=file.path,
            fix="the file is damaged; download or copy it again.",
        )
    return tree


# ---------------------------------------------------------------- from the pickle to names


def _unwrap(tree: Any, where: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The state dict inside what was saved, where it was, and what lay beside it."""
    path: list[str] = []
    extra: list[str] = []
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(tree, dict):
            raise FormatError(
                f"a state dict is expected, found a {_type_name(tree)}.",
                where=where,
                fix="save the weights alone: torch.save(model.state_dict(), NEW).",
            )
        inner = [k for k in _WRAPPERS if isinstance(tree.get(k), dict) and _has_tensors(tree[k])]
        if not inner:
            break
        if len(inner) > 1:
            raise FormatError(
                f"several state dicts are here: {listing(inner)}.",
                where=where,
                fix="save the one you mean alone.",
            )
        extra += [".".join([*path, key]) for key in tree if key != inner[0]]
        path += inner
        tree = tree[inner[0]]
    return tree, {"wrapper": ".".join(path) or None, "extra": extra}


def _has_tensors(tree: Mapping[str, Any]) -> bool:
    """Whether it is a state dict or a wrapper of one."""
    layers: Sequence[Mapping[str, Any]] = [tree]
    for _ in range(_MAX_WRAPPERS):
        if any(isinstance(v, TensorView) for layer in layers for v in layer.values()):
            return True
        inner = [v for layer in layers for k, v in layer.items() if k in _WRAPPERS]
        layers = [v for v in inner if isinstance(v, dict)]
    return False


def _type_name(value: Any) -> str:
    return value.call if isinstance(value, Opaque) else type(value).__name__


def _views(state: Mapping[str, Any], found: dict[str, Any], where: Path) -> dict[str, TensorView]:
    """The state dict's tensors; names of all else go to ``found["extra"]``."""
    views = {}
    front = f"{found['wrapper']}." if found["wrapper"] else ""
    for name, value in state.items():
        if isinstance(value, TensorView):
            views[check_tensor_name(name, where)] = value
        elif isinstance(value, Opaque) and "_rebuild_" in value.call:
            raise FormatError(
                f"it is not a plain tensor (torch calls {value.call}).",
                where=where,
                tensor=name,
                fix="re-save it as a dense tensor with data.",
            )
        else:
            found["extra"].append(front + name)
    if not views:
        raise MissingTensorError(
            f"there are no tensors; the file holds {listing(found['extra'], 4) or 'nothing'}.",
            where=where,
            fix="save the weights alone: torch.save(model.state_dict(), NEW).",
        )
    return views


def _strip_prefix(views: dict[str, TensorView], where: Path) -> tuple[dict[str, TensorView], str]:
    """Names without what a training wrapper put in front of all of them."""
    cut = ""
    while front := next((p for p in _PREFIXES if all(n.startswith(p) for n in views)), ""):
        views = {check_tensor_name(n[len(front) :], where): v for n, v in views.items()}
        cut += front
    return views, cut
