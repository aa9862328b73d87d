"""The embedding behind a recording's final hidden states, and proof that it gives the logits that were recorded.

The table must be the reference's own: carried in the recording, in a checkpoint whose embedding has the recorded hash,
or the candidate's if that has it. A hash says that the values are right; a few rows of logits recorded whole say that the
product on this machine is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..convert.open import Checkpoint, open_checkpoint
from ..formats.dtypes import BF16
from ..formats.errors import ChecksumError, FormatError, MissingTensorError, printable
from ..model import canonical
from . import recording_schema as schema
from .recording_consistency import check_embedded
from .runners.base import Table

if TYPE_CHECKING:
    from ..model.logits_stats import Stats
    from .recording_read import Recording

Array = np.ndarray[Any, np.dtype[Any]]
Embedding = str | Path | Checkpoint


@dataclass(frozen=True)
class Rounding:
    """What a product of the head may be off, in units of: the vectors' norms, ``sqrt(hidden)`` logits, the logit.

    An engine's sum of ``d`` products is off by about its unit roundoff times the norms if the terms cancel, times
    ``sqrt(d)`` times the result if they do not; soft-capping and storing round the result itself a few times. In bfloat16
    the table may have been rounded too.
    """

    norms: float
    root: float
    result: float

    def limit(self, norms: Array, logits: Array, hidden: int) -> Array:
        """Largest difference that is rounding."""
        return np.asarray(
            self.norms * norms + (self.root * math.sqrt(hidden) + self.result) * np.abs(logits)
        )


ROUNDING = {
    "float64": Rounding(8 * 2.0**-53, 2 * 2.0**-53, 4 * 2.0**-53),
    "float32": Rounding(8 * 2.0**-24, 2 * 2.0**-24, 4 * 2.0**-24),
    "bfloat16": Rounding(2.0**-9, 2 * 2.0**-24, 6 * 2.0**-9),
}


@dataclass(frozen=True)
class Head:
    """A recording's table, proven on the rows of logits recorded whole.

    Attributes:
        recording: whose.
        table: its rows in order, as :meth:`.runners.base.Runner.table` gives them.
        norm: largest Euclidean norm of a row.
        share: largest difference found on the whole rows, as a share of what rounding may be.
    """

    recording: Recording
    table: Table
    norm: float
    share: float

    def check_lse(self, batch: Sequence[int], hidden: Array, lse: Array, which: Array) -> None:
        """Compare log-sum-exps computed from final hidden states with those recorded.

        Args:
            batch: probes, one after the other.
            hidden: their states ``[positions, hidden]``.
            lse: what was computed ``[positions]``.
            which: positions that were computed ``[positions]``; not those where the candidate has a NaN.

        Raises:
            FormatError: one differs by more than rounding.
        """
        r = self.recording
        stored = np.concatenate([r.array("lse", i) for i in batch])
        size = np.abs(stored) + 2 * math.log(r.config.vocab_size)
        limit = ROUNDING[r.dtype].limit(_norms(hidden) * self.norm, size, r.config.hidden_size)
        self._require(batch, lse, stored, limit, which, "log-sum-exp")

    def check_stats(self, batch: Sequence[int], hidden: Array, stats: Stats) -> None:
        """Compare what was computed from final hidden states with what was recorded of the logits.

        Args:
            batch: probes, one after the other.
            hidden: their states ``[positions, hidden]``.
            stats: computed from them ``[positions]``.

        Raises:
            FormatError: something differs by more than rounding.
        """
        r = self.recording
        self.check_lse(batch, hidden, stats.lse_ref, stats.finite)
        stored = np.concatenate([r.array("next_logit", i) for i in batch])
        size = _norms(hidden) * self.norm
        limit = 2 * ROUNDING[r.dtype].limit(size, np.abs(stored) + 2, r.config.hidden_size)
        limit = limit + 2.0**-24 * np.abs(stored)  # kept as float32
        goal = stats.finite & (stats.target >= 0)
        found = stats.logp_ref + stats.lse_ref
        self._require(batch, found, stored, limit, goal, "logit of the next token")
        top = np.concatenate([r.array("topk_id", i)[:, 0] for i in batch])
        # a different token may only win by rounding
        margin = np.where(stats.top1_ref == top, 0.0, stats.margin)
        zero = np.zeros_like(margin)
        self._require(batch, margin, zero, limit, stats.finite, "largest logit")

    def _require(
        self,
        batch: Sequence[int],
        found: Array,
        stored: Array,
        limit: Array,
        which: Array,
        what: str,
    ) -> None:
        r = self.recording
        bad = np.flatnonzero(which & ~(np.abs(found - stored) <= limit))
        if len(bad):
            i = int(bad[0])
            rows = np.concatenate([np.arange(r.offsets[p], r.offsets[p + 1]) for p in batch])
            off = float(abs(found[i] - stored[i]))
            raise _contradiction(r, *r.place(int(rows[i])), what, off, float(limit[i]))


def prove(recording: Recording, table: Table, device: str = "cpu") -> Head:
    """Compute the sampled rows of logits again, as the comparison will, and compare them with those recorded.

    Raises:
        FormatError: they differ by more than rounding, so nothing computed from this recording would mean anything.
    """
    import torch

    from .runners.torch_runner import exact_products, torch_device

    place, config = torch_device(device), recording.config
    rows = recording.rows("sample_at", 0, recording.sizes.sampled).tolist()
    states = np.concatenate([recording.rows("final_hidden", i, i + 1) for i in rows])
    stored = recording.rows("sample_logits", 0, len(rows))
    norms, hidden = _norms(states)[:, None], torch.from_numpy(states).to(place)
    largest = share = 0.0
    tokens = recording.rows("tokens", 0, recording.sizes.positions)
    for start, stop, block in table():
        check_embedded(recording, start, block, tokens)
        with exact_products():
            tile = as_tensor(block).to(place).to(hidden.dtype)
            logits = torch.mm(hidden, tile.T)
            if config.final_logit_softcapping is not None:
                cap = config.final_logit_softcapping
                logits.div_(cap).tanh_().mul_(cap)
        sizes = _norms(block)
        found = logits.cpu().numpy().astype(np.float64)
        limit = ROUNDING[recording.dtype].limit(norms * sizes, found, config.hidden_size)
        difference = np.abs(found - stored[:, start:stop])
        bad = np.argwhere(~(difference <= limit))
        if len(bad):
            row, token = int(bad[0][0]), int(bad[0][1])
            probe, at = recording.place(rows[row])
            raise _contradiction(
                recording, probe, at, f"logit of token {start + token}",
                float(difference[row, token]), float(limit[row, token]),
            )  # fmt: skip
        largest = max(largest, float(sizes.max()))
        share = max(share, float((difference / np.maximum(limit, 1e-300)).max()))
    return Head(recording, table, largest, share)


def _contradiction(
    recording: Recording, probe: int, at: int, what: str, found: float, limit: float
) -> FormatError:
    name = printable(recording.probes.probes[probe].id, 60)
    return FormatError(
        f"the {what} at position {at} of probe {name} differs by {found:.3g} from what the recorded final hidden "
        f"states give; rounding explains {limit:.3g}.",
        where=recording.path,
        fix="record again; or the product of matrices on this machine is not exact (TF32?).",
    )


def _norms(rows: Array) -> Array:
    x = rows.astype(np.float64)
    return np.asarray(np.sqrt(np.einsum("pd,pd->p", x, x)))


def as_tensor(rows: Array) -> Any:
    """Rows of a table as a torch tensor, bfloat16 included."""
    import torch

    if rows.dtype == BF16:
        return torch.from_numpy(np.array(rows).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(rows))


# ---------------------------------------------------------------- finding the table


@contextmanager
def find_table(
    recording: Recording,
    given: Embedding | None,
    candidate: Table | None = None,
    option: str = "--reference-embedding",
    absent: str = "there is no candidate to take it from",
) -> Iterator[Table]:
    """The embedding a recording's logits are made with, from wherever it is.

    Args:
        recording: whose.
        given: a checkpoint that has it.
        candidate: the candidate's table, taken if it is the same.
        option: what the user would call ``given``.
        absent: why there is no ``candidate``, for the message.

    Raises:
        ChecksumError: ``given`` has another embedding.
        MissingTensorError: it is nowhere.
        G2Error: ``given`` cannot be opened.
    """
    with ExitStack() as stack:
        yield _rounded(recording, _found(recording, given, candidate, option, absent, stack))


def _found(
    recording: Recording,
    given: Embedding | None,
    candidate: Table | None,
    option: str,
    absent: str,
    stack: ExitStack,
) -> Table:
    wanted = recording.embedding_sha256
    if given is not None:
        checkpoint = _opened(given, stack)
        table = _blocks_of(checkpoint.tensors[canonical.EMBED])
        if schema.embedding_sha256(table()) != wanted:
            raise ChecksumError(
                "the embedding of this checkpoint is not the one the recording was made with.",
                where=checkpoint.path,
                fix=f"give {option} the checkpoint that was recorded, in any lossless format.",
            )
        return table
    if recording.embedding is not None:
        table = _blocks_of(recording.embedding)
        if schema.embedding_sha256(table()) != wanted:
            raise ChecksumError(
                "the embedding carried along is not the one the recording names.",
                where=recording.path,
                fix="record again.",
            )
        return table
    if candidate is not None and schema.embedding_sha256(candidate()) == wanted:
        return candidate
    raise MissingTensorError(
        "the recording does not carry its embedding, and "
        f"{absent if candidate is None else 'the candidate has another'}.",
        where=recording.path,
        fix=f"give the recorded checkpoint with {option} MODEL, or record with --with-embedding.",
    )


def _opened(given: Embedding, stack: ExitStack) -> Checkpoint:
    if isinstance(given, Checkpoint):
        return given
    return stack.enter_context(open_checkpoint(given))


@contextmanager
def table_of(given: Embedding | None) -> Iterator[Table | None]:
    """A checkpoint's embedding, open for the block."""
    with ExitStack() as stack:
        yield None if given is None else _blocks_of(_opened(given, stack).tensors[canonical.EMBED])


def _blocks_of(table: Any) -> Table:
    return lambda: iter(schema.table_blocks(table))


def _rounded(recording: Recording, table: Table) -> Table:
    """As the run used it: in bfloat16 where it computed so."""

    def blocks() -> Iterator[tuple[int, int, Array]]:
        for start, stop, rows in table():
            narrow = recording.dtype == "bfloat16" and rows.dtype != BF16
            yield start, stop, rows.astype(BF16) if narrow else rows

    return blocks
