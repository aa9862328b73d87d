"""Hidden states between blocks: in a file, so that a killed run goes on, and in memory where they may be."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..formats import output_fs as ofs
from ..formats.errors import ConflictError, FileIOError, SpaceError

_PIECE = 8 << 20  # bytes summed at a time
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class States:
    """Hidden states float32 ``[rows, width]`` in a file, and in memory too where they may be.

    Args:
        path: the file; made when ``rows`` is written, read when it is there.
        rows: tokens.
        width: hidden size.
        keep: hold them in memory; else only what is asked for is read.
        create: a new file.

    Raises:
        SpaceError: the disk is full.
    """

    def __init__(self, path: Path, rows: int, width: int, *, keep: bool, create: bool) -> None:
        self.path, self.rows, self.width = path, rows, width
        self._memory = torch.empty(rows, width) if keep else None
        if not create and not path.exists():
            raise ConflictError(
                "the kept hidden states are gone.", where=path, fix="start afresh with --no-resume."
            )
        with ofs.calls("open", path):
            flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
            # opened and closed by the layer that writes: it remembers descriptors
            self._fd: int | None = ofs.REAL.open(path, flags)
            if create:
                self._reserve()
        if not create:
            size = os.fstat(self._open).st_size
            if size != rows * width * 4:
                self.close()
                raise ConflictError(
                    f"the kept hidden states have {size} bytes, expected {rows * width * 4}.",
                    where=path,
                    fix="start afresh with --no-resume.",
                )
            if keep:
                self._memory = self._read(0, rows)

    def _reserve(self) -> None:
        nbytes = self.rows * self.width * 4
        try:
            os.posix_fallocate(self._open, 0, nbytes)
        except OSError as e:
            if e.errno not in _FULL:  # a file system without fallocate
                os.ftruncate(self._open, nbytes)
                return
            free = os.statvfs(self.path.parent)
            self.close()
            raise SpaceError(
                f"{nbytes} bytes are needed for hidden states, {free.f_bavail * free.f_frsize} are free.",
                where=self.path.parent,
                fix="free disk space, or use fewer --samples or a smaller --seq-len.",
            ) from e

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``[stop - start, width]``; not to be changed."""
        if self._memory is not None:
            return self._memory[start:stop]
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> Tensor:
        out = np.empty((stop - start, self.width), np.float32)
        with ofs.calls("read", self.path):
            view = out.reshape(-1).view(np.uint8).data
            at = start * self.width * 4
            while view.nbytes:
                n = os.preadv(self._open, [view], at)
                if not n:
                    raise FileIOError("the hidden states end early.", where=self.path)
                view, at = view[n:], at + n
        return torch.from_numpy(out)

    def write(self, start: int, values: Tensor) -> None:
        """Rows from ``start`` on."""
        values = values.reshape(-1, self.width).cpu()
        if self._memory is not None:
            self._memory[start : start + len(values)] = values
        data = values.contiguous().numpy().reshape(-1).view(np.uint8).data
        with ofs.calls("write", self.path):
            ofs.write_all(ofs.REAL, self._open, data, start * self.width * 4)

    def sync(self) -> None:
        """Make everything written durable."""
        with ofs.calls("write", self.path):
            os.fdatasync(self._open)

    def checksum(self) -> int:
        """CRC-32 of all rows."""
        found, step = 0, max(1, _PIECE // (4 * self.width))
        for start in range(0, self.rows, step):
            rows = self.read(start, min(start + step, self.rows))
            found = zlib.crc32(rows.numpy().reshape(-1).view(np.uint8).data, found)
        return found

    def require(self, checksum: int) -> None:
        """Raise ConflictError unless the rows are those whose checksum this is."""
        if self.checksum() != checksum:
            raise ConflictError(
                "the kept hidden states are not those that were written.",
                where=self.path,
                fix="start afresh with --no-resume.",
            )

    @property
    def _open(self) -> int:
        if self._fd is None:
            raise ValueError("the hidden states are closed")
        return self._fd

    def close(self) -> None:
        """Close the file; twice is harmless."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            ofs.REAL.close(fd)
