"""Writing ggml's block types (GGUF): encoders, llama-quantize's mixes, importance matrices, export."""

from .encode import Blocks, encode
from .types import FORMATS, BlockFormat, Fields, block_format

__all__ = ["FORMATS", "BlockFormat", "Blocks", "Fields", "block_format", "encode"]
