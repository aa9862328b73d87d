"""One table per framework. :data:`VARIANTS` lists them all in the order detection tries them."""

from __future__ import annotations

from ..layout import Variant
from . import flax, gemma_pytorch, gguf, huggingface, keras, maxtext

VARIANTS: tuple[Variant, ...] = (
    *huggingface.VARIANTS,
    *gemma_pytorch.VARIANTS,
    *maxtext.VARIANTS,
    *flax.VARIANTS,
    *gguf.VARIANTS,
    *keras.VARIANTS,
)

__all__ = ["VARIANTS"]
