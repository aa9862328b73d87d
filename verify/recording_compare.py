"""A recording as the reference of a model that runs here.

Errors of blocks are estimates from 16 projections (within about a third at one position, a few percent in a mean);
only accumulated ones exist, since a block cannot be run on hidden states that were not kept. Behind the final norm, and
for logits, the numbers are exact. From a recording of largest logits only, they are lower bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..convert.progress import SILENT, Tick
from ..model.logits_stats import Record, Stats
from . import recording_schema as schema
from .batches import BATCH_TOKENS, padded, plan_batches, targets
from .block_errors import EMBEDDING, Trace, position_errors
from .lockstep import BLOCK_ROWS, SCRATCH, LockstepResult, NonFinite, merge_results
from .lockstep_logits import alike, from_hidden
from .recording_bound import Largest, lower_bound
from .recording_consistency import Persistence
from .recording_read import Recording
from .recording_stats import (
    check_model,
    estimated,
    is_rounded,
    largest_of,
    logits_of,
    projected,
    records_of,
    result_of,
)  # fmt: skip
from .recording_tables import Embedding, Head, find_table, prove, table_of
from .runners.base import Runner

Array = np.ndarray[Any, np.dtype[Any]]
_TILE_BYTES = 16 << 20


def compare_recording(
    recording: Recording,
    cand: Runner,
    *,
    reference_embedding: Embedding | None = None,
    candidate_checkpoint: Embedding | None = None,
    batch_tokens: int = BATCH_TOKENS,
    block_rows: int = BLOCK_ROWS,
    scratch: int = SCRATCH,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    progress: Tick = SILENT,
) -> LockstepResult:
    """Run a model over a recording's tokens and compare.

    Args:
        recording: the reference.
        cand: the candidate.
        reference_embedding: a checkpoint with the recorded embedding, where neither the recording nor the candidate has it.
        candidate_checkpoint: what the candidate runs; needed where its runner keeps its embedding to itself (transformers,
            llama_cpp) and the recorded one is to be taken from it.
        batch_tokens: largest padded batch.
        block_rows: embedding rows at a time.
        scratch: bytes of logits at a time.
        device: torch's name of where the head's products are computed.
        shard: ``(i, n)``: only batches i, i + n, i + 2 n, …; their numbers are those of the whole run.
        progress: called with tokens just done and a place.

    Returns:
        As of :func:`.lockstep.run_lockstep`, with accumulated errors only; ``head`` is ``top-k`` where the numbers are
        lower bounds.

    Raises:
        ConfigError: another model: vocabulary, depth or width differ.
        MissingTensorError: the recorded embedding is nowhere.
        ChecksumError: ``reference_embedding`` has another one.
        FormatError: the logits computed from the recording are not those recorded.
        FileIOError: the recording changed meanwhile.
    """
    full = recording.kind == schema.HIDDEN
    walk = full and "blocks" in cand.gives
    check_model(recording, cand.config, walk, "candidate")
    with ExitStack() as stack:
        head = None
        if full:
            own = cand.table() or stack.enter_context(table_of(candidate_checkpoint))
            why = f"the {cand.name} runner does not give the candidate's"
            table = find_table(recording, reference_embedding, own, absent=why)
            head = prove(recording, stack.enter_context(table), device)
        run = _Against(recording, cand, head, walk, block_rows, scratch, device, progress)
        probes = recording.probes.probes
        batches = plan_batches([len(p.tokens) for p in probes], batch_tokens)
        for batch in batches[shard[0] :: shard[1]]:
            run.batch(batch)
        recording.check_unchanged()
        return run.result()


class _Against:
    """A candidate's batches against a recording; collects what was found."""

    def __init__(
        self,
        recording: Recording,
        cand: Runner,
        head: Head | None,
        walk: bool,
        block_rows: int,
        scratch: int,
        device: str,
        progress: Tick,
    ) -> None:
        self.recording, self.cand, self.head, self.walk = recording, cand, head, walk
        self.block_rows, self.scratch, self.device, self.progress = (
            block_rows, scratch, device, progress,
        )  # fmt: skip
        self.own = cand.table() if walk else None
        self.matrix = schema.signs(recording.config.hidden_size)
        self.records: list[Record] = []
        self.traces: list[Trace] = []
        self.bad: list[NonFinite] = []

    def result(self) -> LockstepResult:
        """Everything, in the same order for any batches."""
        head = "tiles" if self.own is None else "hidden"
        exact = self.head is not None
        return merge_results([
            result_of(self.recording, self.records, self.traces, self.bad, self.walk, exact, head)
        ])  # fmt: skip

    def batch(self, batch: Sequence[int]) -> None:
        """Run and compare some probes."""
        probes = [self.recording.probes.probes[i] for i in batch]
        tokens, real = padded([p.tokens for p in probes], self.cand.config.filler)
        first = self.cand.start(tokens, real)
        if self.walk:
            assert first is not None
            self._blocks(batch, first, real)
        else:
            self.cand.finish()
        self.records += records_of(self.recording, batch, self._stats(batch, real))
        self.progress(int(real.sum()), "logits")

    def _blocks(self, batch: Sequence[int], first: Array, real: Array) -> None:
        seen: set[str] = set()
        through = [Persistence(self.recording, i) for i in batch]
        for layer in range(EMBEDDING, self.cand.config.num_hidden_layers):
            x = first if layer == EMBEDDING else self.cand.advance()
            for row, i in enumerate(batch):
                states = x[row][real[row]]
                norms = self.recording.array("norm", i)[:, layer + 1]
                own, sizes = projected(states, self.matrix, self.recording.sizes.wide)
                recorded = self.recording.array("projection", i)[:, layer + 1]
                errors = estimated(recorded, norms, own)
                through[row].add(layer, errors, norms, sizes)
                self._note(i, layer, errors, states, seen)
            if layer != EMBEDDING:
                self.progress(int(real.sum()), f"block {layer}")
        self.final = self.cand.final_hidden()
        for row, i in enumerate(batch):
            states = self.final[row][real[row]]
            errors = position_errors(self.recording.array("final_hidden", i), states)
            self._note(i, self.cand.config.num_hidden_layers, errors, states, seen)

    def _note(self, i: int, layer: int, errors: Array, states: Array, seen: set[str]) -> None:
        probe = self.recording.probes.probes[i].id
        window = self.recording.config.sliding_window
        self.traces.append(Trace.of(probe, layer, "accumulated", errors, window))
        bad = np.flatnonzero(~np.isfinite(states).all(1))
        if len(bad) and probe not in seen:
            seen.add(probe)
            self.bad.append(NonFinite(layer, probe, int(bad[0]), "candidate"))

    def _stats(self, batch: Sequence[int], real: Array) -> Stats:
        """Of a batch's real tokens, one probe after the other."""
        r = self.recording
        goals = np.concatenate([targets(r.probes.probes[i]) for i in batch])
        if self.head is None:
            return self._bounds(batch, real, goals)
        hidden = np.concatenate([r.array("final_hidden", i) for i in batch])
        if self.own is None:
            stats = self._from_tiles(hidden, real, goals)
        else:
            stats = from_hidden(
                (hidden, self.final[real]), alike((self.head.table, self.own)),
                (r.config, self.cand.config), goals, self.block_rows, self.scratch, self.device,
            )  # fmt: skip
        self.head.check_stats(batch, hidden, stats)
        return stats

    def _from_tiles(self, hidden: Array, real: Array, goals: Array) -> Stats:
        """The candidate's own logits beside those computed from the recording, a stretch of positions at a time."""
        from ..model.logits import compare_logits
        from .runners.torch_runner import exact_products

        assert self.head is not None
        vocab = self.recording.config.vocab_size
        ends = np.cumsum(real.sum(1))
        rows = np.where(real, (ends - real.sum(1))[:, None] + np.cumsum(real, 1) - 1, -1)
        step = max(1, self.scratch // (len(real) * vocab * 16))
        found, order = [], []
        for start in range(0, real.shape[1], step):
            part = slice(start, min(start + step, real.shape[1]))
            mask = real[:, part]
            at = rows[:, part][mask]
            ref = logits_of(hidden[at], self.head, self.device)
            cand = np.empty_like(ref)
            for a, b, tile in self.cand.logit_tiles(positions=part):
                cand[:, a:b] = tile[mask]
            with exact_products():
                found.append(
                    compare_logits(
                        ref,
                        cand,
                        targets=goals[at],
                        scratch=self.scratch,
                        block_rows=self.block_rows,
                    )
                )
            order.append(at)
        return Stats.join(found).select(np.argsort(np.concatenate(order), kind="stable"))

    def _bounds(self, batch: Sequence[int], real: Array, goals: Array) -> Stats:
        """Lower bounds from the recording's largest logits."""
        from .recording_logits import LogitKeeper  # torch

        r, s = self.recording, self.recording.sizes
        ref = largest_of(r, batch)
        keeper = LogitKeeper(
            len(goals), s.vocab, s.top, np.zeros(0, np.int64), goals, np.dtype(np.float32), ref.ids
        )
        rows = max(64, _TILE_BYTES // (real.size * 4))
        for start, stop, tile in self.cand.logit_tiles(rows):
            keeper.add(start, stop, tile[real])
        k = keeper.finish()
        cand = Largest(k.lse, k.ids, k.logits, k.next_logit, k.finite)
        return lower_bound(ref, cand, k.wanted, goals, rounded=is_rounded(r))
