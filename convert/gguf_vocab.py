"""A Gemma tokenizer in both its homes: SentencePiece's ``tokenizer.model`` and GGUF's ``tokenizer.*`` keys.

Forward as llama.cpp's convert_hf_to_gguf.py does it for Gemma, so that llama.cpp tokenizes alike. Back by undoing what
that script loses: GGUF has no user-defined pieces unless tokenizer_config.json named them, and calls some of them
control tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from ..formats.errors import TokenizerError
from ..formats.names import listing
from ..formats.sentencepiece_model import BPE, PieceType, SentencePieceModel, parse, serialize

KeyValue = tuple[str, str, Any]
_GGML = "tokenizer.ggml."
TOKENS, SCORES, TYPES = f"{_GGML}tokens", f"{_GGML}scores", f"{_GGML}token_type"
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"  # SentencePiece's form of a space
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0
# special token -> (GGUF key, Gemma's piece), in llama.cpp's order
_SPECIALS = {
    "bos": (f"{_GGML}bos_token_id", "<bos>"),
    "eos": (f"{_GGML}eos_token_id", "<eos>"),
    "unk": (f"{_GGML}unknown_token_id", "<unk>"),
    "pad": (f"{_GGML}padding_token_id", "<pad>"),
}
END_OF_TURN = "<end_of_turn>"
# Written for Gemma 1, which shares its architecture name with CodeGemma; meant for the released vocabulary's ids.
_GEMMA1_IDS = {"prefix": 67, "suffix": 69, "middle": 68, "eot": 107}
# Tokens the released tokenizer_config.json does not call special, but llama.cpp does.
_LOOKS_SPECIAL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_LOOKS_SPECIAL_AROUND = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def gguf_vocab(
    tokenizer_model: bytes,
    vocab_rows: int,
    tokenizer_config: Mapping[str, Any] | None,
    family: Literal["gemma", "gemma2"],
) -> list[KeyValue]:
    """The GGUF key-values of a tokenizer, in the order llama.cpp's converter writes them.

    Args:
        tokenizer_model: the SentencePiece file.
        vocab_rows: rows of the embedding; ids the tokenizer lacks become ``[PADi]``.
        tokenizer_config: parsed tokenizer_config.json, for added tokens, chat template and special tokens.
        family: ``gemma`` writes the CodeGemma ids too.

    Returns:
        ``(key, type, value)`` for :func:`g2kit.formats.gguf.plan`. The unknown token's id and ``add_bos_token`` are
        always there, although llama.cpp's converter omits them when tokenizer_config.json is absent.

    Raises:
        TokenizerError: the file is damaged, has more pieces than the embedding rows, or the config contradicts it.
    """
    model = parse(tokenizer_model)
    if model.model_type != BPE:
        raise TokenizerError(
            f"the tokenizer's SentencePiece model type is {model.model_type}; Gemma's is {BPE} (BPE)."
        )
    missing = vocab_rows - len(model.pieces)
    if missing < 0:
        raise TokenizerError(
            f"the tokenizer has {len(model.pieces)} pieces, the embedding {vocab_rows} rows.",
            fix="pass the tokenizer.model of this very model.",
        )
    config = tokenizer_config or {}
    first = len(model.pieces)
    tokens = [*model.pieces, *(f"[PAD{i}]" for i in range(first, vocab_rows))]
    scores = [*model.scores, *[_PADDING_SCORE] * missing]
    types = [_exported(t) for t in model.types] + [PieceType.UNUSED] * missing
    _apply_added_tokens(config, tokens, scores, types)
    _check_distinct(tokens)
    ids = _special_ids(model, config, tokens)
    extras = _gemma1_ids(tokens) if family == "gemma" else []
    return [
        (f"{_GGML}model", "str", "llama"),
        (f"{_GGML}pre", "str", "default"),
        (TOKENS, "[str]", tokens),
        (SCORES, "[f32]", scores),
        (TYPES, "[i32]", [int(t) for t in types]),
        *((_SPECIALS[name][0], "u32", i) for name, i in ids.items()),
        *_add_flags(config),
        *_chat_templates(config.get("chat_template")),
        *extras,
        (f"{_GGML}add_space_prefix", "bool", False),
    ]


def _check_distinct(tokens: list[str]) -> None:
    if len(set(tokens)) == len(tokens):
        return
    doubled = [repr(text) for text, n in Counter(tokens).items() if n > 1]
    raise TokenizerError(
        f"two ids have the same text: {listing(sorted(doubled))}.",
        fix="pass the tokenizer files of this very model.",
    )


def _exported(kind: PieceType) -> PieceType:
    """llama.cpp's converter asks SentencePiece's Python class, which does not tell user-defined pieces."""
    return PieceType.NORMAL if kind is PieceType.USER_DEFINED else kind


def _apply_added_tokens(
    config: Mapping[str, Any], tokens: list[str], scores: list[float], types: list[PieceType]
) -> None:
    """What tokenizer_config.json's ``added_tokens_decoder`` says of ids, over what the model file says."""
    added = config.get("added_tokens_decoder")
    if added is None:
        return
    if not isinstance(added, Mapping):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder is not an object.")
    for key, entry in added.items():
        text = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not text or not (key.isascii() and key.isdecimal()):
            raise TokenizerError(
                f"tokenizer_config.json: added_tokens_decoder entry {key!r} is not an id with a content."
            )
        i = int(key[:20])
        if i >= len(tokens):
            raise TokenizerError(
                f"tokenizer_config.json: added token {text!r} has id {i}; the embedding has {len(tokens)} rows.",
                fix="pass the tokenizer files of this very model.",
            )
        special = bool(entry.get("special")) or _looks_special(text)
        types[i] = PieceType.CONTROL if special else PieceType.USER_DEFINED
        tokens[i] = text if special else text.replace(_SPACE, " ")
        scores[i] = _ADDED_SCORE


