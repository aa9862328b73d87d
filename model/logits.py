"""Two logit streams compared position by position, without ever holding positions x vocabulary.

Streams come as final hidden states and unembedding tables (:func:`compare`), so that 8192 positions of a 256k vocabulary
are 75 MB and not 8 GB, or as logits (:func:`compare_logits`) where a runner gives nothing else. A tile of positions is
multiplied with the tables block by block, each product once; the tile's logits stay in a scratch buffer of bounded
size (:mod:`.logits_tile` has the arithmetic). The tables are read once per tile, in blocks of rows.

A call is one document: what it returns does not depend on other documents, so they may be computed anywhere, in any
order. Repeatable to the bit for the same tensors, options, threads and machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..formats.errors import FormatError, ShapeError, UsageError
from .logits_stats import Stats
from .logits_tile import Grid, Sweep, cap_pair

SCRATCH = 512 * 2**20
BLOCK_ROWS = 4096

Array = np.ndarray[Any, np.dtype[Any]]
Rows = tuple[int, int, Tensor | Array]  # start, stop, [stop - start, hidden]
Bounds = Sequence[tuple[int, int]]
SAME = "same"


@runtime_checkable
class RowReader(Protocol):
    """A lazy table; a canonical tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(vocab, hidden)``."""
        ...

    def read_rows(self, start: int, stop: int) -> Tensor | Array:
        """Rows ``[stop - start, hidden]``."""
        ...


Table = Tensor | RowReader | Callable[[], Iterable[Rows]]


def compare(
    ref_hidden: Tensor,
    cand_hidden: Tensor,
    ref_table: Table,
    cand_table: Table | None = None,
    *,
    cap: float | None = None,
    cand_cap: float | str | None = SAME,
    targets: Tensor | Array | None = None,
    vocab: int | None = None,
    dtype: torch.dtype | None = None,
    scratch: int = SCRATCH,
    block_rows: int = BLOCK_ROWS,
) -> Stats:
    """Statistics of every position of one document.

    Args:
        ref_hidden: states after the final norm ``[positions, hidden]``, on the device to compute on.
        cand_hidden: the candidate's, of as many positions.
        ref_table: unembedding ``[vocab, hidden]``: a tensor, an object with ``shape`` and ``read_rows(start, stop)``, or a
            callable that returns an iterable of ``(start, stop, rows)`` in order and without gaps; it is called per tile.
        cand_table: the candidate's; None where both share one. Blocks that are equal are noticed and treated as shared:
            the difference of the logits is then the product of the hidden states' difference and keeps its digits.
        cap: final soft-cap, None for none.
        cand_cap: the candidate's, where it is another.
        targets: the next token's id per position ``[positions]``, -1 for none.
        vocab: rows of the tables to use; default all, which must then be equally many.
        dtype: of the products; default float64 where either hidden state is, else float32.
        scratch: bytes for the logits of a tile; more means fewer reads of the tables.
        block_rows: largest number of table rows at a time.

    Raises:
        ShapeError: shapes do not fit each other.
        FormatError: a table's blocks leave holes or end early.
        UsageError: targets out of range, or a callable table without ``vocab``.
    """
    if ref_hidden.ndim != 2 or cand_hidden.ndim != 2 or len(ref_hidden) != len(cand_hidden):
        raise ShapeError(
            f"hidden states are {tuple(ref_hidden.shape)} and {tuple(cand_hidden.shape)}, expected"
            " [positions, hidden] with the same number of positions.",
            fix="run both models over the same tokens, one document at a time.",
        )
    caps = (cap, cap if cand_cap == SAME else cast("float | None", cand_cap))
    sizes = [_vocab(t, vocab) for t in (ref_table, cand_table) if t is not None]
    if len(set(sizes)) > 1:
        raise ShapeError(
            f"the reference's table has {sizes[0]} rows, the candidate's {sizes[1]}.",
            fix="pass vocab= with the number of real tokens if one of them is padded.",
        )
    hidden = (ref_hidden.detach(), cand_hidden.detach())
    dtype = dtype or torch.promote_types(_dtype(*hidden), torch.float32)
    run = _Run(len(ref_hidden), sizes[0], dtype, ref_hidden.device, scratch, block_rows, targets)
    bad = tuple(~h.isfinite().all(1) for h in hidden)
    # 0 on both sides, so that the tile's other positions are computed as ever
    ref, cand = (h.masked_fill((bad[0] | bad[1])[:, None], 0) for h in hidden)
    alike = caps[0] == caps[1] and ref.shape == cand.shape
    step = (cand.double() - ref.double()).to(dtype) if alike else None
    ref, cand = ref.to(dtype), cand.to(dtype)
    for part in run.parts():
        sweep = run.sweep(part)
        for index, (one, two) in enumerate(_both(ref_table, cand_table, run.grid.bounds)):
            a, d = sweep.block(index)
            rows = _ready(one, ref)
            _product(ref[part], rows, a)
            if step is not None and (two is None or _equal(one, two)):
                _product(step[part], rows, d)
                cap_pair(a, d, cap, sweep.scratch(a.shape[1])[0])
                relative = True
            else:
                _product(cand[part], rows if two is None else _ready(two, cand), d)
                relative = False
                for x, limit in zip((a, d), caps, strict=True):
                    if limit is not None:
                        x.div_(limit).tanh_().mul_(limit)
            sweep.add(index, relative)
        run.take(part, sweep)
    return run.stats(*bad)


def compare_logits(
    ref: Tensor | Array,
    cand: Tensor | Array,
    *,
    targets: Tensor | Array | None = None,
    dtype: torch.dtype | None = None,
    scratch: int = SCRATCH,
    block_rows: int = BLOCK_ROWS,
) -> Stats:
    """Statistics of every position of one document from its logits, soft-cap included.

    Args:
        ref: ``[positions, vocab]``; a memory-mapped array is read tile by tile.
        cand: the candidate's, of the same shape.
        targets: the next token's id per position ``[positions]``, -1 for none.
        dtype: computed in; default float64 where either is, else float32.
        scratch: bytes for the logits of a tile.
        block_rows: largest number of tokens at a time.

    Raises:
        ShapeError: the shapes differ or are not two-dimensional.
        UsageError: targets out of range.
    """
    if ref.ndim != 2 or ref.shape != cand.shape:
        raise ShapeError(
            f"logits are {tuple(ref.shape)} and {tuple(cand.shape)}, expected the same [positions, vocab].",
            fix="run both models over the same tokens and cut padded vocabularies to the real tokens.",
        )
    first, second = _tensor(ref[:0]), _tensor(cand[:0])
    dtype = dtype or torch.promote_types(_dtype(first, second), torch.float32)
    run = _Run(ref.shape[0], ref.shape[1], dtype, first.device, scratch, block_rows, targets)
    bad: list[list[Tensor]] = [[], []]
    for part in run.parts():
        sweep = run.sweep(part)
        pair = [_tensor(x[part]).to(first.device) for x in (ref, cand)]
        for flags, x in zip(bad, pair, strict=True):
            flags.append(~x.isfinite().all(1))
        pair = [x.masked_fill((bad[0][-1] | bad[1][-1])[:, None], 0) for x in pair]
        for index, (start, stop) in enumerate(run.grid.bounds):
            for block, x in zip(sweep.block(index), pair, strict=True):
                block.copy_(x[:, start:stop])
            sweep.add(index, relative=False)
        run.take(part, sweep)
    empty = torch.zeros(0, dtype=torch.bool, device=first.device)
    return run.stats(*(torch.cat([empty, *flags]) for flags in bad))


class _Run:
    """Tiles of one call: their size, buffers and results."""

    def __init__(
        self,
        positions: int,
        vocab: int,
        dtype: torch.dtype,
        device: torch.device,
        scratch: int,
        block_rows: int,
        targets: Tensor | Array | None,
    ) -> None:
        if vocab < 2:
            raise ShapeError(f"the vocabulary has {vocab} tokens, expected at least 2.")
        if block_rows < 1:
            raise UsageError(f"block_rows is {block_rows}, expected at least 1.")
        self.positions = positions
        self.grid = Grid.of(_bounds(vocab, block_rows), device)
        self.targets = _targets(targets, positions, vocab).to(device)
        tile = max(1, scratch // (2 * dtype.itemsize * vocab))
        if tile >= 16:
            tile -= tile % 16  # matrix products like it
        tiles = max(1, math.ceil(positions / tile))
        self.tile = min(tile, max(1, math.ceil(positions / tiles)))
        widest = min(block_rows, vocab)
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.buffers = tuple(torch.empty(self.tile * vocab, **kind) for _ in range(2))
        self.work = [torch.empty(self.tile * widest, **kind) for _ in range(4)]
        self.found: list[dict[str, Tensor]] = []

    def parts(self) -> Iterator[slice]:
        """Positions of each tile."""
        for start in range(0, self.positions, self.tile):
            yield slice(start, min(start + self.tile, self.positions))

    def sweep(self, part: slice) -> Sweep:
        """A fresh tile."""
        one, two = self.buffers
        return Sweep(self.grid, part.stop - part.start, (one, two), self.work)

    def take(self, part: slice, sweep: Sweep) -> None:
        """Keep a finished tile's statistics."""
        found = sweep.finish()
        ids = self.targets[part]
        found["logp_ref"], found["logp_cand"] = sweep.targets(
            ids, found["lse_ref"], found["lse_cand"]
        )
        self.found.append(found)

    def stats(self, bad_ref: Tensor, bad_cand: Tensor) -> Stats:
        """All positions; those with a number that is not finite have NaN and id -1."""
        if not self.found:
            return Stats.empty()
        columns = {n: torch.cat([f[n] for f in self.found]) for n in self.found[0]}
        bad_ref = bad_ref | ~columns["lse_ref"].isfinite()
        bad_cand = bad_cand | (~columns["max_diff"].isfinite() & ~bad_ref)
        bad = bad_ref | bad_cand
        for name, x in columns.items():
            columns[name] = x.masked_fill(bad, math.nan if x.is_floating_point() else -1)
        return Stats(
            target=self.targets.cpu().numpy(),
            finite_ref=(~bad_ref).cpu().numpy(),
            finite_cand=(~bad_cand).cpu().numpy(),
            **{name: x.cpu().numpy() for name, x in columns.items()},
        )


