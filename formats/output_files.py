"""The data files of one write transaction: made at full size, written at any offset from any thread, hashed.

Descriptors are bounded (a zarr checkpoint has thousands of files); which bytes are written, and which of them are
durable yet, is known per file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock

from . import output_fs as ofs
from .base import FilePlan
from .errors import LayoutError, ResumeError
from .manifest import FileEntry
from .output_paths import directories
from .output_ranges import Ranges, Span
from .output_recent import Recent

_MAX_OPEN = 128
_READ = 4 << 20
_WAIT_SECONDS = 0.2
_LOOK_AHEAD = 8  # files; writers follow the plan's order


class _Open:
    """A descriptor and how many threads use it right now."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class DataFiles:
    """The planned files below ``root``. Thread-safe.

    Args:
        root: the staging directory's data directory.
        files: every file, in the plan's order.
        payload: file -> the spans that slots and checksums fill, in order; all else is fixed.
        fs: the file system.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[FilePlan],
        payload: Mapping[str, Sequence[Span]],
        fs: ofs.Filesystem,
    ) -> None:
        self.root, self.files = root, tuple(files)
        self.sizes = {f.name: f.size for f in files}
        self._payload, self._fs = payload, fs
        self._lock = Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._written = {f.name: Ranges() for f in files}
        self._fresh: dict[str, Ranges] = {}
        self.fresh_bytes = 0
        self.recent = Recent()

    @property
    def directories(self) -> list[Path]:
        """Every directory, deepest first, the root last."""
        below = sorted(directories(self.sizes), key=lambda d: (-d.count("/"), d))
        return [*(self.root / d for d in below), self.root]

    def create(self) -> None:
        """Make directories and files, write what is fixed, make all of it durable.

        Raises:
            SpaceError: the space cannot be reserved.
            FileIOError: two names are one on this file system, or a call fails.
        """
        for directory in reversed(self.directories):
            with ofs.calls("create the directory", directory):
                self._fs.mkdir(directory)
        for f in self.files:
            path = self.root / f.name
            with (
                ofs.calls(f"create the file at its {f.size} bytes", path),
                ofs.opened(self._fs, path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd,
            ):
                self._fs.allocate(fd, f.size)
                for offset, data in f.fixed:
                    ofs.write_all(self._fs, fd, memoryview(data), offset)
                self._fs.fsync(fd)
        self.sync_directories()

    def sync_directories(self) -> None:
        """Make every file's name durable."""
        for directory in self.directories:
            with ofs.calls("make durable", directory):
                ofs.sync_dir(self._fs, directory)

    def check(self) -> None:
        """Check that every file is there at its size.

        Raises:
            ResumeError: someone changed the interrupted run's files.
        """
        for name, size in self.sizes.items():
            path = self.root / name
            with ofs.calls("look at", path):
                st = self._fs.lstat(path) if ofs.exists(self._fs, path) else None
            if st is None or not stat.S_ISREG(st.st_mode) or st.st_size != size:
                found = "is missing" if st is None else f"has {st.st_size} bytes, not {size}"
                raise ResumeError(
                    f"the interrupted run's file {found}; something else changed it.",
                    where=path,
                    fix="start afresh with --no-resume.",
                )

    def allocated(self) -> int:
        """Bytes of the files that have room on the disk already."""
        blocks = (self._fs.lstat(self.root / n).st_blocks * 512 for n in self.sizes)
        return sum(min(b, size) for b, size in zip(blocks, self.sizes.values(), strict=True))

    @contextmanager
    def _descriptor(self, name: str) -> Iterator[int]:
        with self._lock:
            entry = self._open.pop(name, None)
            if entry is None:
                entry = _Open(self._fs.open(self.root / name, os.O_RDWR))
            self._open[name] = entry
            entry.users += 1
            spare = self._spare()
        try:
            for fd in spare:
                self._fs.fdatasync(fd)  # an error seen by nobody could be forgotten after close
                ofs.close(self._fs, fd)
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def _spare(self) -> list[int]:
        idle = [n for n, entry in self._open.items() if not entry.users]
        return [self._open.pop(n).fd for n in idle[: max(0, len(self._open) - _MAX_OPEN)]]

    def write(self, name: str, data: memoryview, offset: int) -> None:
        """Write a flat byte buffer."""
        with ofs.calls(f"write at byte {offset}", self.root / name), self._descriptor(name) as fd:
            ofs.write_all(self._fs, fd, data, offset)
        self.recent.put(name, data, offset)
        with self._lock:  # only now: a sync that began before may not have caught these bytes
            self._written[name].add(offset, offset + len(data))
            self._fresh.setdefault(name, Ranges()).add(offset, offset + len(data))
            self.fresh_bytes += len(data)

    def read(self, name: str, out: memoryview, offset: int) -> None:
        """Read back ``len(out)`` bytes."""
        with ofs.calls(f"read back at byte {offset}", self.root / name):
            with self._descriptor(name) as fd:
                n = ofs.read_some(self._fs, fd, out, offset)
            if n != len(out):
                raise OSError(0, f"the file ends {len(out) - n} bytes early")

    def sync(self) -> dict[str, list[Span]]:
        """Make everything written so far durable; returns the spans that became so."""
        with self._lock:
            fresh, self._fresh, self.fresh_bytes = self._fresh, {}, 0
        for name in fresh:
            with ofs.calls("make durable", self.root / name), self._descriptor(name) as fd:
                self._fs.fdatasync(fd)
        return {name: spans.spans() for name, spans in fresh.items()}

    def restore(self, written: Mapping[str, Sequence[Span]]) -> None:
        """Take what an earlier run's journal says is written."""
        for name in written.keys() & self._written.keys():
            for start, stop in written[name]:
                self._written[name].add(start, stop)

    def has(self, name: str, start: int, stop: int) -> bool:
        """Whether all of a span is written."""
        with self._lock:
            return self._written[name].end(start) >= stop

    def final_until(self, name: str, at: int, hint: int) -> tuple[int, int]:
        """Up to where the file's bytes from ``at`` on will not change any more.

        Args:
            name: the file.
            at: everything before it is final.
            hint: what the last call for this file returned second; 0 at first.
        """
        spans, written = self._payload[name], self._written[name]
        with self._lock:
            while hint < len(spans):
                start, stop = spans[hint]
                end = written.end(max(at, start))
                if end < stop:
                    return max(end, start), hint
                hint += 1
        return self.sizes[name], hint

    def close(self) -> None:
        """Close every descriptor; what is not durable yet stays so."""
        self.recent.close()
        while self._open:
            ofs.close(self._fs, self._open.popitem()[1].fd)