def _looks_special(text: str) -> bool:
    around = any(text.startswith(a) and text.endswith(b) for a, b in _LOOKS_SPECIAL_AROUND)
    return around or text in _LOOKS_SPECIAL


def _special_ids(
    model: SentencePieceModel, config: Mapping[str, Any], tokens: list[str]
) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name in _SPECIALS:
        text = config.get(f"{name}_token")
        if isinstance(text, Mapping):
            text = text.get("content")
        if isinstance(text, str):
            if text not in tokens:
                raise TokenizerError(
                    f"tokenizer_config.json: {name}_token {text!r} is not in the vocabulary.",
                    fix="pass the tokenizer files of this very model.",
                )
            ids[name] = tokens.index(text)
            continue
        found = model.special_id(name)
        if found is not None:
            ids[name] = found
        elif name in ("bos", "eos"):
            raise TokenizerError(
                f"the tokenizer has no {name} token ({model.names[name]!r}).",
                fix="pass the tokenizer.model of this very model.",
            )
    return ids


def _add_flags(config: Mapping[str, Any]) -> list[KeyValue]:
    flags = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token")}
    return [
        (f"{_GGML}add_{name}_token", "bool", flag)
        for name, flag in flags.items()
        if isinstance(flag, bool)
    ]


def _chat_templates(template: Any) -> list[KeyValue]:
    """One template, or transformers' list of named ones."""
    if template is None or template == "":
        return []
    if isinstance(template, str):
        return [(_TEMPLATE, "str", template)]
    if not isinstance(template, list) or not all(
        isinstance(t, Mapping)
        and isinstance(t.get("name"), str)
        and isinstance(t.get("template"), str)
        for t in template
    ):
        raise TokenizerError(
            "tokenizer_config.json: chat_template is neither a string nor a list of named templates."
        )
    named = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in t["name"]): t["template"]
        for t in template
    }
    default = named.pop("default", None)
    named.pop("", None)
    rows: list[KeyValue] = [(f"{_TEMPLATE}.{n}", "str", text) for n, text in sorted(named.items())]
    if named:
        rows.append(("tokenizer.chat_templates", "[str]", sorted(named)))
    return rows if default is None else [*rows, (_TEMPLATE, "str", default)]


def _gemma1_ids(tokens: list[str]) -> list[KeyValue]:
    """llama.cpp's converter writes the ids whatever the vocabulary; here only where they are right."""
    eot = _GEMMA1_IDS["eot"]
    if len(tokens) > eot and tokens[eot] == END_OF_TURN:
        return [(f"{_GGML}{name}_token_id", "u32", i) for name, i in _GEMMA1_IDS.items()]
    if END_OF_TURN in tokens:
        return [(f"{_GGML}eot_token_id", "u32", tokens.index(END_OF_TURN))]
    return []


