"""What a long quantization has done so far, on disk: killed at any moment, the same command goes on from the last block.

``DST.quantizing/`` holds a journal (:mod:`g2kit.formats.journal`: a line is durable before the next one begins), the
calibration's ids, the hidden states behind the last finished block, and one file of codes per block. A line is written
only when all it speaks of is durable. The finished run reads codes from here, exports them and removes the directory.
"""

from __future__ import annotations

import errno
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..formats import output_fs as ofs
from ..formats.errors import (
    ConflictError,
    FileIOError,
    InputError,
    ResumeError,
    SpaceError,
    printable,
)
from ..formats.journal import Journal
from ..formats.lock import Lock
from ..formats.names import listing
from ..formats.packed.bits import pack, unpack
from . import ggml
from .calibration import Calibration
from .choose import Rounded, Target
from .scheme import Codes, Scheme

SUFFIX = ".quantizing"
VERSION = 1
_IDS = "calibration.npy"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OURS = re.compile(r"lock|journal|calibration\.npy|(states-\d+\.bin|layer-\d+\.npz)(\.new)?")


def work_path(dst: Path) -> Path:
    """Where a run with this destination keeps its work."""
    return dst.with_name(dst.name + SUFFIX)


class Work:
    """The work directory of one run; a context manager.

    Leaving it after an error keeps it for a later run, unless no block was done or the input is at fault.

    Args:
        path: directory to make or continue.
        settings: what decides the codes, as words for the user -> value.
        resume: continue what is there; False starts afresh.

    Attributes:
        layers: finished blocks -> what :meth:`finish_layer` was told.
        resumed: finished blocks when it was opened.

    Raises:
        ResumeError: what is there was begun with other settings; says which.
        LockedError: another process works there.
        ConflictError: the directory is not of g2quant.
    """

    def __init__(self, path: Path, settings: Mapping[str, str], *, resume: bool = True) -> None:
        self.path = path
        self._settings = dict(settings)
        self._resume = resume
        self.layers: dict[int, dict[str, Any]] = {}
        self.resumed = 0
        self._calibration: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        self._lock = Lock(self.path / "lock")
        self._journal = Journal(self.path / "journal")
        try:
            self._open()
        except BaseException:
            self._journal.close()
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        odd = [n for n in self._names() if not _OURS.fullmatch(n)]
        if odd:
            raise ConflictError(
                f"this directory is needed for the work, and holds files of something else: {listing(odd)}.",
                where=self.path,
                fix="move it away or pass another destination.",
            )
        if not self._journal.records or not self._resume:
            self._forget()  # without a line nothing counts
            self._journal.append({"kind": "open", "version": VERSION, "settings": self._settings})
            return
        self._require_same(self._journal.records[0])
        for line in self._journal.records[1:]:
            if line.get("kind") == "calibration":
                self._calibration = line
            elif line.get("kind") == "layer":
                self.layers[int(line["layer"])] = line
        self.resumed = len(self.layers)

    def _require_same(self, head: Mapping[str, Any]) -> None:
        old = head.get("settings")
        if head.get("version") != VERSION or not isinstance(old, dict):
            raise ConflictError(
                "the interrupted run in this directory was made by another version of g2quant.",
                where=self.path,
                fix="remove the directory, or pass --no-resume.",
            )
        keys = [k for k in sorted({*old, *self._settings}) if old.get(k) != self._settings.get(k)]
        if keys:
            said = "; ".join(
                f"{k} was {old.get(k, 'not set')}, now {self._settings.get(k, 'not set')}"
                for k in keys
            )
            raise ResumeError(
                f"an interrupted run with other settings is there: {printable(said, 600)}.",
                where=self.path,
                fix="repeat the earlier command to finish it, or pass --no-resume to discard it and start afresh.",
                found={k: old.get(k) for k in keys},
                expected={k: self._settings.get(k) for k in keys},
            )

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.path))  # noqa: PTH208

    def _forget(self) -> None:
        self._journal.close()
        # the journal goes first: without it nothing else counts
        for name in sorted((n for n in self._names() if n != "lock"), key=lambda n: n != "journal"):
            (self.path / name).unlink()
        self._journal.forget()

    def __exit__(
        self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._journal.close()
        # after an error about the input there is nothing worth continuing
        if e is not None and (not self.layers or isinstance(e, InputError)):
            self._forget()
        self._lock.release()

    def remove(self) -> None:
        """The result is in its place: nothing here is needed any more."""
        self._forget()

    # ---- calibration

    def calibration(self) -> Calibration | None:
        """The sequences an interrupted run settled on."""
        line = self._calibration
        if line is None:
            return None
        ids = np.load(self.path / _IDS, allow_pickle=False)
        lengths = [int(n) for n in line["lengths"]]
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        found = Calibration(
            line["source"], tuple(parts[: line["train"]]), tuple(parts[line["train"] :])
        )
        if found.sha256 != line["sha256"]:
            raise self._damaged(_IDS)
        return found

    def keep_calibration(self, found: Calibration) -> None:
        """Settle on sequences."""
        every = [*found.train, *found.held]
        self._write(_IDS, lambda f: np.save(f, np.concatenate(every)))
        self._journal.append(
            {
                "kind": "calibration",
                "source": found.source,
                "train": len(found.train),
                "lengths": [len(s) for s in every],
                "sha256": found.sha256,
            }
        )

    # ---- states and codes

    def states(self, layer: int) -> Path:
        """File of the hidden states that enter a block."""
        return self.path / f"states-{layer}.bin"

    def finish_layer(
        self, layer: int, values: Mapping[str, Rounded], told: Mapping[str, Any]
    ) -> None:
        """Keep a block's weights; the states behind it must be durable.

        Args:
            layer: its index.
            values: canonical name -> rounded weight.
            told: JSON values to keep with it.
        """
        arrays: Any = {k: a for n, v in values.items() for k, a in _arrays(n, v).items()}
        self._write(_layer_file(layer), lambda f: np.savez(f, **arrays))
        line = {"kind": "layer", "layer": layer, **told}
        self._journal.append(line)
        self.layers[layer] = line
        self.states(layer).unlink(missing_ok=True)

    def _write(self, name: str, save: Any) -> None:
        """A small file, whole and durable or not there."""
        new = self.path / f"{name}.new"
        if name == _IDS:
            new = self.path / name
        with ofs.calls("write", new):
            with new.open("wb") as f:
                save(f)
                f.flush()
                os.fsync(f.fileno())
            new.replace(self.path / name)
            ofs.sync_dir(ofs.REAL, self.path)

    def load(self, layer: int, name: str, target: Target) -> Rounded:
        """A weight of a finished block.

        Raises:
            ConflictError: the file is damaged.
        """
        file = _layer_file(layer)
        try:
            with np.load(self.path / file, allow_pickle=False) as archive:
                found = {
                    part: archive[f"{name}|{part}"]
                    for part in ("codes", "scales", "zeros", "blocks", "columns")
                    if f"{name}|{part}" in archive
                }
            return _rounded(found, target)
        except OSError as e:
            raise FileIOError(f"cannot read: {e.strerror or e}.", where=self.path / file) from e
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as e:
            raise self._damaged(file) from e

    def _damaged(self, name: str) -> ConflictError:
        return ConflictError(
            "what the interrupted run kept is damaged.",
            where=self.path / name,
            fix="start afresh with --no-resume.",
        )


def _layer_file(layer: int) -> str:
    return f"layer-{layer}.npz"


def _arrays(name: str, value: Rounded) -> dict[str, np.ndarray]:
    if isinstance(value, ggml.Blocks):
        return {f"{name}|blocks": value.data.numpy()}
    out = {
        f"{name}|codes": pack(value.codes.numpy(), value.scheme.bits),
        f"{name}|columns": np.array(value.codes.shape[1]),
        f"{name}|scales": value.scales.numpy(),
    }
    return out if value.zeros is None else out | {f"{name}|zeros": value.zeros.numpy()}


def _rounded(found: Mapping[str, np.ndarray], target: Target) -> Rounded:
    if isinstance(target, str):
        return ggml.Blocks(ggml.block_format(target), torch.from_numpy(found["blocks"]))
    codes = unpack(found["codes"], target.bits, int(found["columns"]))
    zeros = None if target.symmetric else torch.from_numpy(found["zeros"])
    return Codes(target, torch.from_numpy(codes), torch.from_numpy(found["scales"]), zeros)


class WorkCodes(Mapping[str, Any]):
    """Every weight of a finished run, read when asked for; what the exporters take.

    Args:
        work: where they are.
        targets: canonical name -> what it was rounded to.
        source_fingerprint: of what was quantized.
    """

    def __init__(self, work: Work, targets: Mapping[str, Target], source_fingerprint: str) -> None:
        self._work, self._targets = work, dict(targets)
        self.source_fingerprint = source_fingerprint

    def scheme_of(self, name: str) -> Scheme | None:
        """A uniform weight's scheme."""
        target = self._targets[name]
        return target if isinstance(target, Scheme) else None

    def type_of(self, name: str) -> str | None:
        """A block weight's type."""
        target = self._targets[name]
        return target if isinstance(target, str) else None

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __getitem__(self, name: str) -> Rounded:
        target = self._targets[name]
        return self._work.load(int(name.split(".")[2]), name, target)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


class States:
    """Hidden states float32 ``[rows, width]`` in a file, and in memory too where they may be.

    Args:
        path: the file; made when ``rows`` is written, read when it is there.
        rows: tokens.
        width: hidden size.
        keep: hold them in memory; else only what is asked for is read.
        create: a new file.

    Raises:
        SpaceError: the disk is full.
    """

    def __init__(self, path: Path, rows: int, width: int, *, keep: bool, create: bool) -> None:
        self.path, self.rows, self.width = path, rows, width
        self._memory = torch.empty(rows, width) if keep else None
        with ofs.calls("open", path):
            self._file: io.FileIO = io.FileIO(path, "w+" if create else "r+")
            if create:
                self._reserve()
        if not create:
            size = os.fstat(self._file.fileno()).st_size
            if size != rows * width * 4:
                self.close()
                raise ConflictError(
                    f"the kept hidden states have {size} bytes, expected {rows * width * 4}.",
                    where=path,
                    fix="start afresh with --no-resume.",
                )
            if keep:
                self._memory = self._read(0, rows)

    def _reserve(self) -> None:
        nbytes = self.rows * self.width * 4
        try:
            os.posix_fallocate(self._file.fileno(), 0, nbytes)
        except OSError as e:
            if e.errno not in _FULL:  # a file system without fallocate
                os.ftruncate(self._file.fileno(), nbytes)
                return
            free = os.statvfs(self.path.parent)
            self.close()
            raise SpaceError(
                f"{nbytes} bytes are needed for hidden states, {free.f_bavail * free.f_frsize} are free.",
                where=self.path.parent,
                fix="free disk space, or use fewer --samples or a smaller --seq-len.",
            ) from e

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``[stop - start, width]``; not to be changed."""
        if self._memory is not None:
            return self._memory[start:stop]
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> Tensor:
        out = np.empty((stop - start, self.width), np.float32)
        with ofs.calls("read", self.path):
            view = out.reshape(-1).view(np.uint8).data
            at = start * self.width * 4
            while view.nbytes:
                n = os.preadv(self._file.fileno(), [view], at)
                if not n:
                    raise FileIOError("the hidden states end early.", where=self.path)
                view, at = view[n:], at + n
        return torch.from_numpy(out)

    def write(self, start: int, values: Tensor) -> None:
        """Rows from ``start`` on."""
        values = values.reshape(-1, self.width)
        if self._memory is not None:
            self._memory[start : start + len(values)] = values
        data = values.contiguous().numpy().reshape(-1).view(np.uint8).data
        with ofs.calls("write", self.path):
            ofs.write_all(ofs.REAL, self._file.fileno(), data, start * self.width * 4)

    def sync(self) -> None:
        """Make everything written durable."""
        with ofs.calls("write", self.path):
            os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Close the file; twice is harmless."""
        self._file.close()
