"""The small files that users load with the weights, compared: tokenizer.json, tokenizer and generation settings, chat template.

A format that cannot hold a file is no difference: what only one side has is said to be unverified. Where readers have
a default, or g2conv mends what is known to go wrong, that counts as what the file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from ..convert.sidecar_files import (
    GENERATION,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    Sidecars,
)
from ..convert.tokenizer_check import token_ids
from ..formats.sentencepiece_model import PieceType
from .side import Side

Found = tuple[str, Any, Any, bool]  # field, reference, candidate, whether it counts
_SHOWN = 20
_JSON = (TOKENIZER_CONFIG, GENERATION, SPECIAL_TOKENS)
CODE, CLASS = "auto_map", "tokenizer_class"
# all read Gemma's files alike
_CLASSES = (None, "GemmaTokenizer", "GemmaTokenizerFast",
            "PreTrainedTokenizerFast", "TokenizersBackend")  # fmt: skip
# about the file, or compared elsewhere
_SKIPPED = {
    TOKENIZER_CONFIG: {CODE, CLASS, "chat_template", "add_bos_token", "add_eos_token",
                       "transformers_version", "name_or_path"},
    GENERATION: {"auto_map", "_from_model_config", "transformers_version"},
    SPECIAL_TOKENS: set(),
}  # fmt: skip
_GGML = "tokenizer.ggml."
# what Gemma needs, and what readers take where nothing is said; GGUF's add_space_prefix is true unless said
_FLAGS = {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": False}


def side_file_differences(ref: Side, cand: Side) -> Iterator[Found]:
    """What differs in files of which both sides have one; nothing is read of a recording."""
    a, b = ref.sidecars, cand.sidecars
    if a is None or b is None:
        return
    yield from _flag_differences(ref, cand)
    templates = _template(ref), _template(cand)
    if None not in templates and templates[0] != templates[1]:
        yield "chat template", *templates, True
    trees = _json(ref, TOKENIZER_JSON), _json(cand, TOKENIZER_JSON)
    same = trees[0] == trees[1]
    for name in _JSON:
        one, two = _json(ref, name), _json(cand, name)
        if one is not None and two is not None:
            yield from _by_key(name, one, two)
            if name == TOKENIZER_CONFIG:
                yield from _loaders(one, two)
    if not same and trees[0] is not None and trees[1] is not None:
        yield from _trees(trees[0], trees[1], a, b)
    if not same or ref.tokenizer_bytes != cand.tokenizer_bytes:
        yield from _own_tokenizer(ref, cand, trees)


def only_one(ref: Side, cand: Side) -> str | None:
    """A sentence on the side files that one side has and the other not; None without any."""
    if ref.sidecars is None or cand.sidecars is None:
        return None
    sides = {"reference": _kinds(ref), "candidate": _kinds(cand)}
    alone = [
        f"{name} ({side})"
        for side, other in (("reference", "candidate"), ("candidate", "reference"))
        for name in sorted(sides[side] - sides[other])
    ]
    if not alone:
        return None
    why = "only one side has them"
    if _gguf(ref) or _gguf(cand):
        why = "who loads a GGUF file takes none of them from beside it"
    return f"Not compared, {why}: {', '.join(alone)}."


def _kinds(side: Side) -> set[str]:
    found = {name for name in (TOKENIZER_JSON, *_JSON) if _json(side, name) is not None}
    return found | ({"chat template"} if _template(side) is not None else set())


def _gguf(side: Side) -> Mapping[str, Any]:
    """Key-values of a GGUF file with a vocabulary; who loads it takes nothing from the files beside it."""
    kv = {} if side.checkpoint is None else side.checkpoint.source.metadata.get("kv", {})
    return kv if f"{_GGML}model" in kv else {}


def _json(side: Side, name: str) -> dict[str, Any] | None:
    return None if side.sidecars is None or _gguf(side) else side.sidecars.json(name)


def _template(side: Side) -> str | None:
    if kv := _gguf(side):
        found = kv.get("tokenizer.chat_template")
        return None if found is None else str(found)
    return None if side.sidecars is None else side.sidecars.chat_template


def _flags(side: Side) -> dict[str, bool]:
    """How a text's ids begin and end, by what the side says of itself."""
    said: Mapping[str, Any] = _json(side, TOKENIZER_CONFIG) or {}
    if kv := _gguf(side):
        said = {"add_space_prefix": True} | {
            k: kv[f"{_GGML}{k}"] for k in _FLAGS if f"{_GGML}{k}" in kv
        }
    return {k: bool(said[k]) if said.get(k) is not None else v for k, v in _FLAGS.items()}


