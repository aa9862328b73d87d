"""One writer per destination: ``flock`` where the file system has it, process and boot identity where not.

The kernel drops an ``flock`` when its holder dies, so a lock left by a killed run never needs a hand. Network file
systems without it (``nolock`` mounts) fall back to who is written in the file: same machine and boot, and alive.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import output_fs as ofs
from .errors import LockedError, printable

_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ROUNDS = 100  # a lock file that vanishes this often is not ours to fight for


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    pid: int
    host: str
    boot: str

    @staticmethod
    def me() -> Owner:
        """This process."""
        try:
            boot = _BOOT_ID.read_text().strip()
        except OSError:
            boot = ""
        return Owner(os.getpid(), socket.gethostname(), boot)

    @staticmethod
    def parse(data: bytes) -> Owner | None:
        """The owner a lock file names; None when it is empty or torn."""
        try:
            doc = json.loads(data)
            return Owner(int(doc["pid"]), str(doc["host"]), str(doc["boot"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def dump(self) -> bytes:
        """The lock file's content."""
        return json.dumps({"pid": self.pid, "host": self.host, "boot": self.boot}).encode() + b"\n"

    def surely_dead(self) -> bool:
        """Whether this owner cannot be running: same host after a reboot, or no such process."""
        here = Owner.me()
        if self.host != here.host or self.pid <= 0:
            return False
        if self.boot != here.boot:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False


class Lock:
    """The exclusive lock file ``path``, held until :meth:`release`; its directory is made if need be.

    Attributes:
        recovered: the owner of a stale lock that was taken over, or None.

    Raises:
        LockedError: a live process holds it; names its pid and host.
        FileIOError: the file system refuses.
    """

    def __init__(self, path: Path, fs: ofs.Filesystem = ofs.REAL) -> None:
        self.path = path
        self._fs = fs
        self._fd = -1
        self.recovered: Owner | None = None
        with ofs.calls("take the lock", path):
            if not any(self._try() for _ in range(_ROUNDS)):
                raise self._refusal(None)

    def _try(self) -> bool:
        fs = self._fs
        with suppress(FileExistsError):
            fs.mkdir(self.path.parent)
        try:
            fd, created = fs.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
        except FileNotFoundError:
            return False  # its holder has just removed the directory …
        except FileExistsError:
            try:
                fd, created = fs.open(self.path, os.O_RDWR), False
            except FileNotFoundError:
                return False  # … or the file
        self._fd = fd
        try:
            return self._claim(fd, created)
        except BaseException:
            self._close()
            raise

    def _claim(self, fd: int, created: bool) -> bool:
        buffer = bytearray(4096)
        owner = Owner.parse(bytes(buffer[: ofs.read_some(self._fs, fd, memoryview(buffer), 0)]))
        try:
            self._fs.flock(fd)
        except BlockingIOError:
            raise self._refusal(owner) from None
        except OSError as e:
            if e.errno not in _NO_FLOCK:
                raise
            if not created and not (owner and owner.surely_dead()):
                raise self._refusal(owner) from None
        if not self._still_there(fd):  # the former holder removed the file under us
            self._close()
            return False
        self.recovered = owner
        me = Owner.me().dump()
        self._fs.truncate(fd, 0)
        ofs.write_all(self._fs, fd, memoryview(me), 0)
        return True

    def _still_there(self, fd: int) -> bool:
        try:
            there = self._fs.lstat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(fd))

    def _refusal(self, owner: Owner | None) -> LockedError:
        who = f"process {owner.pid} on {printable(owner.host)}" if owner else "another process"
        return LockedError(
            f"{who} is writing this output.",
            where=self.path,
            fix=f"wait for it to end, or stop it; if it surely no longer runs, remove {self.path}.",
        )

    def release(self) -> None:
        """Remove the lock file, and its directory if that is empty now; twice is harmless."""
        if self._fd < 0:
            return
        try:
            with ofs.calls("remove the lock", self.path):
                if self._still_there(self._fd):
                    self._fs.unlink(self.path)
                    if not self._fs.listdir(self.path.parent):
                        self._remove_directory()
        finally:
            self._close()

    def _remove_directory(self) -> None:
        try:
            self._fs.rmdir(self.path.parent)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):  # someone moved in
                raise

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            ofs.close(self._fs, fd)
