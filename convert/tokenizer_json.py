"""tokenizer.json, which Hugging Face's ``tokenizers`` reads, from a SentencePiece BPE model.

SentencePiece merges the pair whose result has the largest score; ``tokenizers`` merges the pair
with the lowest rank in a list. So every way to split a piece in two becomes one entry of that list,
ordered by the piece's score (as transformers' ``GemmaConverter`` does). User-defined pieces are
matched before any merge, longest first from the left, in both.

Nothing guarantees that two programs agree on every text, so each file built here is compared with
SentencePiece on every piece, on many joined pieces and on text of many scripts, and not written
when one id differs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ..formats.errors import TokenizerError, printable
from ..formats.sentencepiece_model import BPE, PieceType, SentencePieceModel

TURN_PIECES = ("<start_of_turn>", "<end_of_turn>")  # special to everybody but SentencePiece
_SPACE = "▁"
_PROOF_TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "  two  spaces   three ", "\t\ttabs\tand\n\n\nlines\r\n",
    "3.14159 and 1,000,000 in 2024", "Grüße, naïve façade, Œuvre", "Съешь же ещё этих мягких булок",
    "Ξεσκεπάζω την ψυχοφθόρα", "我能吞下玻璃而不伤身体。", "私はガラスを食べられます。", "나는 유리를 먹을 수 있어요.",
    "أنا قادر على أكل الزجاج", "אני יכול לאכול זכוכית", "मैं काँच खा सकता हूँ", "ฉันกินกระจกได้", "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301\u200b\u200d",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n", "<html><body class=\"x\">&amp;</body></html>",
    "\x00\x01\x7f\x80\xa0\u2028\ufeff\ufffd\U0010ffff", "▁ already ▁▁ escaped", "<0x0A><0xFF> is text", "", " ", "\n",
    " " * 70, "\n" * 40, "\t" * 40, "a" * 300, "ab" * 99, "=" * 77, "http://a.b/c?d=e&f=%20#g", "\\frac{1}{2} $x_i$",
)  # fmt: skip


def tokenizer_json(
    tokenizer_model: bytes, model: SentencePieceModel
) -> tuple[bytes | None, str | None]:
    """Build and prove a tokenizer.json.

    Args:
        tokenizer_model: the SentencePiece file.
        model: the same file, parsed.

    Returns:
        ``(file, None)``, or ``(None, reason)`` where it could not be built or encodes some text
        differently.
    """
    reason = _unsuitable(model)
    if reason is None:
        built = build(model)
        reason = first_difference(built, tokenizer_model, model)
        if reason is None:
            return built, None
    return None, reason


def _unsuitable(model: SentencePieceModel) -> str | None:
    """Why no tokenizer.json can do what this model does, or None."""
    flags = {
        "it is not a BPE model": model.model_type != BPE,
        "it has no byte fallback": not model.byte_fallback,
        "it puts a space before the text": model.add_dummy_prefix,
        "it shortens runs of spaces": model.remove_extra_whitespaces,
        "it leaves spaces as they are": not model.escape_whitespaces,
        "it normalises the text": bool(model.charsmap),
        "it has no <unk> piece": model.special_id("unk") is None,
        "it has no <bos> piece": model.special_id("bos") is None,
        "its pieces contain spaces": any(" " in piece for piece in model.pieces),
        "it has unused pieces": PieceType.UNUSED in model.types,
        "it lacks byte pieces": any(f"<0x{i:02X}>" not in model.ids for i in range(256)),
    }
    for reason, applies in flags.items():
        if applies:
            return reason
    lost = [c for c in _unlisted_characters(model) if not c.isascii()]
    return (
        f"it merges characters that are no pieces themselves, such as {lost[0]!r}" if lost else None
    )


def build(model: SentencePieceModel) -> bytes:
    """The tokenizer.json of a model that :func:`tokenizer_json` found suitable."""
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    for character in _unlisted_characters(model):
        # only what is in the vocabulary can be merged; alone it still gets its byte's id
        vocab[character] = vocab.pop(f"<0x{ord(character):02X}>")
    merges: list[Any] = [f"{left} {right}" for left, right in merge_list(model)]
    if any(merge.startswith("#version") for merge in merges):
        merges = [merge.split(" ") for merge in merges]  # older readers skip such a line
    bos = model.names["bos"]
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(model),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.names["unk"],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(tree, ensure_ascii=False).encode(
        "utf-8"
    )  # indenting is slow, and nobody reads it


def _special(token: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}


def added_tokens(model: SentencePieceModel) -> list[dict[str, Any]]:
    """Pieces that are cut out of the text before any merge: control, unknown and user-defined ones.

    User-defined pieces are looked for after normalisation, since SentencePiece writes a run of
    spaces as ``▁▁``.
    """
    return [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind is PieceType.USER_DEFINED and piece not in TURN_PIECES,
            "special": kind is not PieceType.USER_DEFINED or piece in TURN_PIECES,
        }
        for i, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    ]


def merge_list(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to split a piece into two, best first."""
    parts = {
        piece: i
        for i, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in (PieceType.NORMAL, PieceType.USER_DEFINED)
    }
    for character in _unlisted_characters(model):
        parts[character] = model.ids[f"<0x{ord(character):02X}>"]
    rows = [
        (model.scores[i], cut, len(piece) - cut, piece)
        for piece, i in parts.items()
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    # transformers' order: score, then the longer left part; equal splits of other pieces keep the
    # order of ids
    rows.sort(key=lambda row: row[:3], reverse=True)
    return [(piece[:cut], piece[cut:]) for _, cut, _, piece in rows]


def _unlisted_characters(model: SentencePieceModel) -> list[str]:
    """Characters of mergeable pieces that are no pieces themselves."""
    normal = [
        p for p, kind in zip(model.pieces, model.types, strict=True) if kind is PieceType.NORMAL
    ]
    return sorted({c for piece in normal if len(piece) > 1 for c in piece} - set(model.pieces))


def first_difference(built: bytes, tokenizer_model: bytes, model: SentencePieceModel) -> str | None:
    """Compare both tokenizers on the proof texts; None when every id is the same.

    Raises:
        TokenizerError: SentencePiece itself refuses the file.
    """
    from tokenizers import Tokenizer

    ours = Tokenizer.from_str(built.decode("utf-8"))
    theirs = load_sentencepiece(tokenizer_model)
    rest = _proof_texts(model)
    while texts := list(islice(rest, 2048)):
        encoded = ours.encode_batch_fast(texts, add_special_tokens=False)
        for text, a, b in zip(texts, encoded, theirs.encode(texts), strict=True):
            if a.ids != b:
                return f"{printable(repr(text), 80)} would become {a.ids[:12]} instead of {b[:12]}"
    return None


def load_sentencepiece(tokenizer_model: bytes) -> Any:
    """SentencePiece's own processor.

    Raises:
        TokenizerError: it refuses the file.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    except (RuntimeError, OSError, ValueError) as e:
        raise TokenizerError(f"SentencePiece refuses the tokenizer: {printable(str(e))}") from None


def _proof_texts(model: SentencePieceModel) -> Iterator[str]:
    """The built-in texts, every piece, and random sequences of pieces; always the same for the same model."""
    # in text, these are plain characters to SentencePiece and tokens to Hugging Face: a wanted
    # difference
    marks = [p for p, kind in zip(model.pieces, model.types, strict=True)
             if kind in (PieceType.CONTROL, PieceType.UNKNOWN)]  # fmt: skip
    for text in _candidates(model):
        if not any(mark in text for mark in marks):
            yield text


def _candidates(model: SentencePieceModel) -> Iterable[str]:
    yield from _PROOF_TEXTS
    yield from model.pieces
    rng = random.Random(0)
    defined = [
        p
        for p, kind in zip(model.pieces, model.types, strict=True)
        if kind is PieceType.USER_DEFINED
    ]
    for _ in range(4000):
        yield "".join(rng.choices(model.pieces, k=rng.randint(2, 24)))
        yield "".join(rng.choices(defined or model.pieces, k=rng.randint(2, 12)))