def _product(hidden: Tensor, rows: Tensor, out: Tensor) -> None:
    torch.mm(hidden, rows.T, out=out)
    if not math.isfinite(float(rows.sum())):  # a soft-cap would hide an infinite weight
        out[:, ~rows.isfinite().all(1)] = math.nan


def _dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _tensor(x: Tensor | Array) -> Tensor:
    """NumPy or torch to torch, ml_dtypes' bfloat16 included."""
    if isinstance(x, Tensor):
        return x
    x = np.require(x, requirements=["C", "W"])
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _ready(rows: Tensor, hidden: Tensor) -> Tensor:
    """Table rows on the hidden state's device and in its dtype."""
    if rows.ndim != 2 or rows.shape[1] != hidden.shape[1]:
        raise ShapeError(
            f"table rows are {tuple(rows.shape)}, expected [rows, {hidden.shape[1]}] as the hidden states.",
            fix="pass each model's own table, [vocab, hidden].",
        )
    return rows.to(device=hidden.device, dtype=hidden.dtype)


def _equal(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.dtype == two.dtype and torch.equal(one, two))


def _bounds(vocab: int, step: int) -> list[tuple[int, int]]:
    return [(i, min(i + step, vocab)) for i in range(0, vocab, step)]


def _vocab(table: Table, wanted: int | None) -> int:
    """Rows to use of a table."""
    if isinstance(table, Tensor | RowReader):
        have = int(table.shape[0])
        if wanted is not None and wanted > have:
            raise ShapeError(f"vocab is {wanted}, but a table has {have} rows.")
        return wanted or have
    if wanted is None:
        raise UsageError("a callable table does not say how many rows it has.", fix="pass vocab=.")
    return wanted


