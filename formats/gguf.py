"""GGUF, llama.cpp's container: one file, or a split set, with key-values and plain or quantized tensors.

Source: ggml's docs/gguf.md; split files as llama.cpp's gguf-split writes them. Reading is stricter than the reference
readers: payloads may neither overlap nor leave holes, a byte-swapped file is refused. :func:`plan` writes version 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from .base import RowTensor, Source, Tensor
from .errors import (
    DtypeError,
    FileIOError,
    FormatError,
    LayoutError,
    MissingTensorError,
    TruncatedError,
)
from .files import InputFile
from .gguf_header import (
    PLAIN,
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    Header,
    TensorInfo,
    align,
    read_header,
)
from .gguf_writer import BlockSlot, KeyValue, plan
from .names import chosen, inside, listing
from .packed.ggml_blocks import BlockTensor, GgmlBlocks, block_type, known_types

__all__ = ["BlockSlot", "KeyValue", "open_source", "plan"]

_SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def open_source(path: Path) -> Source:
    """Open a ``.gguf`` file, any part of a split set, or a directory with exactly one of either.

    Quantized tensors read as float32 and keep their blocks in ``quantized``. ``metadata`` has ``kv`` (key -> value,
    numeric arrays as NumPy arrays, string arrays as lists, the ``split.*`` keys dropped), ``kv_types`` (key -> ``u32``,
    ``[str]``, …), ``version`` and ``alignment``, all of the first part.

    Raises:
        FormatError: not GGUF, or not in the allowed subset; the directory is ambiguous.
        LimitError: a count or length no real file has.
        TruncatedError: a file ends early.
        LayoutError: payloads overlap, leave holes, are unaligned or do not divide into blocks.
        DtypeError: a tensor type that cannot be decoded.
        MissingTensorError: a part of a split set is absent or not the part its name says.
        UnsafePathError: a file that was not named is a symbolic link out of the directory.
    """
    paths = _parts(_only_model(path) if path.is_dir() else path)
    with ExitStack() as opened:
        files = [opened.enter_context(InputFile(p)) for p in paths]
        headers = [read_header(f) for f in files]
        _check_split(headers, paths)
        notes: list[str] = []
        tensors: dict[str, Tensor] = {}
        for file, header in zip(files, headers, strict=True):
            for tensor in _tensors(file, header, notes):
                if tensor.name in tensors:
                    raise FormatError(
                        f"the tensor is in {tensors[tensor.name].where.name} too.",
                        where=file.path,
                        tensor=tensor.name,
                    )
                tensors[tensor.name] = tensor
        close = opened.pop_all().close

    def check_unchanged() -> None:
        for file in files:
            file.check_unchanged()

    head = headers[0]
    own = [k for k in head.kv if k not in (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)]
    metadata = {
        "kv": {k: head.kv[k] for k in own},
        "kv_types": {k: head.kv_types[k] for k in own},
        "version": head.version,
        "alignment": head.alignment,
    }
    return Source(
        "gguf", path, tensors, metadata, tuple(paths), notes,
        check_unchanged=check_unchanged, close=close,
    )  # fmt: skip


def _only_model(directory: Path) -> Path:
    """The directory's one GGUF file, or any part of its one split set."""
    try:
        names = sorted(p.name for p in directory.iterdir() if p.name.endswith(_SUFFIX))
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=directory) from e
    sets = {}
    for name in names:
        part = _PART.fullmatch(name)
        sets[(part["stem"], part["count"]) if part else name] = name
    if not sets:
        raise FormatError(f"the directory has no {_SUFFIX} file.", where=directory)
    if len(sets) > 1:
        raise FormatError(
            f"the directory has {len(sets)} GGUF models: {listing(sorted(sets.values()))}.",
            where=directory,
            fix="name the file instead of the directory.",
        )
    return chosen(directory, next(iter(sets.values())))


