"""Sequences that the model writes itself: calibration without a corpus, in the model's own distribution.

Every sequence begins with BOS (and a user's turn where the model was tuned for chat) and goes on by sampling at
temperature 1. The end of a document, BOS and padding are never drawn, so all sequences have the same length. A block's
weights are read once per position for the whole batch where they do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..formats.errors import NonFiniteError
from ..model import torch_gemma as tg
from ..model.config import GemmaConfig
from .calibration import Ids
from .weights import Weights

Step = Callable[[int, str], None]


def cache_bytes(config: GemmaConfig, length: int) -> int:
    """Bytes of one sequence's keys and values, float32."""
    return 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length


def sample_sequences(
    weights: Weights,
    count: int,
    length: int,
    *,
    seed: int = 0,
    prefix: Sequence[int] = (),
    memory: int = 1 << 30,
    progress: Step | None = None,
) -> list[Ids]:
    """Let the model write.

    Args:
        weights: the model.
        count: sequences.
        length: tokens of each, BOS included.
        seed: of the draws; the same gives the same sequences on the same machine.
        prefix: ids behind the BOS of every sequence.
        memory: bytes for keys and values; decides how many sequences are written at once.
        progress: told of tokens done.

    Returns:
        ``count`` arrays of ids ``[length]``.

    Raises:
        NonFiniteError: the model's output is not finite.
    """
    config = weights.checkpoint.config
    at_once = max(1, min(count, memory // (2 * cache_bytes(config, length))))
    # every sequence has its own, so that it does not matter how many are written at once
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(count)]
    out: list[Ids] = []
    for start in range(0, count, at_once):
        few = generators[start : start + at_once]
        ids = _write(weights, length, prefix, few, progress or (lambda n, name: None))
        out += [row.copy() for row in ids.numpy()]
    return out


@torch.no_grad()
def _write(
    weights: Weights,
    length: int,
    prefix: Sequence[int],
    generators: Sequence[torch.Generator],
    progress: Step,
) -> Tensor:
    n = len(generators)
    config = weights.checkpoint.config
    begin = [config.bos_token_id, *prefix][: length - 1]
    ids = torch.empty(n, length, dtype=torch.int64)
    ids[:, : len(begin)] = torch.tensor(begin)
    caches: list[tg.Cache | None] = [None] * config.num_hidden_layers
    norm = weights.final_norm()
    done = 0
    for end in range(len(begin), length):
        x = weights.embed(ids[:, done:end])
        positions = torch.arange(done, end).expand(n, -1)
        for layer in range(config.num_hidden_layers):
            x, caches[layer] = tg.block(
                x, weights.block(layer), layer, config, positions, cache=caches[layer]
            )
        ids[:, end] = _draw(tg.rms_norm(x[:, -1], norm, config.rms_norm_eps), weights, generators)
        progress(n, "writing calibration text")
        done = end
    return ids


def _draw(hidden: Tensor, weights: Weights, generators: Sequence[torch.Generator]) -> Tensor:
    """One id per row, by the Gumbel trick: the largest of logit plus noise, a block of the vocabulary at a time."""
    config = weights.checkpoint.config
    never = torch.tensor([config.bos_token_id, config.pad_token_id, *config.eos_token_id[:1]])
    best = torch.full((len(hidden),), -torch.inf, dtype=torch.float64)
    chosen = torch.zeros(len(hidden), dtype=torch.int64)
    for start, stop, rows in weights.table():
        logits = tg.soft_cap(hidden @ rows.T, config.final_logit_softcapping)
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                "the model's output is NaN or infinite while it writes calibration text.",
                where=weights.checkpoint.path, fix="check it with `g2verify compare`.",
            )  # fmt: skip
        # minus the log of an exponential variable is Gumbel noise
        noise = torch.empty_like(logits, dtype=torch.float64)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        scored = logits.double() - noise.log()
        scored[:, never[(never >= start) & (never < stop)] - start] = -torch.inf
        value, at = scored.max(1)
        better = value > best
        best, chosen = torch.where(better, value, best), torch.where(better, at + start, chosen)
    return chosen


def chat_prefix(tokenize: Callable[[str], list[int]], start: str) -> list[int]:
    """What a conversation begins with behind its BOS."""
    return [int(i) for i in np.array(tokenize(f"{start}user\n"), np.int64)]
