"""A checked reader of the zip archives that torch writes.

torch reads its archives through miniz, which trusts the central directory, other tools trust the local headers, and
neither looks at the payload's checksum. Here both headers must tell the same story, records may only be stored (not
compressed) and must lie end to end without holes; :mod:`.checked_record` verifies their CRC-32. Sources: PKWARE APPNOTE 6.3;
pytorch/caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

from .checked_record import Record
from .errors import (
    FormatError,
    LayoutError,
    LimitError,
    TruncatedError,
    UnsafeError,
    printable,
)
from .files import InputFile
from .names import listing

MAX_RECORDS = 100_000  # Gemma 2 27B has 512
_MAX_DIRECTORY = 64 << 20
_PROGRAMS = ("code/", "constants.pkl", "bytecode.pkl", "archive_format", "models/")
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR_BIT, _ENCRYPTED_BIT = 0x0008, 0x0001

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, LOCATOR64_MAGIC, DESCRIPTOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"


@dataclass(frozen=True)
class Archive:
    """An archive whose headers have been checked.

    Attributes:
        records: name without the folder -> record, in the directory's order.
        has_checksums: False when torch was told not to compute them; damage then goes unnoticed.
    """

    records: dict[str, Record]
    has_checksums: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


def read_archive(file: InputFile) -> Archive:
    """Read and check every header of the archive; no payload is touched.

    Raises:
        TruncatedError: the file ends before the archive does.
        UnsafeError: it holds a program, not only weights.
        FormatError: not a torch archive, doubled names, or the two headers of a record differ.
        LimitError: compressed records, or more of them than any checkpoint has.
        LayoutError: records overlap or leave holes.
    """
    directory, size, count = _find_directory(file)
    entries = _read_directory(file, directory, size, count)
    names = _names_in_folder(file, entries)
    _refuse_compressed(file, entries)
    offsets = _check_places(file, entries, directory)
    # torch.serialization.set_crc32_options(False) leaves every checksum zero
    has_checksums = any(e.crc for e in entries)
    return Archive(
        {
            name: Record(file, name, offsets[e.header], e.size, e.crc if has_checksums else None)
            for name, e in zip(names, entries, strict=True)
        },
        has_checksums,
    )


def _find_directory(file: InputFile) -> tuple[int, int, int]:
    """Offset, bytes and entries of the central directory."""
    tail = file.read(max(0, file.size - END.size - MAX16), min(file.size, END.size + MAX16))
    at = tail.rfind(END_MAGIC)
    if at < 0 or len(tail) - at < END.size:
        raise _incomplete(file)
    end = file.size - len(tail) + at
    _, disk, first_disk, here, count, size, offset, _ = END.unpack_from(tail, at)
    if len(tail) - at != END.size:
        if not 0 <= end - offset - size <= END64.size + LOCATOR64.size:
            raise _incomplete(file)  # not the record, just bytes of a tensor that look like one
        raise FormatError(
            f"{len(tail) - at - END.size} bytes follow the end of the zip archive.",
            where=file.path,
            fix="torch writes none; download it again or re-save it with torch.save.",
        )
    if at >= LOCATOR64.size and tail.startswith(LOCATOR64_MAGIC, at - LOCATOR64.size):
        wide, end = _read_end64(file, end - LOCATOR64.size)
        narrow = (disk, first_disk, here, count, size, offset)
        for short, long, limit in zip(narrow, wide, (MAX16,) * 4 + (MAX32,) * 2, strict=True):
            if short not in (long, limit):
                raise _differ(file, "the archive's two end records", short, long)
        disk, first_disk, here, count, size, offset = wide
    if disk or first_disk or here != count:
        raise FormatError("the zip archive is split over several files.", where=file.path)
    if count > MAX_RECORDS or size > _MAX_DIRECTORY or count * CENTRAL.size > size:
        raise LimitError(
            f"the zip directory claims {count} records in {size} bytes; at most {MAX_RECORDS} "
            f"in {_MAX_DIRECTORY} are read.",
            where=file.path,
        )
    if offset + size != end:
        raise LayoutError(
            f"the zip directory is said to be at bytes {offset} to {offset + size}, it ends at "
            f"{end}.",
            where=file.path,
            fix="the file is damaged or not torch's; re-save it with torch.save.",
        )
    return offset, size, count


def _incomplete(file: InputFile) -> TruncatedError:
    return TruncatedError(
        f"the zip archive has no directory at its end; the file has {file.size} bytes and is not "
        "complete.",
        where=file.path,
        fix="download or copy it again.",
    )


def _read_end64(file: InputFile, locator: int) -> tuple[tuple[int, ...], int]:
    """The zip64 end record's numbers and where it begins."""
    _, disk, offset, disks = LOCATOR64.unpack(file.read(locator, LOCATOR64.size))
    if offset + END64.size != locator or disk or disks != 1:
        raise LayoutError(
            f"the zip64 end record is said to be at byte {offset} of disk {disk} of {disks}; it "
            f"must end at byte {locator}.",
            where=file.path,
        )
    magic, _, _, _, *numbers = END64.unpack(file.read(offset, END64.size))
    if magic != END64_MAGIC:
        raise FormatError("the zip64 end record has the wrong signature.", where=file.path)
    return tuple(numbers), offset


