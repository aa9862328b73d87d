"""Every file-system call a write transaction makes, and what its failures are called.

One small object stands between :mod:`.output` and the operating system, so that tests can fail, tear or kill the
N-th call for every N. Linux calls that Python lacks (``fallocate``, ``renameat2``) go through ctypes and have
portable fallbacks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .direct import DirectFile
from .errors import FileIOError, G2Error, MemoryLimitError, SpaceError

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
_WRITE_MAX = 64 << 20  # per call: keeps short writes cheap and threads interruptible

_FREE = "free space, then run the same command again to resume."
# errno -> error, reason, advice; others are E_IO
_KNOWN: dict[int, tuple[type[G2Error], str, str]] = {
    errno.ENOSPC: (SpaceError, "the disk is full", _FREE),
    errno.EDQUOT: (SpaceError, "the disk quota is exceeded", _FREE),
    errno.ENOMEM: (
        MemoryLimitError,
        "out of memory",
        "close other programs or raise the limits, then run the same command again to resume.",
    ),
    errno.EFBIG: (
        SpaceError,
        "the file is larger than the file system or `ulimit -f` allows",
        "write smaller files with --max-shard-size.",
    ),
}


class Filesystem:
    """The real one. Raises OSError as ``os`` does; file descriptors are plain ints."""

    def __init__(self) -> None:
        self._direct: dict[int, DirectFile] = {}
        self._direct_lock = threading.Lock()

    def _io(self, fd: int) -> DirectFile:
        with self._direct_lock:
            if fd not in self._direct:
                self._direct[fd] = DirectFile(fd, os.O_RDWR)
            return self._direct[fd]

    def open(self, path: Path, flags: int) -> int:
        """Open with ``0666`` less the umask; a symlink at ``path`` is refused (ELOOP)."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def close(self, fd: int) -> None:
        """Close ``fd``."""
        with self._direct_lock:
            direct = self._direct.pop(fd, None)
        if direct is not None:
            direct.close()
        os.close(fd)

    def pread(self, fd: int, out: memoryview, offset: int) -> int:
        """Read into ``out``; returns the bytes read, 0 at the end of the file."""
        return self._io(fd).read(out, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write some of ``data``; returns how many bytes."""
        return self._io(fd).write(data, offset)

    def allocate(self, fd: int, size: int) -> None:
        """Grow to ``size`` bytes of zeros, reserving the space where the file system can.

        Not ``posix_fallocate``: where the file system cannot, that writes every block.
        """
        call = getattr(_LIBC, "fallocate", None)
        if call is None or size == 0:
            return os.ftruncate(fd, size)
        if call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return None
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return os.ftruncate(fd, size)
        raise OSError(code, os.strerror(code))

    def truncate(self, fd: int, size: int) -> None:
        """Cut or grow to ``size`` bytes."""
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        """Make a file or directory durable."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """Make a file's bytes and size durable."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def flock(self, fd: int) -> None:
        """Take the exclusive advisory lock or raise BlockingIOError."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def mkdir(self, path: Path) -> None:
        """Create a directory with ``0777`` less the umask."""
        os.mkdir(path)  # noqa: PTH102

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)  # noqa: PTH106

    def unlink(self, path: Path) -> None:
        """Remove a file or symlink."""
        os.unlink(path)  # noqa: PTH108

    def rename(self, old: Path, new: Path) -> None:
        """Rename, replacing ``new``."""
        os.rename(old, new)  # noqa: PTH104

    def rename_new(self, old: Path, new: Path) -> None:
        """Rename; FileExistsError if ``new`` is there."""
        if not _renameat2(old, new, _NOREPLACE):
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(old, new)  # noqa: PTH104

    def exchange(self, a: Path, b: Path) -> bool:
        """Swap two paths atomically; False where the system cannot."""
        return _renameat2(a, b, _EXCHANGE)

    def lstat(self, path: Path) -> os.stat_result:
        """Status of the path itself, not of what a symlink points to."""
        return os.lstat(path)

    def listdir(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(path))  # noqa: PTH208

    def statvfs(self, path: Path) -> os.statvfs_result:
        """Free space and inodes."""
        return os.statvfs(path)


REAL = Filesystem()


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    call = getattr(_LIBC, "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def explain(error: OSError, doing: str, where: Path) -> G2Error:
    """The G2Error for a failed call: no room is E_SPACE, no memory E_MEMORY, anything else E_IO."""
    if error.errno in _KNOWN:
        kind, what, fix = _KNOWN[error.errno]
        return kind(f"cannot {doing}: {what}.", where=where, fix=fix)
    reason = error.strerror or str(error)
    return FileIOError(f"cannot {doing}: {reason}.", where=where)


@contextmanager
def calls(doing: str, where: Path) -> Iterator[None]:
    """Turn the block's OSError into a G2Error; ``doing`` completes "cannot …"."""
    try:
        yield
    except OSError as e:
        raise explain(e, doing, where) from e


def write_all(fs: Filesystem, fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, a flat byte buffer, at ``offset``, through short writes and interrupts."""
    done = 0
    while done < len(data):
        try:
            n = fs.pwrite(fd, data[done : done + _WRITE_MAX], offset + done)
        except InterruptedError:
            continue
        if n == 0:  # would loop for ever
            raise OSError(errno.EIO, "the write made no progress")
        done += n


def read_some(fs: Filesystem, fd: int, out: memoryview, offset: int) -> int:
    """Fill ``out`` from ``offset``; fewer bytes only at the end of the file."""
    done = 0
    while done < len(out):
        try:
            n = fs.pread(fd, out[done:], offset + done)
        except InterruptedError:
            continue
        if n == 0:
            break
        done += n
    return done


@contextmanager
def opened(fs: Filesystem, path: Path, flags: int) -> Iterator[int]:
    """A descriptor for the block."""
    fd = fs.open(path, flags)
    try:
        yield fd
    finally:
        close(fs, fd)


def close(fs: Filesystem, fd: int) -> None:
    """Close ``fd``. An error is no news: what matters was synced, and its sync succeeded."""
    with suppress(OSError):
        fs.close(fd)


def read_file(fs: Filesystem, path: Path, limit: int) -> bytes:
    """A small file's bytes.

    Raises:
        OSError: EOVERFLOW if it is larger than ``limit``.
    """
    with opened(fs, path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        size = fs.lstat(path).st_size
        if size > limit:
            raise OSError(errno.EOVERFLOW, f"it has {size} bytes, the limit is {limit}")
        out = bytearray(size)
        return bytes(out[: read_some(fs, fd, memoryview(out), 0)])


def sync_dir(fs: Filesystem, path: Path) -> None:
    """Make a directory's entries durable, where the file system knows how."""
    with opened(fs, path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            fs.fsync(fd)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise


def exists(fs: Filesystem, path: Path) -> bool:
    """Whether anything, a dangling symlink included, is at ``path``."""
    try:
        fs.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
