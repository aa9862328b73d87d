"""Where zarr chunks lie: one file each below a directory, or values of an OCDBT B-tree read through tensorstore.

Values are read in pieces, never whole: one chunk of an official release decodes to more than a gigabyte.
tensorstore is imported on first use, because importing it takes a fifth of a second.
Source for OCDBT: tensorstore's ``ocdbt`` key-value store driver.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FileIOError, FormatError, LimitError, TruncatedError, printable
from .files import InputFile
from .names import contained, listing

MAX_FILES = 1_000_000
MAX_METADATA = 1 << 20  # bytes of one array's JSON
_PIECE = 1 << 20
_FILE_PIECE = 256 << 10
_BATCH = 256  # reads under way at once while a checkpoint is opened

Bytes = bytes | memoryview
_AGAIN = "download or copy the checkpoint again."


def walk(directory: Path) -> dict[str, os.stat_result]:
    """Every regular file below a directory: ``/``-separated relative name -> its stat. Links to directories are not followed.

    Raises:
        UnsafePathError: a file is a symbolic link out of the directory.
        FileIOError: a directory cannot be listed.
        LimitError: more files than any checkpoint has.
    """

    def refuse(e: OSError) -> None:
        raise FileIOError(f"cannot list: {e.strerror}.", where=e.filename or directory) from e

    found: dict[str, os.stat_result] = {}
    for top, _, names in os.walk(directory, onerror=refuse):
        inside = Path(top).relative_to(directory)
        for name in names:
            path = Path(top) / name
            try:
                if stat.S_ISLNK((status := path.lstat()).st_mode):
                    status = contained(directory, path).stat()
            except OSError:
                continue  # a dangling link; if it is a chunk, it is reported as missing
            found[(inside / name).as_posix()] = status
        if len(found) > MAX_FILES:
            raise LimitError(f"more than {MAX_FILES} files.", where=directory)
    return dict(sorted(found.items()))


class Value(ABC):
    """One stored value, opened for reading in pieces."""

    @abstractmethod
    def read_into(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill ``out`` from ``offset``; TruncatedError when the value is shorter."""

    @abstractmethod
    def tail(self, size: int) -> bytes:
        """The last ``size`` bytes; TruncatedError when the value is shorter."""

    @abstractmethod
    def pieces(self, start: int, stop: int | None) -> Iterator[Bytes]:
        """Bytes ``start`` to ``stop`` (None: to the end) in pieces of at most half a megabyte."""

    def close(self) -> None:  # noqa: B027
        """Give back file descriptors, where there are any."""


class Store(ABC):
    """Values under keys such as ``layer_0.attn.q_einsum.w/0.0.0``.

    Attributes:
        where: the checkpoint's directory, for messages.
        keys: every key -> bytes of its value, or None where the store does not tell.
        total: bytes of all values together, at most.
        kind: ``ocdbt`` or ``zarr directories``.
    """

    kind: str

    def __init__(self, where: Path, keys: Mapping[str, int | None], total: int) -> None:
        self.where = where
        self.keys = keys
        self.total = total

    @abstractmethod
    def open(self, key: str, tensor: str) -> Value:
        """Open one value. The tensor's name is for messages."""

    @abstractmethod
    def small(self, keys: Sequence[str]) -> list[bytes]:
        """Values that are metadata: whole, in the order asked for, each at most 1 MiB."""

    @abstractmethod
    def check_ends(self, keys: Mapping[str, int | None], tensor: str) -> None:
        """See that the last byte of every value is there.

        Args:
            keys: key -> size it must have, or None when only the end of its own is known.
            tensor: the array they belong to.

        Raises:
            TruncatedError: one ends early; the message names the array and the key.
        """

    @abstractmethod
    def kvstore(self, prefix: str) -> dict[str, Any]:
        """The specification for tensorstore of the values below ``prefix`` (which ends in ``/``)."""

    def _truncated(self, key: str, tensor: str, why: str) -> TruncatedError:
        return TruncatedError(
            f"{printable(key)}: {why}.", where=self.where, tensor=tensor, fix=_AGAIN
        )


