"""W1 and W2: every canonical tensor of two checkpoints side by side, streamed, bits first and arithmetic only where they differ.

A row of the ledger is a tensor. Its rule follows from how the candidate holds it:

- the same type: equal bits, no tolerance (W1);
- a wider type: the same values (W1);
- a narrower type, or an arithmetic step of the format (1 + w, a folded scale): the correctly rounded value, so at most
  half a unit in the last place of the stored number (W2);
- fewer bits: RMS error within three quarters of a quantization step (uniform rounding errors have 0.29; error compensation
  such as GPTQ's has up to 0.5, the more the fewer tokens it was calibrated on), no row beyond one step or further from the
  reference than zeros are; and where the candidate's manifest names the tensor, its hash (W2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..convert.digest import count_nonfinite, is_zero, run_all
from ..convert.open import Checkpoint, LazyTensor
from ..formats.base import iter_row_blocks
from ..formats.dtypes import short
from ..formats.errors import NonFiniteError
from ..formats.fingerprint import TensorHasher, leaf
from ..formats.manifest import TensorEntry
from ..model import canonical
from .ledger import (
    EQUAL,
    LOSSLESS,
    NARROWED,
    NO_LEAF,
    QUANTIZED,
    STEP,
    WIDENED,
    Row,
    findings,
    fingerprints,
)  # fmt: skip
from .promised import as_promised

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, str], None]

RMS_STEPS, ROW_STEPS = 0.75, 1.0
_SLACK = 1e-3  # of a step: a format's own float32 arithmetic is rounded before the number is
BLOCK_BYTES = 4 << 20  # of a tensor at a time; where bits differ, a dozen times that in float64
MANTISSA = {"bf16": (7, -126), "f16": (10, -14), "f32": (23, -126), "f64": (52, -1022)}


def compare_weights(
    ref: Checkpoint,
    cand: Checkpoint,
    *,
    progress: Progress = lambda nbytes, name: None,
    part: tuple[int, int] = (0, 1),
) -> list[Row]:
    """The ledger, one row per tensor of either side, in forward order.

    Args:
        ref: the reference.
        cand: the candidate, of the same sizes.
        progress: told of bytes read.
        part: ``(i, n)``: only every n-th tensor from the i-th on.
    """
    names = [*ref.tensors, *(n for n in cand.tensors if n not in ref.tensors)]
    entries = cand.sidecars.manifest_tensors

    def job(name: str) -> Callable[[], Row]:
        def work() -> Row:
            one, two = ref.tensors.get(name), cand.tensors.get(name)
            if one is None or two is None:
                return _one_sided(name, one, two)
            if one.shape != two.shape:  # only rows past the vocabulary may be differently many
                return _other_shape(one, two)
            return as_promised(compare_tensor(one, two, progress), entries)

        return work

    rows = run_all({n: job(n) for n in names[part[0] :: part[1]]})
    return list(rows.values())


def compare_tensor(ref: LazyTensor, cand: LazyTensor, progress: Progress) -> Row:
    """One tensor of both sides."""
    try:
        return _Pair(ref, cand).run(progress)
    except NonFiniteError as e:  # packed weights name the damaged block
        rule = _rule(ref, cand)
        size = math.prod(ref.shape)
        return Row(
            ref.name, ref.shape, _dtype(ref), _dtype(cand), rule, "FAIL", 0, size, note=str(e), nonfinite=1
        )  # fmt: skip


def _dtype(tensor: LazyTensor) -> str:
    packed = tensor.source.quantized
    return short(tensor.dtype) if packed is None else str(tensor.source.stored)


def _rule(ref: LazyTensor, cand: LazyTensor) -> str:
    """How the candidate holds the tensor, seen from the reference."""
    if cand.source.quantized is not None and not _same_packing(ref, cand):
        return QUANTIZED
    if cand.step is not None and (ref.step is None or ref.step != cand.step):
        return STEP
    if ref.dtype == cand.dtype:
        return EQUAL
    exact = _exponents(cand.dtype) >= _exponents(ref.dtype) and _bits(cand.dtype) >= _bits(
        ref.dtype
    )
    return WIDENED if exact else NARROWED


def _same_packing(ref: LazyTensor, cand: LazyTensor) -> bool:
    a, b = ref.source.quantized, cand.source.quantized
    return a is not None and b is not None and a.kind == b.kind


def _bits(dtype: np.dtype[Any]) -> int:
    return MANTISSA[short(dtype)][0]


def _exponents(dtype: np.dtype[Any]) -> int:
    return -MANTISSA[short(dtype)][1]


class _Pair:
    """One tensor while both sides are read."""

    def __init__(self, ref: LazyTensor, cand: LazyTensor) -> None:
        self.ref, self.cand = ref, cand
        self.rule = _rule(ref, cand)
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

    def run(self, progress: Progress) -> Row:
        for start, a, b in row_pairs(self.ref, self.cand):
            self._add(start, a, b)
            progress(a.nbytes + b.nbytes, self.ref.name)
        return self._row()

    def _add(self, start: int, a: Array, b: Array) -> None:
        at = start * math.prod(self.ref.shape[1:])
        equal = self.same_type and _equal_bits(a, b)
        if self.alike and not equal:
            self.alike, self.hashers[1] = False, self.hashers[0].fork()
        self.hashers[0].update(a)
        if not self.alike:
            self.hashers[1].update(b)
        self._nonfinite(a, b, at, equal)
        self.zero_rows += _zero_rows(b)
        if equal:
            self.unread = True
            return
        self.shifts.add(_shift(a, b))
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            d = wide_b - wide_a
        unequal = _unequal(a, b, self.same_type, wide_a, wide_b)
        count = int(np.count_nonzero(unequal))
        if count and self.first_different is None:
            first = int(np.argmax(unequal.reshape(-1)))
            self.first_different = at + first
            self.first_values = float(wide_a.flat[first]), float(wide_b.flat[first])
        self.different += count
        finite = np.isfinite(d)
        d = np.where(finite, d, 0.0)
        self.signal.append(_square(np.where(finite, wide_a, 0.0)))
        self.error.append(_square(d))
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
            self._most(np.abs(have - exact) / _ulp(exact, short(kind)))
        elif self.rule == NARROWED:
            self._most(np.abs(d) / _ulp(wide, short(self.cand.dtype)))
        else:
            self._most(np.abs(d) / _ulp(wide, short(self.ref.dtype)))

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
        self.squared_step.append(_square(step) * width)
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
            self.signal = [_square(rows) for _, _, rows in self.ref.blocks(BLOCK_BYTES)]
        signal, error = math.fsum(self.signal), math.fsum(self.error)
        verdict, bound, note = self._judge()
        digests = [self.hashers[0].hexdigest()]
        digests.append(digests[0] if self.alike else self.hashers[1].hexdigest())
        leaves = [_leaf(t, d) for t, d in zip((self.ref, self.cand), digests, strict=True)]
        return Row(
            self.ref.name, self.ref.shape, _dtype(self.ref), _dtype(self.cand), self.rule, verdict,
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


def _first_difference(p: _Pair) -> str:
    assert p.first_different is not None
    size, at = math.prod(p.ref.shape), _place(p.first_different, p.ref.shape)
    amount = f"{p.different} of {_elements(size)} {'differs' if p.different == 1 else 'differ'}"
    return f"first difference at {at}: {_values(p)}; {amount}"


def _values(p: _Pair) -> str:
    """Enough digits to tell them apart."""
    one, two = next(
        pair for digits in (6, 9, 17)
        if len(set(pair := [f"{v:.{digits}g}" for v in p.first_values])) > 1 or digits == 17
    )  # fmt: skip
    return f"{one} in the reference, {two} in the candidate"


def _judge_equal(p: _Pair) -> tuple[str, str, str]:
    if not p.different:
        return "PASS", BOUNDS[p.rule], "" if p.rule == EQUAL else "the same values in a wider type"
    assert p.first_different is not None
    note = _first_difference(p)
    if p.shifts in ({1}, {-1}):
        note = f"every row stands one too {'low' if p.shifts == {1} else 'high'}"
    if p.plus_one == math.prod(p.ref.shape):
        note = "every element is larger by exactly 1: the norm's offset was added once too often"
    return "FAIL", BOUNDS[p.rule], note


def _judge_rounded(p: _Pair) -> tuple[str, str, str]:
    how = f" ({p.cand.placement.step})" if p.rule == STEP else ""
    if p.max_steps <= 0.5 + _SLACK:
        note = f"{_elements(p.different)} rounded{how}" if p.different else f"nothing rounded{how}"
        return "PASS", BOUNDS[p.rule], note
    return "FAIL", BOUNDS[p.rule], f"not the rounded reference{how}; {_first_difference(p)}"


def _judge_quantized(p: _Pair) -> tuple[str, str, str]:
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


_JUDGES: dict[str, Callable[[_Pair], tuple[str, str, str]]] = {
    EQUAL: _judge_equal,
    WIDENED: _judge_equal,
    NARROWED: _judge_rounded,
    STEP: _judge_rounded,
    QUANTIZED: _judge_quantized,
}


def quantization_step(tensor: LazyTensor, reference: Array) -> Array:
    """The step a uniform quantizer of as many bits would have, per group of the reference.

    A group's step is ``2 max|w| / (2^bits - 1)`` with the packed type's code bits, for groups as long as the type's
    blocks (a whole row where it does not say, or where rows are stored in another order).

    Args:
        tensor: the packed tensor.
        reference: rows ``[rows, in]`` float64 of what was quantized.

    Returns:
        ``[rows, groups, 1]``.
    """
    packed = tensor.source.quantized
    assert packed is not None
    width = reference.shape[-1]
    group = getattr(packed, "group_size", None) or getattr(
        getattr(packed, "block", None), "weights", width
    )
    if not tensor.streams_rows or width % group:
        group = width
    levels = 2 ** max(1, int(getattr(packed, "code_bits", packed.bits))) - 1
    groups = np.abs(reference).reshape(-1, width // group, group)
    return np.asarray(2 * groups.max(-1, keepdims=True) / levels)


def row_pairs(ref: LazyTensor, cand: LazyTensor) -> Iterator[tuple[int, Array, Array]]:
    """``(first row, reference's rows, candidate's rows)``; a side that cannot be read by rows is read once."""
    whole = [t.read() if not t.streams_rows else None for t in (ref, cand)]
    itemsize = max(t.source.dtype.itemsize for t in (ref, cand))
    for start, stop in iter_row_blocks(ref.shape, itemsize, BLOCK_BYTES):
        a, b = (
            t.read_rows(start, stop) if w is None else np.ascontiguousarray(w[start:stop])
            for t, w in zip((ref, cand), whole, strict=True)
        )
        yield start, a, b


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _bits_of(x: Array) -> Array:
    return x.view(_UNSIGNED[x.dtype.itemsize])


def _equal_bits(a: Array, b: Array) -> bool:
    return bool(np.array_equal(_bits_of(a), _bits_of(b)))


def _unequal(a: Array, b: Array, same_type: bool, wide_a: Array, wide_b: Array) -> Array:
    """Elements whose bits differ; across types, whose values or signs do."""
    if same_type:
        return np.asarray(_bits_of(a) != _bits_of(b))
    with np.errstate(invalid="ignore"):
        return np.asarray((wide_a != wide_b) | (np.signbit(wide_a) != np.signbit(wide_b)))


def _shift(a: Array, b: Array) -> int:
    """1 or -1 where a matrix holds the reference's rows one further down or up, else 0."""
    if a.ndim < 2 or len(a) < 3 or a.dtype != b.dtype:
        return 0
    if _equal_bits(a[:-1], b[1:]):
        return 1
    return -1 if _equal_bits(a[1:], b[:-1]) else 0


