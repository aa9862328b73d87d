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
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..convert.digest import run_all
from ..convert.open import Checkpoint, LazyTensor
from ..convert.progress import SILENT, Tick
from ..formats.errors import NonFiniteError
from .ledger import EQUAL, LOSSLESS, NARROWED, QUANTIZED, STEP, WIDENED, Row, findings, fingerprints
from .promised import as_promised
from .tensor_pair import TensorPair, leaf_of
from .tensor_values import bits_of, quantization_step, rule_of, stored_as


def compare_weights(
    ref: Checkpoint,
    cand: Checkpoint,
    *,
    progress: Tick = SILENT,
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


def compare_tensor(ref: LazyTensor, cand: LazyTensor, progress: Tick) -> Row:
    """One tensor of both sides."""
    try:
        return TensorPair(ref, cand).run(progress)
    except NonFiniteError as e:  # packed weights name the damaged block
        rule = rule_of(ref, cand)
        size = math.prod(ref.shape)
        return Row(
            ref.name, ref.shape, stored_as(ref), stored_as(cand), rule, "FAIL", 0, size, note=str(e), nonfinite=1
        )  # fmt: skip


def _one_sided(name: str, ref: LazyTensor | None, cand: LazyTensor | None) -> Row:
    """Embedding rows past the vocabulary that one side does not keep."""
    there = ref or cand
    assert there is not None
    data = there.read()
    zero = not bool(bits_of(data).any())
    digest = hashlib.sha256(np.ascontiguousarray(data).view(np.uint8).tobytes()).hexdigest()
    mark = leaf_of(there, digest)
    missing = "candidate" if cand is None else "reference"
    what = "all zero" if zero else "not all zero"
    return Row(
        name, there.shape,
        None if ref is None else stored_as(ref), None if cand is None else stored_as(cand),
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
