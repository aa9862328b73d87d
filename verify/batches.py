"""Which probes run together: batches of similar length, fixed by the whole set so that shards change no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..formats.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
BATCH_TOKENS = 4096


class ProbeLike(Protocol):
    """What is needed of a probe; :class:`g2kit.verify.probes.Probe` is one."""

    @property
    def id(self) -> str:
        """Unique."""
        ...

    @property
    def category(self) -> str:
        """Kind of text."""
        ...

    @property
    def tokens(self) -> Array:
        """Ids ``[length]``."""
        ...

    @property
    def scored(self) -> bool:
        """Whether the next tokens count for perplexity."""
        ...


def plan_batches(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> list[tuple[int, ...]]:
    """Indices of each batch, shortest first; padded, a batch has at most ``batch_tokens`` tokens or one sequence."""
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens is {batch_tokens}, expected at least 1.")
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return [tuple(b) for b in batches]


def padded(sequences: Sequence[Array], fill: int) -> tuple[Array, Array]:
    """Ids ``[batch, length]`` padded on the right, and the mask that is True for real ones."""
    length = max(len(s) for s in sequences)
    tokens = np.full((len(sequences), length), fill, np.int64)
    real = np.zeros(tokens.shape, bool)
    for row, mask, s in zip(tokens, real, sequences, strict=True):
        row[: len(s)], mask[: len(s)] = s, True
    return tokens, real


def targets(probe: ProbeLike) -> Array:
    """The next token of every position, -1 for none."""
    out = np.full(len(probe.tokens), -1, np.int64)
    if probe.scored:
        out[:-1] = probe.tokens[1:]
    return out
