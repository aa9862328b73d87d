"""Writing ggml's block types (GGUF): encoders, llama-quantize's mixes, importance matrices, export."""

from .encode import Blocks, encode
from .layout import pack
from .types import FORMATS, BlockFormat, Fields, block_format, to_half

__all__ = [
    "FORMATS",
    "BlockFormat",
    "Blocks",
    "Fields",
    "block_format",
    "encode",
    "pack",
    "to_half",
]
