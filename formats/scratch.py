"""Temporary files for what does not fit into memory."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import FileIOError, ResourceError, SpaceError

U8 = npt.NDArray[np.uint8]


class Scratch:
    """An unlinked temporary file; its space is free again when it is closed, or the process dies.

    Raises:
        SpaceError: the file system has too little room.
        FileIOError: it cannot be created, written or read.
    """

    def __init__(self, directory: Path | None, nbytes: int) -> None:
        self.where = directory or Path(tempfile.gettempdir())
        self.file = None
        try:
            room = os.statvfs(self.where)
            free = room.f_bavail * room.f_frsize
            if free < nbytes:
                raise self._full(
                    f"{nbytes} bytes are needed for one decoded chunk, {free} are free"
                )
            self.file = tempfile.TemporaryFile(dir=self.where, buffering=0)  # noqa: SIM115
        except OSError as e:
            raise self._failed(e) from e
        self.fd = self.file.fileno()

    def write(self, offset: int, data: U8) -> None:
        """Store bytes at an offset."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self.fd, data[done:].data, offset + done)
        except OSError as e:
            raise self._failed(e) from e

    def read_into(self, offset: int, out: U8) -> None:
        """Fill ``out`` from an offset."""
        done = 0
        try:
            while done < len(out):
                n = os.preadv(self.fd, [out[done:].data], offset + done)
                if n == 0:
                    raise FileIOError("a temporary file became shorter.", where=self.where)
                done += n
        except OSError as e:
            raise self._failed(e) from e

    def close(self) -> None:
        """Free the space; closing twice is harmless."""
        if self.file is not None:
            self.file.close()

    def _failed(self, e: OSError) -> ResourceError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return self._full(f"writing a decoded chunk failed: {e.strerror}")
        return FileIOError(f"temporary file: {e.strerror}.", where=self.where)

    def _full(self, what: str) -> SpaceError:
        return SpaceError(
            f"{what}.", where=self.where, fix="free some space, or set TMPDIR to a larger disk."
        )
