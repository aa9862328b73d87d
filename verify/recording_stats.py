"""What comparisons with recordings share: estimates from projections, logits from kept states, results by probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..formats.errors import ConfigError
from ..model.logits_stats import Record, Stats
from . import recording_schema as schema
from .block_errors import Trace
from .lockstep import LockstepResult, NonFinite, layer_kinds
from .recording_bound import Largest
from .recording_read import Recording
from .recording_tables import Head, as_tensor
from .runners.base import Runner

if TYPE_CHECKING:
    import torch

    from ..model.config import GemmaConfig

Array = np.ndarray[Any, np.dtype[Any]]


def check_model(recording: Recording, config: GemmaConfig, walk: bool, what: str) -> None:
    """Raise ConfigError unless a model is one the recording can be compared with.

    Args:
        recording: the reference.
        config: the candidate's.
        walk: whether hidden states will be compared too.
        what: the candidate, in words.
    """
    names = ["vocab_size", *(("num_hidden_layers", "hidden_size") if walk else ())]
    odd = [n for n in names if getattr(recording.config, n) != getattr(config, n)]
    if odd:
        found = "; ".join(
            f"{n} is {getattr(recording.config, n)} in the recording and {getattr(config, n)} in the {what}"
            for n in odd
        )
        raise ConfigError(
            f"{found}.",
            where=recording.path,
            fix="compare with the model that was recorded.",
        )


def result_of(
    recording: Recording,
    records: list[Record],
    traces: list[Trace],
    bad: list[NonFinite],
    walk: bool,
    exact: bool,
    head: str = "hidden",
) -> LockstepResult:
    """A result; ``exact`` is False where statistics are lower bounds."""
    return LockstepResult(
        records, traces, layer_kinds(cast(Runner, recording)) if walk else {}, recording.config.sliding_window,
        head if exact else "top-k", bad,
    )  # fmt: skip


def records_of(recording: Recording, batch: Sequence[int], stats: Stats) -> list[Record]:
    """Statistics of a batch, one probe after the other, by probe."""
    found, at = [], 0
    for p in (recording.probes.probes[i] for i in batch):
        found.append(Record(p.id, p.category, stats.select(slice(at, at + len(p.tokens)))))
        at += len(p.tokens)
    return found


def is_rounded(recording: Recording) -> bool:
    """Whether its largest logits were rounded to be kept."""
    return recording.dtype == "float64"


def projected(states: Array, matrix: Array, wide: np.dtype) -> tuple[Array, Array]:
    """Projections and norms as a recording stores them, so that equal states give equal ones."""
    kept = np.promote_types(wide, states.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        found, norms = schema.project(states, matrix)
        return found.astype(kept, copy=False), norms.astype(kept, copy=False)


def estimated(ref: Array, norms: Array, cand: Array) -> Array:
    """Relative error of every position, from projections ``[positions, 16]`` and the reference's norms."""
    with np.errstate(invalid="ignore", over="ignore"):
        d = cand.astype(np.float64) - ref.astype(np.float64)
        found = np.sqrt((d**2).mean(1)) / np.maximum(norms.astype(np.float64), 1e-300)
    return np.asarray(np.where(np.isfinite(found), found, np.nan))


def largest_of(recording: Recording, batch: Sequence[int]) -> Largest:
    """The largest logits of some probes, one after the other."""
    names = ("lse", "topk_id", "topk_logit", "next_logit")
    lse, ids, logits, following = (
        np.concatenate([recording.array(n, i) for i in batch]) for n in names
    )
    return Largest(lse, ids.astype(np.int64), logits, following, np.ones(len(lse), bool))


def logits_of(hidden: Array, head: Head, device: str) -> Array:
    """Logits of recorded states ``[positions, vocab]``."""
    import torch

    from .runners.torch_runner import exact_products, torch_device

    place, config = torch_device(device), head.recording.config
    x = torch.from_numpy(np.array(hidden)).to(place)
    out = np.empty((len(hidden), config.vocab_size), hidden.dtype)
    for start, stop, rows in head.table():
        with exact_products():
            tile: torch.Tensor = torch.mm(x, as_tensor(rows).to(place).to(x.dtype).T)
            if config.final_logit_softcapping is not None:
                cap = config.final_logit_softcapping
                tile.div_(cap).tanh_().mul_(cap)
        out[:, start:stop] = tile.cpu().numpy()
    return out