class FileStore(Store):
    """Chunks as files."""

    kind = "zarr directories"

    def __init__(self, where: Path, files: Mapping[str, os.stat_result]) -> None:
        sizes = {name: st.st_size for name, st in files.items()}
        super().__init__(where, sizes, sum(sizes.values()))

    def open(self, key: str, tensor: str) -> Value:
        """See :meth:`Store.open`. Keys are the names the directory walk found, never names from metadata."""
        return _FileValue(self, key, tensor)

    def small(self, keys: Sequence[str]) -> list[bytes]:
        """See :meth:`Store.small`."""
        out = []
        for key in keys:
            with InputFile(self.where / key) as file:
                _check_metadata_size(file.size, file.path)
                out.append(file.read(0, file.size))
        return out

    def check_ends(self, keys: Mapping[str, int | None], tensor: str) -> None:
        """See :meth:`Store.check_ends`."""
        for key, expected in keys.items():
            size = self.keys[key] or 0
            if size == 0 or (expected is not None and size < expected):
                wanted = "" if expected is None else f", expected {expected}"
                raise self._truncated(key, tensor, f"the chunk has {size} bytes{wanted}")
            if expected is not None and size > expected:
                raise FormatError(
                    f"{printable(key)}: the chunk has {size} bytes, expected {expected}.",
                    where=self.where,
                    tensor=tensor,
                )

    def kvstore(self, prefix: str) -> dict[str, Any]:
        """See :meth:`Store.kvstore`."""
        return {"driver": "file", "path": f"{_tensorstore_path(self.where)}/{prefix}"}


class _FileValue(Value):
    def __init__(self, store: FileStore, key: str, tensor: str) -> None:
        self.store, self.key, self.tensor = store, key, tensor
        self.file = InputFile(store.where / key)

    def read_into(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        self._require(offset, len(out))
        self.file.read_into(offset, out)

    def tail(self, size: int) -> bytes:
        self._require(0, size)
        return self.file.read(self.file.size - size, size)

    def pieces(self, start: int, stop: int | None) -> Iterator[Bytes]:
        end = self.file.size if stop is None else stop
        self._require(start, end - start)
        buffer = np.empty(min(_FILE_PIECE, end - start), np.uint8)  # reused: no page faults
        while start < end:
            part = buffer[: min(len(buffer), end - start)]
            self.file.read_into(start, part)
            yield part.data
            start += len(part)

    def _require(self, start: int, size: int) -> None:
        if not 0 <= start <= start + size <= self.file.size:
            raise self.store._truncated(
                self.key,
                self.tensor,
                f"bytes {start} to {start + size} are needed, the file has {self.file.size}",
            )

    def close(self) -> None:
        self.file.close()


class OcdbtStore(Store):
    """Values of an OCDBT database.

    Args:
        where: the directory with ``manifest.ocdbt``.
        total: bytes of all its files.

    Raises:
        TruncatedError: the manifest or a B-tree node is missing or short.
        FormatError: the manifest or a node is damaged.
    """

    kind = "ocdbt"

    def __init__(self, where: Path, total: int) -> None:
        import tensorstore as ts

        self.path = _tensorstore_path(where)
        # B-tree nodes are read again for every range unless they are cached
        context = ts.Context({"cache_pool": {"total_bytes_limit": 32 << 20}})
        try:
            self.kv = ts.KvStore.open(self._spec(), context=context).result()
            found = self.kv.list().result()
        except (
            Exception
        ) as e:  # tensorstore raises ValueError, OSError and others without a common base
            raise self._damaged(str(e), where) from e
        super().__init__(where, {k.decode("utf-8", "surrogateescape"): None for k in found}, total)

    def _spec(self) -> dict[str, Any]:
        return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.path}/"}}

    @staticmethod
    def _damaged(message: str, where: Path) -> FormatError | TruncatedError:
        kind = TruncatedError if message.startswith(("NOT_FOUND", "OUT_OF_RANGE")) else FormatError
        return kind(
            f"the OCDBT database cannot be read, none of its arrays can: {printable(message)}",
            where=where,
            fix=_AGAIN,
        )

    def open(self, key: str, tensor: str) -> Value:
        """See :meth:`Store.open`."""
        return _OcdbtValue(self, key, tensor)

    def small(self, keys: Sequence[str]) -> list[bytes]:
        """See :meth:`Store.small`."""
        out: list[bytes] = []
        for start in range(0, len(keys), _BATCH):
            part = keys[start : start + _BATCH]
            # only a value that is too large has a byte there
            probes = [self.range(key, MAX_METADATA, MAX_METADATA + 1) for key in part]
            _check_metadata_size(MAX_METADATA + max(map(_found, probes)), self.where)
            whole = [self.range(key, 0, None) for key in part]
            for key, future in zip(part, whole, strict=True):
                try:
                    value = bytes(future.result().value)
                except Exception as e:
                    raise self._truncated(key, key, f"cannot be read ({e})") from e
                if not value:  # tensorstore reads a value of a missing data file as empty
                    raise self._truncated(key, key, "the value's data file is missing")
                out.append(value)
        return out

    def check_ends(self, keys: Mapping[str, int | None], tensor: str) -> None:
        """See :meth:`Store.check_ends`."""
        names = list(keys)
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            waiting = [self.range(k, -1 if (n := keys[k]) is None else n - 1, None) for k in part]
            for key, future in zip(part, waiting, strict=True):
                try:
                    left = len(future.result().value)
                except Exception as e:
                    raise self._truncated(key, tensor, f"the value ends early ({e})") from e
                if left == 0:  # tensorstore reads a value of a missing data file as empty
                    raise self._truncated(key, tensor, "the value's data file is missing")
                if left > 1:
                    raise FormatError(
                        f"{printable(key)}: the chunk has {left - 1} bytes more than expected.",
                        where=self.where,
                        tensor=tensor,
                    )

    def kvstore(self, prefix: str) -> dict[str, Any]:
        """See :meth:`Store.kvstore`."""
        return {**self._spec(), "path": prefix}

    def range(self, key: str, start: int, stop: int | None) -> Any:
        """Future of a read; the value must be as long as ``stop``."""
        return self.kv.read(key.encode("utf-8", "surrogateescape"), byte_range=slice(start, stop))

    def _rest(self, key: str, start: int, tensor: str) -> bytes:
        try:
            return bytes(self.range(key, start, None).result().value)
        except Exception as e:
            raise self._truncated(key, tensor, f"cannot be read ({e})") from e