def _parts(path: Path) -> list[Path]:
    """All files of the set that ``path`` is named as a part of, in order."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    no, count = int(part["no"]), int(part["count"])
    if not 1 <= no <= count:
        raise FormatError(f"the name says part {no} of {count}.", where=path)
    paths = [
        path.with_name(f"{part['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    missing = [p.name for p in paths if p.name != path.name and inside(p.parent, p.name) is None]
    if not path.exists():
        raise FileIOError("cannot open: No such file or directory.", where=path)
    if missing:
        raise MissingTensorError(
            f"{len(missing)} of {count} parts are missing: {listing(missing)}.",
            where=path.parent,
            fix="download the missing parts into the same directory.",
        )
    return paths


def _check_split(headers: list[Header], paths: list[Path]) -> None:
    for i, (header, path) in enumerate(zip(headers, paths, strict=True)):
        count, no = _integer(header, path, SPLIT_COUNT, 1), _integer(header, path, SPLIT_NO, 0)
        if (count, no) == (len(paths), i) or (len(paths) == 1 and count == 0):
            continue
        raise MissingTensorError(
            f"the file says it is part {no + 1} of {count}, its name says part {i + 1} of {len(paths)}.",
            where=path,
            fix="give every part the name it had: STEM-00001-of-0000N.gguf, and so on.",
        )
    found = sum(len(h.tensors) for h in headers)
    total = _integer(headers[0], paths[0], SPLIT_TENSORS, found)
    if len(paths) > 1 and total != found:
        raise MissingTensorError(
            f"the parts hold {found} tensors, {SPLIT_TENSORS} says {total}.",
            where=paths[0],
            fix="the parts are of different models or revisions; download them again.",
        )


def _integer(header: Header, path: Path, key: str, default: int) -> int:
    value = header.kv.get(key, default)
    if not isinstance(value, int):
        raise FormatError(f"{key} is {header.kv_types[key]}; it must be an integer.", where=path)
    return value


def _tensors(file: InputFile, header: Header, notes: list[str]) -> Iterable[Tensor]:
    """Lazy tensors of one file, its payload ranges checked."""
    opened = [(t, *_open_tensor(file, header, t)) for t in header.tensors]
    for info, _, nbytes in opened:
        end = header.data_offset + info.offset + nbytes
        if end > file.size:
            raise TruncatedError(
                f"{end - file.size} bytes are missing: the tensor ends at byte {end}, "
                f"the file has {file.size}.",
                where=file.path,
                tensor=info.name,
                fix="download or copy the file again.",
            )
    end = _check_ranges(file, header, [(info, nbytes) for info, _, nbytes in opened])
    extra = file.size - align(header.data_offset + end, header.alignment)
    if extra > 0:
        notes.append(f"{file.path.name}: {extra} bytes after the last tensor are not used.")
    return [tensor for _, tensor, _ in opened]


def _open_tensor(file: InputFile, header: Header, info: TensorInfo) -> tuple[Tensor, int]:
    """The lazy tensor and its stored bytes."""
    offset = header.data_offset + info.offset
    if info.type_code in PLAIN:
        name, dtype = PLAIN[info.type_code]
        plain = RowTensor(info.name, dtype, info.shape, file, offset, name)
        return plain, plain.nbytes
    block = block_type(info.type_code)
    if block is None:
        known = ", ".join([name for name, _ in PLAIN.values()] + known_types())
        raise DtypeError(
            f"ggml type {info.type_code} is not known; known: {known}.",
            where=file.path,
            tensor=info.name,
        )
    blocks = GgmlBlocks(info.name, block, info.shape, file, offset)
    return BlockTensor(blocks, file.path), blocks.nbytes


def _check_ranges(file: InputFile, header: Header, sizes: list[tuple[TensorInfo, int]]) -> int:
    """Whether payloads are aligned and follow each other; returns where the last one ends."""
    end, before = 0, "the header"
    for info, nbytes in sorted(sizes, key=lambda s: (s[0].offset, s[1])):
        problem = None
        if info.offset % header.alignment:
            problem = f"offset {info.offset} is not a multiple of the alignment {header.alignment}."
        elif info.offset < end:
            problem = f"bytes {info.offset} to {min(end, info.offset + nbytes)} of the payload overlap {before}."
        elif info.offset > align(end, header.alignment):
            gap = info.offset - align(end, header.alignment)
            problem = f"{gap} bytes between it and {before} belong to no tensor."
        if problem:
            raise LayoutError(problem, where=file.path, tensor=info.name)
        end, before = info.offset + nbytes, repr(info.name)
    return end
