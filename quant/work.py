"""What a long quantization has done so far, on disk: killed at any moment, the same command goes on from the last block.

``DST.quantizing/`` holds a journal (:mod:`g2kit.formats.journal`: a line is durable before the next one begins), the
calibration's ids, the hidden states behind the last finished block, and one file of codes per block. A line is written
only when all it speaks of is durable. The finished run reads codes from here, exports them and removes the directory.
"""

from __future__ import annotations

import os
import re
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    printable,
)
from ..formats.journal import Journal
from ..formats.lock import Lock
from ..formats.names import listing
from ..formats.packed.bits import pack, unpack
from ..model import canonical
from . import ggml
from .calibration import Calibration
from .choose import Rounded, Target
from .scheme import Codes, Scheme
from .tunable import weight_of

SUFFIX = ".quantizing"
VERSION = 2
_IDS = "calibration.npy"
_TUNING, _TUNED = "tuning.npz", "tuned.npz"
# numpy parses headers with Python's own parser, which raises SystemError now and then where two threads use it (3.11)
_READING = threading.Lock()
_OURS = re.compile(
    r"lock|journal|calibration\.npy|(spill|held)\.bin|(states-\d+\.bin|layer-\d+\.npz|tun(ing|ed)\.npz)(\.new)?"
)


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
        tuned: what :meth:`finish_tuning` was told, or None.

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
        self.tuned: dict[str, Any] | None = None
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
            elif line.get("kind") == "tuned":
                self.tuned = line
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
        ids = self._loaded_ids()
        lengths = [int(n) for n in line["lengths"]]
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        found = Calibration(
            line["source"], tuple(parts[: line["train"]]), tuple(parts[line["train"] :])
        )
        if found.sha256 != line["sha256"]:
            raise self._damaged(_IDS)
        return found

    def _loaded_ids(self) -> np.ndarray:
        try:
            found = np.load(self.path / _IDS, allow_pickle=False)
        except FileNotFoundError as e:
            raise self._damaged(_IDS) from e
        except OSError as e:
            raise FileIOError(f"cannot read: {e.strerror or e}.", where=self.path / _IDS) from e
        except (ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as e:
            raise self._damaged(_IDS) from e
        if not isinstance(found, np.ndarray) or found.ndim != 1:
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
        self,
        layer: int,
        values: Mapping[str, Rounded],
        told: Mapping[str, Any],
        floats: Mapping[str, Tensor] | None = None,
        squares: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep a block's weights; the states behind it must be durable.

        Args:
            layer: its index.
            values: canonical name -> rounded weight.
            told: JSON values to keep with it.
            floats: canonical name -> tuned tensor.
            squares: canonical name -> mean squares of its inputs.
        """
        arrays: Any = {k: a for n, v in values.items() for k, a in _arrays(n, v).items()}
        arrays |= {f"{n}|float": x.cpu().numpy() for n, x in (floats or {}).items()}
        arrays |= {f"{n}|squares": x.cpu().numpy() for n, x in (squares or {}).items()}
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
        """A weight of a finished block, as it was before all blocks were tuned together.

        Raises:
            ConflictError: the file is damaged.
        """
        parts = ("codes", "scales", "zeros", "blocks", "columns")
        found = self._arrays(_layer_file(layer), [f"{name}|{part}" for part in parts])
        try:
            return _rounded({k.rpartition("|")[2]: a for k, a in found.items()}, target)
        except (KeyError, ValueError) as e:
            raise self._damaged(_layer_file(layer)) from e

    def floats(self, layer: int) -> dict[str, Tensor]:
        """Tuned tensors of a finished block."""
        found = self._arrays(_layer_file(layer))
        wanted = {k: a for k, a in found.items() if k.endswith("|float")}
        return {k.removesuffix("|float"): torch.from_numpy(a) for k, a in wanted.items()}

    def squares(self, layer: int) -> dict[str, np.ndarray]:
        """Mean squares of the inputs of a finished block's weights ``[in_features]``."""
        found = self._arrays(_layer_file(layer))
        return {k.removesuffix("|squares"): a for k, a in found.items() if k.endswith("|squares")}

    def _arrays(self, file: str, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of a file, those there are of ``keys``."""
        try:
            with _READING, np.load(self.path / file, allow_pickle=False) as archive:
                return {
                    k: archive[k] for k in (archive.files if keys is None else keys) if k in archive
                }
        except FileNotFoundError as e:
            raise self._damaged(file) from e
        except OSError as e:
            raise FileIOError(f"cannot read: {e.strerror or e}.", where=self.path / file) from e
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as e:
            raise self._damaged(file) from e

    # ---- tuning of all blocks together

    def keep_tuning(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep how far it has come; replaces what was kept before."""
        kept: Any = dict(arrays)
        self._write(_TUNING, lambda f: np.savez(f, **kept))

    def tuning(self) -> dict[str, np.ndarray] | None:
        """What was kept last."""
        return self._arrays(_TUNING) if (self.path / _TUNING).is_file() else None

    def finish_tuning(
        self, numbers: Mapping[str, Sequence[Tensor]], told: Mapping[str, Any]
    ) -> None:
        """Keep the result.

        Args:
            numbers: canonical name -> a weight's stored numbers (see :mod:`.tunable`), or a float tensor alone.
            told: JSON values to keep with it.
        """
        arrays: Any = {
            f"{n}|{i}": x.cpu().numpy() for n, xs in numbers.items() for i, x in enumerate(xs)
        }
        self._write(_TUNED, lambda f: np.savez(f, **arrays))
        line = {"kind": "tuned", **told}
        self._journal.append(line)
        self.tuned = line
        (self.path / _TUNING).unlink(missing_ok=True)

    def tuned_numbers(self, name: str) -> list[Tensor]:
        """A tensor's numbers from :meth:`finish_tuning`, or none."""
        if self.tuned is None:
            return []
        found = self._arrays(_TUNED, (f"{name}|0", f"{name}|1"))
        return [torch.from_numpy(a) for a in found.values()]

    def final(self, layer: int, name: str, target: Target) -> Rounded:
        """A weight as it shall be written."""
        value, numbers = self.load(layer, name, target), self.tuned_numbers(name)
        if not numbers:
            return value
        weight = weight_of(value)
        return weight.rebuilt(numbers, weight.codes)

    def final_floats(self, layers: int) -> dict[str, Tensor]:
        """Tuned tensors as they shall be written, the final norm among them."""
        found = {n: x for i in range(layers) for n, x in self.floats(i).items()}
        if self.tuned is not None:
            found[canonical.FINAL_NORM] = torch.empty(0)
        return {n: (self.tuned_numbers(n) or [x])[0] for n, x in found.items()}

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
        return {f"{name}|blocks": value.data.cpu().numpy()}
    out = {
        f"{name}|codes": pack(value.codes.cpu().numpy(), value.scheme.bits),
        f"{name}|columns": np.array(value.codes.shape[1]),
        f"{name}|scales": value.scales.cpu().numpy(),
    }
    return out if value.zeros is None else out | {f"{name}|zeros": value.zeros.cpu().numpy()}


def _rounded(found: Mapping[str, np.ndarray], target: Target) -> Rounded:
    if isinstance(target, str):
        return ggml.Blocks(ggml.block_format(target), torch.from_numpy(found["blocks"]))
    codes = unpack(found["codes"], target.bits, int(found["columns"]))
    zeros = None if target.symmetric else torch.from_numpy(found["zeros"])
    return Codes(target, torch.from_numpy(codes), torch.from_numpy(found["scales"]), zeros)


class WorkCodes(Mapping[str, Any]):
    """Every weight of a finished run, read when asked for, and tuned norms; what the exporters take.

    Args:
        work: where they are.
        targets: canonical name -> what it was rounded to.
        source_fingerprint: of what was quantized.
        layers: of the model, whose norms may have been tuned.
    """

    def __init__(
        self, work: Work, targets: Mapping[str, Target], source_fingerprint: str, layers: int = 0
    ) -> None:
        self._work, self._targets = work, dict(targets)
        self._floats = work.final_floats(layers)
        self.source_fingerprint = source_fingerprint

    def scheme_of(self, name: str) -> Scheme | None:
        """A uniform weight's scheme."""
        target = self._targets.get(name)
        return target if isinstance(target, Scheme) else None

    def type_of(self, name: str) -> str | None:
        """A block weight's type."""
        target = self._targets.get(name)
        return target if isinstance(target, str) else None

    def __contains__(self, name: object) -> bool:
        return name in self._targets or name in self._floats

    def __getitem__(self, name: str) -> Any:
        if name in self._floats:
            return self._floats[name]
        return self._work.final(int(name.split(".")[2]), name, self._targets[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._targets
        yield from self._floats

    def __len__(self) -> int:
        return len(self._targets) + len(self._floats)
