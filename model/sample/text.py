"""The text the sample was trained on: which documents, which are held out, and the two excerpts that ship."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

HOLD_OUT_EVERY = 20  # every 20th document, by name, is never trained on
HELDOUT_DOCUMENTS = (
    "library/bisect", "library/email.policy", "library/time", "tutorial/inputoutput",
)  # fmt: skip
EXCERPT_EVERY, EXCERPT_BYTES = 10, 2500  # training excerpt: the start of every 10th document


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        yield from ((p.as_posix(), p.read_bytes()) for p in path.rglob("*.rst.txt"))
        return
    unpack = ["dpkg-deb", "--fsys-tarfile", str(path)]
    data = subprocess.run(unpack, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".rst.txt") else None
            if file is not None:
                yield member.name, file.read()


def read_documents(path: Path) -> dict[str, str]:
    """Name -> text of every ``_sources/**/*.rst.txt``, sorted by name.

    Args:
        path: the Debian package python3.11-doc, or its unpacked ``_sources`` directory.
    """
    named = {n.rpartition("_sources/")[2]: raw.decode() for n, raw in _files(path)}
    return {name.removesuffix(".rst.txt"): named[name] for name in sorted(named)}


def split(documents: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out documents."""
    held = {n for i, n in enumerate(documents) if i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1}
    return (
        {n: t for n, t in documents.items() if n not in held},
        {n: t for n, t in documents.items() if n in held},
    )


def write_excerpts(out: Path, train: dict[str, str], held: dict[str, str]) -> None:
    """Write ``heldout.txt`` (whole held-out documents) and ``train_excerpt.txt`` (starts of training documents)."""
    (out / "heldout.txt").write_text("".join(held[n] for n in HELDOUT_DOCUMENTS))
    starts = [t.encode()[:EXCERPT_BYTES] for t in list(train.values())[::EXCERPT_EVERY]]
    (out / "train_excerpt.txt").write_text("".join(s.decode(errors="ignore") for s in starts))
