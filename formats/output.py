"""Write a planned checkpoint as one transaction: all of it appears at its place, or nothing does.

Everything is written below ``DST.partial`` (its layout and the commit are described in :mod:`.output_commit`). A
unit of work counts as done only once its bytes are durable; then the journal says so, durably. So after a kill or a
power loss at any moment the old DST is untouched, or the new one is complete, and the same command run again
continues and ends with the same bytes as a run that was never interrupted.

What a resumed run trusts: the journal's lines (each with its CRC-32), the sizes of the files, and the disk to keep
what it confirmed. Bytes not covered by a line are written again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from . import manifest as mf
from . import output_commit as oc
from . import output_fs as ofs
from . import output_paths as paths
from .base import Array, ContainerPlan, FilePlan, Slot
from .errors import (
    ConflictError,
    DtypeError,
    G2Error,
    InputError,
    LayoutError,
    ParityError,
    ShapeError,
    UsageError,
)
from .journal import Journal
from .lock import Lock
from .names import listing
from .output_crc import Checksums
from .output_files import DataFiles, FileHashes
from .output_ranges import check_plan, layout_digest, needed, split_runs
from .output_resume import Found, head_record, require_free, require_ours, take_over

_SYNC_BYTES, _SYNC_SECONDS, _POLL_SECONDS = 128 << 20, 2.0, 0.05


class Output:
    """One transaction; a context manager. :meth:`write` and :meth:`complete` are thread-safe.

    Leaving the block without :meth:`finish` keeps ``DST.partial`` for a later run, or removes it when no unit was
    complete.

    Args:
        dst: directory to create, or the file itself with ``single_file``.
        plan: every file.
        slots: the arrays the plan has places for.
        plan_hash: option -> value of everything that decides the bytes: source fingerprint, options, tool version.
            An interrupted run is continued only if all are equal.
        overwrite: replace an existing output.
        resume: continue an interrupted run; False discards it and starts afresh.
        sources: input files and directories; the output must lie apart.
        single_file: name of the plan's only file, when ``dst`` is a file.
        extra: small files to add, name -> content.
        fs: the file system.
        background: sync and hash in two threads; False does both in the caller's, at the same points every time.
        sync_bytes: written bytes after which data are made durable and complete units recorded.

    Attributes:
        done: units that an interrupted run completed -> their records; they need not be written again.
        committed: an interrupted run's output is in its place already; :meth:`finish` will return at once.
        notes: odd but harmless findings, one sentence each.

    Raises:
        LayoutError: the plan does not fit the slots.
        UsageError: ``single_file`` with a plan of several files, or a destination without a name.
        FileIOError: the destination's directory does not exist.
    """

    def __init__(
        self,
        dst: Path,
        plan: ContainerPlan,
        slots: Sequence[Slot],
        plan_hash: Mapping[str, str],
        *,
        overwrite: bool = False,
        resume: bool = True,
        sources: Sequence[Path] = (),
        single_file: str | None = None,
        extra: Mapping[str, bytes] | None = None,
        fs: ofs.Filesystem = ofs.REAL,
        background: bool = True,
        sync_bytes: int = _SYNC_BYTES,
    ) -> None:
        more = tuple(FilePlan(n, len(b), ((0, b),)) for n, b in (extra or {}).items())
        self._plan = plan = replace(plan, files=(*plan.files, *more))
        names = [f.name for f in plan.files]
        if single_file and names != [single_file]:
            raise UsageError(f"one output file cannot hold {len(names)}: {listing(names)}.")
        self._slots = {s.name: s for s in slots}
        payload = check_plan(plan, slots)
        self._head = head_record(plan_hash, layout_digest(plan, slots), names)
        self._stage = oc.Stage(paths.normalise(Path(dst)), single_file)
        if self._stage.manifest_name in names:
            raise LayoutError(f"{self._stage.manifest_name} is the manifest's own name.")
        self._overwrite, self._resume, self._sources = overwrite, resume, tuple(sources)
        self._fs, self._background, self._sync_bytes = fs, background, sync_bytes
        self._files = DataFiles(self._stage.data, plan.files, payload, fs)
        self._checksums = Checksums(plan, self._slots, self._files)
        self._hashes = FileHashes(self._files)
        self.done: Mapping[str, dict[str, Any]] = {}
        self.committed = False
        self.notes: list[str] = []
        self._pending: dict[str, dict[str, Any]] = {}
        self._pending_lock, self._flushing = threading.Lock(), threading.Lock()
        self._durable_units, self._last_flush = 0, 0.0
        self._lock: Lock | None = None
        self._journal: Journal | None = None
        self._created = self._landing = self._worthless = False
        self._broken: BaseException | None = None
        self._sealing: threading.Thread | None = None
        self._syncer = _Repeat("g2kit-sync", self._flush_if_due, self._fail)
        self._hasher = _Repeat("g2kit-hash", self._hashes.advance, self._fail)

    @property
    def partial(self) -> Path:
        """The staging directory."""
        return self._stage.partial

    # ---- opening and closing

    def __enter__(self) -> Self:
        """Check the destination, take the lock, continue or create.

        Raises:
            ConflictError: the destination exists, is a link, is of another kind or not g2kit's, or input and output are
                not apart; LockedError: another process writes it; ResumeError: an interrupted run of another plan is
                there.
            SpaceError: not enough room. FileIOError: the operating system refuses.
        """
        self.preflight()
        stage = self._stage
        self._lock = Lock(stage.lock, self._fs)
        if owner := self._lock.recovered:
            self.notes.append(f"took over the lock of process {owner.pid}, which no longer runs.")
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def preflight(self) -> None:
        """Everything that can be refused without writing; ``with`` begins with it.

        Raises:
            ConflictError, SpaceError, FileIOError: as entering the ``with`` block does.
        """
        stage, fs = self._stage, self._fs
        paths.check_names(stage.dst, self._files.sizes, stage.suffixes)
        paths.check_kind(stage.dst, is_file=stage.single is not None)
        left = paths.check_kind(stage.partial, is_file=False)
        paths.check_apart([stage.dst, stage.partial], self._sources)
        if left:
            require_ours(fs, stage)
            return  # what it holds decides the rest, and may only be judged under the lock
        require_free(fs, stage, overwrite=self._overwrite)
        self._require_space(self._plan.nbytes)

    def _require_space(self, nbytes: int) -> None:
        inodes = len(self._files.sizes) + len(self._files.directories)
        paths.check_space(self._fs, self._stage.dst.parent, nbytes, inodes)

    def _open(self) -> None:
        fs, stage = self._fs, self._stage
        self._journal = Journal(stage.journal, fs)
        found = take_over(
            fs, stage, self._journal, self._head, overwrite=self._overwrite, resume=self._resume
        )
        self.done, self.committed = found.units, found.committed
        self._durable_units = len(found.units)
        if found.committed:
            return
        if found.created:
            self._continue(found)
        else:
            self._create()
        self._last_flush = time.monotonic()
        if self._background:
            self._syncer.start()
            self._hasher.start()

    def _create(self) -> None:
        stage, fs, journal = self._stage, self._fs, self._the_journal
        self._require_space(self._plan.nbytes)
        self._created = True
        journal.append(self._head)
        with ofs.calls("make durable", stage.partial):
            ofs.sync_dir(fs, stage.partial)
            ofs.sync_dir(fs, stage.dst.parent)
        self._files.create()
        with ofs.calls("make durable", stage.partial):
            ofs.sync_dir(fs, stage.partial)
        journal.append({"kind": "created"})

    def _continue(self, found: Found) -> None:
        self._files.check()
        self._created = True
        self._files.restore(found.written)
        self._require_space(self._plan.nbytes - self._files.allocated())
        self.notes.append(f"continued an interrupted run: {len(found.units)} units were done.")

    @property
    def _the_journal(self) -> Journal:
        if self._journal is None:
            raise UsageError("use Output in a with block.")
        return self._journal

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Keep what is resumable, release the lock.

        After an error about the input or about what was written there is nothing worth continuing.
        """
        self._worthless = isinstance(e, InputError | ParityError)
        self._close()

    def _close(self) -> None:
        with ExitStack() as stack:  # every step, whatever the others raise; the last one first
            stack.callback(self._release)
            if self._journal:
                stack.callback(self._journal.close)
            stack.callback(self._discard_if_useless)
            stack.callback(self._files.close)
            stack.callback(self._save_progress)
            stack.callback(self._hasher.stop)
            stack.callback(self._syncer.stop)
            stack.callback(self._join_sealing)
        self._journal = None

    def _release(self) -> None:
        try:
            if self._lock:
                self._lock.release()
        except G2Error as e:  # the kernel lets go of it all the same
            self.notes.append(f"could not clear up: {e}")

    def _save_progress(self) -> None:
        if self._pending and not (self._broken or self._landing or self._worthless):
            with suppress(G2Error):
                self._flush()

    def _discard_if_useless(self) -> None:
        useless = self._worthless or not self._durable_units
        if self._created and useless and not self._landing:
            with suppress(G2Error):
                oc.clear(self._fs, self._stage, self._files.sizes)

    # ---- writing

    def write(self, slot: str, start: tuple[int, ...], array: Array) -> None:
        """Store ``array`` as the box of the slot's array that begins at index ``start``.

        Raises:
            LayoutError: no such slot. DtypeError, ShapeError: not the slot's, or outside of it.
            SpaceError, FileIOError: the write, or an earlier one in the background, failed.
        """
        self._check()
        spec = self._slots.get(slot)
        if spec is None:
            raise LayoutError("the plan has no such slot.", tensor=slot)
        _require_box(spec, start, array)
        stop = tuple(a + n for a, n in zip(start, array.shape, strict=True))
        for chunk in self._plan.chunks[slot]:
            for offset, _, index in split_runs(chunk, array.dtype.itemsize, start, stop):
                part = np.ascontiguousarray(array[index] if array.ndim else array)
                data = part.reshape(-1).view(np.uint8).data
                self._files.write(chunk.file, data, offset)
                self._checksums.update(slot, offset, data)
        if self._background:
            self._hashes.keep_up()
        if self._files.fresh_bytes >= self._sync_bytes:
            self._syncer.wake()

    def complete(self, unit: str, record: Mapping[str, Any]) -> None:
        """Say that all bytes of ``unit`` are written; journaled with ``record`` once they are durable.

        Args:
            unit: any name; the same in every run of the same plan.
            record: what :attr:`done` shall hold for it; JSON values.
        """
        self._check()
        json.dumps(record)  # a mistake should show here, not in a thread
        with self._pending_lock:
            self._pending[unit] = dict(record)
        if self._background:
            self._syncer.wake()
            self._hasher.wake()  # checksums before the payload may have been what it waited for
        else:
            self._flush_if_due()

    def _flush_if_due(self) -> bool:
        full = self._files.fresh_bytes >= self._sync_bytes
        old = bool(self._pending) and time.monotonic() - self._last_flush >= _SYNC_SECONDS
        if full or (old and self._background):
            self._flush()
        return full

    def _flush(self) -> None:
        """Make everything written so far durable, then record the units that were complete before."""
        with self._flushing:
            self._check()
            with self._pending_lock:
                units, self._pending = self._pending, {}
            try:
                written = self._files.sync()
                if units or written:
                    record = {"kind": "sync", "units": units, "written": written}
                    self._the_journal.append(record)
            except BaseException as e:
                self._fail(e)  # a failed fsync must never be repeated: the second may lie
                raise
            self._durable_units += len(units)
            self._last_flush = time.monotonic()

    def _fail(self, error: BaseException) -> None:
        self._broken = self._broken or error

    def _check(self) -> None:
        if self._broken:
            raise self._broken
        if self._landing or self.committed:
            raise UsageError("this output is finished already.")
        self._the_journal  # noqa: B018

    # ---- finishing

    def seal(self) -> Path:
        """Everything is written: fill in the checksums; syncing goes on while the caller reads the result.

        Returns:
            The output as it will be, but for its manifest and its place.

        Raises:
            LayoutError: a byte of a slot was never written.
        """
        if self.committed:
            return self._stage.dst
        if self._sealing is None:
            self._check()
            self._syncer.stop()
            self._require_everything()
            self._checksums.finish()
            self._sealing = threading.Thread(target=self._flush_quietly, name="g2kit-seal")
            if self._background:
                self._sealing.start()
        return self._stage.payload

    def _flush_quietly(self) -> None:
        with suppress(BaseException):  # kept by _fail, raised by the next call
            self._flush()

    def _join_sealing(self) -> None:
        if self._sealing is not None and self._sealing.ident is not None:
            self._sealing.join()

    def finish(self, manifest: mf.Manifest) -> mf.Manifest:
        """Checksums, manifest, durability, and the rename that makes it visible.

        Args:
            manifest: everything but ``files``, which is filled in here.

        Returns:
            The manifest as written.

        Raises:
            LayoutError: a byte of a slot was never written.
            ConflictError: the destination appeared meanwhile; run again with ``overwrite``, nothing is lost.
            SpaceError, FileIOError: run again, nothing is lost.
        """
        if self.committed:
            return mf.load(self._stage.final_manifest)
        self.seal()
        self._join_sealing()
        self._flush()
        self._hasher.stop()
        self._check()
        files = self._hashes.finish(2 if self._background else 1)
        if self._stage.single:
            files = {self._stage.dst.name: files[self._stage.single]}
        manifest = replace(manifest, files=files)
        self._write_manifest(manifest.dumps())
        self._require_no_others()
        self._files.close()  # some file systems do not rename what is open
        self._landing = True
        journal = self._the_journal
        replaced = oc.commit(self._fs, self._stage, journal, overwrite=self._overwrite)
        try:
            journal.close()
            oc.clear(self._fs, self._stage, {*self._files.sizes, *replaced})
        except (G2Error, OSError) as e:
            self.notes.append(f"the output is complete, but clearing up failed: {e}")
        return manifest

    def _require_everything(self) -> None:
        missing = [
            name
            for name, slot in self._slots.items()
            for chunk in self._plan.chunks[name]
            if not all(self._files.has(chunk.file, a, b) for a, b in needed(chunk, slot))
        ]
        if names := list(dict.fromkeys(missing)):
            raise LayoutError(
                f"{len(names)} slots were never written to their end: {listing(names)}.",
                where=self._stage.partial,
            )

    def _write_manifest(self, data: bytes) -> None:
        path = self._stage.data / self._stage.manifest_name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with ofs.calls("write the manifest", path):
            with ofs.opened(self._fs, path, flags) as fd:
                ofs.write_all(self._fs, fd, memoryview(data), 0)
                self._fs.fsync(fd)
            ofs.sync_dir(self._fs, self._stage.data)

    def _require_no_others(self) -> None:
        with ofs.calls("list", self._stage.data):
            found, _ = paths.tree(self._stage.data)
        if odd := sorted(found.keys() - self._files.sizes.keys() - {self._stage.manifest_name}):
            raise ConflictError(
                f"something else put files into the unfinished output: {listing(odd)}.",
                where=self._stage.data,
                fix="move them away and run again.",
            )


def _require_box(slot: Slot, start: tuple[int, ...], array: Array) -> None:
    if array.dtype != slot.dtype:
        raise DtypeError(f"expected {slot.dtype}, got {array.dtype}.", tensor=slot.name)
    fits = len(start) == array.ndim == len(slot.shape) and all(
        0 <= a <= a + n <= size for a, n, size in zip(start, array.shape, slot.shape, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"a box of shape {array.shape} at {start} does not lie in shape {slot.shape}.",
            tensor=slot.name,
        )


class _Repeat:
    """A thread that calls ``step`` over and over; rests when it returns False, ends when it raises."""

    def __init__(
        self, name: str, step: Callable[[], bool], failed: Callable[[BaseException], None]
    ) -> None:
        self._step, self._failed = step, failed
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """End its rest."""
        self._wake.set()

    def stop(self) -> None:
        """Wait for the current step and end."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self._step():
                    self._wake.wait(_POLL_SECONDS)
                    self._wake.clear()
        except BaseException as e:
            self._failed(e)
