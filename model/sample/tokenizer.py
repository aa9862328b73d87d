"""Train the sample's SentencePiece model with Gemma's settings and Gemma's special ids.

Gemma's vocabulary begins with the same 473 pieces whatever follows, and converters treat those ids specially, so the
sample must have them too. SentencePiece numbers control pieces, then ``user_defined_symbols`` in order, then the byte
pieces, then what it learns; listing the symbols in Gemma's order is enough to reach every id.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

BLOCK = ("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td")
HEADING = ("h1", "h2", "h3", "h4", "h5", "h6", "blockquote")
INLINE = ("strong", "em", "b", "i", "u", "s", "sub", "sup", "code")
HTML = (
    *(f"<{slash}{tag}>" for tags in (BLOCK, HEADING, INLINE) for slash in ("", "/") for tag in tags),
    "<br>",
)  # fmt: skip
USER_DEFINED = (
    "<mask>", "<2mass>", "[@BOS@]",  # 4, 5, 6
    *(f"<unused{i}>" for i in range(99)),  # 7 to 105
    "<start_of_turn>", "<end_of_turn>",  # 106, 107
    *("\n" * n for n in range(1, 32)),  # 108 to 138
    *("▁" * n for n in range(2, 31)),  # 139 to 167
    *HTML,  # 168 to 216; the 256 byte pieces follow at 217
)  # fmt: skip


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece model (``tokenizer.model``) learned from ``texts``."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        user_defined_symbols=list(USER_DEFINED),
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        max_sentence_length=1 << 16,
        num_threads=2,
        minloglevel=1,
    )  # fmt: skip
    return model.getvalue()
