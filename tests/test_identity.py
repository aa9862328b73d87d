"""C0: every configuration field and the tokenizer, named one by one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert.open import Checkpoint
from g2kit.convert.sidecar_files import TOKENIZER_MODEL
from g2kit.formats.sentencepiece_model import PieceType, SentencePieceModel, parse, serialize
from g2kit.model.config import GemmaConfig
from g2kit.model.sample import sample_dir
from g2kit.verify.identity import (
    CORPUS,
    FUNCTION,
    KINDS,
    NOTE,
    SETTINGS,
    SIZE,
    USE,
    compare_identity,
    config_differences,
    piece_differences,
)
from g2kit.verify.side import Side, open_side

CONFIG = small("gemma2-2b")
MODEL = (sample_dir() / TOKENIZER_MODEL).read_bytes()
OTHER: dict[str, object] = {
    "query_pre_attn_scalar": 9.0, "attn_logit_softcapping": None, "final_logit_softcapping": 29.0,
    "sliding_window": 5, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "max_position_embeddings": 65,
    "bos_token_id": 3, "eos_token_id": (1, 7), "pad_token_id": 5,
}  # fmt: skip


def side(config: GemmaConfig = CONFIG, tokenizer: bytes | None = None) -> Side:
    made: Checkpoint = checkpoint(config, random_weights(config, 1))
    if tokenizer is not None:
        made.sidecars = made.sidecars.with_content(TOKENIZER_MODEL, tokenizer)
    found = Side(Path("memory"), made, None)
    if tokenizer is not None:
        found.sidecars = made.sidecars  # what travelling() would find beside a file
    return found


def test_the_table_has_every_field() -> None:
    assert set(KINDS) == set(GemmaConfig.__dataclass_fields__)


def test_equal_configurations_have_no_difference() -> None:
    assert compare_identity(side(), side()).differences == ()


@pytest.mark.parametrize("name", OTHER)
def test_each_field_is_named(name: str) -> None:
    found = list(config_differences(CONFIG, CONFIG.with_(**{name: OTHER[name]})))
    assert [d.field for d in found] == [name]
    assert found[0].kind == KINDS[name]
    assert name in str(found[0])


@pytest.mark.parametrize("changes", [
    {"vocab_size": 65}, {"hidden_size": 26}, {"num_hidden_layers": 3}, {"head_dim": 10},
])  # fmt: skip
def test_sizes_are_other_models(changes: dict[str, int]) -> None:
    other = CONFIG.with_(**changes)
    assert [d.kind for d in config_differences(CONFIG, other)] == [SIZE]


def test_what_was_only_assumed_is_a_note() -> None:
    other = CONFIG.with_(eos_token_id=(1, 7), sliding_window=5)
    found = list(
        config_differences(CONFIG, other, {"eos_token_id": "shapes", "sliding_window": "shapes"})
    )
    assert {d.field: d.kind for d in found} == {"eos_token_id": NOTE, "sliding_window": FUNCTION}


def test_values_that_a_file_keeps_as_float32_are_equal() -> None:
    eps = float.fromhex("0x1.0c6f7ap-20")  # 1e-6 as float32
    assert list(config_differences(CONFIG, CONFIG.with_(rms_norm_eps=eps))) == []
    assert len(list(config_differences(CONFIG, CONFIG.with_(rms_norm_eps=1.001e-6)))) == 1


def test_a_missing_tokenizer_is_said() -> None:
    found = compare_identity(side(tokenizer=MODEL), side())
    assert found.pieces is None
    assert "candidate carries no tokenizer" in found.untested[0]
    assert "neither side" in compare_identity(side(), side()).untested[0]


def swapped(i: int, j: int) -> bytes:
    """The sample's tokenizer with two pieces exchanged."""
    m = parse(MODEL)
    pieces = list(m.pieces)
    pieces[i], pieces[j] = pieces[j], pieces[i]
    return rewritten(m, pieces=pieces)


def rewritten(m: SentencePieceModel, **fields: object) -> bytes:
    values = {n: getattr(m, n) for n in SentencePieceModel.__dataclass_fields__} | fields
    values["pieces"], values["scores"] = tuple(values["pieces"]), tuple(values["scores"])
    return serialize(SentencePieceModel(**values))


def test_equal_tokenizers() -> None:
    found = compare_identity(side(tokenizer=MODEL), side(tokenizer=MODEL))
    assert found.differences == ()
    assert found.pieces == len(parse(MODEL).pieces)


