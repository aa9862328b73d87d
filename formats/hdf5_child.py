"""The HDF5 library, in a process of its own: lists a file's datasets, reads rows of packed ones.

The HDF5 C library parses untrusted bytes in place; mutated files make it crash (chunk indices) or loop for ever
(group indices). Here that ends a child process with limited memory and processor time, not the caller's.
:mod:`.hdf5_process` starts this file as a script, :mod:`.hdf5_reader` judges what it says.

Requests are JSON lines on standard input, each with the processor seconds it may take (``cpu``); every reply is a
JSON line, followed by ``bytes`` raw bytes if it says so.
Imports nothing of g2kit, so that starting it costs little more than importing h5py.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5l, h5o, h5s, h5t

MAX_OBJECTS = 50_000  # a 27B with its optimizer has 5,000
MAX_PATH = 1024
MAX_DTYPE_NAME = 64  # characters of a "dtype" attribute
MEMORY_BYTES = 8 << 30  # address space, which libraries and threads take more of than memory

_LINKS = {h5l.TYPE_SOFT: "soft", h5l.TYPE_EXTERNAL: "external"}
_LAYOUTS = {
    h5d.CONTIGUOUS: "contiguous", h5d.CHUNKED: "chunked", h5d.COMPACT: "compact", h5d.VIRTUAL: "virtual",
}  # fmt: skip
_CLASSES = {
    h5t.INTEGER: "integer", h5t.FLOAT: "float", h5t.TIME: "time", h5t.STRING: "string",
    h5t.BITFIELD: "bit field", h5t.OPAQUE: "opaque", h5t.COMPOUND: "compound",
    h5t.REFERENCE: "reference", h5t.ENUM: "enumeration", h5t.VLEN: "variable length",
    h5t.ARRAY: "array",
}  # fmt: skip


def _bfloat16() -> h5t.TypeFloatID:
    made = h5t.IEEE_F32LE.copy()
    made.set_fields(15, 7, 8, 0, 7)
    made.set_size(2)
    made.set_ebias(127)
    return made


_TYPES = {
    "f16": h5t.IEEE_F16LE, "f32": h5t.IEEE_F32LE, "f64": h5t.IEEE_F64LE, "bf16": _bfloat16(),
    "i8": h5t.STD_I8LE, "i16": h5t.STD_I16LE, "i32": h5t.STD_I32LE, "i64": h5t.STD_I64LE,
    "u8": h5t.STD_U8LE, "u16": h5t.STD_U16LE, "u32": h5t.STD_U32LE, "u64": h5t.STD_U64LE,
}  # fmt: skip


class TooMuchError(Exception):
    """The file has more objects, or deeper ones, than any checkpoint."""


def listing(path: str) -> dict[str, Any]:
    """Every dataset of a file and whatever else its groups link to.

    Returns:
        ``{"datasets": [...], "links": [[name, "soft"]], "others": [name]}``; a dataset is a dict of facts, see
        :func:`_dataset`. Groups reached twice are under ``"twice"``.
    """
    out: dict[str, Any] = {"datasets": [], "links": [], "others": [], "twice": []}
    fid = h5f.open(os.fsencode(path), h5f.ACC_RDONLY)
    try:
        seen: set[int] = set()
        for name, kind, found in _objects(h5g.open(fid, b"/"), seen):
            if kind == "dataset":
                out["datasets"].append({"name": name, **_dataset(found)})
            elif kind in ("soft", "external"):
                out["links"].append([name, kind])
            else:
                out[kind].append(name)
    finally:
        fid.close()
    return out


def _objects(root: h5g.GroupID, seen: set[int]) -> Iterator[tuple[str, str, Any]]:
    """``(name, kind, object)`` of everything below the root but plain groups."""
    seen.add(h5o.get_info(root).addr)
    stack, count = [("", root)], 0
    while stack:
        path, group = stack.pop()
        names = list(group)
        count += len(names)
        if count > MAX_OBJECTS:
            raise TooMuchError(f"more than {MAX_OBJECTS} objects")
        below = []
        for raw in names:
            name = path + raw.decode("utf-8", "surrogateescape")
            if len(name) > MAX_PATH:
                raise TooMuchError(f"a path longer than {MAX_PATH} characters")
            link = _LINKS.get(group.links.get_info(raw).type)
            if link is not None:
                yield name, link, None
                continue
            found = h5o.open(group, raw)
            addr = h5o.get_info(found).addr
            if addr in seen:
                yield name, "twice", None
            elif isinstance(found, h5g.GroupID):
                below.append((name + "/", found))
            else:
                kind = "dataset" if isinstance(found, h5d.DatasetID) else "others"
                yield name, kind, found
            seen.add(addr)
        stack += reversed(below)


def _dataset(d: h5d.DatasetID) -> dict[str, Any]:
    """Facts about one dataset: layout, type, shape, where it lies, how it is packed."""
    plist = d.get_create_plist()
    layout = _LAYOUTS.get(plist.get_layout(), "unknown")
    facts: dict[str, Any] = {"layout": layout, "external": plist.get_external_count()}
    if layout == "virtual" or facts["external"]:
        return facts  # asking for more could open the other files
    space = d.get_space()
    kind = d.get_type()
    facts |= {
        "type": _type_name(kind),
        "itemsize": kind.get_size(),
        "attribute": _dtype_attribute(d),
        "shape": list(d.shape) if space.get_simple_extent_type() != h5s.NULL else None,
        "stored": d.get_storage_size(),
        "offset": d.get_offset() if layout == "contiguous" else None,
    }
    if layout == "chunked":
        facts["chunk"] = list(plist.get_chunk())
        facts["chunks"] = d.get_num_chunks()
    return facts


def _type_name(kind: h5t.TypeID) -> str:
    for name, known in _TYPES.items():
        if kind.equal(known):
            return name
    return f"{_CLASSES.get(kind.get_class(), 'unknown')} of {kind.get_size()} bytes"


def _dtype_attribute(d: h5d.DatasetID) -> str | None:
    """Keras's note of what an opaque dataset holds."""
    if not h5py.h5a.exists(d, b"dtype"):
        return None
    a = h5py.h5a.open(d, b"dtype")
    if a.get_type().get_class() != h5t.STRING or a.shape != () or a.get_storage_size() > 4096:
        return None
    value = h5py.Dataset(d).attrs["dtype"]
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text[:MAX_DTYPE_NAME]