class _OcdbtValue(Value):
    """The length is not known beforehand: a range past the end is an error, then the rest is asked for."""

    def __init__(self, store: OcdbtStore, key: str, tensor: str) -> None:
        self.store, self.key, self.tensor = store, key, tensor

    def read_into(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        done = 0
        for piece in self.pieces(offset, offset + len(out)):
            out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        if done != len(out):
            raise self._short(f"{done} of {len(out)} bytes at {offset} are there")

    def tail(self, size: int) -> bytes:
        try:
            found = bytes(self.store.range(self.key, -size, None).result().value)
        except Exception as e:
            raise self._short(f"the last {size} bytes cannot be read ({e})") from e
        if len(found) != size:
            raise self._short(f"{len(found)} of the last {size} bytes are there")
        return found

    def pieces(self, start: int, stop: int | None) -> Iterator[Bytes]:
        waiting = self._ask(start, stop)
        while waiting is not None:
            end = self._end(start, stop)
            try:
                piece = waiting.result().value
            except Exception as e:
                if stop is not None:
                    raise self._short(f"it ends before byte {end} ({e})") from e
                piece = self.store._rest(self.key, start, self.tensor)
                end = start + len(piece)
                waiting = None
            if len(piece) != end - start:  # the data file is missing
                raise self._short(f"bytes {start} to {end} cannot be read")
            if waiting is not None:  # the next piece is read while this one is used
                waiting = self._ask(end, stop)
            start = end
            if piece:
                yield piece

    @staticmethod
    def _end(start: int, stop: int | None) -> int:
        return start + _PIECE if stop is None else min(start + _PIECE, stop)

    def _ask(self, start: int, stop: int | None) -> Any:
        end = self._end(start, stop)
        return self.store.range(self.key, start, end) if end > start else None

    def _short(self, why: str) -> TruncatedError:
        return self.store._truncated(self.key, self.tensor, why)


def _tensorstore_path(where: Path) -> str:
    """An absolute path as tensorstore takes it.

    Raises:
        FileIOError: tensorstore cannot open directories of this name; other readers can.
    """
    path = str(where.absolute())
    if "\\" in path or path != path.encode("utf-8", "replace").decode("utf-8"):
        raise FileIOError(
            "tensorstore cannot open paths with a backslash or with bytes that are not UTF-8.",
            where=where,
            fix="rename the directory, or reach it through a symbolic link.",
        )
    return path


def _found(future: Any) -> int:
    """Bytes a range read gave; 0 when there are none."""
    try:
        return len(future.result().value)
    except ValueError:
        return 0


def _check_metadata_size(size: int, where: Path) -> None:
    if size > MAX_METADATA:
        raise LimitError(
            f"an array's metadata has {size} bytes, at most {MAX_METADATA} are read.", where=where
        )


def arrays_in(store: Store) -> dict[str, int]:
    """Array name -> zarr version, for every ``.zarray`` and ``zarr.json`` in a store."""
    found: dict[str, int] = {}
    for file, version in ((".zarray", 2), ("zarr.json", 3)):
        for key in store.keys:
            name, _, last = key.rpartition("/")
            if last != file or not name:
                continue
            if name in found:
                raise FormatError(
                    f"{listing([name])} has both .zarray and zarr.json.", where=store.where
                )
            found[name] = version
    return dict(sorted(found.items()))
