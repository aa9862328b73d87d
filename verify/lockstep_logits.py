"""The logit part of a lockstep: statistics from final hidden states and tables, or from the runners' own logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..model.config import GemmaConfig
from ..model.logits_stats import Stats
from .runners.base import Runner, Table

Array = np.ndarray[Any, np.dtype[Any]]
SCRATCH = 512 << 20  # bytes of logits at a time
BLOCK_ROWS = 4096


def tables_of(ref: Runner, cand: Runner) -> tuple[Table, Table] | None:
    """Both unembeddings in one dtype; None where a runner keeps its own to itself."""
    one, two = ref.table(), cand.table()
    return None if one is None or two is None else alike((one, two))


def alike(tables: tuple[Table, Table]) -> tuple[Table, Table]:
    """Both in one dtype: the same values in two dtypes are one table, which statistics can only see in one dtype."""
    dtypes = [next(iter(t()))[2].dtype for t in tables]
    return tables if dtypes[0] == dtypes[1] else (_widened(tables[0]), _widened(tables[1]))


def _widened(table: Table) -> Table:
    def blocks() -> Iterator[tuple[int, int, Array]]:
        for start, stop, rows in table():
            yield start, stop, rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)

    return blocks


def from_hidden(
    states: tuple[Array, Array],
    tables: tuple[Table, Table],
    configs: tuple[GemmaConfig, GemmaConfig],
    goals: Array,
    block_rows: int,
    scratch: int,
    device: str,
) -> Stats:
    """Statistics from both sides' final hidden states.

    Args:
        states: ``[positions, hidden]`` of either.
        tables: unembeddings, in one dtype; see :func:`alike`.
        configs: of the models; the reference's gives the vocabulary, each its soft-cap.
        goals: the id that follows every position; -1 for none.
        block_rows: rows of a table at a time.
        scratch: bytes of logits at a time.
        device: torch's name of where it is computed.
    """
    import torch

    from ..model.logits import compare
    from .runners.torch_runner import exact_products, torch_device

    place = torch_device(device)
    one, two = (torch.from_numpy(np.require(s, requirements="W")).to(place) for s in states)
    wide = torch.promote_types(one.dtype, two.dtype)
    with exact_products():
        return compare(
            one.to(wide), two.to(wide), *tables,
            cap=configs[0].final_logit_softcapping, cand_cap=configs[1].final_logit_softcapping,
            targets=goals, vocab=configs[0].vocab_size, scratch=scratch, block_rows=block_rows,
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