def _read_directory(file: InputFile, offset: int, size: int, count: int) -> list[_Entry]:
    data = file.read(offset, size)
    entries = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > size:
            raise FormatError("the zip directory ends inside an entry.", where=file.path)
        head = CENTRAL.unpack_from(data, at)
        magic, _, _, flags, method, _, _, crc, packed, full, *lengths, _, _, _, header = head
        name_len, extra_len, comment_len = lengths
        name_at = at + CENTRAL.size
        at = name_at + name_len + extra_len + comment_len
        if magic != CENTRAL_MAGIC or at > size:
            raise FormatError("the zip directory is damaged.", where=file.path)
        raw = data[name_at : name_at + name_len]
        extra = data[name_at + name_len : name_at + name_len + extra_len]
        full, packed, header = _widen(file, extra, (full, packed, header))
        entries.append(_Entry(_decode(file, raw), raw, flags, method, crc, packed, full, header))
    if at != size:
        raise FormatError(
            f"{size - at} bytes of the zip directory are in no entry.", where=file.path
        )
    return entries


def _decode(file: InputFile, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"zip entry name {raw[:80]!r} is not UTF-8.", where=file.path) from None


def _widen(file: InputFile, extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers with those that are all ones replaced from the zip64 extra field."""
    wanted = [n == MAX32 for n in numbers]
    if not any(wanted):
        return numbers
    at = 0
    while at + 4 <= len(extra):
        field, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if field == 1 and length >= 8 * sum(wanted) and at + length <= len(extra):
            wide = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, at))
            return tuple(next(wide) if want else n for n, want in zip(numbers, wanted, strict=True))
        at += length
    raise FormatError("a zip entry needs 64-bit sizes and has none.", where=file.path)


def _names_in_folder(file: InputFile, entries: list[_Entry]) -> list[str]:
    """Names without the folder that all of them must share."""
    # miniz, which torch uses, looks names up without regard to case
    counts = Counter(e.name.lower() for e in entries)
    if twice := [e.name for e in entries if counts[e.name.lower()] > 1]:
        raise FormatError(
            f"records are in the archive more than once: {listing(twice)}.",
            where=file.path,
            fix="readers would disagree on which one counts; re-save it with torch.save.",
        )
    folder = entries[0].name.partition("/")[0] + "/" if entries else "/"
    names = [e.name.removeprefix(folder) for e in entries]
    if programs := [n for n in names if _is_program(n)]:
        raise UnsafeError(
            f"the archive holds a program ({listing(programs, 3)}), not only weights: TorchScript "
            "or torch.export.",
            where=file.path,
            fix="save the weights alone: torch.save(model.state_dict(), NEW).",
        )
    if "data.pkl" not in names:
        raise FormatError(
            "this zip archive has no data.pkl, so torch.save did not write it.",
            where=file.path,
            fix="if it is a packed directory, unpack it first.",
        )
    if outside := [e.name for e in entries if not e.name.startswith(folder)]:
        raise FormatError(
            f"records are outside of the archive's folder {printable(folder)}: {listing(outside)}.",
            where=file.path,
        )
    return names


def _is_program(name: str) -> bool:
    return any(name.startswith(p) if p.endswith("/") else name == p for p in _PROGRAMS)


def _refuse_compressed(file: InputFile, entries: list[_Entry]) -> None:
    for e in entries:
        if e.flags & _ENCRYPTED_BIT:
            raise FormatError(f"{printable(e.name)} is encrypted.", where=file.path)
        if e.method or e.packed != e.size:
            raise LimitError(
                f"{printable(e.name)} is compressed (method {e.method}, {e.packed} bytes that "
                f"claim to become {e.size}); torch stores records as they are.",
                where=file.path,
                fix="re-save it with torch.save.",
            )


def _check_places(file: InputFile, entries: list[_Entry], directory: int) -> dict[int, int]:
    """Header offset -> payload offset, after every local header has been compared."""
    ordered = sorted(entries, key=lambda e: e.header)
    if ordered[0].header:
        raise LayoutError(
            f"{ordered[0].header} bytes are in front of the archive's first record.",
            where=file.path,
        )
    stops = [*(e.header for e in ordered[1:]), directory]
    return {e.header: _check_local(file, e, s) for e, s in zip(ordered, stops, strict=True)}


def _check_local(file: InputFile, entry: _Entry, stop: int) -> int:
    """Payload offset of one record, whose bytes must end at ``stop``."""
    data: int = entry.header + LOCAL.size + len(entry.raw_name)
    if data + entry.size > stop:
        raise _misplaced(file, entry, data + entry.size, stop)
    head = LOCAL.unpack(file.read(entry.header, LOCAL.size))
    magic, _, flags, method, _, _, crc, packed, size, name_len, extra_len = head
    if magic != LOCAL_MAGIC:
        raise FormatError(
            f"{printable(entry.name)} has no local header at byte {entry.header}.", where=file.path
        )
    data += extra_len
    if data + entry.size > stop:
        raise _misplaced(file, entry, data + entry.size, stop)
    tail = file.read(entry.header + LOCAL.size, len(entry.raw_name) + extra_len)
    name, extra = tail[: len(entry.raw_name)], tail[len(entry.raw_name) :]
    if name_len != len(name) or name != entry.raw_name:
        raise _differ(file, f"the names of the record at {entry.header}", name, entry.raw_name)
    later = bool(entry.flags & _DESCRIPTOR_BIT) and (crc, packed, size) == (0, 0, 0)
    if not later:
        size, packed = _widen(file, extra, (size, packed))
    found = (flags, method) if later else (flags, method, crc, packed, size)
    expected = (entry.flags, entry.method, entry.crc, entry.packed, entry.size)[: len(found)]
    if found != expected:
        raise _differ(
            file,
            f"the two headers of {printable(entry.name)} (flags, method, CRC-32, sizes)",
            found,
            expected,
        )
    ends = _possible_ends(file, entry, data + entry.size, stop)
    if not ends:
        raise FormatError(
            f"the data descriptor of {printable(entry.name)} differs from the directory.",
            where=file.path,
        )
    if stop not in ends:
        raise _misplaced(file, entry, ends[0], stop)
    return data


def _possible_ends(file: InputFile, entry: _Entry, end: int, stop: int) -> list[int]:
    """Where the record may end: behind its data descriptor if it has one (miniz: none when empty)."""
    if not entry.flags & _DESCRIPTOR_BIT:
        return [end]
    ends = [] if entry.size else [end]
    for form in ("<4s3I", "<4sI2Q"):
        length = struct.calcsize(form)
        if end + length <= stop and struct.unpack(form, file.read(end, length)) == (
            DESCRIPTOR_MAGIC, entry.crc, entry.packed, entry.size,
        ):  # fmt: skip
            ends.append(end + length)
    return ends


def _misplaced(file: InputFile, entry: _Entry, end: int, stop: int) -> LayoutError:
    what = "overlaps what follows" if end > stop else "leaves a hole"
    return LayoutError(
        f"{printable(entry.name)} {what}: it ends at byte {end}, the next part begins at {stop}.",
        where=file.path,
        fix="the file is damaged or not torch's; re-save it with torch.save.",
    )


def _differ(file: InputFile, what: str, found: object, expected: object) -> FormatError:
    return FormatError(
        f"{what} differ: {printable(str(found))} and {printable(str(expected))}.",
        where=file.path,
        fix="readers would disagree on the content; download it again or re-save it.",
    )
