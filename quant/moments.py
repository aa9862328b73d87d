"""Second moments gathered by several processes, each from its share of the batches; their sum is the same for any number.

Float sums depend on their order, sums of whole numbers do not. So every batch's product, a float32 matrix, is rounded to
whole numbers of a unit that is the same everywhere: ``2**-24`` of the size that the very first batch gave its columns, as
powers of two. Every shard looks at that batch, whoever adds it. All inputs are those of the original model (one pass needs
no barrier between blocks), so a run from moments is the same for any number of shards, and not the same as a run
that gathers behind rounded blocks. Shards must be gathered on the same kind of machine with as many threads.

A directory holds ``moments.json``, ``calibration.npy``, ``units.npz`` and per layer and stage the int64 sums of the panels
on and above the diagonal, one behind the other.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..formats import strict_json
from ..formats.errors import (
    ChecksumError,
    ConflictError,
    FormatError,
    LimitError,
    NotFoundError,
    ShapeError,
)
from .calibration import Calibration
from .hessian import PANEL, STAGES, Collector, Moments, mirror

NAME, SCHEMA, VERSION = "moments.json", "g2kit.moments", 2
IDS, UNITS = "calibration.npy", "units.npz"
_BITS = 24  # below a column's mean square in the first batch
_LEAST = (
    2.0**-12
)  # mean square of a column that is counted in smaller units than others, relative to the mean of all
_MOST = 2.0**61
Units = npt.NDArray[np.int16]


class ExactMoments(Moments):
    """Moments in whole numbers.

    Attributes:
        adding: False while a batch is only looked at for its units.
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        epsilon: float | None,
        held_rows: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(names, 0, epsilon, held_rows, device)
        self.adding = True
        self.units: Tensor | None = None
        self.panels = [
            torch.zeros(min(PANEL, width - a), width - a, dtype=torch.int64, device=device)
            for a in range(0, width, PANEL)
        ]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take inputs; the first ones set the units.

        Raises:
            LimitError: a column is larger than its unit can count; names the layer.
        """
        rows = self.rows(x, y)
        if self.units is None:
            self.units = units_of(rows)
        if not self.adding:
            return
        rows = torch.ldexp(rows, -self.units)
        self._tokens += len(rows)
        for a, panel in zip(range(0, rows.shape[1], PANEL), self.panels, strict=True):
            product = (rows[:, a : a + PANEL].t() @ rows[:, a:]).double().mul_(2.0**_BITS)
            # nothing is larger than the diagonal, of the sum either
            if float((product.diagonal() + panel.diagonal()).max()) >= _MOST:
                raise LimitError(
                    "an input is thousands of times larger than in the first sequences, too large for their units.",
                    tensor=self.names[0],
                    fix="put the sequence with the largest inputs first, or quantize without --moments.",
                )
            panel += product.round_().to(torch.int64)


def units_of(rows: Tensor) -> Tensor:
    """Exponent of a power of two near each column's size, int32 ``[in_features]``; never far below their mean."""
    power = rows.square().mean(0, dtype=torch.float64)
    least = float(power.mean()) * _LEAST or 1.0
    _, exponent = torch.frexp(power.clamp_min(least).sqrt())
    return exponent.to(torch.int32)


def file_name(layer: int, stage: int) -> str:
    """Where a stage's sums lie."""
    return f"layer-{layer}-{stage}.npy"


