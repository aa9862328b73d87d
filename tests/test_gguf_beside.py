"""A tokenizer.model beside a GGUF file is used only if it is that file's own vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_identity import rewritten, swapped

from g2kit.convert import convert
from g2kit.convert.gguf_beside import check_beside
from g2kit.convert.gguf_vocab import SCORES, TOKENS, TYPES
from g2kit.formats.errors import TokenizerError
from g2kit.formats.sentencepiece_model import PieceType, parse
from g2kit.model.sample import sample_dir
from g2kit.verify.compare import compare_weights
from g2kit.verify.side import open_side

MODEL = (sample_dir() / "tokenizer.model").read_bytes()
PIECES = parse(MODEL)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the file."""
    out = tmp_path_factory.mktemp("g") / "m.gguf"
    convert(sample_dir(), out, to="gguf")
    return out


def beside(gguf: Path, folder: Path, tokenizer: bytes) -> Path:
    folder.mkdir()
    (folder / "m.gguf").hardlink_to(gguf)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder / "m.gguf"


def ordinary() -> list[int]:
    return [i for i, t in enumerate(PIECES.types) if t is PieceType.NORMAL]


def test_its_own_tokenizer_is_taken(gguf: Path, tmp_path: Path) -> None:
    path = beside(gguf, tmp_path / "d", MODEL)
    with open_side(path) as side:
        assert side.tokenizer_bytes == MODEL
        assert side.sidecars is not None
        assert side.sidecars.notes == ()
    report = convert(path, tmp_path / "o", to="safetensors")
    assert (tmp_path / "o/tokenizer.model").read_bytes() == MODEL
    assert not any("GGUF file's vocabulary" in n for n in report["notes"])


def test_another_vocabulary_is_refused_by_conversion_and_comparison(
    gguf: Path, tmp_path: Path
) -> None:
    i, j = ordinary()[100:102]
    path = beside(gguf, tmp_path / "d", swapped(i, j))
    said = rf"tokenizer.model.*not the one in the GGUF file.*token {i} is '.*' in the GGUF file, '.*; {j} is"
    with pytest.raises(TokenizerError, match=said):
        convert(path, tmp_path / "o", to="safetensors")
    assert not (tmp_path / "o").exists()
    with pytest.raises(TokenizerError, match=said):
        compare_weights(sample_dir(), path)
    # naming it says which one is meant
    convert(path, tmp_path / "o", to="safetensors", tokenizer=sample_dir() / "tokenizer.model")


def test_a_shorter_and_a_longer_one() -> None:
    kv = {TOKENS: list(PIECES.pieces), SCORES: list(PIECES.scores), TYPES: [int(t) for t in PIECES.types]}  # fmt: skip
    where = Path("tokenizer.model")
    assert check_beside(MODEL, kv, where) == []
    padded = {TOKENS: [*kv[TOKENS], "[PAD9]"], SCORES: [*kv[SCORES], -1e4], TYPES: [*kv[TYPES], 5]}
    assert check_beside(MODEL, padded, where) == []
    more = {TOKENS: [*kv[TOKENS], "new"], SCORES: [*kv[SCORES], -1.0], TYPES: [*kv[TYPES], 1]}
    with pytest.raises(TokenizerError, match="is 'new' in the GGUF file, absent beside it"):
        check_beside(MODEL, more, where)
    cut = max(ordinary())
    fewer = {k: v[:cut] for k, v in kv.items()}
    with pytest.raises(TokenizerError, match=rf"token {cut} is absent in the GGUF file"):
        check_beside(MODEL, fewer, where)


def test_other_scores_are_noted(gguf: Path, tmp_path: Path) -> None:
    scores = list(PIECES.scores)
    scores[ordinary()[7]] -= 0.5
    path = beside(gguf, tmp_path / "d", rewritten(PIECES, scores=scores))
    report = convert(path, tmp_path / "o", to="safetensors")
    assert any(
        n.startswith("1 scores of the GGUF file's vocabulary differ") for n in report["notes"]
    )


def test_special_pieces_may_be_called_otherwise(gguf: Path, tmp_path: Path) -> None:
    """Writers rename what no text is tokenized to."""
    pieces = list(PIECES.pieces)
    at = next(i for i, t in enumerate(PIECES.types) if t is PieceType.USER_DEFINED)
    pieces[at] = "<renamed>"
    path = beside(gguf, tmp_path / "d", rewritten(PIECES, pieces=pieces))
    with open_side(path) as side:
        assert side.tokenizer is not None
        assert side.tokenizer.pieces[at] == "<renamed>"
