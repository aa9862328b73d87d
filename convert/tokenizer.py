"""Text to token ids and back, with the tokenizer a checkpoint carries."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from ..formats.errors import TokenizerError
from ..formats.sentencepiece_model import parse
from .extras import travelling
from .open import Checkpoint
from .sidecar_files import TOKENIZER_MODEL


class Tokenizer(Protocol):
    """What probes and reports need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        ...

    def piece(self, token: int) -> str:
        """Text of one id, to be shown."""
        ...


class SentencePieceTokenizer:
    """A ``tokenizer.model``.

    Attributes:
        pieces: number of ids.
        sha256: of the file.

    Args:
        data: the file.
        where: its path, for messages.

    Raises:
        TokenizerError: damaged.
    """

    def __init__(self, data: bytes, where: str | Path = TOKENIZER_MODEL) -> None:
        import sentencepiece

        self._model = parse(data, where)  # bounds every length before SentencePiece sees it
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as e:
            raise TokenizerError(f"SentencePiece refuses it: {e}.", where=where) from e
        self.pieces = len(self._model.pieces)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        return [int(i) for i in self._processor.encode(text)]

    def piece(self, token: int) -> str:
        """Text of one id with spaces as such; ids without a piece are shown as ``[id]``."""
        if not 0 <= token < self.pieces:
            return f"[{token}]"
        return self._model.pieces[token].replace("▁", " ")


def tokenizer_of(checkpoint: Checkpoint) -> SentencePieceTokenizer | None:
    """The tokenizer beside a checkpoint, or in its GGUF metadata; None where there is none (a ``tokenizer.json`` alone is none).

    Raises:
        TokenizerError: it is damaged.
    """
    kv = checkpoint.source.metadata.get("kv", {})
    files = travelling(checkpoint.path, checkpoint.source.format, kv, None)
    data = files.tokenizer_model
    return None if data is None else SentencePieceTokenizer(data, files.where(TOKENIZER_MODEL))
