"""A recording carries the model's tokenizer: another one in the candidate is named as it is for checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from memory import checkpoint
from recording_case import few_probes, first_version, make, resigned, sample
from test_identity import rewritten, swapped

from g2kit.convert import convert
from g2kit.formats.errors import (
    ChecksumError,
    FileIOError,
    FormatError,
    G2Error,
    TokenizerError,
    TruncatedError,
)
from g2kit.formats.sentencepiece_model import PieceType, parse
from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.compare import compare
from g2kit.verify.identity import FUNCTION, SIZE, compare_identity
from g2kit.verify.recording import open_recording, record
from g2kit.verify.runners import open_runner
from g2kit.verify.side import open_side

pytest.importorskip("torch")
MODEL = (sample_dir() / schema.TOKENIZER).read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "rec", with_embedding=True)


def with_tokenizer(out: Path, tokenizer: bytes) -> Path:
    """The sample with another tokenizer."""
    shutil.copytree(sample_dir(), out)
    (out / schema.TOKENIZER).write_bytes(tokenizer)
    return out


def test_the_tokenizer_travels(good: Path) -> None:
    with open_recording(good) as r, open_side(good) as side, open_side(sample_dir()) as model:
        assert r.tokenizer_model == MODEL
        assert side.describe(None)["tokenizer"] == model.describe(None)["tokenizer"]
        assert not side.tokenizer_rebuilt
        found = compare_identity(side, model)
    assert found.differences == ()
    assert found.pieces == len(parse(MODEL).pieces)
    assert not any("tokenizer" in text.lower() for text in found.untested)


def test_another_vocabulary_is_an_error_that_names_the_pieces(good: Path, tmp_path: Path) -> None:
    m = parse(MODEL)
    i, j = [k for k, t in enumerate(m.types) if t is PieceType.NORMAL][100:102]
    document = compare(good, with_tokenizer(tmp_path / "m", swapped(i, j)))
    assert document["verdict"] == "ERROR"
    named = {d["field"]: d["kind"] for d in document["differences"] if d["kind"] == SIZE}
    assert named == {f"tokenizer.pieces[{i}]": SIZE, f"tokenizer.pieces[{j}]": SIZE}


def test_settings_and_scores_are_named(good: Path, tmp_path: Path) -> None:
    m = parse(MODEL)
    scores = [-s if t is PieceType.NORMAL else s for s, t in zip(m.scores, m.types, strict=True)]
    other = rewritten(m, scores=scores, add_dummy_prefix=True)
    with (
        open_side(good) as one,
        open_side(with_tokenizer(tmp_path / "m", other)) as two,
    ):
        found = compare_identity(one, two).differences
    assert {d.kind for d in found} == {FUNCTION}
    names = " ".join(d.field for d in found)
    for part in ("tokenizer.scores[", "tokenizer.add_dummy_prefix", "corpus text"):
        assert part in names


def test_a_vocabulary_rebuilt_from_gguf_is_the_same_tokenizer(good: Path, tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "x.gguf", to="gguf", dtype="f32")
    with open_side(tmp_path / "x.gguf") as side:
        assert side.tokenizer_rebuilt
        with open_runner("torch", side.opened) as runner:
            record(runner, few_probes(), tmp_path / "rec", checkpoint=side.opened)
    with open_side(tmp_path / "rec") as one, open_side(good) as two:
        assert one.tokenizer_rebuilt
        assert one.tokenizer_bytes != two.tokenizer_bytes
        found = compare_identity(one, two)
    assert [d for d in found.differences if d.kind in (SIZE, FUNCTION)] == []


def test_recordings_of_the_first_version_are_read(good: Path, tmp_path: Path) -> None:
    old = first_version(good, tmp_path / "old")
    document = compare(old, sample_dir())
    claims = {c["id"]: c["verdict"] for c in document["claims"]}
    assert claims["C0"] == "PASS"
    assert any("the reference carries no tokenizer" in text for text in document["not_verified"])


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    weights = {n: t.read() for n, t in sample().tensors.items()}
    with open_runner("torch", checkpoint(sample().config, weights)) as runner:
        record(
            runner, few_probes(), tmp_path / "r", checkpoint=checkpoint(sample().config, weights)
        )
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [schema.ARRAYS, schema.DOCUMENT]
    with open_recording(tmp_path / "r") as r:
        assert r.tokenizer_model is None


DAMAGE: dict[str, tuple[Any, type[G2Error], str]] = {
    "gone": (lambda p: p.unlink(), FileIOError, "tokenizer.model: cannot open"),
    "other": (lambda p: p.write_bytes(MODEL[:-1] + b"?"), ChecksumError, "tokenizer.model: the file's sha256"),
    "cut": (lambda p: p.write_bytes(MODEL[:99]), TruncatedError, "tokenizer.model: the file has 99 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(good: Path, tmp_path: Path, name: str) -> None:
    edit, error, match = DAMAGE[name]
    copy = Path(shutil.copytree(good, tmp_path / "r"))
    edit(copy / schema.TOKENIZER)
    with pytest.raises(error, match=match):
        open_recording(copy)


def test_a_document_that_contradicts_the_tokenizer(good: Path, tmp_path: Path) -> None:
    def fewer(document: dict[str, Any]) -> None:
        document["model"]["tokenizer"]["pieces"] = 5

    def none(document: dict[str, Any]) -> None:
        document["model"]["tokenizer"] = None

    with pytest.raises(FormatError, match=r"has \d+ pieces, recording.json says 5"):
        open_recording(resigned(good, tmp_path / "a", document=fewer))
    with pytest.raises(FormatError, match=r"files must be an object with arrays.safetensors\."):
        open_recording(resigned(good, tmp_path / "b", document=none))


def test_no_tokenizer_at_all(good: Path, tmp_path: Path) -> None:
    """Right hashes over what is no SentencePiece file."""
    import hashlib

    def hashed(document: dict[str, Any]) -> None:
        entry = document["files"][schema.TOKENIZER]
        entry["size"], entry["sha256"] = 3, hashlib.sha256(b"abc").hexdigest()

    made = resigned(good, tmp_path / "r", document=hashed)
    (made / schema.TOKENIZER).write_bytes(b"abc")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        open_recording(made)
