"""A directory that appears whole or not at all, for outputs that a rerun makes again in minutes.

Files are laid out at their size in ``DST.partial/data``, made durable, and take their place by one rename. Unlike
:mod:`..formats.output` there is no journal: what a killed run left is thrown away by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..formats import output_fs as ofs
from ..formats import output_paths as paths
from ..formats.base import FilePlan
from ..formats.errors import ConflictError, G2Error, UsageError
from ..formats.lock import Lock
from ..formats.names import listing
from ..formats.output_commit import Stage, exists_error


class StagedDirectory:
    """One transaction; a context manager that keeps nothing unless :meth:`commit` was called.

    Args:
        dst: directory to create.
        files: laid out at once; their ``fixed`` bytes are written.
        later: names of small files that :meth:`add` gives; counted with ``later_bytes`` for the room they need.
        overwrite: replace an existing directory that holds nothing but these files.
        sources: what is read meanwhile; the output must lie apart.
        fs: the file system.
    """

    def __init__(
        self,
        dst: Path,
        files: Sequence[FilePlan],
        later: Sequence[str] = (),
        *,
        overwrite: bool = False,
        sources: Sequence[Path] = (),
        fs: ofs.Filesystem = ofs.REAL,
    ) -> None:
        self._named = Path(dst)
        self._stage = Stage(paths.normalise(self._named))
        self._files, self._overwrite, self._fs = tuple(files), overwrite, fs
        self._known = [*(f.name for f in files), *later]
        self._sources = tuple(sources)
        self._fds: dict[str, int] = {}
        self._lock: Lock | None = None

    def check(self) -> None:
        """Look at the destination, touching nothing: for before the work whose result it is to hold.

        Raises:
            ConflictError: it exists, holds other files, or is not apart from the input.
            FileIOError: the operating system refuses.
        """
        stage = self._stage
        paths.check_names(stage.dst, self._sizes(), [paths.PARTIAL])
        self._check_destination()
        left = paths.check_kind(stage.partial, is_file=False)
        paths.check_apart([stage.dst, stage.partial], self._sources)
        if left:
            self._require_ours()

    def __enter__(self) -> Self:
        """Check the destination, take the lock, clear what a killed run left, create the files.

        Raises:
            ConflictError: as :meth:`check`; LockedError: another process writes it.
            SpaceError: not enough room. FileIOError: the operating system refuses.
        """
        stage, fs, sizes = self._stage, self._fs, self._sizes()
        self.check()
        self._lock = Lock(stage.lock, fs)
        try:
            self._require_ours()
            self._remove_left()
            paths.check_space(fs, stage.dst.parent, sum(f.size for f in self._files), len(sizes))
            self._create()
        except BaseException:
            self._close()
            raise
        return self

    def _sizes(self) -> dict[str, int]:
        return {f.name: f.size for f in self._files} | dict.fromkeys(self._known, 0)

    def write(self, name: str, data: memoryview, offset: int) -> None:
        """Write a flat byte buffer into a file.

        Raises:
            SpaceError, FileIOError: it failed.
        """
        with ofs.calls(f"write at byte {offset}", self._stage.data / name):
            ofs.write_all(self._fs, self._fds[name], data, offset)

    def sync(self, name: str) -> Path:
        """Make a file durable; where it can be read back."""
        path = self._stage.data / name
        with ofs.calls("make durable", path):
            self._fs.fsync(self._fds[name])
        return path

    def add(self, name: str, content: bytes) -> None:
        """A small file, durable at once."""
        if name not in self._known:
            raise UsageError(f"{name} was not announced as a file of this output.")
        self._open(FilePlan(name, len(content), ((0, content),)))
        self.sync(name)

    def commit(self) -> None:
        """Put the directory in its place.

        Raises:
            ConflictError: the destination appeared meanwhile.
            FileIOError: the operating system refuses.
        """
        fs, stage = self._fs, self._stage
        for name in self._fds:
            self.sync(name)
        self._close_files()
        with ofs.calls("make durable", stage.data):
            ofs.sync_dir(fs, stage.data)
        with ofs.calls("put the output in its place", stage.dst):
            there = ofs.exists(fs, stage.dst)
            if there and not self._overwrite:
                raise exists_error(self._named)
            if there:
                paths.check_replaceable(stage.dst, self._known)
            self._land(there)
            ofs.sync_dir(fs, stage.dst.parent)

    def _land(self, replace: bool) -> None:
        fs, stage = self._fs, self._stage
        try:
            if not replace:
                fs.rename_new(stage.data, stage.dst)
            elif not fs.exchange(stage.data, stage.dst):
                fs.rename(stage.dst, stage.old)
                fs.rename_new(stage.data, stage.dst)
        except FileExistsError:
            raise exists_error(self._named) from None

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Remove the staging directory and release the lock."""
        self._close()

    def _check_destination(self) -> None:
        if not paths.check_kind(self._stage.dst, is_file=False):
            return
        if not self._overwrite:
            raise exists_error(self._named)
        paths.check_replaceable(self._stage.dst, self._known)

    def _require_ours(self) -> None:
        stage = self._stage
        with ofs.calls("list", stage.partial):
            odd = set(self._fs.listdir(stage.partial)) - {"lock", "data", "old"}
        if odd:
            raise self._not_ours(sorted(odd))

    def _not_ours(self, odd: Sequence[str]) -> ConflictError:
        return ConflictError(
            f"this directory is needed for writing, and holds files of something else: {listing(odd)}.",
            where=self._stage.partial,
            fix="move it away or pass another destination.",
        )

    def _remove_left(self) -> None:
        fs, stage = self._fs, self._stage
        with ofs.calls("put the former output back", stage.dst):
            # killed between two renames
            if ofs.exists(fs, stage.old) and not ofs.exists(fs, stage.dst):
                fs.rename_new(stage.old, stage.dst)
        for root in (stage.data, stage.old):
            with ofs.calls("look at", root):
                there = ofs.exists(fs, root)
            if there and (odd := paths.remove_known(fs, root, self._known)):
                raise self._not_ours(odd)

    def _create(self) -> None:
        data = self._stage.data
        with ofs.calls("create the directory", data):
            self._fs.mkdir(data)
        for f in self._files:
            self._open(f)

    def _open(self, plan: FilePlan) -> None:
        path, fs = self._stage.data / plan.name, self._fs
        with ofs.calls(f"create the file at its {plan.size} bytes", path):
            fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._fds[plan.name] = fd
            fs.allocate(fd, plan.size)
            for offset, content in plan.fixed:
                ofs.write_all(fs, fd, memoryview(content), offset)

    def _close_files(self) -> None:
        while self._fds:
            ofs.close(self._fs, self._fds.popitem()[1])

    def _close(self) -> None:
        with ExitStack() as stack:  # every step, whatever the others raise; the last one first
            if self._lock:
                stack.callback(self._lock.release)
            stack.callback(self._discard)
            stack.callback(self._close_files)
        self._lock = None

    def _discard(self) -> None:
        with suppress(G2Error):  # the next run tries again
            self._remove_left()
