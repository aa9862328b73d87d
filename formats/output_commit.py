"""How a finished output takes its place, and how a commit that was cut short is completed.

::

    DST.partial/lock      who writes
    DST.partial/journal   what is durable (see journal.py); its last line says that the commit began
    DST.partial/data/     the output, complete but for its place
    DST.partial/old/      the output that was replaced, where the file system cannot swap two names

A directory lands by one rename: to a free name, or swapped with the output it replaces (``RENAME_EXCHANGE``). Where
the system cannot swap, two renames do it; a crash between them leaves no DST, and the next run of the same command
(or ``mv DST.partial/data DST``) puts the new one there. A single file lands by one rename too, so DST is always the
whole old file or the whole new one; its manifest beside cannot change in the same instant, so the old one is removed
first and the new one comes last: a manifest never describes another file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import manifest as mf
from . import output_fs as ofs
from . import strict_json
from .errors import ConflictError, G2Error, InputError, ResumeError
from .journal import Journal
from .names import listing
from .output_paths import PARTIAL, check_replaceable, remove_known


@dataclass(frozen=True)
class Stage:
    """The paths of one transaction.

    Attributes:
        dst: where the output goes; its directory resolved.
        single: the planned file that becomes ``dst``; None when the output is a directory.
    """

    dst: Path
    single: str | None = None

    @property
    def partial(self) -> Path:
        """The staging directory."""
        return self.dst.with_name(self.dst.name + PARTIAL)

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.partial / "lock"

    @property
    def journal(self) -> Path:
        """The journal."""
        return self.partial / "journal"

    @property
    def data(self) -> Path:
        """The directory the files are written in."""
        return self.partial / "data"

    @property
    def old(self) -> Path:
        """Where a replaced directory waits for removal."""
        return self.partial / "old"

    @property
    def payload(self) -> Path:
        """What is renamed to ``dst``."""
        return self.data / self.single if self.single else self.data

    @property
    def visible(self) -> list[Path]:
        """What appears outside of the staging directory."""
        return [self.dst, self.final_manifest] if self.single else [self.dst]

    @property
    def suffixes(self) -> list[str]:
        """What is appended to the destination's name."""
        return [PARTIAL, f".{mf.NAME}"] if self.single else [PARTIAL]

    @property
    def manifest_name(self) -> str:
        """The manifest's name inside :attr:`data`."""
        return f"{self.dst.name}.{mf.NAME}" if self.single else mf.NAME

    @property
    def final_manifest(self) -> Path:
        """Where the manifest ends up."""
        return self.dst.with_name(self.manifest_name) if self.single else self.dst / mf.NAME


def previous_files(dst: Path) -> list[str]:
    """The files that an existing output directory may hold, from its manifest.

    Raises:
        ConflictError: it holds anything else, so that removing it could lose something.
    """
    path = dst / mf.NAME
    known: list[str] = []
    if path.exists():
        try:
            known = [*mf.load(path).files, mf.NAME]
        except G2Error as e:
            raise ConflictError(
                f"cannot tell what the destination holds, its manifest is damaged ({e.what})",
                where=dst,
                fix="remove the directory yourself, or pass another destination.",
            ) from e
    check_replaceable(dst, known)
    return known


def identity(fs: ofs.Filesystem, path: Path) -> list[int] | None:
    """``[device, inode]``, which a rename keeps; None when nothing is there."""
    if not ofs.exists(fs, path):
        return None
    st = fs.lstat(path)
    return [st.st_dev, st.st_ino]


def commit(fs: ofs.Filesystem, stage: Stage, journal: Journal, *, overwrite: bool) -> list[str]:
    """Put the complete, durable output in its place.

    Returns:
        The files of the directory it replaced, which now wait for removal.

    Raises:
        ConflictError: the destination appeared meanwhile, or may not be replaced; the partial stays complete.
        FileIOError: a call fails; the same command run again completes the commit.
    """
    with ofs.calls("look at the destination", stage.dst):
        there = ofs.exists(fs, stage.dst)
        replaces = previous_files(stage.dst) if there and not stage.single and overwrite else []
        record = {
            "kind": "commit",
            "identity": identity(fs, stage.payload),
            "manifest": _digest(fs, stage.data / stage.manifest_name),
            "replaces": replaces,
        }
    journal.append(record)
    with ofs.calls("put the output in its place", stage.dst):
        try:
            if stage.single:
                _land_file(fs, stage, overwrite)
            else:
                _land_dir(fs, stage, overwrite and there)
        except FileExistsError as e:
            raise exists_error(Path(e.filename2 or e.filename or stage.dst)) from None
    return replaces


