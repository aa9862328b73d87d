"""The checkpoint's tokenizer, as the verifier's modules import it."""

from ..convert.tokenizer import SentencePieceTokenizer, Tokenizer, tokenizer_of

__all__ = ["SentencePieceTokenizer", "Tokenizer", "tokenizer_of"]