def _flag_differences(ref: Side, cand: Side) -> Iterator[Found]:
    assert ref.sidecars is not None
    assert cand.sidecars is not None
    if not all({TOKENIZER_MODEL, TOKENIZER_JSON} & set(s.names)
               for s in (ref.sidecars, cand.sidecars)):  # fmt: skip
        return
    one, two = _flags(ref), _flags(cand)
    for key, needed in _FLAGS.items():
        if one[key] != two[key]:  # a candidate that has what Gemma needs was mended
            yield f"tokenizer.{key}", one[key], two[key], two[key] != needed


def _by_key(name: str, one: dict[str, Any], two: dict[str, Any]) -> Iterator[Found]:
    for key in sorted(one.keys() & two.keys() - _SKIPPED[name]):
        a, b = one[key], two[key]
        if name == GENERATION and key.endswith("_token_id"):
            a, b = _listed(a), _listed(b)
            if set(a) != set(
                b
            ):  # stopping at more ids is how g2conv mends instruction-tuned models
                yield f"{name} {key}", a, b, not (key == "eos_token_id" and set(a) < set(b))
        elif _plain(a) != _plain(b):
            yield f"{name} {key}", _plain(a), _plain(b), True
    for key in sorted((one.keys() ^ two.keys()) - _SKIPPED[name]):
        yield f"{name} {key}", one.get(key), two.get(key), False


def _loaders(one: dict[str, Any], two: dict[str, Any]) -> Iterator[Found]:
    """What of the two makes a reader load another tokenizer than Gemma's; what the candidate left out is no loss."""
    for key, same in ((CLASS, _CLASSES), (CODE, (None,))):
        a, b = one.get(key), two.get(key)
        if a != b and b not in same:
            yield f"{TOKENIZER_CONFIG} {key}", a, b, True


def _listed(value: Any) -> list[Any]:
    return [str(v) if isinstance(v, dict | list) else v
            for v in (value if isinstance(value, list) else [value])]  # fmt: skip


def _plain(value: Any) -> Any:
    """A token by its text, however it is written."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _trees(one: dict[str, Any], two: dict[str, Any], a: Sidecars, b: Sidecars) -> Iterator[Found]:
    """Two tokenizer.json: the ids of all tokens, then every other part."""
    ids = token_ids(one, a.where(TOKENIZER_JSON)), token_ids(two, b.where(TOKENIZER_JSON))
    other = [t for t in {**ids[0], **ids[1]} if ids[0].get(t) != ids[1].get(t)]
    for token in other[:_SHOWN]:
        yield f"tokenizer.json id of {token!r}", ids[0].get(token), ids[1].get(token), True
    if len(other) > _SHOWN:
        yield "tokenizer.json ids that differ", 0, len(other), True
    models = one["model"], two["model"]
    merges = [_merges(m.get("merges")) for m in models]
    if merges[0] != merges[1]:
        pairs = enumerate(zip_longest(*merges))
        at, (a_merge, b_merge) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        yield f"tokenizer.json merges, from {at} on", a_merge, b_merge, True
    for key in sorted({*models[0], *models[1]} - {"vocab", "merges"}):
        if models[0].get(key) != models[1].get(key):
            yield f"tokenizer.json model.{key}", models[0].get(key), models[1].get(key), True
    for key in sorted({*one, *two} - {"model", "version"}):
        if one.get(key) != two.get(key):
            a_part, b_part = str(one.get(key))[:200], str(two.get(key))[:200]
            yield f"tokenizer.json {key}", a_part, b_part, True


def _merges(value: Any) -> list[Any]:
    """Merges as pairs; older files write them with a space between."""
    found = value if isinstance(value, list) else []
    return [m.split(" ") if isinstance(m, str) else m for m in found]


def _own_tokenizer(
    ref: Side, cand: Side, trees: tuple[dict[str, Any] | None, ...]
) -> Iterator[Found]:
    """Ordinary pieces that a side's tokenizer.json has under another id than its own tokenizer.model."""
    wrong = []
    for side, tree in zip((ref, cand), trees, strict=True):
        moved: dict[int, tuple[str, str]] = {}
        if side.tokenizer is not None and tree is not None and side.sidecars is not None:
            ids = token_ids(tree, side.sidecars.where(TOKENIZER_JSON))
            texts = {i: token for token, i in ids.items()}
            for i, (piece, kind) in enumerate(
                zip(side.tokenizer.pieces, side.tokenizer.types, strict=True)
            ):
                if kind is PieceType.NORMAL and texts.get(i, piece) != piece:
                    moved[i] = piece, texts[i]
        wrong.append(moved)
    for i in sorted({*wrong[0], *wrong[1]})[:_SHOWN]:
        a, b = wrong[0].get(i), wrong[1].get(i)
        if a != b:
            yield f"tokenizer.json against tokenizer.model, id {i}", _pair(a), _pair(b), True


def _pair(found: tuple[str, str] | None) -> str:
    return "the same" if found is None else f"{found[1]!r} for {found[0]!r}"
