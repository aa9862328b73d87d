"""One tensor of two checkpoints, read side by side: what differs, by how much, and whether its rule allows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..convert.digest import count_nonfinite, is_zero
from ..convert.open import LazyTensor
from ..convert.progress import Tick
from ..formats.dtypes import short
from ..formats.fingerprint import TensorHasher, leaf
from ..formats.manifest import TensorEntry
from ..model import canonical
from .ledger import EQUAL, NARROWED, NO_LEAF, QUANTIZED, STEP, WIDENED, Row
from .tensor_values import (
    BLOCK_BYTES,
    equal_bits,
    quantization_step,
    row_pairs,
    rule_of,
    shift,
    square,
    stored_as,
    ulp,
    unequal,
    zero_rows,
)

Array = np.ndarray[Any, np.dtype[Any]]
RMS_STEPS, ROW_STEPS = 0.75, 1.0
_SLACK = 1e-3  # of a step: a format's own float32 arithmetic is rounded before the number is


class TensorPair:
    """One tensor while both sides are read."""

    def __init__(self, ref: LazyTensor, cand: LazyTensor) -> None:
        self.ref, self.cand = ref, cand
        self.rule = rule_of(ref, cand)
        self.hashers = [TensorHasher(t.name, t.dtype, t.shape) for t in (ref, cand)]
        self.alike = ref.dtype == cand.dtype  # so far: then one hash is enough
        self.same_type = ref.dtype == cand.dtype
        self.different = self.bad = self.bad_ref = self.zero_rows = self.common_zero = 0
        self.first_bad: int | None = None
        self.first_different: int | None = None
        self.first_values = (0.0, 0.0)  # of reference and candidate there
        self.signal: list[float] = []
        self.error: list[float] = []
        self.squared_step: list[float] = []
        self.max_steps = self.worst_row = 0.0
        self.worst_row_at = self.max_at = 0
        self.lost_row: int | None = None  # no nearer to the reference than zeros
        self.plus_one = 0
        self.shifts: set[int] = set()
        self.unread = False  # equal blocks are no part of ``signal`` yet

    def run(self, progress: Tick) -> Row:
        """Read both and judge."""
        for start, a, b in row_pairs(self.ref, self.cand):
            self._add(start, a, b)
            progress(a.nbytes + b.nbytes, self.ref.name)
        return self._row()

    def _add(self, start: int, a: Array, b: Array) -> None:
        at = start * math.prod(self.ref.shape[1:])
        equal = self.same_type and equal_bits(a, b)
        if self.alike and not equal:
            self.alike, self.hashers[1] = False, self.hashers[0].fork()
        self.hashers[0].update(a)
        if not self.alike:
            self.hashers[1].update(b)
        self._nonfinite(a, b, at, equal)
        self.zero_rows += zero_rows(b)
        if equal:
            self.unread = True
            return
        self.shifts.add(shift(a, b))
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            d = wide_b - wide_a
        other = unequal(a, b, self.same_type, wide_a, wide_b)
        count = int(np.count_nonzero(other))
        if count and self.first_different is None:
            first = int(np.argmax(other.reshape(-1)))
            self.first_different = at + first
            self.first_values = float(wide_a.flat[first]), float(wide_b.flat[first])
        self.different += count
        finite = np.isfinite(d)
        d = np.where(finite, d, 0.0)
        self.signal.append(square(np.where(finite, wide_a, 0.0)))
        self.error.append(square(d))
        if len(self.ref.shape) == 1:
            self.plus_one += int(np.count_nonzero(np.abs(d - 1.0) <= 2.0**-7))
        if count:
            self._steps(start, a, wide_a, b, d)

    def _nonfinite(self, a: Array, b: Array, at: int, equal: bool) -> None:
        bad = count_nonfinite(b)
        bad_ref = bad if equal else count_nonfinite(a)
        if bad and self.first_bad is None:
            self.first_bad = at + int(np.argmin(np.isfinite(b.astype(np.float32)).reshape(-1)))
        self.bad += bad
        self.bad_ref += bad_ref

    def _steps(self, start: int, a: Array, wide: Array, b: Array, d: Array) -> None:
        """Errors in units of the rule's step."""
        if self.rule == QUANTIZED:
            self._quantized_steps(start, wide, d)
        elif self.rule == STEP:
            # compared as stored: the reference put through the step, and what is there put through it again
            step, config = self.cand.step, self.cand.config
            assert step is not None
            kind = self.cand.source.dtype
            have = step.forward(b, config, kind).astype(np.float64)
            exact = a.astype(np.float64) * step.factor(config) + step.offset
            self._most(np.abs(have - exact) / ulp(exact, short(kind)))
        elif self.rule == NARROWED:
            self._most(np.abs(d) / ulp(wide, short(self.cand.dtype)))
        else:
            self._most(np.abs(d) / ulp(wide, short(self.ref.dtype)))

    def _most(self, steps: Array) -> None:
        if steps.size:
            self.max_steps = max(self.max_steps, float(np.nanmax(steps)))

    def _quantized_steps(self, start: int, wide: Array, d: Array) -> None:
        step = quantization_step(self.cand, wide)
        grouped = d.reshape(*step.shape[:-1], -1)  # step has a last axis of 1
        with np.errstate(invalid="ignore", divide="ignore"):
            steps = np.where(step > 0, np.abs(grouped) / step, np.where(grouped == 0, 0.0, np.inf))
        steps = np.where(np.isfinite(steps), steps, 1e9)
        if steps.size and steps.max() > self.max_steps:
            self.max_at = start * math.prod(self.ref.shape[1:]) + int(np.argmax(steps))
        self._most(steps)
        width = grouped.shape[-1]
        self.squared_step.append(square(step) * width)
        rows = len(d) if d.ndim > 1 else 1
        error = np.square(grouped).reshape(rows, -1).sum(1)
        allowed = (np.square(step) * width).reshape(rows, -1).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.sqrt(np.where(allowed > 0, error / allowed, np.where(error > 0, 1e18, 0.0)))
        lost = (error >= np.square(wide).reshape(rows, -1).sum(1)) & (error > 0)
        if self.lost_row is None and lost.any():
            self.lost_row = start + int(np.argmax(lost))
        worst = int(np.argmax(ratio))
        if ratio[worst] > self.worst_row:
            self.worst_row, self.worst_row_at = float(ratio[worst]), start + worst

    def _row(self) -> Row:
        size = math.prod(self.ref.shape)
        if self.different and self.unread:
            self.signal = [square(rows) for _, _, rows in self.ref.blocks(BLOCK_BYTES)]
        signal, error = math.fsum(self.signal), math.fsum(self.error)
        verdict, bound, note = self._judge()
        digests = [self.hashers[0].hexdigest()]
        digests.append(digests[0] if self.alike else self.hashers[1].hexdigest())
        leaves = [leaf_of(t, d) for t, d in zip((self.ref, self.cand), digests, strict=True)]
        return Row(
            self.ref.name, self.ref.shape, stored_as(self.ref), stored_as(self.cand), self.rule, verdict,
            size - self.different, self.different, digests[1], digests[0], leaves[1], leaves[0],
            10 * math.log10(signal / error) if error > 0 and signal > 0 else None,
            math.sqrt(error / signal) if self.different and signal > 0 else None,
            self.max_steps if self.different else None, bound, note, self.bad, self.bad_ref, self.zero_rows,
        )  # fmt: skip

    def _judge(self) -> tuple[str, str, str]:
        """Verdict, bound and note."""
        if self.bad:
            assert self.first_bad is not None
            where = _place(self.first_bad, self.ref.shape)
            note = f"{_elements(self.bad, 'is', 'are')} NaN or infinite, the first at {where}"
            if self.first_different == self.first_bad:
                note += f" ({_values(self)})"
            elif self.first_different is not None:
                note += f"; {_first_difference(self)}"
            if self.bad_ref == 0 and self.rule == NARROWED:
                note += f"; the reference's values overflow {short(self.cand.dtype)}"
            return "FAIL", BOUNDS[self.rule], note
        return _JUDGES[self.rule](self)


