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

from ..formats.errors import FormatError
from ..formats.named_files import read_text, token_ids

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
        NotFoundError, FileIOError: it cannot be read.
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
        G2Error: as :func:`g2kit.formats.named_files.token_ids`.
    """
    return list(np.atleast_2d(token_ids(source, "documents")))
