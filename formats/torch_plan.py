"""Lays out PyTorch checkpoints to the byte: the zip archive, and the pickle in it.

The same records in the same order as ``torch.save``: ``data.pkl``, ``byteorder``, one storage per tensor aligned to 64
bytes, ``version``. What differs: checksums stand in the local headers instead of behind the data, which every zip tool
understands; ``.format_version`` is left out, because it would promise loaders torch's own spacing of records; nothing
depends on the time or the file's name. Sources: pytorch/caffe2/serialize/inline_container.cc; torch/serialization.py;
PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

from . import dtypes, sharded
from .base import Chunk, ContainerPlan, Crc32Patch, FilePlan, Slot
from .errors import FormatError, MissingTensorError
from .names import check_tensor_name
from .torch_zip import (
    CENTRAL,
    CENTRAL_MAGIC,
    END,
    END64,
    END64_MAGIC,
    END_MAGIC,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR64,
    LOCATOR64_MAGIC,
    MAX16,
    MAX32,
)

_ALIGN = 64
_FOLDER = "archive/"
_VERSION, _VERSION64 = 20, 45  # of zip: plain and 64-bit
_UTF8 = 0x0800
_DATE = 0x0021  # 1980-01-01, the first that zip can say
_LOCAL_CRC, _CENTRAL_CRC = 14, 16  # where the checksum is in either header
_SHARDED = ("pytorch_model", ".bin")


def plan(
    slots: Sequence[Slot],
    *,
    wrapper: str | None = "model_state_dict",
    max_shard_size: int | None = None,
    stem: str = "model",
    suffix: str = ".ckpt",
) -> ContainerPlan:
    """Lay out one archive, or shards with their index.

    Args:
        slots: in the order of the state dict.
        wrapper: key the state dict is put under, as gemma_pytorch has it in a single file; None for the state dict
            alone, as Hugging Face has it.
        max_shard_size: most payload bytes per file; None means one file. Shards hold bare state dicts; where a wrapper
            was asked for they are named ``pytorch_model-0000i-of-0000n.bin``, as gemma_pytorch's 27B release is.
        stem: the file's name without its suffix.
        suffix: with its dot.

    Raises:
        MissingTensorError: no slots.
        FormatError: two slots have one name, or a name that the reader would refuse.
        DtypeError: a slot's type has no torch name.
        UsageError: the shard size is less than one byte.
    """
    _check_slots(slots, stem + suffix)
    shards = (
        [list(slots)] if max_shard_size is None else sharded.assign_shards(slots, max_shard_size)
    )
    if len(shards) > 1 and wrapper is not None:
        wrapper, (stem, suffix) = None, _SHARDED
    held = dict(zip(sharded.shard_names(stem, len(shards), suffix), shards, strict=True))
    files: list[FilePlan] = []
    chunks: dict[str, tuple[Chunk, ...]] = {}
    patches: list[Crc32Patch] = []
    for name, some in held.items():
        file, offsets, places = _lay_out(name, some, wrapper)
        files.append(file)
        for slot in some:
            start = (0,) * len(slot.shape)
            chunks[slot.name] = (Chunk(start, slot.shape, name, offsets[slot.name]),)
            if slot.nbytes:
                patches.append(Crc32Patch(slot.name, name, places[slot.name]))
    if len(files) > 1:
        files.append(sharded.index_file(f"{stem}{suffix}.index.json", held))
    return ContainerPlan(tuple(files), {s.name: chunks[s.name] for s in slots}, tuple(patches))


def _check_slots(slots: Sequence[Slot], where: str) -> None:
    if not slots:
        raise MissingTensorError("there are no tensors to write.", where=where)
    seen: set[str] = set()
    for slot in slots:
        if check_tensor_name(slot.name, where) in seen:
            raise FormatError(f'the name "{slot.name}" is given to two tensors.', where=where)
        seen.add(slot.name)
        dtypes.names(slot.dtype)


def _lay_out(
    name: str, slots: Sequence[Slot], wrapper: str | None
) -> tuple[FilePlan, Mapping[str, int], Mapping[str, tuple[int, ...]]]:
    """The file, every slot's payload offset, and the places of its checksum."""
    archive = _ArchiveLayout()
    archive.add("data.pkl", _state_dict_pickle(slots, wrapper))
    archive.add("byteorder", b"little")
    offsets = {s.name: archive.add(f"data/{k}", s.nbytes) for k, s in enumerate(slots)}
    archive.add("version", b"3\n")
    size, fixed, places = archive.finish()
    crc_places = {s.name: places[f"data/{k}"] for k, s in enumerate(slots)}
    return FilePlan(name, size, fixed), offsets, crc_places


# ---------------------------------------------------------------- the archive


