"""Two recordings against each other: parity of two machines on a third that has neither model nor accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from ..convert.progress import SILENT, Tick
from ..model.logits_stats import Record, Stats
from . import recording_schema as schema
from .batches import BATCH_TOKENS, plan_batches, targets
from .block_errors import EMBEDDING, Trace, position_errors
from .lockstep import BLOCK_ROWS, SCRATCH, LockstepResult, merge_results
from .lockstep_logits import alike, from_hidden
from .recording_bound import lower_bound, matched
from .recording_consistency import Persistence
from .recording_read import Recording, require_same_probes
from .recording_stats import (
    check_model,
    estimated,
    is_rounded,
    largest_of,
    records_of,
    result_of,
)  # fmt: skip
from .recording_tables import Embedding, Head, find_table, prove
from .runners.base import Table

Array = np.ndarray[Any, np.dtype[Any]]


def compare_recordings(
    ref: Recording,
    cand: Recording,
    *,
    reference_embedding: Embedding | None = None,
    candidate_embedding: Embedding | None = None,
    lower_bound_only: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    block_rows: int = BLOCK_ROWS,
    scratch: int = SCRATCH,
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    progress: Tick = SILENT,
) -> LockstepResult:
    """Compare two recordings of the same probes; no model runs.

    Args:
        ref: the reference.
        cand: the candidate.
        reference_embedding: a checkpoint with the reference's embedding; serves both where they have the same.
        candidate_embedding: one with the candidate's.
        lower_bound_only: do without embeddings: errors of blocks, and lower bounds from the largest logits.
        batch_tokens: largest padded batch.
        block_rows: embedding rows at a time.
        scratch: bytes of logits at a time.
        device: torch's name of where the head's products are computed.
        shard: ``(i, n)``: only batches i, i + n, i + 2 n, …; their numbers are those of the whole run.
        progress: called with tokens just done and a place.

    Returns:
        As :func:`compare_recording`.

    Raises:
        G2Error: as :func:`compare_recording`; FormatError also where the probes differ.
    """
    walk = ref.kind == cand.kind == schema.HIDDEN
    check_model(ref, cand.config, walk, "candidate's recording")
    require_same_probes(ref, cand)
    heads = None
    with ExitStack() as stack:
        if walk and not lower_bound_only:
            one = stack.enter_context(_either(ref, cand, reference_embedding, candidate_embedding))
            two = one
            if ref.embedding_sha256 != cand.embedding_sha256 or ref.dtype != cand.dtype:
                two = stack.enter_context(
                    _either(
                        cand, ref, candidate_embedding, reference_embedding, "--candidate-embedding"
                    )
                )
            heads = prove(ref, one, device), prove(cand, two, device)
        traces: list[Trace] = []
        records: list[Record] = []
        batches = plan_batches([len(p.tokens) for p in ref.probes.probes], batch_tokens)
        for batch in batches[shard[0] :: shard[1]]:
            for i in batch if walk else ():
                traces += _recorded_traces(ref, cand, i)
            stats = _recorded_stats(ref, cand, batch, heads, block_rows, scratch, device)
            records += records_of(ref, batch, stats)
            progress(len(stats), "recordings")
    for r in (ref, cand):
        r.check_unchanged()
    return merge_results([result_of(ref, records, traces, [], walk, heads is not None)])


def _either(
    one: Recording,
    other: Recording,
    given: Embedding | None,
    others: Embedding | None,
    option: str = "--reference-embedding",
) -> AbstractContextManager[Table]:
    """A recording's table, from the other recording too where both have the same."""
    same = one.embedding_sha256 == other.embedding_sha256
    if given is None and same:
        given = others
    carried = other.embedding if same and one.embedding is None else None
    blocks = None if carried is None else (lambda: iter(schema.table_blocks(carried)))
    why = f"the other recording {'does not either' if same else 'is of another'}"
    return find_table(one, given, blocks, option, why)


def _recorded_traces(ref: Recording, cand: Recording, i: int) -> list[Trace]:
    one, two = ref.array("projection", i), cand.array("projection", i)
    norms, others = ref.array("norm", i), cand.array("norm", i)
    window, probe = ref.config.sliding_window, ref.probes.probes[i].id
    last = position_errors(ref.array("final_hidden", i), cand.array("final_hidden", i))
    errors = {
        layer: estimated(one[:, layer + 1], norms[:, layer + 1], two[:, layer + 1])
        for layer in range(EMBEDDING, ref.config.num_hidden_layers)
    }
    errors[ref.config.num_hidden_layers] = last
    through = Persistence(ref, i)
    for layer in range(EMBEDDING, ref.config.num_hidden_layers):
        through.add(layer, errors[layer], norms[:, layer + 1], others[:, layer + 1])
    return [Trace.of(probe, layer, "accumulated", e, window) for layer, e in errors.items()]


def _recorded_stats(
    ref: Recording,
    cand: Recording,
    batch: Sequence[int],
    heads: tuple[Head, Head] | None,
    block_rows: int,
    scratch: int,
    device: str,
) -> Stats:
    goals = np.concatenate([targets(ref.probes.probes[i]) for i in batch])
    if heads is None:
        one, two = largest_of(ref, batch), largest_of(cand, batch)
        rounded = is_rounded(ref) or is_rounded(cand)
        return lower_bound(one, two, matched(one.ids, two), goals, rounded=rounded)
    a, b = (np.concatenate([r.array("final_hidden", i) for i in batch]) for r in (ref, cand))
    stats = from_hidden(
        (a, b), alike((heads[0].table, heads[1].table)), (ref.config, cand.config), goals,
        block_rows, scratch, device,
    )  # fmt: skip
    heads[0].check_stats(batch, a, stats)
    heads[1].check_lse(batch, b, stats.lse_cand, stats.finite)
    return stats
