"""Checkpoints of real shapes with random weights, generated as they are read: no disk, no memory.

Values are normal with deviation 0.02 in bfloat16, so they compress as trained weights do; queries are twice as large,
or attention scores would stay far below their soft-cap and a comparison could not see it. Each tensor is a window into one
block of random numbers, shifted by its name: tensors differ, and generating costs no more than copying.
"""

from __future__ import annotations

import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from g2kit.convert.layout import Layout
from g2kit.convert.layouts import VARIANTS
from g2kit.convert.open import Checkpoint, LazyTensor
from g2kit.convert.sidecar import Sidecars
from g2kit.formats.base import Array, Index, Source, Tensor, leading_rows
from g2kit.formats.dtypes import BF16
from g2kit.model.config import GemmaConfig
from g2kit.model.config_formats import ConfigReading

BLOCK = 1 << 25  # elements: 64 MiB
LARGER = {"q_proj": 2}  # powers of two: exact


@cache
def noise() -> Array:
    """The block of random numbers, twice in a row so that any window is contiguous."""
    rng = np.random.default_rng(20261122)
    block = (rng.standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)).astype(BF16)
    return np.concatenate((block, block))


class Synthetic(Tensor):
    """A tensor that is computed when read."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, BF16, shape, Path("synthetic"), "BF16")
        self.shift = zlib.crc32(name.encode()) % BLOCK
        self.factor = next((f for part, f in LARGER.items() if part in name), 1)

    def read(self, index: Index = ()) -> Array:
        start, stop, rest = leading_rows(self.shape, index)
        row = math.prod(self.shape[1:])
        out = np.empty((stop - start) * row, BF16)
        for at in range(0, out.size, BLOCK):
            part = out[at : at + BLOCK]
            begin = (self.shift + start * row + at) % BLOCK
            part[:] = noise()[begin : begin + part.size]
        if self.factor != 1:
            out *= BF16.type(self.factor)
        box = out.reshape(stop - start, *self.shape[1:])
        return np.ascontiguousarray(box[rest]) if rest else box


def checkpoint(config: GemmaConfig) -> Checkpoint:
    """An opened checkpoint of that model under Hugging Face names."""
    variant = next(v for v in VARIANTS if v.name == "huggingface")
    layout = Layout(variant, config)
    tensors: dict[str, Tensor] = {n: Synthetic(n, row.shape) for n, row in layout.rows.items()}
    source = Source("safetensors", Path("synthetic"), tensors)
    lazy = {
        name: LazyTensor(tensors[row.name], p, None, config)
        for name, (row, p) in layout.placements.items()
    }
    reading = ConfigReading(config, dict.fromkeys(GemmaConfig.__dataclass_fields__, "preset"), [])
    return Checkpoint(Path("synthetic"), source, layout, reading, lazy, Sidecars(Path("synthetic")))
