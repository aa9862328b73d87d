"""Large transfers past the page cache (O_DIRECT), where file and file system allow.

A conversion touches every byte once or twice. Through the page cache each of these bytes costs a page to find, clear and
copy (several seconds per gigabyte on small virtual machines), and pushes out what other programs had cached. So large
reads take what is cached already and fetch the rest directly; large writes go directly, but for the edges that do not
fill a block. Anything unsupported falls back to ordinary calls.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

_ALIGN = (
    4096  # block size of nearly every device; a larger one is refused with EINVAL, which falls back
)
_PIECE = 8 << 20
SMALL = 256 << 10  # below it the page cache is quicker
_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOENT}
_CACHESTAT = 451  # Linux 6.5; the number is the same on every architecture that has O_DIRECT
_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_local = threading.local()


def _bounce() -> memoryview:
    """This thread's aligned buffer."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, _PIECE))
    buffer: memoryview = _local.buffer
    return buffer


def _copy(to: memoryview, data: memoryview) -> None:
    """Copy bytes without holding the interpreter's lock, as assigning to a slice would."""
    np.copyto(np.frombuffer(to, np.uint8), np.frombuffer(data, np.uint8))


def is_cached(fd: int, offset: int, size: int) -> bool:
    """Whether a range is in the page cache, most of it; true where the kernel does not tell (before Linux 6.5).

    Source: cachestat(2).
    """
    span = (ctypes.c_uint64 * 2)(offset, size)
    found = (ctypes.c_uint64 * 5)()  # cached, dirty, in write-back, evicted, recently evicted
    call = getattr(_LIBC, "syscall", None)
    if call is None or call(_CACHESTAT, fd, span, found, 0):
        return True
    return int(found[0]) * _PAGE * 2 > size


class DirectFile:
    """Reads and writes of one open file; does not own ``fd``. Safe to share between threads.

    Both calls may transfer less than asked, as ``pread`` and ``pwrite`` may.
    """

    def __init__(self, fd: int, flags: int) -> None:
        self._fd = fd
        self._flags = flags
        self._direct: int | None = None
        self._usable = bool(_O_DIRECT)
        self._lock = threading.Lock()

    def read(self, out: memoryview, offset: int) -> int:
        """Some bytes from ``offset`` into ``out``; 0 at the end of the file."""
        if not self._usable or len(out) < SMALL:
            return os.preadv(self._fd, [out], offset)
        out = out[:_PIECE]
        if is_cached(self._fd, offset, len(out)):
            return os.preadv(self._fd, [out], offset)
        n = self._read_direct(out, offset)
        return os.preadv(self._fd, [out], offset) if n is None else n

    def _read_direct(self, out: memoryview, offset: int) -> int | None:
        start = offset - offset % _ALIGN
        skip = offset - start
        buffer = _bounce()
        wanted = min(_PIECE, -(-(skip + len(out)) // _ALIGN) * _ALIGN)
        n = self._try(lambda fd: os.preadv(fd, [buffer[:wanted]], start))
        if n is None:
            return None
        got = max(0, min(n - skip, len(out)))
        _copy(out[:got], buffer[skip : skip + got])
        return got

    def write(self, data: memoryview, offset: int) -> int:
        """Write some of ``data`` at ``offset``."""
        if not self._usable or len(data) < SMALL:
            return os.pwrite(self._fd, data, offset)
        edge = -offset % _ALIGN
        if edge:
            return os.pwrite(self._fd, data[:edge], offset)
        size = min(_PIECE, len(data) - len(data) % _ALIGN)
        buffer = _bounce()
        _copy(buffer[:size], data[:size])
        n = self._try(lambda fd: os.pwrite(fd, buffer[:size], offset))
        return os.pwrite(self._fd, data, offset) if n is None else n

    def _try(self, call: Callable[[int], int]) -> int | None:
        """Run ``call`` on the direct descriptor; None where direct transfers do not work."""
        try:
            with self._lock:
                if self._direct is None:
                    # the same file whatever its path means by now
                    self._direct = os.open(
                        f"/proc/self/fd/{self._fd}", self._flags | _O_DIRECT | os.O_CLOEXEC
                    )
            return call(self._direct)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
            self._usable = False
            return None

    def close(self) -> None:
        """Close the direct descriptor."""
        with self._lock:
            if self._direct is not None:
                os.close(self._direct)
                self._direct = None
            self._usable = False
