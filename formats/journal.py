"""What an interrupted run may be trusted to have done: an append-only file of checksummed lines.

Each line is ``<crc32 in hex> <JSON>``. A line is appended only after what it says is durable, and is itself made
durable before the next one is started. So only the tail can be torn; reading stops at the first line that is not
whole, and appending overwrites from there.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import output_fs as ofs

MAX_BYTES = 256 << 20


def encode(record: Mapping[str, Any]) -> bytes:
    """One line."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines at the front of ``data``, and how many bytes they take."""
    records: list[dict[str, Any]] = []
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        crc, _, text = data[at:end].partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            break
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
        at = end + 1
    return records, at


class Journal:
    """The journal at ``path``; :attr:`records` is what it held when it was opened.

    Args:
        path: created by the first :meth:`append`.
        fs: the file system.

    Raises:
        FileIOError: it cannot be read or is absurdly large.
    """

    def __init__(self, path: Path, fs: ofs.Filesystem = ofs.REAL) -> None:
        self.path = path
        self._fs = fs
        self._fd = -1
        self._end = 0
        self.records: list[dict[str, Any]] = []
        with ofs.calls("read the journal", path):
            if ofs.exists(fs, path):
                self.records, self._end = decode(ofs.read_file(fs, path, MAX_BYTES))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and make it durable."""
        line = encode(record)
        with ofs.calls("write the journal", self.path):
            if self._fd < 0:
                self._fd = self._fs.open(self.path, os.O_RDWR | os.O_CREAT)
                self._fs.truncate(self._fd, self._end)
            ofs.write_all(self._fs, self._fd, memoryview(line), self._end)
            self._fs.fdatasync(self._fd)
        self._end += len(line)

    def forget(self) -> None:
        """Start empty: the file was removed, or what it holds does not count."""
        self.records, self._end = [], 0

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            ofs.close(self._fs, fd)
