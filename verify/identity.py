"""C0: whether two sides are the same model before a weight is read: configuration and tokenizer, field by field.

A difference is one of three kinds. *Sizes*: token ids or hidden states do not correspond, nothing can be compared.
*Function*: the same weights would compute something else. *Use*: logits are the same, but generation starts or stops
differently; where such a value was only assumed (from a released model's shapes), it is no evidence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from ..formats.errors import printable
from ..formats.sentencepiece_model import PieceType, SentencePieceModel
from ..model.config import GemmaConfig
from .config_file import file_differences, replaced_file, stated_types
from .side import Side, config_fields
from .side_files import only_one, side_file_differences
from .tokenizer import SentencePieceTokenizer

SIZE, FUNCTION, USE, NOTE = "size", "function", "use", "note"
# every field of GemmaConfig; a test holds the table against the dataclass
KINDS: dict[str, str] = {
    "family": SIZE, "num_hidden_layers": SIZE, "hidden_size": SIZE, "intermediate_size": SIZE,
    "num_attention_heads": SIZE, "num_key_value_heads": SIZE, "head_dim": SIZE, "vocab_size": SIZE,
    "query_pre_attn_scalar": FUNCTION, "attn_logit_softcapping": FUNCTION,
    "final_logit_softcapping": FUNCTION, "sliding_window": FUNCTION, "rope_theta": FUNCTION,
    "rms_norm_eps": FUNCTION,
    "max_position_embeddings": USE, "bos_token_id": USE, "eos_token_id": USE, "pad_token_id": NOTE,
}  # fmt: skip
_ASSUMED = ("shapes", "preset ", "default of every Gemma", "llama.cpp's rule")
# relative: GGUF and Keras keep these as float32
_ROUNDED = {"query_pre_attn_scalar", "rope_theta", "rms_norm_eps", "attn_logit_softcapping",
            "final_logit_softcapping"}  # fmt: skip
_SHOWN = 20
# what a tokenizer.model says of all pieces: how text is split, and normalised before
SETTINGS = (
    "model_type", "byte_fallback", "treat_whitespace_as_suffix", "add_dummy_prefix",
    "remove_extra_whitespaces", "escape_whitespaces", "charsmap", "names",
)  # fmt: skip
# short texts in several scripts; what counts is that both tokenizers give the same ids
CORPUS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\ttabs and\n\nnew lines  ",
    "def f(x: int) -> float:\n    return x ** 2 / 3.14159  # area",
    "1234567890 0.001 1e-6 2^10 ½ ³ №7 100 %",
    "Grüße aus Köln, ça va à Besançon, señor Núñez?",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "敏捷的棕色狐狸跳过懒狗。吾輩は猫である。名前はまだ無い。",
    "다람쥐 헌 쳇바퀴에 타고파",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है",
    "🙂🚀👩‍👩‍👧 ∀x∈ℝ: ∃n∈ℕ: n > x",
    "<bos><eos><start_of_turn>user\nhello<end_of_turn>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "A\u0301 vs \u00c1, ﬁ vs fi, \u200bzero width",
)


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        field: its name, such as ``sliding_window`` or ``tokenizer.pieces[107]``.
        reference, candidate: the two values, plain data.
        kind: ``size``, ``function``, ``use`` or ``note``.
    """

    field: str
    reference: Any
    candidate: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.field} is {_show(self.reference)} / {_show(self.candidate)}"

    def to_json(self) -> dict[str, Any]:
        """The report's row."""
        return {
            "field": self.field,
            "reference": self.reference,
            "candidate": self.candidate,
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Identity:
    """What C0 found.

    Attributes:
        differences: all of them, in the order of the table.
        fields: how many configuration fields were compared.
        pieces: how many tokenizer pieces were compared; None where a side has no tokenizer.
        untested: sentences on what could not be compared.
    """

    differences: tuple[Difference, ...]
    fields: int
    pieces: int | None
    untested: tuple[str, ...] = ()

    def of(self, *kinds: str) -> list[Difference]:
        """The differences of these kinds."""
        return [d for d in self.differences if d.kind in kinds]


def compare_identity(ref: Side, cand: Side) -> Identity:
    """Configuration and tokenizer of both sides."""
    assumed = {**_assumed(ref), **_assumed(cand)}
    differences = list(config_differences(ref.config, cand.config, assumed))
    differences += [Difference(*d, FUNCTION) for d in file_differences(ref, cand)]
    differences += [Difference(*d, USE) for d in stated_types(ref, cand)]
    pieces: int | None = None
    replaced = (replaced_file(ref, "reference"), replaced_file(cand, "candidate"))
    untested = [said for said in replaced if said is not None]
    lacking = [n for n, s in (("reference", ref), ("candidate", cand)) if s.tokenizer is None]
    if ref.tokenizer is not None and cand.tokenizer is not None:
        pieces = min(len(ref.tokenizer.pieces), len(cand.tokenizer.pieces))
        if ref.tokenizer_bytes != cand.tokenizer_bytes:
            differences += tokenizer_differences(ref, cand)
    else:
        who = "neither side carries" if len(lacking) == 2 else f"the {lacking[0]} carries"
        a = "a" if len(lacking) == 2 else "no"
        untested.append(f"Tokenizers were not compared: {who} {a} tokenizer.")
    differences += [
        Difference(field, a, b, USE if counts else NOTE)
        for field, a, b, counts in side_file_differences(ref, cand)
    ]
    if (alone := only_one(ref, cand)) is not None:
        untested.append(alone)
    for name, side in (("reference", ref), ("candidate", cand)):
        ignored = () if side.sidecars is None else side.sidecars.ignored
        untested += [f"Beside the {name}, {said}." for said in ignored]
    return Identity(tuple(differences), len(KINDS), pieces, tuple(untested))


def config_differences(
    ref: GemmaConfig, cand: GemmaConfig, assumed: dict[str, str] | None = None
) -> Iterator[Difference]:
    """Fields that differ.

    Args:
        ref: the reference's.
        cand: the candidate's.
        assumed: fields whose value a side did not carry, with where it came from.
    """
    a, b = config_fields(ref), config_fields(cand)
    for name, kind in KINDS.items():
        if _same(name, a[name], b[name]):
            continue
        if kind == USE and name in (assumed or {}):
            kind = NOTE
        yield Difference(name, a[name], b[name], kind)


def tokenizer_differences(ref: Side, cand: Side) -> Iterator[Difference]:
    """Where two tokenizers differ: pieces, scores and types by id, settings, the ids of :data:`CORPUS`."""
    one, two = ref.tokenizer, cand.tokenizer
    assert one is not None
    assert two is not None
    assert ref.tokenizer_bytes is not None
    assert cand.tokenizer_bytes is not None
    texts = piece_differences(one, two)
    yield from texts[:_SHOWN]
    if len(texts) > _SHOWN:
        kind = SIZE if any(d.kind == SIZE for d in texts) else FUNCTION
        yield Difference("tokenizer.pieces that differ", 0, len(texts), kind)
    rebuilt = ref.tokenizer_rebuilt or cand.tokenizer_rebuilt
    yield from _column_differences("scores", one, two, rebuilt)
    yield from _column_differences("types", one, two, rebuilt)
    for name in SETTINGS:
        a, b = (_setting(m, name) for m in (one, two))
        if a != b:
            yield Difference(f"tokenizer.{name}", a, b, FUNCTION)
    ids = (encode(ref.tokenizer_bytes), encode(cand.tokenizer_bytes))
    for i, (a, b) in enumerate(zip(*ids, strict=True)):
        if a != b:
            at = next(k for k, pair in enumerate(zip_longest(a, b)) if pair[0] != pair[1])
            yield Difference(f"tokenizer ids of corpus text {i}, from token {at}",
                             a[at : at + 8], b[at : at + 8], FUNCTION)  # fmt: skip


def _column_differences(
    name: str, one: SentencePieceModel, two: SentencePieceModel, rebuilt: bool
) -> Iterator[Difference]:
    """Scores or types that differ, by id.

    A vocabulary rebuilt from GGUF has those of ordinary pieces only: of the others they are notes.
    """
    columns = zip(getattr(one, name), getattr(two, name), strict=False)
    found = [(i, a, b) for i, (a, b) in enumerate(columns) if a != b]
    for counts in (True, False):
        kind = FUNCTION if counts else NOTE
        listed = [
            row for row in found
            if (not rebuilt or _ordinary(one, row[0]) or _ordinary(two, row[0])) is counts
        ]  # fmt: skip
        for i, a, b in listed[:_SHOWN]:
            shown = (a.name, b.name) if isinstance(a, PieceType) else (a, b)
            yield Difference(f"tokenizer.{name}[{i}]", shown[0], shown[1], kind)
        if len(listed) > _SHOWN:
            yield Difference(f"tokenizer.{name} that differ", 0, len(listed), kind)


def _setting(model: SentencePieceModel, name: str) -> Any:
    value = getattr(model, name)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:16]}"
    return value