def _targets(targets: Tensor | Array | None, positions: int, vocab: int) -> Tensor:
    if targets is None:
        return torch.full((positions,), -1)
    ids = torch.as_tensor(targets).detach().cpu()
    if ids.is_floating_point() or tuple(ids.shape) != (positions,):
        raise UsageError(
            f"targets are {ids.dtype} {tuple(ids.shape)}, expected integers [{positions}]."
        )
    if positions and not -1 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UsageError(
            f"targets run from {int(ids.min())} to {int(ids.max())}, expected -1 (none) to {vocab - 1}.",
            fix="check that tokenizer and model belong together.",
        )
    return ids.long()


def _both(one: Table, two: Table | None, bounds: Bounds) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of both tables side by side; None for the second where it is the first."""
    if two is None or two is one:
        for rows in _blocks(one, bounds):
            yield rows, None
    else:
        yield from zip(_blocks(one, bounds), _blocks(two, bounds), strict=True)


def _blocks(table: Table, bounds: Bounds) -> Iterator[Tensor]:
    """Rows of each of ``bounds``."""
    if isinstance(table, Tensor):
        yield from (table.detach()[i:j] for i, j in bounds)
    elif isinstance(table, RowReader):
        yield from (_tensor(table.read_rows(i, j)) for i, j in bounds)
    else:
        yield from _recut(table(), bounds)


def _recut(blocks: Iterable[Rows], bounds: Bounds) -> Iterator[Tensor]:
    """Blocks of any size cut and joined to ``bounds``."""
    source = iter(blocks)
    have = torch.empty(0, 0)
    at = 0
    for start, stop in bounds:
        parts: list[Tensor] = []
        missing = stop - start
        while missing:
            if not len(have):
                have, at = _next_rows(source, at, stop)
            parts.append(have[:missing])
            have = have[missing:]
            missing -= len(parts[-1])
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def _next_rows(source: Iterator[Rows], at: int, wanted: int) -> tuple[Tensor, int]:
    """The next block, which must begin at row ``at``; and where it ends."""
    block = next(source, None)
    if block is None:
        raise FormatError(f"a table's blocks end at row {at}, expected rows up to {wanted}.")
    start, stop, rows = block
    if start != at or stop <= start or len(rows) != stop - start:
        raise FormatError(
            f"a table's block says rows {start} to {stop} and has {len(rows)}, expected rows from {at} on."
        )
    return _tensor(rows), stop
