"""tokenizer.model as data, against SentencePiece's own reading of the same bytes; damage."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats import sentencepiece_model as sm
from g2kit.formats.errors import G2Error, LimitError, TokenizerError
from g2kit.formats.sentencepiece_model import PieceType, SentencePieceModel, parse, serialize

OFFICIAL = (Path(__file__).parent / "data" / "gguf" / "tokenizer.model").read_bytes()


def trained(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world of tokens", "some other words here"] * 5),
        model_writer=out, minloglevel=2, num_threads=1, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return out.getvalue()


MODELS = {
    "gemma": OFFICIAL,
    "defaults": trained(vocab_size=40),
    "bpe": trained(vocab_size=320, model_type="bpe", byte_fallback=True, pad_id=0, bos_id=-1,
                   unk_id=2, eos_id=1, unk_piece="<?>", control_symbols=["<c>"],
                   user_defined_symbols=["<u>"], normalization_rule_name="identity",
                   add_dummy_prefix=False, remove_extra_whitespaces=False,
                   treat_whitespace_as_suffix=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_piece_is_as_sentencepiece_says(name: str) -> None:
    model = parse(MODELS[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])
    assert len(model.pieces) == len(theirs)
    for i, (piece, score, kind) in enumerate(
        zip(model.pieces, model.scores, model.types, strict=True)
    ):
        assert (piece, score) == (theirs.id_to_piece(i), theirs.get_score(i))
        assert (kind is PieceType.CONTROL) == theirs.is_control(i)
        assert (kind is PieceType.UNKNOWN) == theirs.is_unknown(i)
        assert (kind is PieceType.BYTE) == theirs.is_byte(i)
        assert (kind is PieceType.UNUSED) == theirs.is_unused(i)
    for special in ("bos", "eos", "pad", "unk"):
        found = model.special_id(special)
        assert (-1 if found is None else found) == getattr(theirs, f"{special}_id")()


def test_settings() -> None:
    gemma, plain, bpe = (parse(m) for m in MODELS.values())
    assert (gemma.model_type, gemma.byte_fallback, gemma.charsmap) == (sm.BPE, True, b"")
    assert (gemma.add_dummy_prefix, gemma.remove_extra_whitespaces) == (False, False)
    assert gemma.escape_whitespaces
    assert gemma.types[gemma.ids["<start_of_turn>"]] is PieceType.USER_DEFINED
    assert (plain.model_type, plain.byte_fallback, plain.add_dummy_prefix) == (1, False, True)
    assert len(plain.charsmap) > 1000  # nmt_nfkc, SentencePiece's default
    assert bpe.treat_whitespace_as_suffix
    assert bpe.names == {"unk": "<?>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}


@pytest.mark.parametrize("name", MODELS)
def test_serialize_is_the_inverse(name: str) -> None:
    model = parse(MODELS[name])
    assert parse(serialize(model)) == model
    ours = sentencepiece.SentencePieceProcessor(model_proto=serialize(model))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])
    for text in ("hello  world", " tokens é\n", "<u><c>x"):
        assert ours.encode(text) == theirs.encode(text)


def made(*pieces: str, score: float = 0.0) -> bytes:
    kinds = (PieceType.NORMAL,) * len(pieces)
    return serialize(SentencePieceModel(pieces, (score,) * len(pieces), kinds))


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"{}", "not a SentencePiece model"),
        (OFFICIAL[:-1], "are announced"),
        (OFFICIAL[:3000], "are announced"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7fx", "bytes are announced, 1 are left"),
        (b"\x0a" + b"\xff" * 30, "a number does not end"),
        (b"\x00\x00", "field number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x12\x00", "it has no pieces"),
        (b"\x0a\x05\x15\0\0\0\0", "piece 0 has no text"),
        (b"\x0a\x05\x0a\x01a\x18\x09", "piece 0 has type 9"),
        (b"\x0a\x03\x0a\x01\xff", "piece 0 is not UTF-8"),
        (made("a", score=float("nan")), "piece 0 has score nan"),
        (made("a", "b", "a"), "piece 'a' appears twice, again as 2"),
    ],
)
def test_damage_is_named(data: bytes, part: str) -> None:
    with pytest.raises(TokenizerError) as info:
        parse(data, "dir/tokenizer.model")
    assert str(info.value).startswith("dir/tokenizer.model: ")
    assert part in str(info.value)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm, "MAX_PIECES", 3)
    with pytest.raises(LimitError, match="more than 3 pieces"):
        parse(made("a", "b", "c", "d"))
    monkeypatch.setattr(sm, "MAX_BYTES", 10)
    with pytest.raises(LimitError, match="at most 10 are read"):
        parse(OFFICIAL)


@given(st.data())
@settings(max_examples=300)
def test_mutated_files_raise_only_our_errors(data: st.DataObject) -> None:
    raw = bytearray(serialize(parse(OFFICIAL))[-2500:])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        model = parse(bytes(raw))
    except G2Error:
        return
    assert len(model.pieces) == len(model.scores) == len(model.types) > 0


@given(st.binary(max_size=60))
def test_any_bytes(raw: bytes) -> None:
    try:
        parse(raw)
    except G2Error as e:
        assert e.fix is not None or e.code == "E_LIMIT"  # noqa: PT017


def test_a_vocabulary_of_gemmas_size() -> None:
    n = 256_000
    pieces = tuple(
        map("".join, itertools.islice(itertools.product("abcdefghijklmnop", repeat=5), n))
    )
    big = SentencePieceModel(pieces, tuple(map(float, range(n))), (PieceType.NORMAL,) * n, sm.BPE)
    assert parse(serialize(big)).pieces == pieces
