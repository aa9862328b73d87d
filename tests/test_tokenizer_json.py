"""tokenizer.json against SentencePiece itself, in ``tokenizers`` and in transformers; and that the proof can fail."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from g2kit.convert import tokenizer_json as tj
from g2kit.convert.tokenizer_json import build, first_difference, merge_list, tokenizer_json
from g2kit.formats.errors import TokenizerError
from g2kit.formats.sentencepiece_model import PieceType, SentencePieceModel, parse, serialize

OFFICIAL = (Path(__file__).parent / "data" / "gguf" / "tokenizer.model").read_bytes()
DEFINED = [
    "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<start_of_turn>", "<end_of_turn>",
    *("\n" * i for i in range(1, 9)), *("▁" * i for i in range(2, 9)), "<table>", "</h1>", "\t\t", "\t\t\t",
]  # fmt: skip


@cache
def trained() -> bytes:
    """A model with Gemma's settings, of Python's own source: other merges than the official fixture has."""
    text = "\n".join(Path(m.__file__ or "").read_text()[:60_000] for m in (json, random, io))
    text += "\nçà et là, naïve; 東京 大阪 京都 東京都; привет мир; 1234567890\n" * 30
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=out, model_type="bpe",
        vocab_size=900, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>", unk_piece="<unk>",
        user_defined_symbols=DEFINED, num_threads=1, minloglevel=2, hard_vocab_limit=False,
        character_coverage=0.998,
    )  # fmt: skip
    return out.getvalue()


MODELS = {"official": lambda: OFFICIAL, "trained": trained}


@cache
def pair(name: str) -> tuple[Tokenizer, Any, SentencePieceModel]:
    raw = MODELS[name]()
    model = parse(raw)
    built, reason = tokenizer_json(raw, model)
    assert reason is None
    assert built is not None
    return (
        Tokenizer.from_str(built.decode()), sentencepiece.SentencePieceProcessor(model_proto=raw), model,
    )  # fmt: skip


def same(name: str, text: str) -> None:
    ours, theirs, _ = pair(name)
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


MARKS = ("<bos>", "<eos>", "<pad>", "<unk>")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CLOSE = st.text("  ▁\n\tabeorst<>/_=01.é東", max_size=80)


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@settings(max_examples=250)
def test_same_ids_as_sentencepiece(name: str, data: st.DataObject) -> None:
    _, _, model = pair(name)
    pieces = st.lists(st.sampled_from(model.pieces), max_size=20).map("".join)
    words = st.lists(st.sampled_from([*DEFINED, "a", " "]), max_size=20).map("".join)
    text = data.draw(st.one_of(TEXT, CLOSE, pieces, words))
    if not any(mark in text for mark in MARKS):
        same(name, text)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_the_text_back(name: str) -> None:
    ours, theirs, _ = pair(name)
    for text in (
        "hello  world\n\n x",
        "naïve 東京 \U0001f600",
        "<start_of_turn>user\nhi<end_of_turn>",
    ):
        ids = theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == text == theirs.decode(ids)


def test_bos_comes_first_once() -> None:
    ours, theirs, _ = pair("official")
    assert ours.encode("hello world").ids == [2, *theirs.encode("hello world")]
    assert ours.encode("a", "b").ids == [2, *theirs.encode("a"), 2, *theirs.encode("b")]


def test_control_tokens_in_text_are_tokens_and_turns_are_special() -> None:
    ours, theirs, model = pair("official")
    assert (
        ours.encode("<bos>x", add_special_tokens=False).ids[0] == 2
    )  # SentencePiece spells it out
    assert theirs.encode("<bos>x")[0] != 2
    turn = model.ids["<start_of_turn>"]
    assert ours.get_added_tokens_decoder()[turn].special
    assert ours.get_added_tokens_decoder()[0].special
    assert not ours.get_added_tokens_decoder()[model.ids["<unused0>"]].special
    assert ours.get_vocab_size() == len(model.pieces)


def test_the_same_model_gives_the_same_bytes() -> None:
    model = parse(trained())
    assert build(model) == build(parse(trained()))
    merges = json.loads(build(model))["model"]["merges"]
    assert merges[0].count(" ") == 1  # the form every version of the reader takes


def test_transformers_loads_it_and_agrees(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    raw = trained()
    model = parse(raw)
    (tmp_path / "tokenizer.json").write_bytes(build(model))
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>",
              "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    _, right, _ = pair("trained")
    texts = list(tj._proof_texts(model))
    assert len(texts) > 8000
    for text, ids in zip(texts, theirs(texts).input_ids, strict=True):
        assert ids == [2, *right.encode(text)], text


# ---- that the proof can fail


def broken(change: str) -> bytes:
    tree = json.loads(build(parse(OFFICIAL)))
    merges, tokens = tree["model"]["merges"], tree["added_tokens"]
    if change == "a merge is missing":
        del merges[40]
    elif change == "two merges change places":
        i, j = merges.index("i n"), merges.index("t i")
        merges[i], merges[j] = merges[j], merges[i]
    elif change == "runs of spaces are left to the merges":
        tree["added_tokens"] = [t for t in tokens if "▁" not in t["content"]]
        tree["model"]["merges"] = [m for m in merges if m != "▁ ▁"]
    elif change == "runs of lines are left to the merges":
        tree["added_tokens"] = [t for t in tokens if "\n" not in t["content"]]
        tree["model"]["merges"] = [m for m in merges if "\n" not in m]
    elif change == "spaces stay":
        tree["normalizer"] = None
    elif change == "unknown characters are no bytes":
        tree["model"]["byte_fallback"] = False
    elif change == "two ids change places":
        vocab = tree["model"]["vocab"]
        vocab["or"], vocab["an"] = vocab["an"], vocab["or"]
    return json.dumps(tree).encode()


CHANGES = ["a merge is missing", "two merges change places", "runs of spaces are left to the merges",
           "runs of lines are left to the merges", "spaces stay", "unknown characters are no bytes",
           "two ids change places"]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_proof_notices(change: str) -> None:
    model = parse(OFFICIAL)
    assert first_difference(broken("nothing"), OFFICIAL, model) is None
    found = first_difference(broken(change), OFFICIAL, model)
    assert found is not None
    assert "would become" in found


def test_a_difference_leaves_the_file_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tj, "build", lambda _: broken("a merge is missing"))
    built, reason = tokenizer_json(OFFICIAL, parse(OFFICIAL))
    assert built is None
    assert "instead of" in str(reason)


# ---- models no tokenizer.json can follow


NAMES = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}


def edited(**changes: Any) -> SentencePieceModel:
    return replace(parse(OFFICIAL), **changes)


def with_pieces(*pieces: tuple[str, PieceType]) -> SentencePieceModel:
    base = parse(OFFICIAL)
    return replace(
        base, pieces=base.pieces + tuple(p for p, _ in pieces),
        scores=base.scores + tuple(-300.0 - i for i in range(len(pieces))),
        types=base.types + tuple(t for _, t in pieces),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (edited(model_type=1), "not a BPE model"),
        (edited(byte_fallback=False), "no byte fallback"),
        (edited(add_dummy_prefix=True), "puts a space before the text"),
        (edited(remove_extra_whitespaces=True), "shortens runs of spaces"),
        (edited(escape_whitespaces=False), "leaves spaces as they are"),
        (edited(charsmap=b"\0\0\0\0"), "normalises the text"),
        (edited(names=NAMES | {"unk": "<x>"}), "no <unk> piece"),
        (edited(names=NAMES | {"bos": "<s>"}), "no <bos> piece"),
        (with_pieces(("a b", PieceType.NORMAL)), "contain spaces"),
        (with_pieces(("zzz", PieceType.UNUSED)), "unused pieces"),
        (with_pieces(("éé", PieceType.NORMAL)), "no pieces themselves, such as 'é'"),
    ],
)
def test_unsuitable_models_are_left_out(model: SentencePieceModel, reason: str) -> None:
    built, why = tokenizer_json(serialize(model), model)
    assert built is None
    assert reason in str(why)


def test_merges_of_an_ascii_character_that_is_no_piece() -> None:
    # SentencePiece merges it all the same; without the piece, tokenizers would spell out bytes
    model = with_pieces(("@e", PieceType.NORMAL), ("@en", PieceType.NORMAL))
    raw = serialize(model)
    built, reason = tokenizer_json(raw, model)
    assert (reason, built is not None) == (None, True)
    ours = Tokenizer.from_str((built or b"").decode())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    for text in ("@en", "@e", "x@", "@@en@", "e@n"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)
    assert ours.encode("@", add_special_tokens=False).ids == [model.ids["<0x40>"]]
    assert ours.encode("@en", add_special_tokens=False).ids == [len(model.pieces) - 1]


def test_a_merge_older_readers_take_for_a_comment() -> None:
    parts = ["#", "v", "#v", "#ve", "#ver", "s", "#vers", "i", "#versi", "o", "#versio", "n", "#version", "x",
             "#versionx"]  # fmt: skip
    known = parse(OFFICIAL).ids
    model = with_pieces(*((p, PieceType.NORMAL) for p in parts if p not in known))
    assert ("#version", "x") in merge_list(model)
    built, reason = tokenizer_json(serialize(model), model)
    assert reason is None
    assert ["#version", "x"] in json.loads(built or b"")["model"]["merges"]


def test_byte_and_control_pieces_are_never_merged_from_text() -> None:
    model = with_pieces(
        *((p, PieceType.NORMAL) for p in ("<", "0x0", "A>", "<0x0", "x0", "0x0A>", ">", "A"))
    )
    made = {left + right for left, right in merge_list(model)}
    assert "<0x0A>" not in made
    assert "<0x0" in made
    _, reason = tokenizer_json(serialize(model), model)
    assert reason is None  # the proof texts have "<0x0A>" in them


def test_sentencepiece_refusing_the_file_is_our_error() -> None:
    with pytest.raises(TokenizerError, match="SentencePiece refuses"):
        tj.load_sentencepiece(b"\x0a\x03abc")
