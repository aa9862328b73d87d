"""The logit part of a lockstep: statistics from final hidden states and tables, or from the runners' own logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..model.logits_stats import Stats
from .runners.base import Runner, Table

Array = np.ndarray[Any, np.dtype[Any]]
SCRATCH = 512 << 20  # bytes of logits at a time
BLOCK_ROWS = 4096


def tables_of(ref: Runner, cand: Runner) -> tuple[Table, Table] | None:
    """Both unembeddings in one dtype; None where a runner keeps its own to itself."""
    one, two = ref.table(), cand.table()
    if one is None or two is None:
        return None
    dtypes = [next(iter(t()))[2].dtype for t in (one, two)]
    # the same values in two dtypes are one table, which statistics can only see in one dtype
    return (one, two) if dtypes[0] == dtypes[1] else (_widened(one), _widened(two))


def _widened(table: Table) -> Table:
    def tiles() -> Iterator[tuple[int, int, Array]]:
        for start, stop, rows in table():
            yield start, stop, rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)

    return tiles


def from_hidden(
    ref: Runner,
    cand: Runner,
    final: tuple[list[Array], list[Array]],
    tables: tuple[Table, Table],
    goals: Array,
    block_rows: int,
    scratch: int,
    device: str,
) -> Stats:
    """From the final hidden states, per sequence, and the tables; positions in the order of the sequences."""
    import torch

    from ..model.logits import compare
    from .runners.torch_runner import exact_products, torch_device

    place = torch_device(device)
    states = [torch.from_numpy(np.concatenate(side)).to(place) for side in final]
    wide = torch.promote_types(states[0].dtype, states[1].dtype)
    with exact_products():
        return compare(
            states[0].to(wide), states[1].to(wide), *tables,
            cap=ref.config.final_logit_softcapping,
            cand_cap=cand.config.final_logit_softcapping,
            targets=goals, vocab=ref.config.vocab_size,
            scratch=scratch, block_rows=block_rows,
        )  # fmt: skip


def from_tiles(
    ref: Runner, cand: Runner, real: Array, goals: Array, block_rows: int, scratch: int, device: str
) -> Stats:
    """From logits the runners make, a stretch of positions at a time."""
    from ..model.logits import compare_logits
    from .runners.torch_runner import exact_products

    batch, length = real.shape
    vocab = ref.config.vocab_size
    step = max(1, scratch // (batch * vocab * 16))
    starts = np.cumsum([0, *real.sum(1)])[:-1]
    columns = np.where(real, starts[:, None] + np.cumsum(real, 1) - 1, -1)
    found: list[Stats] = []
    order: list[Array] = []
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        mask = real[:, part]
        if not mask.any():
            continue
        at = columns[:, part][mask]
        pair = [_whole(r, mask, part, vocab) for r in (ref, cand)]
        with exact_products():
            found.append(
                compare_logits(*pair, targets=goals[at], scratch=scratch, block_rows=block_rows)
            )
        order.append(at)
    joined = Stats.join(found)
    return joined.select(np.argsort(np.concatenate(order), kind="stable"))


def _whole(runner: Runner, mask: Array, part: slice, vocab: int) -> Array:
    """Logits of the real tokens in a stretch ``[tokens, vocab]``."""
    out: Array | None = None
    for start, stop, tile in runner.logit_tiles(positions=part):
        if out is None:
            out = np.empty((int(mask.sum()), vocab), tile.dtype)
        out[:, start:stop] = tile[mask]
    assert out is not None
    return out
