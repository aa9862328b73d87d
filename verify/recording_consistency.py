"""Whether the numbers of a recording can come from one run: what hashes cannot say of a file made with right hashes.

Damage is found by hashes. Somebody who writes right hashes can still not change one array alone: the whole rows of logits
fix log-sum-exps and largest logits (here), these and the embedding fix the final hidden states (:mod:`.recording_tables`),
the final norm ties the last block's projections to the final states (here), and a difference of two runs that is there
behind one block does not vanish behind the next (:class:`Persistence`). What nothing ties down is said in
``docs/recordings.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.base import iter_row_blocks
from ..formats.errors import FormatError, printable
from . import recording_schema as schema
from .batches import targets
from .recording_document import DAMAGED

if TYPE_CHECKING:
    from .recording_read import Recording

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 16 << 20
# unit roundoff of what a run of this type stores as hidden states
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}
# roundings of independent elements add up like a random walk; 8 of its steps, with some operations each
_WALK, _STEPS = 16.0, 8.0
# 16 projections tell a difference's size within a factor of 3; a residual stream does not take 20 times that away
PERSISTS, _NOISE = 64.0, 64.0
_SIZE = 8.0  # of projections against norms, over all positions


def check_recording(recording: Recording) -> None:
    """Everything that an opened recording says twice.

    Raises:
        FormatError: it contradicts itself; with the position and probe.
    """
    _check_samples(recording)
    _check_next(recording)
    if recording.kind != schema.HIDDEN:
        return
    _check_norms(recording)
    if recording.sizes.final_norm:
        _check_final(recording)


def _check_samples(recording: Recording) -> None:
    """Rows recorded whole agree with the same positions' log-sum-exp and largest logits."""
    rows = recording.rows("sample_at", 0, recording.sizes.sampled)
    for i, row in enumerate(rows.tolist()):
        logits = recording.rows("sample_logits", i, i + 1)[0].astype(np.float64)
        top = float(logits.max())
        lse = top + math.log(np.exp(logits - top).sum())
        stored = float(recording.rows("lse", row, row + 1)[0])
        ids = recording.rows("topk_id", row, row + 1)[0]
        largest = recording.rows("topk_logit", row, row + 1)[0]
        same = np.array_equal(logits[ids].astype(np.float32), largest)
        if not same or abs(lse - stored) > 1e-6 * (1 + abs(stored)):
            what = "the logits recorded whole contradict the recorded log-sum-exp or largest logits"
            raise contradiction(recording, row, what, "sample_logits")


def _check_next(recording: Recording) -> None:
    """The next token's logit is the one among the largest, or is none of the largest."""
    goals = np.concatenate([targets(p) for p in recording.probes.probes])
    top = recording.sizes.top
    for start, stop in iter_row_blocks((len(goals), top), 4, _BLOCK):
        part = slice(start, stop)
        ids, logits = (recording.rows(n, start, stop) for n in ("topk_id", "topk_logit"))
        stored, goal = recording.rows("next_logit", start, stop), goals[part]
        among = ids == goal[:, None]
        wanted = np.where(among, logits, 0).sum(1)
        good = np.where(among.any(1), stored == wanted, stored <= logits[:, -1])
        bad = np.flatnonzero(~np.where(goal < 0, stored == 0, good))
        if len(bad):
            what = "the next token's logit contradicts the largest logits"
            raise contradiction(recording, start + int(bad[0]), what, "next_logit")


def _check_norms(recording: Recording) -> None:
    """Norms are of the size of their projections: 16 of them tell it within a factor of 2."""
    s = recording.sizes
    points = s.layers + 1
    shares: list[Array] = []
    for start, stop in iter_row_blocks((s.positions, points * schema.DIMS), 8, _BLOCK):
        projected = recording.rows("projection", start, stop).astype(np.float64)
        norm = recording.rows("norm", start, stop).astype(np.float64)
        shares.append(np.sqrt(np.square(projected).mean(2)) / np.maximum(norm, 1e-300))
    middle = np.median(np.concatenate(shares), axis=0)
    bad = np.flatnonzero(~((middle < _SIZE) & (middle > 1 / _SIZE)))
    if len(bad):
        what = f"the norms {_behind(int(bad[0]))} contradict their projections"
        raise contradiction(recording, 0, what, "norm")


def _behind(point: int) -> str:
    return "of the embedded tokens" if point == 0 else f"behind block {point - 1}"


def _check_final(recording: Recording) -> None:
    """The last block's projections and norm are those of the states that the final norm made into the final ones."""
    s, config = recording.sizes, recording.config
    unit = UNIT[recording.dtype]
    weight = recording.rows("final_norm", 0, s.hidden)
    factor = 1 + weight
    gone = factor == 0  # nothing is left of these columns
    safe = np.where(gone, 1.0, factor)
    # of a column: its own rounding, that of 1 + w, and of w where the run rounds it
    column = unit + 2.0**-23 / np.abs(safe)
    if recording.dtype == "bfloat16":
        column = column + unit * np.abs(weight / safe)
    matrix = schema.signs(s.hidden)
    for start, stop in iter_row_blocks((s.positions, s.hidden), 8, _BLOCK):
        norm = recording.rows("norm", start, stop)[:, -1].astype(np.float64)
        final = recording.rows("final_hidden", start, stop).astype(np.float64)
        scale = np.sqrt(norm**2 / s.hidden + config.rms_norm_eps)
        x = np.where(gone, 0.0, final / safe) * scale[:, None]
        left = gone & (final != 0)
        _complain(recording, start, left, "the last block's projections")
        found, size = schema.project(x, matrix)
        stored = recording.rows("projection", start, stop)[:, -1].astype(np.float64)
        noise = np.sqrt(np.square(x * column).sum(1))
        unknown: Array | float = 0.0
        if gone.any():
            rest = np.sqrt(np.maximum(norm**2 * (1 + 8 * unit) - size**2, 0.0))
            unknown = math.sqrt(int(gone.sum())) * rest[:, None]
        limit = _WALK * noise[:, None] + 4 * unit * (np.abs(found) + norm[:, None]) + unknown
        _complain(recording, start, np.abs(stored - found) > limit, "the last block's projections")