def test_exchanged_pieces_are_another_vocabulary() -> None:
    m = parse(MODEL)
    i, j = [k for k, t in enumerate(m.types) if t is PieceType.NORMAL][100:102]
    found = compare_identity(side(tokenizer=MODEL), side(tokenizer=swapped(i, j)))
    pieces = [d for d in found.differences if "pieces" in d.field]
    assert [d.field for d in pieces] == [f"tokenizer.pieces[{i}]", f"tokenizer.pieces[{j}]"]
    assert {d.kind for d in pieces} == {SIZE}


def test_other_scores_give_other_ids() -> None:
    m = parse(MODEL)
    scores = [-s if t is PieceType.NORMAL else s for s, t in zip(m.scores, m.types, strict=True)]
    found = compare_identity(side(tokenizer=MODEL), side(tokenizer=rewritten(m, scores=scores)))
    names = [d.field for d in found.differences]
    assert any("tokenizer.scores[" in n for n in names)
    assert any("corpus text" in n for n in names)
    assert {d.kind for d in found.differences} == {FUNCTION}


def test_the_settings_are_all_that_is_not_by_id() -> None:
    by_id = {"pieces", "scores", "types"}
    assert {*SETTINGS, *by_id} == set(SentencePieceModel.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), [
    ("add_dummy_prefix", True), ("remove_extra_whitespaces", True),
    ("treat_whitespace_as_suffix", True), ("escape_whitespaces", False),
])  # fmt: skip
def test_settings_of_the_tokenizer_are_compared(name: str, value: object) -> None:
    other = rewritten(parse(MODEL), **{name: value})
    found = compare_identity(side(tokenizer=MODEL), side(tokenizer=other)).differences
    assert (f"tokenizer.{name}", FUNCTION) in [(d.field, d.kind) for d in found]


@pytest.mark.parametrize("kind", [PieceType.USER_DEFINED, PieceType.NORMAL])
def test_types_and_scores_are_compared_by_id(kind: PieceType) -> None:
    m = parse(MODEL)
    i = [k for k, t in enumerate(m.types) if t is kind][-1]
    types = tuple(PieceType.UNUSED if k == i else t for k, t in enumerate(m.types))
    scores = [s - 0.5 if k == i else s for k, s in enumerate(m.scores)]
    for name, values in (("types", types), ("scores", scores)):
        other = rewritten(m, **{name: values})
        found = compare_identity(side(tokenizer=MODEL), side(tokenizer=other)).differences
        assert (f"tokenizer.{name}[{i}]", FUNCTION) in [(d.field, d.kind) for d in found]


def test_many_differences_are_counted() -> None:
    m = parse(MODEL)
    normal = [k for k, t in enumerate(m.types) if t is PieceType.NORMAL]
    pieces = list(m.pieces)
    for k in normal[:50]:
        pieces[k] = f"x{k}x"
    other = parse(rewritten(m, pieces=pieces))
    assert len(piece_differences(m, other)) == 50
    found = compare_identity(side(tokenizer=MODEL), side(tokenizer=rewritten(m, pieces=pieces)))
    assert any(
        d.field == "tokenizer.pieces that differ" and d.candidate == 50 for d in found.differences
    )


def test_more_pieces_on_one_side() -> None:
    m = parse(MODEL)
    longer = rewritten(
        m, pieces=[*m.pieces, "novel"], scores=[*m.scores, -1.0], types=(*m.types, PieceType.NORMAL)
    )
    assert piece_differences(m, parse(longer))[0].kind == SIZE
    padded = rewritten(
        m, pieces=[*m.pieces, "[PAD]"], scores=[*m.scores, -1.0], types=(*m.types, PieceType.UNUSED)
    )
    assert piece_differences(m, parse(padded))[0].kind == NOTE


def test_renamed_special_tokens_are_no_other_vocabulary() -> None:
    m = parse(MODEL)
    i = next(k for k, t in enumerate(m.types) if t is PieceType.USER_DEFINED)
    pieces = [p if k != i else "<renamed>" for k, p in enumerate(m.pieces)]
    found = piece_differences(m, parse(rewritten(m, pieces=pieces)))
    assert [d.kind for d in found] == [FUNCTION]


def test_the_corpus_has_several_scripts() -> None:
    names = " ".join(unicodedata.name(c, "") for c in "".join(CORPUS))
    for script in (
        "LATIN",
        "CYRILLIC",
        "CJK",
        "HIRAGANA",
        "HANGUL",
        "ARABIC",
        "DEVANAGARI",
        "ROCKET",
    ):
        assert script in names


def test_a_side_says_what_it_is() -> None:
    with open_side(sample_dir()) as found:
        said = found.describe(None)
    assert said["dtypes"] == {"bfloat16": 46}
    assert said["config_from"] == "config.json"
    assert said["tokenizer"]["pieces"] == 3072
    assert said["parameters"] == 3_936_512
    assert KINDS["eos_token_id"] == USE
