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

from ..formats.errors import FormatError, G2Error, UsageError
from ..formats.named_files import load_ids, read_text

SNIPPETS = "snippets"
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
    content = read_text(path)
    if not content.strip():
        raise FormatError("there is no text in it.", where=path, fix="name a file with text.")
    return Text(path.name, "text", content)


def user_tokens(
    source: str | Path | npt.ArrayLike | Sequence[object],
) -> list[npt.NDArray[np.int64]]:
    """Token ids given by the user: one document per row, exactly as they are.

    Args:
        source: a ``.npy`` file or array of whole numbers, ``[length]`` or ``[documents, length]``.

    Raises:
        FileIOError: the file cannot be read.
        FormatError: it holds something else.
        UsageError: the array is something else.
    """
    wrong: type[G2Error]
    if isinstance(source, str | Path):
        where, wrong = Path(source), FormatError
        ids = load_ids(where)
    else:
        where, wrong, ids = None, UsageError, np.asarray(source)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise wrong(
            f"token ids must be whole numbers of shape [length] or [documents, length], found {ids.dtype} "
            f"{list(ids.shape)}.",
            where=where,
            fix="save whole numbers (int32 or int64) of one or two dimensions with numpy.save(file, ids).",
        )
    if int(ids.max()) > np.iinfo(np.int64).max:
        raise wrong(
            f"token id {int(ids.max())} is in no vocabulary.", where=where,
            fix="save ids of the model's tokenizer.",
        )  # fmt: skip
    return list(np.atleast_2d(ids).astype(np.int64))