def check_embedded(recording: Recording, start: int, rows: Array, tokens: Array) -> None:
    """The embedded tokens' projections are those of the embedding's rows.

    Args:
        recording: whose.
        start: id of the first of ``rows``.
        rows: of the embedding ``[ids, hidden]``.
        tokens: of all positions ``[positions]``.

    Raises:
        FormatError: they are not.
    """
    s, unit = recording.sizes, UNIT[recording.dtype]
    at = np.flatnonzero((tokens >= start) & (tokens < start + len(rows)))
    if not len(at):
        return
    matrix = schema.signs(s.hidden)
    factor = math.sqrt(s.hidden)
    for first in range(0, len(at), _rows(s.hidden)):
        part = at[first : first + _rows(s.hidden)]
        x = rows[tokens[part] - start].astype(np.float64) * factor
        found, size = schema.project(x, matrix)
        stored, norm = (_gather(recording, n, part)[:, 0] for n in ("projection", "norm"))
        # the factor is rounded too, to the table's type
        limit = _WALK * unit * size[:, None] + 4 * unit * np.abs(found)
        bad = (np.abs(stored - found) > limit) | (np.abs(norm - size) > _STEPS * unit * size)[
            :, None
        ]
        if bad.any():
            row = int(part[int(np.argwhere(bad)[0][0])])
            what = "the embedded token's projections are not those of its row of the embedding"
            raise contradiction(recording, row, what, "projection")


def _rows(hidden: int) -> int:
    return max(1, _BLOCK // (8 * hidden))


def _gather(recording: Recording, name: str, at: Array) -> Array:
    """Rows of an array, in ascending order of ``at``; read as few stretches."""
    out = []
    for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
        out.append(recording.rows(name, int(run[0]), int(run[-1]) + 1))
    return np.concatenate(out).astype(np.float64)


class Persistence:
    """Differences from a recording, followed through the blocks of one probe.

    Every block adds to its input, so a difference behind one block is still there behind the next, larger or smaller by
    a little. Projections that somebody changed differ behind one block only. Norms differ by no more than the states do.

    Args:
        recording: the reference.
        probe: index of the probe.
    """

    def __init__(self, recording: Recording, probe: int) -> None:
        self.recording, self.probe = recording, probe
        self._before: tuple[Array, Array] | None = None

    def add(self, layer: int, errors: Array, norms: Array, others: Array) -> None:
        """The next point.

        Args:
            layer: the block, -1 for the embedded tokens.
            errors: relative, ``[positions]``; NaN where not finite.
            norms: of the recorded states ``[positions]``.
            others: of the candidate's states ``[positions]``.

        Raises:
            FormatError: the difference behind the block before has vanished, or norms differ and states do not.
        """
        with np.errstate(invalid="ignore"):
            size = errors * norms.astype(np.float64)
            noise = _NOISE * UNIT[self.recording.dtype] * norms
            # either may have been rounded to be kept
            kept = max(np.finfo(x.dtype).eps for x in (norms, others)) * norms
            self._check_norms(layer, np.abs(others.astype(np.float64) - norms), size, noise + kept)
            if self._before is not None:
                former, other = self._before
                bad = np.flatnonzero(former > PERSISTS * size + np.maximum(noise, other))
                if len(bad):
                    row = self.recording.offsets[self.probe] + int(bad[0])
                    where = "the embedding" if layer == 0 else f"block {layer - 1}"
                    what = (
                        f"the candidate differs from the projections recorded behind {where} and not from those "
                        f"behind block {layer}, which is computed from it; the recorded projections were changed"
                    )
                    raise contradiction(self.recording, row, what, "projection")
            self._before = size, noise

    def _check_norms(self, layer: int, apart: Array, size: Array, noise: Array) -> None:
        """Norms are no further apart than the states, of which projections tell the distance within ``_SIZE``."""
        bad = np.flatnonzero(np.isfinite(apart) & (apart > _SIZE * size + noise))
        if len(bad):
            row = self.recording.offsets[self.probe] + int(bad[0])
            what = (
                f"the norm recorded {_behind(layer + 1)} differs from the candidate's and the projections do not; "
                "the recorded norms were changed"
            )
            raise contradiction(self.recording, row, what, "norm")


def _complain(recording: Recording, start: int, bad: Array, what: str) -> None:
    if bad.any():
        row = start + int(np.argwhere(bad)[0][0])
        raise contradiction(
            recording, row, f"{what} are not those of its final hidden states", "projection"
        )


def contradiction(recording: Recording, row: int, what: str, tensor: str) -> FormatError:
    """The error for a row of a recording's arrays."""
    probe, position = recording.place(row)
    name = printable(recording.probes.probes[probe].id, 60)
    return FormatError(
        f"position {position} of probe {name}: {what}.",
        where=recording.path / schema.ARRAYS,
        tensor=tensor,
        fix=DAMAGED,
    )


__all__: Sequence[str] = (
    "Persistence", "check_embedded", "check_recording", "contradiction",
)  # fmt: skip