def _leaf(tensor: LazyTensor, digest: str) -> str:
    """The tensor's leaf; rows past the vocabulary that are all zero carry nothing and have none."""
    entry = TensorEntry(short(tensor.dtype), tensor.shape, digest)
    if tensor.name == canonical.EMBED_PADDING and is_zero(entry):
        return NO_LEAF
    return leaf(tensor.name, entry.dtype, entry.shape, digest)


def _square(x: Array) -> float:
    return float(np.vdot(x, x)) if x.dtype == np.float64 else _square(x.astype(np.float64))


def _zero_rows(x: Array) -> int:
    return int(np.count_nonzero(~x.any(axis=1))) if x.ndim > 1 else 0


def _ulp(x: Array, dtype: str) -> Array:
    """Unit in the last place of ``x`` in a type, subnormals included."""
    bits, lowest = MANTISSA[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, lowest) - bits))


def _place(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(i) for i in np.unravel_index(flat, shape)])


def _one_sided(name: str, ref: LazyTensor | None, cand: LazyTensor | None) -> Row:
    """Embedding rows past the vocabulary that one side does not keep."""
    there = ref or cand
    assert there is not None
    data = there.read()
    zero = not bool(_bits_of(data).any())
    digest = hashlib.sha256(np.ascontiguousarray(data).view(np.uint8).tobytes()).hexdigest()
    mark = _leaf(there, digest)
    missing = "candidate" if cand is None else "reference"
    what = "all zero" if zero else "not all zero"
    return Row(
        name, there.shape,
        None if ref is None else _dtype(ref), None if cand is None else _dtype(cand),
        EQUAL, "PASS" if zero else "FAIL", 0, 0 if zero else data.size,
        None if cand is None else digest, None if ref is None else digest,
        None if cand is None else mark, None if ref is None else mark,
        note=f"rows past the vocabulary, {what}, that the {missing} does not keep; no token reaches them",
    )  # fmt: skip


def _other_shape(ref: LazyTensor, cand: LazyTensor) -> Row:
    one, two = _one_sided(ref.name, ref, None), _one_sided(ref.name, None, cand)
    return replace(
        one, candidate_dtype=two.candidate_dtype, hash=two.hash, leaf=two.leaf,
        different=one.different + two.different,
        verdict="PASS" if one.verdict == two.verdict == "PASS" else "FAIL",
        note=f"shape {list(ref.shape)} in the reference, {list(cand.shape)} in the candidate",
    )  # fmt: skip


__all__ = [
    "EQUAL", "LOSSLESS", "NARROWED", "QUANTIZED", "STEP", "WIDENED", "Row", "compare_tensor",
    "compare_weights", "findings", "fingerprints", "quantization_step",
]  # fmt: skip