class Merged:
    """The moments of all shards, added up when asked for.

    Args:
        paths: directories that :func:`.gather.gather` made, in any order.

    Attributes:
        calibration: what they were gathered from.
        fingerprint: of the weights.
        tokens: in all of them.

    Raises:
        NotFoundError, FormatError, ChecksumError: no moments, or damaged ones.
        ConflictError: not the shards of one whole, or not gathered alike.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(p) for p in paths]
        found = [_document(p) for p in self._paths]
        first = found[0]
        for path, document in zip(self._paths, found, strict=True):
            for key in ("of", "source_fingerprint", "calibration", "g2kit"):
                if document.get(key) != first.get(key):
                    raise ConflictError(
                        f"its {key} is not that of {self._paths[0]}.", where=path,
                        fix="gather all shards from the same checkpoint, sequences and N.",
                    )  # fmt: skip
        have, of = sorted(d["shard"] for d in found), first["of"]
        if have != list(range(of)):
            raise ConflictError(
                f"shards {have} are there, of {of}.",
                fix=f"pass --moments once for each of the {of} shards.",
            )
        self.tokens = sum(d["tokens"] for d in found)
        self.fingerprint: str = first["source_fingerprint"]
        self.calibration = _calibration(self._paths[0], first["calibration"])
        if self.tokens != self.calibration.tokens:
            raise ConflictError(
                f"the shards are of {self.tokens} tokens, their sequences have {self.calibration.tokens}.",
                where=self._paths[0], fix="gather them again with `g2quant moments`.",
            )  # fmt: skip
        self._units = _units(self._paths)
        self._checksums = [d["crc32"] for d in found]

    def fill(self, layer: int, collector: Collector) -> None:
        """Give a collector's stages their Hessians.

        Raises:
            ShapeError: of another model.
        """
        templates = [s.templates[0].format(i=layer) for s in STAGES]
        for m in collector.moments:
            m.take(self._hessian(layer, templates.index(m.names[0])), self.tokens)

    def _hessian(self, layer: int, stage: int) -> Tensor:
        units = self._units.get(f"{layer}-{stage}")
        if units is None:
            raise ShapeError("there are no moments of that layer.", where=self._paths[0])
        n = len(units)
        name = file_name(layer, stage)
        parts = [
            _sums(path / name, n, stored.get(name))
            for path, stored in zip(self._paths, self._checksums, strict=True)
        ]
        exponents = torch.from_numpy(units.astype(np.int32))
        out, at = torch.empty(n, n), 0
        for a in range(0, n, PANEL):
            rows = min(PANEL, n - a)
            end = at + rows * (n - a)
            total = np.sum([p[at:end] for p in parts], axis=0, dtype=np.int64)
            panel = torch.from_numpy(total).view(rows, n - a).double()
            panel = torch.ldexp(panel, exponents[a : a + rows, None] + exponents[a:] - _BITS)
            out[a : a + rows, a:] = panel / self.tokens
            at = end
        return mirror(out)


def checksum(sums: npt.NDArray[np.int64]) -> int:
    """CRC-32 of a stage's sums, without the file's header."""
    return zlib.crc32(sums.view(np.uint8).data)


def _sums(file: Path, n: int, stored: Any) -> npt.NDArray[np.int64]:
    """A stage's panels one after another; ``stored`` is their checksum."""
    try:
        found: npt.NDArray[np.int64] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise FormatError(f"cannot be read ({e}).", where=file) from e
    size = sum(min(PANEL, n - a) * (n - a) for a in range(0, n, PANEL))
    if found.dtype != np.int64 or found.shape != (size,):
        raise FormatError(
            f"these are {found.dtype} {list(found.shape)}, expected int64 [{size}].", where=file
        )
    if checksum(found) != stored:
        raise ChecksumError(
            "these are not the sums that were gathered.", where=file,
            fix="gather the shard again with `g2quant moments`.",
        )  # fmt: skip
    return found


def _document(path: Path) -> dict[str, Any]:
    where = path / NAME
    if not where.is_file():
        raise NotFoundError(
            f"there is no {NAME} here.", where=path, fix="make it with `g2quant moments`."
        )
    found = strict_json.load_object(where)
    good = (
        found.get("schema") == SCHEMA
        and found.get("version") == VERSION
        and all(type(found.get(k)) is int for k in ("shard", "of", "tokens"))
        and 0 < found["of"] < 1 << 20
        and found["tokens"] >= 0
        and isinstance(found.get("calibration"), dict)
        and isinstance(found.get("crc32"), dict)
        and isinstance(found.get("source_fingerprint"), str)
    )
    if not good:
        raise FormatError(f"no moments of version {VERSION}.", where=where)
    return found


def _calibration(path: Path, told: dict[str, Any]) -> Calibration:
    try:
        ids = np.load(path / IDS, allow_pickle=False)
        parts = np.split(ids, np.cumsum([int(n) for n in told["lengths"]])[:-1])
        train = int(told["train"])
        found = Calibration(str(told["source"]), tuple(parts[:train]), tuple(parts[train:]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise FormatError(f"its sequences cannot be read ({e}).", where=path / IDS) from e
    if found.sha256 != told.get("sha256"):
        raise ConflictError("its sequences were changed.", where=path / IDS)
    return found


def _units(paths: Sequence[Path]) -> dict[str, Units]:
    found: dict[str, Units] = {}
    for path in paths:
        try:
            with np.load(path / UNITS, allow_pickle=False) as archive:
                here = {k: archive[k] for k in archive.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
            raise FormatError(f"cannot be read ({e}).", where=path / UNITS) from e
        if any(u.dtype != np.int16 or u.ndim != 1 for u in here.values()):
            raise FormatError("no units of columns.", where=path / UNITS)
        if found and not (
            found.keys() == here.keys() and all(np.array_equal(found[k], here[k]) for k in found)
        ):
            raise ConflictError(
                "the first sequences gave other inputs here than in another shard.", where=path,
                fix="gather all shards on the same kind of machine, with as many threads.",
            )  # fmt: skip
        found = here
    return found