class _ArchiveLayout:
    """Stored records end to end, then the directory; payloads may be left for later."""

    def __init__(self) -> None:
        self._at = 0
        self._fixed: list[tuple[int, bytes]] = []
        self._records: list[tuple[str, int, int, int]] = []  # name, header offset, size, crc

    def add(self, name: str, content: bytes | int) -> int:
        """Place a record, given its bytes or only how many; returns the payload's offset."""
        data = content if isinstance(content, bytes) else b""
        size = len(data) if isinstance(content, bytes) else content
        crc = zlib.crc32(data)
        header = self._local_header((_FOLDER + name).encode(), size, crc)
        self._records.append((name, self._at, size, crc))
        self._fixed.append((self._at, header + data))
        payload = self._at + len(header)
        self._at = payload + size
        return payload

    def _local_header(self, name: bytes, size: int, crc: int) -> bytes:
        extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= MAX32 else b""
        # torch's own padding: a field "FB" that fills up to the next multiple of 64
        padding = -(self._at + LOCAL.size + len(name) + len(extra) + 4) % _ALIGN
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        short = min(size, MAX32)
        version = _VERSION64 if size >= MAX32 else _VERSION
        return (
            LOCAL.pack(
                LOCAL_MAGIC, version, _UTF8, 0, 0, _DATE, crc, short, short, len(name), len(extra)
            )
            + name
            + extra
        )

    def finish(self) -> tuple[int, tuple[tuple[int, bytes], ...], dict[str, tuple[int, ...]]]:
        """File size, everything but the payloads, and where each record's checksum stands."""
        directory = bytearray()
        places: dict[str, tuple[int, ...]] = {}
        for name, header, size, crc in self._records:
            places[name] = (header + _LOCAL_CRC, self._at + len(directory) + _CENTRAL_CRC)
            directory += _central_header((_FOLDER + name).encode(), header, size, crc)
        count = len(self._records)
        directory += _end(count, len(directory), self._at)
        fixed = (*self._fixed, (self._at, bytes(directory)))
        return self._at + len(directory), fixed, places


def _central_header(name: bytes, header: int, size: int, crc: int) -> bytes:
    wide = [n for n in (size, size, header) if n >= MAX32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _VERSION64 if wide else _VERSION
    short = min(size, MAX32)
    return (
        CENTRAL.pack(
            CENTRAL_MAGIC, version, version, _UTF8, 0, 0, _DATE, crc, short, short,
            len(name), len(extra), 0, 0, 0, 0, min(header, MAX32),
        )
        + name
        + extra
    )  # fmt: skip


def _end(count: int, size: int, offset: int) -> bytes:
    """The end records: 64-bit ones in front when a number needs them."""
    wide = b""
    if count >= MAX16 or size >= MAX32 or offset >= MAX32:
        wide = END64.pack(
            END64_MAGIC, END64.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, offset
        )
        wide += LOCATOR64.pack(LOCATOR64_MAGIC, 0, offset + size, 1)
    few, short, near = min(count, MAX16), min(size, MAX32), min(offset, MAX32)
    return wide + END.pack(END_MAGIC, 0, 0, few, few, short, near, 0)


# ---------------------------------------------------------------- the pickle


def _state_dict_pickle(slots: Sequence[Slot], wrapper: str | None) -> bytes:
    """``{wrapper: {name: tensor, …}}`` in protocol 2, of which slot k's tensor is all of ``data/<k>``."""
    p = _Pickle()
    p.raw(b"\x80\x02")
    if wrapper is not None:
        p.raw(b"}")
        p.text(wrapper)
    p.raw(b"}(")
    for key, slot in enumerate(slots):
        p.text(slot.name)
        _put_tensor(p, str(key), slot)
    p.raw(b"u" if wrapper is None else b"us")
    p.raw(b".")
    return bytes(p.out)


def _put_tensor(p: _Pickle, key: str, slot: Slot) -> None:
    storage = dtypes.names(slot.dtype).torch_storage
    count = math.prod(slot.shape) if storage else slot.nbytes
    p.constant("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3")
    p.raw(b"((")
    p.shared("storage")
    p.constant(*(("torch", storage) if storage else ("torch.storage", "UntypedStorage")))
    p.text(key)
    p.shared("cpu")
    p.integer(count)
    p.raw(b"tQ")
    p.integer(0)
    p.integers(slot.shape)
    # torch counts an axis of size 0 as 1 here
    p.integers([math.prod(max(n, 1) for n in slot.shape[k + 1 :]) for k in range(len(slot.shape))])
    p.raw(b"\x89")  # requires_grad
    p.constant("collections", "OrderedDict")  # no hooks
    p.raw(b")R")
    if not storage:
        p.constant("torch", slot.dtype.name)
    p.raw(b"tR")


class _Pickle:
    """Pickle opcodes, protocol 2; repeated names are written once."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[tuple[str, ...], int] = {}

    def raw(self, opcodes: bytes) -> None:
        self.out += opcodes

    def text(self, value: str) -> None:
        encoded = value.encode("utf-8")
        self.out += b"X" + len(encoded).to_bytes(4, "little") + encoded

    def shared(self, value: str) -> None:
        self._once((value,), lambda: self.text(value))

    def constant(self, module: str, name: str) -> None:
        self._once((module, name), lambda: self.raw(f"c{module}\n{name}\n".encode("ascii")))

    def _once(self, key: tuple[str, ...], write: Callable[[], None]) -> None:
        if key in self._memo:
            self.out += bytes((b"h"[0], self._memo[key]))
            return
        write()
        self._memo[key] = len(self._memo)
        self.out += bytes((b"q"[0], self._memo[key]))

    def integer(self, n: int) -> None:
        for opcode, form, limit in (
            (b"K", "<B", 1 << 8),
            (b"M", "<H", 1 << 16),
            (b"J", "<i", 1 << 31),
        ):
            if n < limit:
                self.out += opcode + struct.pack(form, n)
                return
        encoded = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        self.out += b"\x8a" + bytes((len(encoded),)) + encoded

    def integers(self, numbers: Sequence[int]) -> None:
        self.out += b"("
        for n in numbers:
            self.integer(n)
        self.out += b"t"
