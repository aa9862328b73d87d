"""Which directory holds the arrays: the item itself, or one below the path that the user named.

Checkpoints lie in the wild as an item, as items of a multi-item checkpoint (``default/``, ``items/``, ``params/``), in step
directories (``0/items``, ``ckpt_100/default``), or in one directory beside ``tokenizer.model``. One candidate is
taken, several are an error. Nothing is ever deleted: a directory that only looks temporary may be someone's only copy.
Source: Orbax's checkpoint format guide and its ``path`` module (temporary names, commit markers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import FileIOError, FormatError, LimitError, printable
from .named_files import require_there
from .names import contained, listing

TMP_MARK = ".orbax-checkpoint-tmp"
METADATA, MSGPACK, MANIFEST = "_METADATA", "checkpoint", "manifest.ocdbt"
CHECKPOINT_METADATA, COMMIT = "_CHECKPOINT_METADATA", "commit_success.txt"
PROCESS = "ocdbt.process_"
_ARRAY_FILES = (".zarray", "zarr.json")
_DEPTH = 4  # run directory / checkpoints / step / item
_MAX_ENTRIES = 50_000
_NOT_ITEMS = ("d", "array_metadatas")


@dataclass(frozen=True)
class Item:
    """Where a checkpoint's arrays are.

    Attributes:
        path: the directory with the arrays and their ``_METADATA``.
        root: the directory with ``_CHECKPOINT_METADATA``, the same or its parent; None when there is none.
        notes: what was passed over on the way, one sentence each.
    """

    path: Path
    root: Path | None
    notes: tuple[str, ...] = ()


def find_item(path: Path) -> Item:
    """The one item at or below ``path``.

    Args:
        path: an item's directory, a directory above it, or one of its marker files.

    Raises:
        FormatError: none, several, or only saves that never finished.
        NotFoundError: no such directory.
        FileIOError: it cannot be listed.
        UnsafePathError: the one found is a symbolic link out of the directory.
    """
    require_there(path)
    if path.is_file() and path.name in (METADATA, MSGPACK, MANIFEST):
        path = path.parent
    if not path.is_dir():
        raise FormatError(
            "not an Orbax checkpoint, which is a directory.",
            where=path,
            fix="pass the directory that holds manifest.ocdbt or _METADATA.",
        )
    if any(TMP_MARK in part for part in path.absolute().parts):
        raise _uncommitted(path, "its name is that of a save in progress")
    search = _Search(path)
    found = search.run(_has_markers) or search.run(_has_arrays)
    if not found and search.temporary:
        raise _uncommitted(search.temporary[0], "its name is that of a save in progress")
    if not found:
        raise FormatError(
            f"no checkpoint found: no {MANIFEST}, {METADATA}, {MSGPACK} or zarr arrays here or "
            f"down to {_DEPTH} directories below.",
            where=path,
            fix="pass the directory that holds the checkpoint's files.",
        )
    if len(found) > 1:
        raise FormatError(
            f"{len(found)} checkpoints are below: {listing(_relative(found, path))}.",
            where=path,
            fix=f"pass the one you mean, such as {printable(str(found[-1]))}.",
        )
    item = found[0]
    roots = [p for p in (item, item.parent) if (p / CHECKPOINT_METADATA).is_file()]
    notes = [f"read from {printable(item.relative_to(path).as_posix())}."] if item != path else []
    if search.temporary:
        names = listing(_relative(search.temporary, path))
        notes.append(f"saves that never finished are beside it and were ignored: {names}.")
    return Item(item, roots[0] if roots else None, tuple(notes))


def _relative(paths: list[Path], base: Path) -> list[str]:
    return [p.relative_to(base).as_posix() for p in paths]


def _uncommitted(path: Path, why: str) -> FormatError:
    return FormatError(
        f"uncommitted: {why}, so the save is unfinished or was interrupted.",
        where=path,
        fix="wait until it is finished, or use an earlier step; nothing was changed or deleted.",
    )


def check_committed(item: Item, names: set[str]) -> None:
    """See that an OCDBT save was finished.

    Args:
        item: the item.
        names: files and directories in it.

    Raises:
        FormatError: the processes' parts were never merged.
    """
    if MANIFEST in names or not any(name.startswith(PROCESS) for name in names):
        return
    # an atomic rename leaves no half-merged directory behind, so a marker means that a file was lost later
    places = {item.path, item.root or item.path}
    if any((place / COMMIT).is_file() for place in places):
        return
    raise _uncommitted(
        item.path, f"{MANIFEST} is missing while {PROCESS}* is there, and there is no {COMMIT}"
    )


class _Search:
    """Breadth first, so the topmost directory that looks right is taken and not looked into."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.temporary: list[Path] = []

    def run(self, matches: Callable[[Path, list[Path]], bool]) -> list[Path]:
        """Every topmost directory that matches, in the order of names."""
        found, seen = [], 0
        self.temporary = []
        queue = deque([(self.top, 0)])
        while queue:
            directory, depth = queue.popleft()
            entries = _entries(directory)
            seen += len(entries)
            if seen > _MAX_ENTRIES:
                raise LimitError(
                    f"more than {_MAX_ENTRIES} files and directories, and no checkpoint yet.",
                    where=self.top,
                    fix="pass the checkpoint's own directory.",
                )
            if matches(directory, entries):
                found.append(contained(self.top, directory))
                continue
            if depth < _DEPTH:
                queue.extend((sub, depth + 1) for sub in entries if self._worth_a_look(sub))
        return found

    def _worth_a_look(self, path: Path) -> bool:
        if path.name.startswith(".") or path.name in _NOT_ITEMS or not path.is_dir():
            return False
        if TMP_MARK in path.name:
            self.temporary.append(path)
            return False
        return True


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=directory) from e


def _has_markers(directory: Path, entries: list[Path]) -> bool:
    names = {p.name for p in entries}
    if METADATA in names or MANIFEST in names or any(n.startswith(PROCESS) for n in names):
        return True
    return MSGPACK in names and _is_msgpack_map(directory / MSGPACK)


def _is_msgpack_map(path: Path) -> bool:
    """TensorFlow writes a text file of the same name."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as f:
            head = f.read(1)
    except OSError as e:
        raise FileIOError(f"cannot open: {e.strerror}.", where=path) from e
    return head in (b"\xde", b"\xdf") or b"\x80" <= head <= b"\x8f"


def _has_arrays(directory: Path, entries: list[Path]) -> bool:
    """Arrays of a nested tree lie directly in the item, those of Google's flat tree below ``transformer``."""
    return any(
        entry.name == "transformer" or any((entry / file).is_file() for file in _ARRAY_FILES)
        for entry in entries
        if entry.is_dir()
    )