def sentencepiece_from_gguf(kv: Mapping[str, Any]) -> bytes:
    """Rebuild ``tokenizer.model`` from GGUF key-values, with Gemma's normaliser settings.

    Encoding any text gives the same ids as the original model. User-defined pieces that GGUF calls control or normal
    tokens become user-defined again: control tokens other than pad, eos and bos, and normal ones whose score is +0, as
    only SentencePiece's trainer leaves it on pieces that were given to it.

    Args:
        kv: ``Source.metadata["kv"]`` of an opened GGUF file.

    Raises:
        TokenizerError: no SentencePiece vocabulary, or a contradictory one.
    """
    tokens, scores, types = _vocabulary(kv)
    specials = {name: _special(kv, tokens, name) for name in _SPECIALS}
    while len(tokens) and types[-1] == PieceType.UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop()  # rows of the embedding that the tokenizer does not have
        types.pop()
        scores.pop()
    kinds = _restored_types(tokens, scores, types, specials)
    pieces = [
        text.replace(" ", _SPACE) if kind is PieceType.USER_DEFINED else text
        for text, kind in zip(tokens, kinds, strict=True)
    ]
    _check_distinct(pieces)
    model = SentencePieceModel(
        tuple(pieces),
        tuple(s if k in _SCORED else 0.0 for s, k in zip(scores, kinds, strict=True)),
        tuple(kinds),
        model_type=BPE,
        byte_fallback=kinds.count(PieceType.BYTE) == 256,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        names={name: pieces[i] for name, i in specials.items()},
    )
    data = serialize(model)
    parse(data, "tokenizer.model rebuilt from GGUF")
    _load(data)
    return data


_MAX_SCORE = (2 - 2.0**-23) * 2.0**127  # tokenizer.model holds float32
_SCORED = (PieceType.NORMAL, PieceType.BYTE, PieceType.UNUSED)


def _vocabulary(kv: Mapping[str, Any]) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types, checked against each other."""
    kind = kv.get(f"{_GGML}model")
    if kind != "llama":
        raise TokenizerError(
            f"{_GGML}model is {kind!r}; only SentencePiece vocabularies ('llama') have a tokenizer.model.",
            fix="pass the tokenizer with --tokenizer.",
        )
    columns = {}
    for key in (TOKENS, SCORES, TYPES):
        value = kv.get(key)
        if value is None or not hasattr(value, "__len__") or isinstance(value, str):
            raise TokenizerError(f"{key} is missing.", fix="pass the tokenizer with --tokenizer.")
        columns[key] = value if isinstance(value, list) else value.tolist()
    lengths = {key: len(value) for key, value in columns.items()}
    if len(set(lengths.values())) != 1:
        raise TokenizerError(f"lengths differ: {lengths}.")
    tokens, scores, types = (list(columns[key]) for key in (TOKENS, SCORES, TYPES))
    for key, values, wanted in (
        (TOKENS, tokens, str),
        (SCORES, scores, float),
        (TYPES, types, int),
    ):
        if not all(isinstance(v, wanted) for v in values):
            raise TokenizerError(f"{key} holds other things than {wanted.__name__}.")
    for i, (text, score, code) in enumerate(zip(tokens, scores, types, strict=True)):
        if not text or "\0" in text or not abs(score) <= _MAX_SCORE or code not in _KINDS:
            raise TokenizerError(f"token {i} is {text!r} with score {score} and type {code}.")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as e:
        raise TokenizerError(f"a token has a lone surrogate ({e.object[e.start]!r}).") from e
    return tokens, scores, types


_KINDS = {int(kind): kind for kind in PieceType}


def _special(kv: Mapping[str, Any], tokens: list[str], name: str) -> int:
    """Id of a special piece. Gemma's text goes first: a tuned model's key may name another end token."""
    key, text = _SPECIALS[name]
    if text in tokens:
        return tokens.index(text)
    i = kv.get(key)
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(tokens):
        raise TokenizerError(
            f"there is no {text} token and {key} is {i!r}.",
            fix="pass the tokenizer with --tokenizer.",
        )
    return i


def _restored_types(
    tokens: list[str], scores: list[float], types: list[int], specials: Mapping[str, int]
) -> list[PieceType]:
    kinds = [_KINDS[code] for code in types]
    ranks = list(zip(scores, kinds, strict=True))
    for i, (score, kind) in enumerate(ranks):
        # the first merge has score -0; where a tool lost its sign, the second one (-1) follows it
        first_merge = ranks[i + 1 : i + 2] == [(-1.0, PieceType.NORMAL)]
        given = score == 0 and math.copysign(1, score) > 0 and not first_merge
        if kind is PieceType.CONTROL or (kind is PieceType.NORMAL and given):
            kinds[i] = PieceType.USER_DEFINED
    for name, i in specials.items():
        kinds[i] = PieceType.UNKNOWN if name == "unk" else PieceType.CONTROL
    return kinds


def _load(data: bytes) -> None:
    """Raise unless SentencePiece itself takes the model."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as e:
        raise TokenizerError(
            f"SentencePiece refuses the vocabulary: {e}.",
            fix="pass the tokenizer with --tokenizer.",
        ) from e
