"""Whether a tokenizer belongs to a model: number of pieces against embedding rows, special ids against the config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.errors import TokenizerError, printable
from ..formats.sentencepiece_model import PieceType, SentencePieceModel, parse
from ..model.config import GemmaConfig
from .chat_template import END, START

RELEASED_TOKENS = 256_000  # with one row each
_RIGHT_ONE = "pass the tokenizer.model of this very model with --tokenizer, or leave the tokenizer out with --tokenizer none."


@dataclass(frozen=True)
class TokenizerInfo:
    """What a tokenizer.model says, checked against a model.

    Attributes:
        model: the parsed file.
        pieces: number of ids.
        padding: rows of the embedding that no piece uses.
        bos_id: ``<bos>``, or None.
        eos_id: ``<eos>``, or None.
        pad_id: ``<pad>``, or None.
        unk_id: ``<unk>``, or None.
        start_of_turn_id: ``<start_of_turn>``, or None.
        end_of_turn_id: ``<end_of_turn>``, or None.
        notes: harmless differences from the configuration.
    """

    model: SentencePieceModel
    pieces: int
    padding: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    start_of_turn_id: int | None
    end_of_turn_id: int | None
    notes: tuple[str, ...] = ()


def check_tokenizer(
    tokenizer_model: bytes,
    config: GemmaConfig,
    *,
    where: str | Path = "tokenizer.model",
    highest_id: int = -1,
) -> TokenizerInfo:
    """Read a tokenizer.model and compare it with the model it is to serve.

    Args:
        tokenizer_model: the file.
        config: the model.
        where: its path, for messages.
        highest_id: the largest id that another file defines (a fine-tune's added tokens).

    Raises:
        TokenizerError: damaged; more pieces than embedding rows, or fewer than a released model has; ids of
            the configuration that mean something else here.
    """
    model = parse(tokenizer_model, where)
    pieces = len(model.pieces)
    added = max(0, min(highest_id + 1, config.vocab_size) - pieces)
    spare = config.vocab_size - pieces - added
    if spare < 0 or (spare and config.vocab_size == RELEASED_TOKENS):
        extra = f" and {added} added tokens" if added else ""
        raise TokenizerError(
            f"the tokenizer has {pieces} pieces{extra}, the model's vocabulary {config.vocab_size}.",
            where=where,
            fix=_RIGHT_ONE,
        )
    bos, eos = model.special_id("bos"), model.special_id("eos")
    if bos is not None and bos != config.bos_token_id:
        raise TokenizerError(
            f"{model.names['bos']} has id {bos}, the configuration's bos_token_id is {config.bos_token_id}.",
            where=where,
            fix=_RIGHT_ONE,
        )
    far = [i for i in config.eos_token_id if i >= pieces + added]
    if far:
        raise TokenizerError(
            f"the configuration's eos_token_id {far[0]} is none of the {pieces + added} ids.",
            where=where,
            fix=_RIGHT_ONE,
        )
    notes = []
    if spare:
        notes.append(
            f"the embedding has {spare} rows more than the tokenizer has ids ({config.vocab_size} and "
            f"{pieces + added}); no text leads to them"
        )
    if eos is not None and eos not in config.eos_token_id:
        notes.append(f"{model.names['eos']} (id {eos}) does not end the model's output: eos_token_id is "
                     f"{list(config.eos_token_id)}")  # fmt: skip
    return TokenizerInfo(
        model, pieces, spare, bos, eos, model.special_id("pad"), model.special_id("unk"),
        model.ids.get(START), model.ids.get(END), tuple(notes),
    )  # fmt: skip


def check_tokenizer_json(
    tree: dict[str, Any],
    model: SentencePieceModel | None,
    config: GemmaConfig,
    where: str | Path = "tokenizer.json",
) -> list[str]:
    """Compare a tokenizer.json with the tokenizer.model beside it and with the model.

    Args:
        tree: the file, parsed.
        model: the SentencePiece model, or None.
        config: the model.
        where: its path, for messages.

    Returns:
        Harmless differences, one sentence each.

    Raises:
        TokenizerError: not a tokenizer.json, ids past the vocabulary, or ordinary pieces with other
            ids.
    """
    vocab = token_ids(tree, where)
    highest = max(vocab.values(), default=-1)
    if highest >= config.vocab_size:
        raise TokenizerError(
            f"the highest id is {highest}, the model's vocabulary has {config.vocab_size}.",
            where=where,
            fix=_RIGHT_ONE,
        )
    if model is None:
        return []
    texts = {i: token for token, i in vocab.items()}
    moved = [i for i, piece in enumerate(model.pieces) if texts.get(i, piece) != piece]
    # a byte piece may stand under its character; fine-tunes rename spare user-defined pieces
    plain = [i for i in moved if model.types[i] in (PieceType.NORMAL, PieceType.UNKNOWN)]
    if plain:
        shown = ", ".join(
            f"{i} is {printable(repr(texts[i]), 30)} / {printable(repr(model.pieces[i]), 30)}"
            for i in plain[:20]
        )
        raise TokenizerError(
            f"tokenizer.json and tokenizer.model disagree on {len(plain)} ids (json / model): {shown}.",
            where=where,
            fix="remove the one that does not belong to this model.",
        )
    renamed = [i for i in moved if model.types[i] is not PieceType.BYTE]
    return [f"tokenizer.json names {len(renamed)} special ids differently from tokenizer.model, such as "
            f"{printable(repr(texts[renamed[0]]), 40)}"] if renamed else []  # fmt: skip


def token_ids(
    tree: dict[str, Any], where: str | Path, fix: str = "pass this model's tokenizer.json."
) -> dict[str, int]:
    """Token -> id of a parsed tokenizer.json, added tokens included.

    Args:
        tree: the file, parsed.
        where: its path, for messages.
        fix: what to advise where it is none.

    Raises:
        TokenizerError: the file has no such table.
    """
    part = tree.get("model")
    vocab = part.get("vocab") if isinstance(part, dict) else None
    added = tree.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise TokenizerError(
            "this is no tokenizer.json with a BPE vocabulary.",
            where=where,
            fix=fix,
        )
    found = dict(vocab)
    for token in added:
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    bad = [t for t, i in found.items() if type(i) is not int or i < 0]
    if bad:
        raise TokenizerError(
            f"token {printable(repr(bad[0]), 60)} has id {printable(repr(found[bad[0]]), 60)}.",
            where=where,
            fix="get the file from its source again.",
        )
    return found
