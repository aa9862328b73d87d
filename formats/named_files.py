"""Files that the user names as input beside a checkpoint: text, and arrays of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FileIOError, FormatError, LimitError

MAX_BYTES = 256 << 20


def existing(*given: object) -> tuple[Path, ...]:
    """What of the values of options is a file or directory to read: a preset's name or ids in memory are none."""
    named = (Path(x) for x in given if isinstance(x, str | Path))
    return tuple(p for p in named if os.path.exists(p))  # noqa: PTH110 - False for any odd name


def read_text(path: Path, *, fix: str | None = None) -> str:
    """The whole text of a UTF-8 file; it may be empty.

    Args:
        path: the file.
        fix: what to do where there is none.

    Raises:
        FileIOError: it cannot be read.
        LimitError: it is larger than 256 MiB.
        FormatError: it is not UTF-8.
    """
    require_file(path, fix=fix)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror}.", where=path) from e
    except UnicodeDecodeError as e:
        raise FormatError(
            f"not UTF-8 at byte {e.start}.", where=path, fix="convert the file to UTF-8."
        ) from e


def load_ids(path: Path, *, fix: str | None = None) -> npt.NDArray[Any]:
    """The array in a ``.npy`` file, of any dtype and shape, memory-mapped.

    Args:
        path: the file.
        fix: what to do where there is none.

    Raises:
        FileIOError: it cannot be read.
        LimitError: it is larger than 256 MiB.
        FormatError: it is something else.
    """
    require_file(path, fix=fix)
    write = "write token ids with numpy.save(file, ids)."
    if not _begins_like_numpy(path):
        raise FormatError(
            "not a NumPy file, expected an array of token ids.", where=path, fix=write
        )
    found, reason = None, "an archive of several"
    try:  # memory-mapped: the file's size bounds what its header may ask for
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror or e}.", where=path) from e
    except Exception as e:  # whatever its parser of headers, which is Python's own, raises
        reason = (str(e) or repr(e)).splitlines()[0]
    if not isinstance(found, np.ndarray):
        raise FormatError(f"not a NumPy array ({reason}).", where=path, fix=write)
    return found


def _begins_like_numpy(path: Path) -> bool:
    """Whether ``numpy.load`` would look for an array: for anything else it talks of pickles."""
    try:
        with path.open("rb") as f:
            return f.read(6).startswith((b"\x93NUMPY", b"PK"))
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror or e}.", where=path) from e


def require_file(path: Path, *, fix: str | None = None) -> int:
    """The size in bytes of a regular file that may be read whole.

    Raises:
        FileIOError: it is none; ``fix`` says what to do.
        LimitError: it is larger than 256 MiB.
    """
    try:
        if not path.is_file():
            there = "this is a directory" if path.is_dir() else "not a regular file"
            raise FileIOError(f"{there if path.exists() else 'no such file'}.", where=path, fix=fix)
        size = path.stat().st_size
    except (OSError, ValueError) as e:
        raise FileIOError(f"cannot read: {e}.", where=path) from e
    if size > MAX_BYTES:
        raise LimitError(
            f"{size} bytes; at most {MAX_BYTES} are read.", where=path, fix="give an excerpt."
        )
    return size
