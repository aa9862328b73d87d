"""The same function with its sums in another order: a checkpoint whose inner units are permuted."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..convert.open import Checkpoint, LazyTensor
from ..model import canonical
from ..model.config import GemmaConfig
from .views import changed, edited

Array = np.ndarray[Any, np.dtype[Any]]


def permuted(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """Feed-forward units, query heads inside their group, groups, and value channels in another order.

    Exact: every number that is computed is the same number, only sums have their terms in another order. Hidden states keep
    their order.
    """
    config = checkpoint.config
    tensors: dict[str, LazyTensor] = {}
    for layer in range(config.num_hidden_layers):
        for template, edit in _edits(config, seed, layer).items():
            name = template.format(i=layer)
            tensors[name] = edited(checkpoint.tensors[name], edit)
    return changed(checkpoint, tensors)


def _edits(config: GemmaConfig, seed: int, layer: int) -> dict[str, Callable[[Array], Array]]:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}/{layer}".encode())))
    groups, h = config.num_key_value_heads, config.head_dim
    each = config.num_attention_heads // groups
    units = rng.permutation(config.intermediate_size)
    order = rng.permutation(groups)
    inside = np.stack([rng.permutation(each) for _ in range(groups)])
    channels = np.stack([rng.permutation(h) for _ in range(groups)])
    # where head n of the new order comes from, and where its value channels do
    heads = (order[:, None] * each + inside[order]).reshape(-1)
    queries = (heads[:, None] * h + np.arange(h)).reshape(-1)
    keys = (order[:, None] * h + np.arange(h)).reshape(-1)
    values = (order[:, None] * h + channels[order]).reshape(-1)
    outputs = (heads[:, None] * h + np.repeat(channels[order], each, axis=0)).reshape(-1)
    return {
        canonical.Q: lambda w: w[queries],
        canonical.K: lambda w: w[keys],
        canonical.V: lambda w: w[values],
        canonical.O: lambda w: w[:, outputs],
        canonical.GATE: lambda w: w[units],
        canonical.UP: lambda w: w[units],
        canonical.DOWN: lambda w: w[:, units],
    }