BOUNDS = {
    EQUAL: "equal bits",
    WIDENED: "equal values",
    NARROWED: "at most 0.5 units in the last place of the narrower type",
    STEP: "at most 0.5 units in the last place of the stored number",
    QUANTIZED: f"RMS at most {RMS_STEPS:g} quantization steps, no row above {ROW_STEPS:g} or further off than zeros",
}


def _elements(count: int, one: str = "", many: str = "") -> str:
    return (
        f"{count} {'element' if count == 1 else 'elements'} {one if count == 1 else many}".rstrip()
    )


def _first_difference(p: TensorPair) -> str:
    assert p.first_different is not None
    size, at = math.prod(p.ref.shape), _place(p.first_different, p.ref.shape)
    amount = f"{p.different} of {_elements(size)} {'differs' if p.different == 1 else 'differ'}"
    return f"first difference at {at}: {_values(p)}; {amount}"


def _values(p: TensorPair) -> str:
    """Enough digits to tell them apart."""
    one, two = next(
        pair for digits in (6, 9, 17)
        if len(set(pair := [f"{v:.{digits}g}" for v in p.first_values])) > 1 or digits == 17
    )  # fmt: skip
    return f"{one} in the reference, {two} in the candidate"


def _judge_equal(p: TensorPair) -> tuple[str, str, str]:
    if not p.different:
        return "PASS", BOUNDS[p.rule], "" if p.rule == EQUAL else "the same values in a wider type"
    assert p.first_different is not None
    note = _first_difference(p)
    if p.shifts in ({1}, {-1}):
        note = f"every row stands one too {'low' if p.shifts == {1} else 'high'}"
    if p.plus_one == math.prod(p.ref.shape):
        note = "every element is larger by exactly 1: the norm's offset was added once too often"
    return "FAIL", BOUNDS[p.rule], note


