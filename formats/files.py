"""Bounds-checked positional reads of one regular file.

``pread`` rather than ``mmap``: a file that shrinks while it is read gives an error, not SIGBUS, and pages read
do not count as this process's memory. Large reads go past the page cache where they are not cached (:mod:`.direct`).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from .direct import DirectFile
from .errors import FileIOError, TruncatedError


class InputFile:
    """One open input file. Safe to share between threads.

    Raises:
        FileIOError: not there, not readable, not a regular file, or changed while being read.
        TruncatedError: a read goes past the end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._io: DirectFile | None = None
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            # ENXIO: a socket
            why = "not a regular file" if e.errno == errno.ENXIO else f"cannot open: {e.strerror}"
            raise FileIOError(f"{why}.", where=self.path) from e
        st = os.fstat(self._fd)
        if not stat.S_ISREG(st.st_mode):
            self.close()  # and forget the number: another file may get it before __del__ runs
            raise FileIOError("not a regular file.", where=self.path, fix="name a file.")
        self._io = DirectFile(self._fd, os.O_RDONLY)
        self.size = st.st_size
        self._identity = (st.st_size, st.st_mtime_ns)

    def read_into(self, offset: int, out: npt.NDArray[np.uint8] | memoryview) -> None:
        """Fill ``out`` (a flat byte buffer) from ``offset``."""
        view = (out if isinstance(out, memoryview) else out.data).cast("B")
        self._require(offset, len(view))
        if self._io is None:
            raise FileIOError("the file is closed.", where=self.path)
        done = 0
        while done < len(view):
            try:
                n = self._io.read(view[done:], offset + done)
            except OSError as e:
                raise FileIOError(
                    f"read failed at byte {offset + done}: {e.strerror}.", where=self.path
                ) from e
            if n == 0:
                raise FileIOError(
                    f"the file became shorter while it was read (at byte {offset + done}).",
                    where=self.path,
                    fix="wait until nothing writes to it, then run again.",
                )
            done += n

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; for headers, not payloads."""
        self._require(offset, size)  # before allocating what a corrupt header asks for
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def _require(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise TruncatedError(
                f"{offset + size - self.size} bytes are missing: bytes {offset} to "
                f"{offset + size} are needed, the file has {self.size}.",
                where=self.path,
                fix="download or copy the file again.",
            )

    def check_unchanged(self) -> None:
        """Raise if the file was written to since it was opened."""
        st = os.fstat(self._fd)
        if (st.st_size, st.st_mtime_ns) != self._identity:
            raise FileIOError(
                "the file changed while it was read.",
                where=self.path,
                fix="wait until nothing writes to it, then run again.",
            )

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            if self._io is not None:
                self._io.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
