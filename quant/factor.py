"""A Hessian's triangular factor, in the order columns are rounded, in one buffer of its own size.

With ``n`` columns the Hessian and this buffer are all there is of size ``n * n`` (340 MB each in float32 for 2B's down_proj,
820 MB for 9B's): it is filled in the order wanted, factored, turned round and divided where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DAMP_LADDER = (0.01, 0.02, 0.05, 0.10)
_CHUNK = 1 << 22  # elements moved at a time


@dataclass(frozen=True)
class Factor:
    """``H`` factored in the order columns are rounded.

    Attributes:
        order: column indices ``[in_features]``, the first rounded first.
        unit: unit upper triangular ``[in_features, in_features]``, rows and columns in that order; its columns are runs of
            memory.
        damp: share of the mean diagonal that was added.
        dtype: in which it was factored.
    """

    order: Tensor
    unit: Tensor
    damp: float
    dtype: torch.dtype


def factor(
    hessian: Tensor,
    *,
    act_order: bool = True,
    ladder: tuple[float, ...] = DAMP_LADDER,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> Factor | None:
    """Factor ``H`` with the least damping of the ladder that works in the first dtype, then in the next.

    Args:
        hessian: symmetric ``[in_features, in_features]``; not changed. Columns that never saw an input have a zero diagonal.
        act_order: round columns in descending order of the diagonal, so the most used are rounded with most left to correct.
        ladder: shares of the mean diagonal to add.
        dtypes: to factor in, one after the other.

    Returns:
        None when nothing worked.
    """
    diagonal = hessian.diagonal()
    n = len(diagonal)
    order = torch.arange(n, device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    back = order.flip(0)
    mean = float(diagonal.double().mean())
    dead = (diagonal == 0)[back]
    for dtype in dtypes:
        h = torch.empty(n, n, dtype=dtype, device=hessian.device)
        for damp in ladder:
            _permuted(hessian, back, h)
            h.diagonal().add_(damp * mean)
            h.diagonal()[dead] = mean or 1.0
            if _cholesky(h):
                _turn_round(h)
                h /= h.diagonal().clone()[:, None]
                return Factor(order, h.t(), damp, dtype)
        del h
    return None


@contextmanager
def damped(hessian: Tensor, share: float) -> Iterator[None]:
    """For as long as it lasts, a share of the mean diagonal is added to ``H``; afterwards it is what it was, to the bit."""
    diagonal = hessian.diagonal()
    before = diagonal.clone()
    diagonal.add_(share * float(before.double().mean()))
    try:
        yield
    finally:
        diagonal.copy_(before)


def _permuted(matrix: Tensor, order: Tensor, out: Tensor) -> None:
    """Rows and columns of a matrix in another order."""
    step = max(1, _CHUNK // len(order))
    for a in range(0, len(order), step):
        out[a : a + step] = matrix[order[a : a + step]][:, order]


def _cholesky(h: Tensor) -> bool:
    """Overwrite a symmetric ``[n, n]`` by its lower factor's transpose; whether there is one."""
    lower = (
        h.t()
    )  # its columns are runs of memory, as LAPACK has them: it then works where the matrix lies
    info = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    step = max(1, _CHUNK // len(h))
    return not int(info) and all(
        bool(torch.isfinite(h[a : a + step]).all()) for a in range(0, len(h), step)
    )


def _turn_round(matrix: Tensor) -> None:
    """Reverse rows and columns of a contiguous matrix."""
    flat = matrix.view(-1)
    n, half = len(flat), len(flat) // 2
    for a in range(0, half, _CHUNK):
        b = min(a + _CHUNK, half)
        front = flat[a:b].flip(0)
        flat[a:b] = flat[n - b : n - a].flip(0)
        flat[n - b : n - a] = front
