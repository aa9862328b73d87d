"""A run of bytes in a file with a CRC-32 stored for it, verified without a second pass.

**When it is verified**: once, when :meth:`Record.verify` is called, which readers do no later than when the last row of
any tensor in the record is read. Pieces are summed as they are read, in any order, from any thread; what was not read
until then is read for the sum. So reading from front to back costs nothing but the sum, and reading only the last row
costs a pass over the record, once.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from .crc32 import PiecewiseCrc32
from .errors import ChecksumError, LimitError, printable
from .files import InputFile

_BLOCK = 8 << 20  # one direct read


class Record:
    """One file of an archive.

    Attributes:
        name: without the archive's folder, such as ``data/0``.
        size: bytes.
        stored_crc: CRC-32 from the directory; None when the archive was saved without checksums.
    """

    def __init__(
        self, file: InputFile, name: str, offset: int, size: int, stored_crc: int | None
    ) -> None:
        self.name = name
        self.size = size
        self.stored_crc = stored_crc
        self._file = file
        self._offset = offset
        self._crc = PiecewiseCrc32(size)
        self._verified = stored_crc is None

    def read_into(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` (flat bytes) from byte ``start`` of the record, summing as it passes."""
        if self._verified:
            self._file.read_into(self._offset + start, out)
            return
        crc = 0
        for a in range(0, len(out), _BLOCK):
            block = out[a : a + _BLOCK]
            self._file.read_into(self._offset + start + a, block)
            crc = zlib.crc32(block.data, crc)
        self._crc.add(start, start + len(out), crc)

    def verify(self) -> None:
        """Compare the checksum, reading what was not read yet.

        Raises:
            ChecksumError: the bytes are not those the writer summed.
        """
        if self._verified:
            return
        block = np.empty(min(_BLOCK, self.size), np.uint8)
        for start, stop in self._crc.gaps():
            for a in range(start, stop, _BLOCK):
                piece = block[: min(_BLOCK, stop - a)]
                self._file.read_into(self._offset + a, piece)
                self._crc.update(a, piece.data)
        if self._crc.value != self.stored_crc:
            raise ChecksumError(
                f"the {self.size} bytes of {printable(self.name)} have CRC-32 "
                f"{self._crc.value or 0:08x}, the archive says {self.stored_crc or 0:08x}.",
                where=self._file.path,
                fix="the file is damaged; download or copy it again.",
            )
        self._verified = True

    def read(self, limit: int) -> bytes:
        """The whole record, not yet verified.

        Raises:
            LimitError: it is larger than ``limit`` bytes.
        """
        if self.size > limit:
            raise LimitError(
                f"{printable(self.name)} has {self.size} bytes, at most {limit} are read.",
                where=self._file.path,
            )
        out = np.empty(self.size, np.uint8)
        self.read_into(0, out)
        return out.tobytes()