def _land_dir(fs: ofs.Filesystem, stage: Stage, replace: bool) -> None:
    if not replace:
        fs.rename_new(stage.data, stage.dst)
    elif not fs.exchange(stage.data, stage.dst):
        fs.rename(stage.dst, stage.old)
        fs.rename_new(stage.data, stage.dst)
    ofs.sync_dir(fs, stage.dst.parent)


def _land_file(fs: ofs.Filesystem, stage: Stage, overwrite: bool) -> None:
    for path in stage.visible:
        if ofs.exists(fs, path) and not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if ofs.exists(fs, stage.final_manifest):
        fs.unlink(stage.final_manifest)
        ofs.sync_dir(fs, stage.dst.parent)
    (fs.rename if overwrite else fs.rename_new)(stage.payload, stage.dst)
    ofs.sync_dir(fs, stage.dst.parent)
    _land_manifest(fs, stage)


def _land_manifest(fs: ofs.Filesystem, stage: Stage) -> None:
    staged = stage.data / stage.manifest_name
    if stage.single and ofs.exists(fs, staged):
        fs.rename(staged, stage.final_manifest)
        ofs.sync_dir(fs, stage.dst.parent)


def complete_commit(fs: ofs.Filesystem, stage: Stage, records: list[dict[str, Any]]) -> bool:
    """Whether the output of an interrupted run is in its place; what was left to do for that is done.

    Raises:
        ResumeError: something changed the destination or the staging directory since.
    """
    commits = [r for r in records if r.get("kind") == "commit"]
    if not commits:
        return False
    with ofs.calls("complete the commit", stage.dst):
        if not _landed(fs, stage, commits[-1]):
            return False
        ofs.sync_dir(fs, stage.dst.parent)
        _land_manifest(fs, stage)
    return True


def _landed(fs: ofs.Filesystem, stage: Stage, record: dict[str, Any]) -> bool:
    if not ofs.exists(fs, stage.payload):
        return _is_the_output(fs, stage, record)
    if stage.single:
        return False
    if not ofs.exists(fs, stage.dst):
        if ofs.exists(fs, stage.old):
            fs.rename_new(stage.data, stage.dst)
        return not ofs.exists(fs, stage.data)
    # two directories: swapped already, or not yet
    wanted = record.get("manifest")
    there, here = (_digest(fs, d / mf.NAME) == wanted for d in (stage.dst, stage.data))
    if there and here:  # the output replaces one equal to it
        return identity(fs, stage.dst) == record.get("identity")
    if not there and not here:
        raise ResumeError(
            "something changed this directory after a finished output was to be moved out of it.",
            where=stage.partial,
            fix=f"look at {stage.data} and {stage.dst}, keep what you need, then remove "
            f"{stage.partial}.",
        )
    return there


def _is_the_output(fs: ofs.Filesystem, stage: Stage, record: dict[str, Any]) -> bool:
    """Whether the destination is what this commit put there, rather than something that came there since.

    Its bytes tell: after a power loss inodes and times need not be those that were noted.
    """
    staged = stage.data / stage.manifest_name
    manifest = staged if stage.single and ofs.exists(fs, staged) else stage.final_manifest
    digest = _digest(fs, manifest)
    if digest is None or digest != record.get("manifest") or not ofs.exists(fs, stage.dst):
        return False
    try:
        mf.check_files(stage.dst, mf.load(manifest))
    except InputError:
        return False
    return True


def _digest(fs: ofs.Filesystem, manifest: Path) -> str | None:
    if not ofs.exists(fs, manifest):
        return None
    return hashlib.sha256(ofs.read_file(fs, manifest, strict_json.MAX_BYTES)).hexdigest()


def clear(fs: ofs.Filesystem, stage: Stage, known: Iterable[str]) -> None:
    """Remove what is left in the staging directory but the lock.

    Args:
        fs: the file system.
        stage: the transaction.
        known: the files that may be removed: the run's own and those of the output it replaced.

    Raises:
        ConflictError: there are others; they stay, and the journal with them.
    """
    names = {*known, stage.manifest_name}
    for root in (stage.data, stage.old):
        if ofs.exists(fs, root) and (foreign := remove_known(fs, root, names)):
            raise ConflictError(
                f"g2kit did not write these files and does not remove them: {listing(foreign)}.",
                where=root,
                fix=f"move them out of {stage.partial}.",
            )
    with ofs.calls("remove the journal", stage.journal):
        if ofs.exists(fs, stage.journal):
            fs.unlink(stage.journal)


def exists_error(dst: Path) -> ConflictError:
    """What to raise when the destination is there and may not be replaced."""
    is_manifest = dst.name.endswith(f".{mf.NAME}")
    kind = "'s manifest" if is_manifest else " directory" if dst.is_dir() else " file"
    return ConflictError(
        f"the destination{kind} exists.",
        where=dst,
        fix="pass --overwrite to replace it, or another destination.",
    )
