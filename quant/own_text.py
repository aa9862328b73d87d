"""Calibration that the model writes itself, and what names a calibration in a run's settings."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..convert.chat_template import END, START, tuned_for_chat
from ..convert.open import Checkpoint
from ..convert.progress import Progress
from ..convert.tokenizer import tokenizer_of
from ..model import canonical
from ..model.config import GemmaConfig
from .calibration import SELF, Calibration, Ids, Wanted, divide
from .sampling import at_once, cache_bytes, chat_prefix, sample_sequences, writing_dtype
from .weights import Weights

_READING = 1e9  # bytes per second, of weights that are read again


@dataclass(frozen=True)
class Share:
    """How memory is divided while the model writes.

    Attributes:
        dtype: to compute in.
        at_once: sequences written together.
        cache: bytes of their keys and values.
        weights: bytes of weights that are kept; the others are read again for every position.
        missing: bytes of those others.
    """

    dtype: torch.dtype
    at_once: int
    cache: int
    weights: int
    missing: int

    @classmethod
    def of(cls, config: GemmaConfig, stored: str, wanted: Wanted, limit: int) -> Share:
        """As many weights as fit beside the keys and values, which get up to a quarter of the memory.

        Args:
            config: the model.
            stored: its dtype.
            wanted: how much text.
            limit: bytes of memory to work in.
        """
        dtype = writing_dtype(stored)
        few = at_once(config, wanted.total, wanted.seq_len, limit // 4, dtype)
        cache = few * cache_bytes(config, wanted.seq_len, dtype)
        every = config.num_parameters * dtype.itemsize
        kept = min(every, max(0, limit - cache))
        return cls(dtype, few, cache, kept, every - kept)


def written(
    checkpoint: Checkpoint,
    wanted: Wanted,
    seed: int,
    limit: int,
    meter: Progress,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Sequences of the model's own, divided into those for Hessians and those kept apart.

    Args:
        checkpoint: the model.
        wanted: how much.
        seed: of the draws.
        limit: bytes of memory to work in.
        meter: told of tokens.
        device: to compute on.
    """
    count = wanted.total
    meter.start(count * (wanted.seq_len - 1), "writing calibration text (tokens)")
    share = Share.of(checkpoint.config, _stored(checkpoint), wanted, limit)
    weights = Weights(checkpoint, share.weights, dtype=share.dtype, device=device)
    ids: list[Ids] = sample_sequences(
        weights, count, wanted.seq_len, seed=seed, prefix=_chat_prefix(checkpoint),
        memory=share.cache, progress=meter,
    )  # fmt: skip
    return divide(ids, SELF, checkpoint.config, wanted)


def cost(checkpoint: Checkpoint, wanted: Wanted, limit: int) -> tuple[int, float]:
    """Bytes and seconds that writing takes, roughly; measures this machine's speed for a moment."""
    config = checkpoint.config
    share = Share.of(config, _stored(checkpoint), wanted, limit)
    x = torch.randn(share.at_once, config.hidden_size).to(share.dtype)
    w = torch.randn(config.intermediate_size, config.hidden_size).to(share.dtype)
    x @ w.T
    began = time.perf_counter()
    x @ w.T
    per_weight = (time.perf_counter() - began) / w.numel()
    positions = -(-wanted.total // share.at_once) * (wanted.seq_len - 1)
    each = config.num_parameters * per_weight + share.missing / _READING
    return share.cache + share.weights, positions * each


def _stored(checkpoint: Checkpoint) -> str:
    return checkpoint.tensors[canonical.EMBED].dtype.name


def _chat_prefix(checkpoint: Checkpoint) -> list[int]:
    """A user's turn, where the model was tuned for chat."""
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        return []
    ends = tokenizer.encode(END)
    end = ends[0] if len(ends) == 1 else None
    tuned, _ = tuned_for_chat(None, checkpoint.config.eos_token_id, end, None, checkpoint.path)
    return chat_prefix(tokenizer.encode, START) if tuned else []


def settings(given: Calibration | None, wanted: Wanted, seed: int) -> dict[str, str]:
    """What decides the sequences, as words for the user -> value."""
    if given is not None:
        return {"the calibration's ids": given.sha256[:16]}
    return {
        "--calibration": SELF,
        "--samples": str(wanted.samples),
        "--seq-len": str(wanted.seq_len),
        "the held-out share": str(wanted.held_out),
        "--seed": str(seed),
    }