def piece_differences(one: SentencePieceModel, two: SentencePieceModel) -> list[Difference]:
    """Ids with other texts; more ids on one side count as one difference, unless they are padding."""
    found = []
    for i, (a, b) in enumerate(zip(one.pieces, two.pieces, strict=False)):
        if a != b:
            ordinary = _ordinary(one, i) or _ordinary(two, i)
            found.append(Difference(f"tokenizer.pieces[{i}]", a, b, SIZE if ordinary else FUNCTION))
    if len(one.pieces) != len(two.pieces):
        longer = max(one, two, key=lambda m: len(m.pieces))
        rest = longer.types[min(len(one.pieces), len(two.pieces)) :]
        padding = all(t is PieceType.UNUSED for t in rest)
        kind = NOTE if padding else SIZE
        found.append(Difference("tokenizer pieces", len(one.pieces), len(two.pieces), kind))
    return found


def encode(tokenizer_model: bytes, texts: tuple[str, ...] = CORPUS) -> list[list[int]]:
    """Ids of each text, by SentencePiece itself."""
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    return [tokenizer.encode(t) for t in texts]


def _ordinary(model: SentencePieceModel, i: int) -> bool:
    """Whether text is tokenized to this id."""
    return i < len(model.types) and model.types[i] in (PieceType.NORMAL, PieceType.BYTE)


def _assumed(side: Side) -> dict[str, str]:
    if side.checkpoint is None:
        return {}
    origin = side.checkpoint.reading.origin
    return {n: o for n, o in origin.items() if o.startswith(_ASSUMED)}


def _same(name: str, a: Any, b: Any) -> bool:
    if name in _ROUNDED and a is not None and b is not None:
        return abs(float(a) - float(b)) <= 1e-7 * abs(float(a))
    return bool(a == b)


def _show(value: Any) -> str:
    return "null" if value is None else printable(str(value), 60)
