"""Checkpoints that exist in memory only, as sources for conversions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from g2kit.convert.layout import Layout
from g2kit.convert.layouts import VARIANTS
from g2kit.convert.open import Checkpoint, LazyTensor
from g2kit.convert.sidecar import Sidecars
from g2kit.formats.base import Array, Index, Source, Tensor
from g2kit.formats.dtypes import BF16, short
from g2kit.model import canonical
from g2kit.model.config import GemmaConfig
from g2kit.model.config_formats import ConfigReading


class MemoryTensor(Tensor):
    """An array that is there already."""

    def __init__(self, name: str, array: Array) -> None:
        super().__init__(name, array.dtype, array.shape, Path("memory"), short(array.dtype))
        self.array = array

    def read(self, index: Index = ()) -> Array:
        return np.ascontiguousarray(self.array[index])


def random_weights(
    config: GemmaConfig, seed: int, dtype: np.dtype = BF16, rows: int | None = None
) -> dict[str, Array]:
    """Canonical name -> normal random values; padding rows, if any, are zero."""
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.standard_normal(t.shape, dtype=np.float32).astype(dtype)
        for name, t in canonical.tensors(config).items()
    }
    if rows and rows > config.vocab_size:
        pad = (rows - config.vocab_size, config.hidden_size)
        weights[canonical.EMBED_PADDING] = np.zeros(pad, dtype)
    return weights


def checkpoint(config: GemmaConfig, weights: dict[str, Array]) -> Checkpoint:
    """An opened checkpoint holding ``weights``, padding rows included where given."""
    variant = next(v for v in VARIANTS if v.name == "huggingface")
    padding = weights.get(canonical.EMBED_PADDING)
    embed = weights[canonical.EMBED]
    stored = {**weights, canonical.EMBED: embed}
    if padding is not None:
        stored[canonical.EMBED] = np.concatenate((embed, stored.pop(canonical.EMBED_PADDING)))
    layout = Layout(variant, config, len(stored[canonical.EMBED]))
    tensors: dict[str, Tensor] = {n: MemoryTensor(n, stored[n]) for n in layout.rows}
    lazy = {
        name: LazyTensor(tensors[row.name], p, None, config)
        for name, (row, p) in layout.placements.items()
    }
    reading = ConfigReading(config, dict.fromkeys(GemmaConfig.__dataclass_fields__, "test"), [])
    source = Source("safetensors", Path("memory"), tensors)
    return Checkpoint(Path("memory"), source, layout, reading, lazy, Sidecars(Path("memory")))
