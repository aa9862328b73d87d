"""Texts that probes are made of: short documents written for this project, and the user's own.

``texts/*.txt`` hold documents behind lines ``=== name``; the file's name is their category. Long sequences take the bundled
sample's held-out documentation, which is long enough for them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..formats.errors import FileIOError, FormatError, LimitError, UsageError

SNIPPETS = "snippets"
MAX_BYTES = 256 << 20  # of a user's file
_HEADING = re.compile(r"^=== (.+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """A document.

    Attributes:
        name: ``category/name``, unique.
        category: kind of text.
        text: its content.
    """

    name: str
    category: str
    text: str


def split(content: str, category: str) -> list[Text]:
    """Documents of one file."""
    parts = _HEADING.split(content)[1:]
    return [
        Text(f"{category}/{name}", category, text.removesuffix("\n"))
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]


@cache
def snippets() -> tuple[Text, ...]:
    """Sixteen one-line texts."""
    return tuple(split(_read(SNIPPETS), SNIPPETS))


@cache
def documents() -> tuple[Text, ...]:
    """Short documents; one of every category, then a second of every category, and so on."""
    names = sorted(
        p.name.removesuffix(".txt") for p in files(__package__).joinpath("texts").iterdir()
    )
    columns = [split(_read(n), n) for n in names if n != SNIPPETS]
    rows = chain.from_iterable(zip_longest(*columns))
    return tuple(t for t in rows if t is not None)


def _read(name: str) -> str:
    return files(__package__).joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


def user_text(path: str | Path) -> Text:
    """A text file named by the user.

    Raises:
        FileIOError: it cannot be read.
        LimitError: it is larger than 256 MiB.
        FormatError: it is empty or not UTF-8.
    """
    path = Path(path)
    _check_size(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror}.", where=path) from e
    except UnicodeDecodeError as e:
        raise FormatError(
            f"not UTF-8 at byte {e.start}.", where=path, fix="convert the file to UTF-8."
        ) from e
    if not content.strip():
        raise FormatError("there is no text in it.", where=path)
    return Text(path.name, "text", content)


def user_tokens(
    source: str | Path | npt.ArrayLike | Sequence[object],
) -> list[npt.NDArray[np.int64]]:
    """Token ids given by the user: one document per row, exactly as they are.

    Args:
        source: a ``.npy`` file or array of whole numbers, ``[length]`` or ``[documents, length]``.

    Raises:
        FileIOError: the file cannot be read.
        FormatError: it is no array of numbers.
        UsageError: not whole numbers of one of these shapes, or none.
    """
    if isinstance(source, str | Path):
        where: Path | None = Path(source)
        ids = load_array(Path(source))
    else:
        where, ids = None, np.asarray(source)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise UsageError(
            f"token ids must be whole numbers of shape [length] or [documents, length], found {ids.dtype} "
            f"{list(ids.shape)}.",
            where=where,
        )
    if int(ids.max()) > np.iinfo(np.int64).max:
        raise UsageError(f"token id {int(ids.max())} is in no vocabulary.", where=where)
    return list(np.atleast_2d(ids).astype(np.int64))


def load_array(path: Path) -> npt.NDArray[np.generic]:
    """The array in a ``.npy`` file, memory-mapped.

    Raises:
        FileIOError: it cannot be read.
        LimitError: it is larger than 256 MiB.
        FormatError: it is something else.
    """
    _check_size(path)
    found, reason = None, "an archive of several"
    if not _begins_like_numpy(path):
        raise FormatError(
            "not a NumPy file, expected an array of token ids.",
            where=path,
            fix="write token ids with numpy.save(file, ids).",
        )
    try:  # memory-mapped: the file's size bounds what its header may ask for
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror or e}.", where=path) from e
    except Exception as e:  # whatever its parser of headers, which is Python's own, raises
        reason = (str(e) or repr(e)).splitlines()[0]
    if not isinstance(found, np.ndarray):
        raise FormatError(
            f"not a NumPy array ({reason}).",
            where=path,
            fix="write token ids with numpy.save(file, ids).",
        )
    return found


def _begins_like_numpy(path: Path) -> bool:
    """Whether ``numpy.load`` would look for an array: for anything else it talks of pickles."""
    try:
        with path.open("rb") as f:
            return f.read(6).startswith((b"\x93NUMPY", b"PK"))
    except OSError as e:
        raise FileIOError(f"cannot read: {e.strerror or e}.", where=path) from e


def _check_size(path: Path) -> None:
    try:
        if not path.is_file():
            there = "this is a directory" if path.is_dir() else "not a regular file"
            raise FileIOError(f"{there if path.exists() else 'no such file'}.", where=path)
        size = path.stat().st_size
    except (OSError, ValueError) as e:
        raise FileIOError(f"cannot read: {e}.", where=path) from e
    if size > MAX_BYTES:
        raise LimitError(f"{size} bytes; at most {MAX_BYTES} are read.", where=path)
