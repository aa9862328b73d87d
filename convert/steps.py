"""Arithmetic some formats demand on weights: named, invertible up to rounding, counted, reported.

Computed in float32 at least, then rounded once to the stored dtype. ``exact`` says whether the inverse restores every
value of every dtype (multiplying by a power of two, barring underflow); the engine counts the elements that do not come
back in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats.dtypes import F32
from ..model.config import GemmaConfig
from ..model.config_formats import llama_cpp_query_scalar

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One named operation on a weight.

    Attributes:
        describe: what it does, for reports.
        offset: added after multiplying.
        factor: config -> number the weight is multiplied by.
    """

    describe: str
    factor: Callable[[GemmaConfig], float]
    offset: float = 0.0

    def is_identity(self, config: GemmaConfig) -> bool:
        """Whether it changes nothing for this model."""
        return self.offset == 0.0 and self.factor(config) == 1.0

    def is_exact(self, config: GemmaConfig) -> bool:
        """Whether it is a power of two, which changes no mantissa."""
        return self.offset == 0.0 and math.frexp(self.factor(config))[0] == 0.5

    def forward(self, x: Array, config: GemmaConfig, dtype: np.dtype) -> Array:
        """Canonical values -> stored values in ``dtype``."""
        wide = np.promote_types(F32, dtype) if x.dtype.itemsize > 4 else F32
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and overflow are counted and named
            y = x.astype(wide) * wide.type(self.factor(config))
            if self.offset:  # -0 + 0 would lose its sign
                y = y + wide.type(self.offset)
            return np.asarray(y).astype(dtype)

    def inverse(self, x: Array, config: GemmaConfig, dtype: np.dtype) -> Array:
        """Stored values -> canonical values in ``dtype``."""
        wide = x.dtype if x.dtype.itemsize > 4 else F32
        with np.errstate(over="ignore", invalid="ignore"):
            y = (x.astype(wide) - wide.type(self.offset)) / wide.type(self.factor(config))
            return np.asarray(y).astype(dtype)


STEPS: dict[str, Step] = {
    "plus_one": Step("norm gains stored as 1 + w", lambda c: 1.0, 1.0),
    "query_scale": Step(
        "query projection stored times the query scale", lambda c: c.query_pre_attn_scalar**-0.5
    ),
    "embed_scale": Step("embedding stored times sqrt(d)", lambda c: c.hidden_size**0.5),
    "llama_query_scale": Step(
        "query projection multiplied so that llama.cpp's fixed scale gives the model's",
        lambda c: math.sqrt(llama_cpp_query_scalar(c) / c.query_pre_attn_scalar),
    ),
}