class _Job:
    """One file being hashed."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.hash = hashlib.sha256()
        self.at = self.hint = self.final = 0


class FileHashes:
    """sha256 of every file, following the writers as bytes become final. Thread-safe.

    So most of the hashing is over, out of the page cache, by the time the last byte is written.
    """

    def __init__(self, files: DataFiles) -> None:
        self._files = files
        self._lock = Lock()
        self._moved = Condition(self._lock)
        self._busy = 0
        self._idle = deque(_Job(name, size) for name, size in files.sizes.items())
        self._entries: dict[str, FileEntry] = {}

    def advance(self) -> bool:
        """Hash the next block of some file; False when there is none that is final."""
        job = self._take()
        if job is None:
            return False
        try:
            self._hash_next(job)
        finally:
            with self._lock:
                if job.at == job.size:
                    self._entries[job.name] = FileEntry(job.size, job.hash.hexdigest())
                else:
                    self._idle.appendleft(job)
                self._busy -= 1
                self._moved.notify_all()
        return True

    def keep_up(self) -> None:
        """Help, or wait for, the hashing of what was written lately, before it must be read back from the disk."""
        while self._files.recent.full and not self.advance():
            with self._lock:
                if not (self._busy and self._moved.wait(_WAIT_SECONDS)):
                    return  # what comes next in every file is not written yet

    def _hash_next(self, job: _Job) -> None:
        recent = self._files.recent
        found = recent.take(job.name, job.at, job.final)
        if found is not None:
            start, piece = found
            job.hash.update(piece[job.at - start :].data)
            job.at = start + len(piece)
            recent.back(piece)
            return
        stop = min(job.final, job.at + _READ, recent.next_start(job.name, job.at) or job.final)
        part = memoryview(bytearray(stop - job.at))
        self._files.read(job.name, part, job.at)
        job.hash.update(part)
        job.at = stop

    def _take(self) -> _Job | None:
        """The first of the next few files that has final bytes to hash."""
        with self._lock:
            for k in range(min(_LOOK_AHEAD, len(self._idle))):
                job = self._idle[k]
                job.final, job.hint = self._files.final_until(job.name, job.at, job.hint)
                if job.final > job.at or job.size == 0:
                    del self._idle[k]
                    self._busy += 1
                    return job
        return None

    def finish(self, threads: int) -> dict[str, FileEntry]:
        """Hash the rest; the entries in the files' order."""

        def work(_: int) -> None:
            while self.advance():
                pass

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(threads)))
        work(0)
        if len(self._entries) != len(self._files.sizes):
            raise LayoutError("some bytes were never written.", where=self._files.root)
        return {name: self._entries[name] for name in self._files.sizes}
