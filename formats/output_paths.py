"""What a destination may be: the rules that keep a conversion from destroying anything, and the room it needs.

Nothing here writes. Paths are compared by device and inode on the way to the root, so links, bind mounts and case-
insensitive file systems do not get past.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import output_fs as ofs
from .errors import (
    ConflictError,
    FileIOError,
    SpaceError,
    UsageError,
    printable,
)
from .names import check_file_name, listing

PARTIAL = ".partial"
MARGIN_FACTOR, MARGIN_BYTES, MARGIN_INODES = 1.02, 8 << 20, 16


def normalise(dst: Path) -> Path:
    """``dst`` with its directory resolved; the last name is left alone, a symlink there is judged later.

    Raises:
        UsageError: it has no name to create.
        FileIOError: its directory is missing or is none.
    """
    name = dst.name
    if name in ("", ".", ".."):
        raise UsageError(
            f"the destination {printable(str(dst))} does not name something new.",
            fix="pass the name of the directory or file to create.",
        )
    parent = Path(os.path.realpath(dst.parent))
    if not parent.is_dir():
        state = "is not a directory" if os.path.lexists(parent) else "does not exist"
        raise FileIOError(
            f"the destination's directory {state}.",
            where=parent,
            fix=f"create it (mkdir -p {parent}) or pass another destination.",
        )
    return parent / name


def check_kind(dst: Path, *, is_file: bool) -> bool:
    """Whether ``dst`` is there, as what the plan would write.

    Raises:
        ConflictError: a symlink, a directory where a file is to be written, a file for a directory, a device.
    """
    try:
        mode = os.lstat(dst).st_mode
    except FileNotFoundError:
        return False
    except OSError as e:
        raise ofs.explain(e, "look at the destination", dst) from e
    if stat.S_ISLNK(mode):
        raise ConflictError(
            f"the destination is a symbolic link to {printable(str(dst.readlink()))}.",
            where=dst,
            fix="pass the path it leads to, or remove the link.",
        )
    right = stat.S_ISREG if is_file else stat.S_ISDIR
    if not right(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "not a directory"
        wanted = "one file" if is_file else "a directory"
        raise ConflictError(
            f"the destination is {found}, and {wanted} is to be written.",
            where=dst,
            fix="pass another destination.",
        )
    return True


def check_apart(paths: Iterable[Path], sources: Sequence[Path]) -> None:
    """Refuse to write over, into or around the input.

    Args:
        paths: what will be created, replaced or removed; need not exist.
        sources: what will be read.

    Raises:
        ConflictError: one is the other, or inside the other.
    """
    for source in sources:
        for path in paths:
            relation = _relation(path, source)
            if relation:
                raise ConflictError(
                    f"the output {relation} the input {printable(str(source))}.",
                    where=path,
                    fix="pass a destination apart from the input.",
                )


def _relation(path: Path, source: Path) -> str | None:
    real_path, real_source = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    path_id, source_id = _identity(real_path), _identity(real_source)
    if real_path == real_source or (path_id and path_id == source_id):
        return "is the same as"
    if real_source in real_path.parents or _any_is(real_path.parents, source_id):
        return "lies inside"
    if real_path in real_source.parents or _any_is(real_source.parents, path_id):
        return "contains"
    return None


def _any_is(paths: Iterable[Path], wanted: tuple[int, int] | None) -> bool:
    return wanted is not None and any(_identity(p) == wanted for p in paths)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        st = path.stat()
    except OSError:
        return None
    return st.st_dev, st.st_ino


def check_names(dst: Path, files: Mapping[str, int], suffixes: Iterable[str]) -> None:
    """Names that this file system can hold, below the output directory only.

    Args:
        dst: the destination.
        files: planned file name -> size, ``/``-separated.
        suffixes: what is appended to the destination's name.

    Raises:
        UnsafePathError: a planned name could leave the directory.
        FileIOError: a name is too long, or is both a file and a directory.
    """
    limit = os.pathconf(dst.parent, "PC_NAME_MAX")
    longest = dst.name + max(suffixes, key=len)
    if len(os.fsencode(longest)) > limit:
        raise FileIOError(
            f"the name is too long: {len(os.fsencode(longest))} bytes with what is appended to "
            f"it while writing, the file system allows {limit}.",
            where=dst,
            fix="pass a shorter destination.",
        )
    for name in files:
        for part in name.split("/"):
            check_file_name(part, dst)
            if len(os.fsencode(part)) > limit:
                raise FileIOError(f"the file name {printable(part)} is too long.", where=dst)
    if both := directories(files) & files.keys():
        raise FileIOError(f"planned as file and as directory: {listing(both)}.", where=dst)


def directories(files: Iterable[str]) -> set[str]:
    """Every directory the files need, ``/``-separated, parents included, the root not."""
    found: set[str] = set()
    for name in files:
        parts = name.split("/")[:-1]
        found |= {"/".join(parts[: k + 1]) for k in range(len(parts))}
    return found


def check_space(fs: ofs.Filesystem, where: Path, nbytes: int, inodes: int) -> None:
    """Refuse before work what cannot end well.

    Raises:
        SpaceError: free bytes are under 1.02 times the need and a margin, or free inodes run short.
    """
    with ofs.calls("ask for free space", where):
        vfs = fs.statvfs(where)
    free, need = vfs.f_bavail * vfs.f_frsize, int(nbytes * MARGIN_FACTOR) + MARGIN_BYTES
    if free < need:
        raise SpaceError(
            f"not enough disk space: need {show_bytes(need)}, have {show_bytes(free)} "
            f"on {mount_point(where)}.",
            where=where,
            fix="free space or pass a destination on another disk.",
        )
    if vfs.f_files and vfs.f_favail < inodes + MARGIN_INODES:  # no count: made on demand
        raise SpaceError(
            f"not enough inodes: need {inodes + MARGIN_INODES}, have {vfs.f_favail} "
            f"on {mount_point(where)}.",
            where=where,
            fix="remove files or pass a destination on another disk.",
        )


def show_bytes(n: int) -> str:
    """``18.4 GiB``."""
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"


def mount_point(path: Path) -> Path:
    """Where the file system of ``path`` is mounted."""
    path = Path(os.path.realpath(path))
    while path != path.parent and not os.path.ismount(path):
        path = path.parent
    return path


def tree(root: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """What a directory holds: files (anything but real directories) and directories, ``/``-separated.

    Symlinks are listed as files and never followed.
    """
    files: dict[str, os.stat_result] = {}
    dirs: list[str] = []
    todo = [""]
    while todo:
        at = todo.pop()
        with os.scandir(root / at) as entries:
            for entry in entries:
                name = f"{at}/{entry.name}" if at else entry.name
                if entry.is_dir(follow_symlinks=False):
                    dirs.append(name)
                    todo.append(name)
                else:
                    files[name] = entry.stat(follow_symlinks=False)
    return files, dirs


def remove_known(fs: ofs.Filesystem, root: Path, known: Iterable[str]) -> list[str]:
    """Remove a directory that holds nothing but ``known`` files.

    Returns:
        Names that were found besides, the directory's own where it is none; if there are any, nothing is removed.
    """
    with ofs.calls("list", root):
        if not stat.S_ISDIR(fs.lstat(root).st_mode):  # a link would lead to somebody's files
            return [root.name]
        files, dirs = tree(root)
    if foreign := sorted(files.keys() - set(known)):
        return foreign
    with ofs.calls("remove", root):
        for name in sorted(files):
            fs.unlink(root / name)
        for name in sorted(dirs, reverse=True):
            fs.rmdir(root / name)
        fs.rmdir(root)
    return []


def check_replaceable(dst: Path, known: Iterable[str]) -> None:
    """``--overwrite`` removes what g2kit wrote, and only that.

    Args:
        dst: an existing output directory.
        known: the files its manifest lists, the manifest included.

    Raises:
        ConflictError: it holds anything else.
    """
    with ofs.calls("list", dst):
        files, _ = tree(dst)
    if foreign := sorted(files.keys() - set(known)):
        raise ConflictError(
            f"the destination holds {len(foreign)} files that g2kit did not write: "
            f"{listing(foreign)}.",
            where=dst,
            fix="move them away or remove the directory yourself, or pass another destination.",
        )
