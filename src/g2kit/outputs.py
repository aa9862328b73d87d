"""The files a command is to write, claimed before anything is computed: a report lost to a wrong path costs hours."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .convert.detect import belongs_to_checkpoint
from .formats.errors import FileIOError, UnsafePathError, UsageError, printable

Render = Callable[[Mapping[str, Any]], str]


class Outputs:
    """Output files by what they hold.

    Entering creates an empty temporary file beside each, so that a missing directory, a directory in the file's place or
    a read-only file system shows at once. :meth:`write` puts each complete file in place; leaving removes what is left.

    Args:
        paths: kind -> file, None for those not asked for. A link is followed: what it leads to is replaced.
        inputs: what must not be overwritten: files, or directories that nothing is written into; they need not be there yet.
        others: kind -> file that the command writes by other means.
    """

    def __init__(
        self,
        paths: Mapping[str, Path | None],
        inputs: Iterable[str | Path] = (),
        others: Mapping[str, Path | None] | None = None,
    ) -> None:
        self.paths = {kind: _followed(path) for kind, path in paths.items() if path is not None}
        self._others = {k: path for k, path in (others or {}).items() if path is not None}
        self.inputs = [Path(p) for p in inputs]
        self._temporary: dict[str, Path | None] = {}

    def __enter__(self) -> Self:
        try:
            self._check()
            for kind, path in self.paths.items():
                self._temporary[kind] = _claim(path)
        except BaseException:
            self._clear()
            raise
        return self

    @property
    def pending(self) -> list[str]:
        """What is not written yet, nor failed to be."""
        return list(self._temporary)

    def write(self, kind: str, text: str) -> Path:
        """Write a file that was claimed; replaces what was there.

        Raises:
            FileIOError: the operating system refused.
        """
        path, temporary = self.paths[kind], self._temporary.pop(kind)
        try:
            if temporary is None:  # a pipe or device: nothing to replace
                path.write_text(text, encoding="utf-8")
                return path
            with temporary.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        except OSError as e:
            raise FileIOError(f"cannot write: {e.strerror}.", where=path) from e
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return path

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._clear()

    def _check(self) -> None:
        seen = {path.resolve(): kind for kind, path in self._others.items()}
        sources = [p.resolve() for p in self.inputs]
        for kind, path in self.paths.items():
            real = path.resolve()
            if real in seen:
                raise UsageError(
                    f"--{seen[real]} and --{kind} name the same file.", where=path,
                    fix="give each a name of its own.",
                )  # fmt: skip
            seen[real] = kind
            if str(path) == "-" or _is_standard_output(path):
                raise UsageError(
                    f"--{kind} is standard output, where the command itself writes.", where=path,
                    fix="name a file; --json prints the one document to standard output.",
                )  # fmt: skip
            for source in sources:
                if real == source or source in real.parents:
                    raise UnsafePathError(
                        f"--{kind} {'is' if real == source else 'lies in'} an input of this command.",
                        where=path, fix="name a new file, beside the inputs.",
                    )  # fmt: skip
            if path.is_file() and belongs_to_checkpoint(path.name):
                raise UnsafePathError(
                    f"--{kind} would replace a file that by its name belongs to a checkpoint or recording.",
                    where=path, fix="choose another name, or remove that file first.",
                )  # fmt: skip

    def _clear(self) -> None:
        for temporary in self._temporary.values():
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        self._temporary = {}


def _claim(path: Path) -> Path | None:
    """An empty file beside ``path`` to become it; None where ``path`` is a pipe or a device."""
    try:
        if path.is_dir():
            raise UsageError(
                "this is a directory, expected a file to write.", where=path,
                fix="name a file in it.",
            )  # fmt: skip
        if path.exists() and (not stat.S_ISREG(path.stat().st_mode) or _is_stream(path)):
            return None
        if path.exists() and not os.access(path, os.W_OK):
            raise FileIOError("the file cannot be replaced: it is read-only.", where=path)
        temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
        temporary.touch(exist_ok=False)
    except OSError as e:
        raise FileIOError(
            f"nothing can be written here: {printable(e.strerror or str(e))}.", where=path,
            fix="make the directory, or name another place.",
        ) from e  # fmt: skip
    return temporary


def _followed(path: Path) -> Path:
    """Where a link leads; anything else, and an open file's name, as it is."""
    return path.resolve() if path.is_symlink() and not _is_stream(path) else path


def _is_standard_output(path: Path) -> bool:
    """Whether what is printed lands there too, ``/dev/null`` aside."""
    try:
        there, printed = path.stat(), os.fstat(1)
    except OSError:  # nothing there, or no standard output
        return False
    nowhere = stat.S_ISCHR(printed.st_mode) and not os.isatty(1)
    return os.path.samestat(there, printed) and not nowhere


def _is_stream(path: Path) -> bool:
    """Whether this is an open file's name, such as ``/dev/stdout``: nothing may take its place."""
    parent = path.parent.resolve()
    return parent == Path("/dev") or Path("/proc") in parent.parents