def _judge_rounded(p: TensorPair) -> tuple[str, str, str]:
    how = f" ({p.cand.placement.step})" if p.rule == STEP else ""
    if p.max_steps <= 0.5 + _SLACK:
        note = f"{_elements(p.different)} rounded{how}" if p.different else f"nothing rounded{how}"
        return "PASS", BOUNDS[p.rule], note
    return "FAIL", BOUNDS[p.rule], f"not the rounded reference{how}; {_first_difference(p)}"


def _judge_quantized(p: TensorPair) -> tuple[str, str, str]:
    allowed = math.fsum(p.squared_step)
    rms = math.sqrt(math.fsum(p.error) / allowed) if allowed > 0 else 0.0
    note = f"RMS error {rms:.2f} steps, worst row {p.worst_row_at} with {p.worst_row:.2f}"
    good = rms <= RMS_STEPS and p.worst_row <= ROW_STEPS and p.lost_row is None
    if p.lost_row is not None:
        note += f"; row {p.lost_row} is no nearer to the reference than zeros"
    if p.different and p.max_steps > 1 + _SLACK:
        at = _place(p.max_at, p.ref.shape)
        note += f"; the largest error is {p.max_steps:.2f} steps at {at} (clipped or compensated)"
    return "PASS" if good else "FAIL", BOUNDS[QUANTIZED], note


_JUDGES: dict[str, Callable[[TensorPair], tuple[str, str, str]]] = {
    EQUAL: _judge_equal,
    WIDENED: _judge_equal,
    NARROWED: _judge_rounded,
    STEP: _judge_rounded,
    QUANTIZED: _judge_quantized,
}


def leaf_of(tensor: LazyTensor, digest: str) -> str:
    """The tensor's leaf; rows past the vocabulary that are all zero carry nothing and have none."""
    entry = TensorEntry(short(tensor.dtype), tensor.shape, digest)
    if tensor.name == canonical.EMBED_PADDING and is_zero(entry):
        return NO_LEAF
    return leaf(tensor.name, entry.dtype, entry.shape, digest)


def _place(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(i) for i in np.unravel_index(flat, shape)])
