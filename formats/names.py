"""Names that come out of files: what may be a tensor's name, and which file an index may mean.

A tensor's name is never used as a path, yet ends up in messages, tables and other formats' keys; a shard's name is
used as a path, so it may only be a plain name inside the index's own directory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from .errors import FileIOError, FormatError, UnsafePathError, printable

MAX_TENSOR_NAME = 1024
_MAX_FILE_NAME = 255  # bytes; NAME_MAX everywhere


def listing(found: Collection[str], limit: int = 8) -> str:
    """Names for a message: the first few, escaped, and how many more there are."""
    names = list(found)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(n, 100) for n in names[:limit]) + more


def check_tensor_name(name: str, where: str | Path) -> str:
    """The name itself, if it is one a table and a terminal can show.

    Raises:
        FormatError: empty, too long, control characters, or shaped like a path out of a directory.
    """
    for broken, why in (
        (not name, "is empty"),
        (len(name) > MAX_TENSOR_NAME, f"has {len(name)} characters, at most {MAX_TENSOR_NAME}"),
        (not name.isprintable(), "has control characters"),
        (_like_a_path_out(name), "looks like a path out of the directory"),
    ):
        if broken:
            raise FormatError(
                f'tensor name "{printable(name, 80)}" {why}.',
                where=where,
                fix="do not use this file; no framework writes such names.",
            )
    return name


def _like_a_path_out(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or (len(parts) > 1 and parts[0].endswith(":"))


def check_file_name(name: str, where: str | Path) -> str:
    """The name itself, if it can only mean a file in the directory it is joined to.

    Raises:
        UnsafePathError: a path, a drive, a URL, ``..``, or a name no file system takes.
    """
    for broken, why in (
        (not name, "is empty"),
        ("://" in name, "is a URL"),
        (name.startswith(("/", "\\")), "is an absolute path"),
        (name in (".", "..") or name.startswith(("../", "..\\")), "leaves the directory"),
        ("/" in name or "\\" in name, "has a path separator"),
        (":" in name, "names a drive"),
        (not name.isprintable(), "has control characters"),
        (len(name.encode("utf-8", "replace")) > _MAX_FILE_NAME, "is longer than 255 bytes"),
    ):
        if broken:
            raise UnsafePathError(
                f'file name "{printable(name, 80)}" {why}; only plain names of files beside the '
                "index are opened.",
                where=where,
                fix="do not use this checkpoint, or put the file beside its index and name it so.",
            )
    return name


def inside(directory: Path, name: str) -> Path | None:
    """The path of ``name``, which comes out of a file, in ``directory``; None when there is nothing there.

    Raises:
        UnsafePathError: it is not a plain name, its link leads elsewhere, or its links form a loop.
        FileIOError: the operating system refuses to follow the link.
    """
    path = directory / check_file_name(name, directory)
    try:
        return contained(directory, path)
    except FileNotFoundError:
        return None


def contained(directory: Path, path: Path) -> Path:
    """``path``, which lies below ``directory``, if its symbolic links do not lead out of it.

    A link may lead into the same directory, or from ``snapshots/<revision>/`` into ``blobs/`` of the same
    repository in a Hugging Face cache (huggingface_hub, "Understand caching").

    Raises:
        UnsafePathError: its link leads elsewhere, or its links form a loop.
        FileIOError: the operating system refuses to follow the link.
        FileNotFoundError: nothing is there.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        home = Path(os.path.realpath(directory, strict=True))
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise FileIOError(f"cannot follow the link: {e.strerror}.", where=path) from e
        raise UnsafePathError(
            "symbolic links form a loop.", where=path, fix="copy the file itself here."
        ) from None
    blobs = [p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots"][:1]
    if target.is_relative_to(home) or target.parent in blobs:
        return path
    raise UnsafePathError(
        f"this symbolic link leads to {printable(str(target))}, outside its directory.",
        where=path,
        fix="copy the file itself here, or pass the path of the file that is meant.",
    )


def chosen(directory: Path, name: str) -> Path:
    """A file that was found by listing ``directory``, to be opened.

    Raises:
        UnsafePathError, FileIOError: see :func:`contained`; a link that leads nowhere too.
    """
    try:
        return contained(directory, directory / name)
    except FileNotFoundError:
        raise FileIOError("the link leads nowhere.", where=directory / name) from None