def rows(path: str, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Rows ``start:stop`` of axis 0 of one dataset (all of a scalar), as they are stored: raw bytes."""
    fid = h5f.open(os.fsencode(path), h5f.ACC_RDONLY)
    try:
        d = h5o.open(fid, name.encode("utf-8", "surrogateescape"))
        shape = (stop - start, *d.shape[1:]) if d.shape else ()
        kind = d.get_type()
        out = np.empty(math.prod(shape), f"V{kind.get_size()}")
        here, there = h5s.create_simple((max(out.size, 1),)), d.get_space()
        if shape:
            there.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
        d.read(here, there, out, kind)  # with the stored type: no conversion
        return out.view(np.uint8)
    finally:
        fid.close()


def _limit(seconds: float) -> None:
    """End this process (SIGXCPU) when it works longer from here."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    stop = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (stop, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
    """The reply to one request and the bytes that follow it."""
    try:
        if request["op"] == "list":
            return listing(request["path"]), None
        data = rows(request["path"], request["name"], request["start"], request["stop"])
        return {"bytes": data.nbytes}, data
    except TooMuchError as e:
        return {"too_much": str(e)}, None
    except MemoryError:
        return {"error": "it asks for more memory than such a file can need"}, None
    except (
        Exception
    ) as e:  # whatever the library raises: it is the file's fault, and the caller's to say
        return {"error": f"{type(e).__name__}: {e}"}, None


def main(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for line in requests:
        request = json.loads(line)
        _limit(request["cpu"])
        reply, data = answer(request)
        replies.write(json.dumps(reply).encode() + b"\n")
        if data is not None:
            replies.write(data.data)
        replies.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
