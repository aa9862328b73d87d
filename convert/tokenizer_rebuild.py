"""tokenizer.model from tokenizer.json, for formats that hold a SentencePiece vocabulary.

transformers 5 saves tokenizer.json alone. It keeps every piece, but merges in place of scores; SentencePiece's trainer
numbers its pieces in the order of their scores, so the scores are the ids again. That is a guess until it is proven:
the rebuilt model must give the very merges of the file, and the same ids for every proof text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..formats.errors import G2Error, printable
from ..formats.sentencepiece_model import BPE, PieceType, SentencePieceModel, parse, serialize
from .tokenizer_json import build, first_difference

REBUILT = (
    "tokenizer.model is rebuilt from tokenizer.json: proven to give the same merges and ids, but not the original "
    "file byte for byte"
)
_SPECIALS = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
_BYTES = tuple(f"<0x{i:02X}>" for i in range(256))


def sentencepiece_from_json(raw: bytes) -> tuple[bytes | None, str | None]:
    """Rebuild a tokenizer.model.

    Args:
        raw: the tokenizer.json.

    Returns:
        ``(file, None)``, or ``(None, reason)`` where no SentencePiece model is proven to do the same.
    """
    try:
        tree = json.loads(raw)
        pieces = _pieces(tree)
        if isinstance(pieces, str):
            return None, pieces
        data = serialize(_model(tree, pieces))
        model = parse(data, "tokenizer.model rebuilt from tokenizer.json")
        made = json.loads(build(model))
        reason = _different(tree, made) or first_difference(raw, data, model)
    except (G2Error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        return None, f"it is damaged or unusual ({printable(str(e), 100)})"
    except Exception as e:  # the tokenizers library raises bare Exception for files it refuses
        return None, f"the tokenizers library refuses it ({printable(str(e), 100)})"
    return (data, None) if reason is None else (None, reason)


def _pieces(tree: Mapping[str, Any]) -> list[str] | str:
    """Pieces in the order of ids, or why there is no such list."""
    if tree["model"].get("type") != "BPE" or not tree["model"].get("byte_fallback"):
        return "it is not a BPE model with byte fallback"
    ids = {**tree["model"]["vocab"], **{t["content"]: t["id"] for t in tree["added_tokens"]}}
    if sorted(ids.values()) != list(range(len(ids))):
        return "its ids have holes or are used twice"
    for byte, piece in enumerate(_BYTES[:128]):
        # Hugging Face's converter gives a byte's id to its character where merges need that
        if piece not in ids and chr(byte) in ids:
            ids[piece] = ids.pop(chr(byte))
    if missing := [piece for piece in (*_SPECIALS.values(), *_BYTES) if piece not in ids]:
        return f"it lacks {missing[0]}"
    return sorted(ids, key=lambda piece: ids[piece])


def _model(tree: Mapping[str, Any], pieces: list[str]) -> SentencePieceModel:
    kinds = dict.fromkeys((t["content"] for t in tree["added_tokens"]), PieceType.USER_DEFINED)
    kinds |= dict.fromkeys(_BYTES, PieceType.BYTE)
    kinds |= dict.fromkeys(_SPECIALS.values(), PieceType.CONTROL)
    kinds[_SPECIALS["unk"]] = PieceType.UNKNOWN
    types = tuple(kinds.get(piece, PieceType.NORMAL) for piece in pieces)
    scores, rank = [], 0
    for kind in types:
        scores.append(-float(rank) if kind is PieceType.NORMAL else 0.0)
        rank += kind is PieceType.NORMAL
    return SentencePieceModel(
        tuple(pieces),
        tuple(scores),
        types,
        model_type=BPE,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        names=dict(_SPECIALS),
    )


def _different(tree: Mapping[str, Any], made: Mapping[str, Any]) -> str | None:
    """Where the rebuilt model's tokenizer.json says something else about merging, or None."""
    for key, say in (("vocab", "ids"), ("merges", "merges")):
        theirs, ours = tree["model"][key], made["model"][key]
        if key == "merges":
            theirs, ours = _pairs(theirs), _pairs(ours)
        if theirs != ours:
            return f"its {say} are not those of a SentencePiece vocabulary in the order of ids"
    if tree.get("normalizer") != made["normalizer"]:
        return "it normalises the text otherwise"
    return None


def _pairs(merges: list[Any]) -> list[tuple[str, ...]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]
