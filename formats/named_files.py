"""Files that the user names as input beside a checkpoint: text, and arrays of token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FileIOError, FormatError, G2Error, LimitError, NotFoundError, UsageError

MAX_BYTES = 256 << 20
_WRITE_IDS = (
    "save whole numbers (int32 or int64) of one or two dimensions with numpy.save(file, ids)."
)


def existing(*given: object) -> tuple[Path, ...]:
    """What of the values of options is a file or directory to read: a preset's name or ids in memory are none."""
    named = (Path(x) for x in given if isinstance(x, str | Path))
    return tuple(p for p in named if os.path.exists(p))  # noqa: PTH110 - False for any odd name


def require_there(path: str | Path, *, fix: str | None = None) -> None:
    """Raise NotFoundError if nothing is at a path that the user named."""
    if not existing(path):
        raise NotFoundError("no such file or directory.", where=path, fix=fix)


def read_text(path: Path, *, fix: str | None = None) -> str:
    """The whole text of a UTF-8 file; it may be empty.

    Args:
        path: the file.
        fix: what to do where there is none.

    Raises:
        NotFoundError, FileIOError: it cannot be read.
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


def token_ids(source: object, rows: str, *, fix: str | None = None) -> npt.NDArray[np.int64]:
    """Token ids that the user gave, of any vocabulary.

    Args:
        source: a ``.npy`` file or an array of whole numbers, ``[length]`` or ``[rows, length]``.
        rows: what the rows are, for messages.
        fix: what to do where there is no such file.

    Returns:
        The ids, of as many dimensions.

    Raises:
        NotFoundError, FileIOError, LimitError: the file cannot be read.
        FormatError: it holds something else.
        UsageError: the array is something else.
    """
    wrong: type[G2Error] = UsageError
    if isinstance(source, str | Path):
        where, wrong, ids = Path(source), FormatError, _load_array(Path(source), fix)
    else:
        where, ids = None, _as_array(source)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise wrong(
            f"token ids must be whole numbers of shape [length] or [{rows}, length], found {ids.dtype} "
            f"{list(ids.shape)}.",
            where=where, fix=_WRITE_IDS,
        )  # fmt: skip
    if int(ids.max()) > np.iinfo(np.int64).max:
        raise wrong(
            f"token id {int(ids.max())} is in no vocabulary.", where=where,
            fix="save ids of the model's tokenizer.",
        )  # fmt: skip
    return np.asarray(ids, np.int64)


def _as_array(source: object) -> npt.NDArray[Any]:
    try:
        return np.asarray(source)
    except ValueError as e:  # rows of different lengths
        raise UsageError(f"token ids are no array: {e}.", fix=_WRITE_IDS) from e


def _load_array(path: Path, fix: str | None) -> npt.NDArray[Any]:
    """The array in a ``.npy`` file, of any dtype and shape, memory-mapped."""
    require_file(path, fix=fix)
    if not _begins_like_numpy(path):
        raise FormatError(
            "not a NumPy file, expected an array of token ids.", where=path, fix=_WRITE_IDS
        )
    found, reason = None, "an archive of several"
    try:  # memory-mapped: the file's size bounds what its header may ask for
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror or e}.", where=path) from e
    except Exception as e:  # whatever its parser of headers, which is Python's own, raises
        reason = (str(e) or repr(e)).splitlines()[0]
    if not isinstance(found, np.ndarray):
        raise FormatError(
            f"not a NumPy array ({reason}), expected token ids.", where=path, fix=_WRITE_IDS
        )
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
        NotFoundError: there is none; ``fix`` says what to do.
        FileIOError: it is something else.
        LimitError: it is larger than 256 MiB.
    """
    require_there(path, fix=fix)
    try:
        if not path.is_file():
            there = "this is a directory" if path.is_dir() else "not a regular file"
            raise FileIOError(f"{there}.", where=path, fix=fix)
        size = path.stat().st_size
    except (OSError, ValueError) as e:
        raise FileIOError(f"cannot read: {e}.", where=path) from e
    if size > MAX_BYTES:
        raise LimitError(
            f"{size} bytes; at most {MAX_BYTES} are read.", where=path, fix="give an excerpt."
        )
    return size
