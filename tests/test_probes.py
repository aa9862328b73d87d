"""What is run: the same ids everywhere, every regime reached, nothing left out in silence, bad input named."""

from __future__ import annotations

import contextlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from configs import ARCHITECTURES, small
from hypothesis import given
from hypothesis import strategies as st
from memory import checkpoint, random_weights

from g2kit.convert import convert, open_checkpoint
from g2kit.formats import named_files
from g2kit.formats.errors import (
    FileIOError,
    FormatError,
    G2Error,
    LimitError,
    NotFoundError,
    TokenizerError,
    UsageError,
)
from g2kit.model.config import PRESETS, GemmaConfig
from g2kit.model.sample import heldout_text, sample_dir
from g2kit.verify.probes import PROFILES, Probe, ProbeSet, build_probes, describe, tokenizer_of
from g2kit.verify.text_probes import documents, snippets, user_tokens
from g2kit.verify.tokenizer import SentencePieceTokenizer

# ids of the sample's ci profile and of random ids; a change makes old recordings incomparable
SAMPLE_CI = "5abd625acba0b0b1b0943798a6fb24313fced56e608b2af0594de8c517476396"
RANDOM_FULL = "77e69c6a0ad78d1b824a9295381a2293d364989fdf3294e7c9b7ef2d2b5f391d"


@pytest.fixture(scope="module")
def sample() -> tuple[GemmaConfig, SentencePieceTokenizer]:
    with open_checkpoint(sample_dir()) as opened:
        tokenizer = tokenizer_of(opened)
        assert tokenizer is not None
        return opened.config, tokenizer


@pytest.fixture(scope="module")
def ci(sample: tuple[GemmaConfig, SentencePieceTokenizer]) -> ProbeSet:
    return build_probes(*sample, "ci")


def why(probes: ProbeSet, group: str) -> str:
    return " ".join(s["why"] for s in probes.skipped if s["group"] == group)


# ---- the texts ----------------------------------------------------------------------------------------------------


def scripts(text: str) -> set[str]:
    """First words of the Unicode names of a text's letters: LATIN, CYRILLIC, CJK, …"""
    return {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}


def test_documents_are_many_and_of_many_kinds() -> None:
    found = documents()
    assert len(found) >= 64
    assert max(Counter(t.text for t in found).values()) == 1
    assert max(Counter(t.name for t in found).values()) == 1
    assert {"code", "maths", "dialogue", "english", "data"} <= {t.category for t in found}
    assert all(len(t.text) >= 100 for t in found)
    wanted = {
        "LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI",
        "BENGALI", "TAMIL", "TELUGU", "THAI", "GEORGIAN", "ARMENIAN", "ETHIOPIC",
    }  # fmt: skip
    assert wanted <= scripts("".join(t.text for t in found))
    assert len(snippets()) == 16
    assert len(scripts("".join(t.text for t in snippets()))) >= 9


def test_any_beginning_of_the_documents_has_every_kind() -> None:
    kinds = {t.category for t in documents()}
    assert {t.category for t in documents()[: len(kinds)]} == kinds


# ---- what the profiles run ----------------------------------------------------------------------------------------


def test_the_ids_are_pinned(
    ci: ProbeSet, sample: tuple[GemmaConfig, SentencePieceTokenizer]
) -> None:
    assert ci.sha256 == SAMPLE_CI
    assert build_probes(*sample, "ci").sha256 == ci.sha256
    assert build_probes(small("gemma2-2b"), None, "full").sha256 == RANDOM_FULL
    assert build_probes(small("gemma2-2b"), None, "full", seed=1).sha256 != RANDOM_FULL


def test_the_hash_sees_every_id(ci: ProbeSet) -> None:
    probe = ci.probes[3]
    ids = probe.tokens.copy()
    ids[-1] ^= 1
    other = Probe(probe.id, probe.group, probe.category, probe.document, ids, None, probe.scored)
    changed = ProbeSet((*ci.probes[:3], other, *ci.probes[4:]), "ci", 0, [])
    assert changed.sha256 != ci.sha256


def test_ci_on_the_sample(ci: ProbeSet) -> None:
    assert {p.group for p in ci} == {"P0", "P1", "P2", "P3", "P4", "P10"}
    assert len(ci.group("P2")) >= 64
    assert ci.tokens <= 20_000
    assert ci.skipped == []
    assert [len(p.tokens) for p in ci.group("P0")] == [4]
    assert [len(p.tokens) for p in ci.group("P3")] == [63, 64, 65, 66, 128]
    assert [len(p.tokens) for p in ci.group("P4")] == [512]
    assert len(ci.group("P1")) == 16
    assert all(len(p.tokens) <= 64 for p in ci.group("P1"))
    assert all(p.scored == (p.group != "P10") for p in ci)
    assert "P3/65" in {p.id for p in ci}


def test_every_vocabulary_row_is_an_input_once(ci: ProbeSet) -> None:
    ids = np.concatenate([p.tokens[1:] for p in ci.group("P10")])
    assert np.array_equal(np.sort(ids), np.arange(3072))
    assert not np.array_equal(ids, np.arange(3072)), (
        "in order, a shifted row would meet its neighbour"
    )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["sample", *(p for p in PRESETS if "-it" not in p)])
def test_every_probe_fits_its_model(
    name: str, profile: str, sample: tuple[GemmaConfig, SentencePieceTokenizer]
) -> None:
    config = sample[0] if name == "sample" else PRESETS[name].config
    if profile == "full" and name != "sample":
        config = config.with_(vocab_size=4096)  # its rows alone are 256 000 tokens
    probes = build_probes(config, sample[1], profile)
    assert len({p.id for p in probes}) == len(probes)
    for p in probes:
        assert p.tokens.dtype == np.int64
        assert p.tokens[0] == config.bos_token_id
        assert 1 < len(p.tokens) <= config.max_position_embeddings
        assert 0 <= p.tokens.min() <= p.tokens.max() < config.vocab_size
        assert not p.tokens.flags.writeable
        assert p.id.startswith(f"{p.group}/")
    groups = {p.group for p in probes} | {s["group"] for s in probes.skipped}
    assert groups == {"P0", "P1", "P2", "P3", "P4", "P10"}, (
        "a group is run, or skipped with a reason"
    )
    if config.sliding_window:
        assert max(len(p.tokens) for p in probes.group("P3")) == config.sliding_window + 64
    if profile == "ci" and name != "sample":
        assert probes.tokens <= 6_000
    if profile == "full":
        assert len(probes.group("P2")) >= 64
        assert max(len(p.tokens) for p in probes) == config.max_position_embeddings


def test_full_at_the_window_of_gemma_2(sample: tuple[GemmaConfig, SentencePieceTokenizer]) -> None:
    config = PRESETS["gemma2-2b"].config.with_(vocab_size=3072)
    probes = build_probes(config, sample[1], "full")
    assert [len(p.tokens) for p in probes.group("P3", "P4")] == [4095, 4096, 4097, 4098, 4160, 8192]
    assert probes.skipped == []


def test_what_is_left_out_is_said(sample: tuple[GemmaConfig, SentencePieceTokenizer]) -> None:
    config, tokenizer = sample
    smoke = build_probes(config, tokenizer, "smoke")
    assert {p.group for p in smoke} == {"P0", "P1", "P3"}
    assert [len(p.tokens) for p in smoke.group("P3")] == [128]
    assert "the smoke profile has no documents" in why(smoke, "P2")
    assert "does not run the full context of 512" in why(smoke, "P4")
    big = build_probes(PRESETS["gemma2-2b"].config, tokenizer, "ci")
    assert "24 of 80 documents" in why(big, "P2")
    assert "255744 of 256000 vocabulary rows" in why(big, "P10")
    assert {0, 1, 2, 63, 255_999} <= set(np.concatenate([p.tokens for p in big.group("P10")]))
    old = build_probes(PRESETS["gemma-2b"].config, tokenizer, "ci")
    assert why(old, "P3") == "the model has no sliding window."
    assert [p.category for p in old.group("P4")] == ["long"]
    assert "1500 of the 8192 positions" in why(old, "P4")
    short = build_probes(config.with_(max_position_embeddings=64), tokenizer, "ci")
    assert "the context of 64 does not reach past the window of 64" in why(short, "P3")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_without_a_tokenizer_ids_are_random_and_no_text_is_claimed(arch: str, profile: str) -> None:
    config = small(arch)
    probes = build_probes(config, None, profile)
    assert not probes.group("P2")
    assert ("documents" if profile == "smoke" else "carries no tokenizer") in why(probes, "P2")
    assert not any(p.scored or p.text for p in probes)
    specials = {config.bos_token_id, config.pad_token_id, *config.eos_token_id}
    for p in probes.group("P0", "P1", "P3", "P4"):
        assert not specials & set(p.tokens[1:].tolist())
    longest = max(probes, key=lambda p: len(p.tokens))
    assert len(set(longest.tokens.tolist())) > 20, (
        "random ids that are all alike would test nothing"
    )


@given(context=st.integers(1, 40), window=st.integers(1, 50), vocab=st.integers(4, 30))
def test_any_window_and_context(context: int, window: int, vocab: int) -> None:
    config = small("gemma2-2b", vocab=vocab).with_(
        max_position_embeddings=context, sliding_window=window
    )
    for profile in PROFILES:
        for p in build_probes(config, None, profile):
            assert 1 <= len(p.tokens) <= context
            assert p.tokens.max() < vocab


def test_the_report_lists_them(ci: ProbeSet) -> None:
    rows = describe(ci)
    assert len(rows) == len(ci)
    assert rows[0] == {
        "id": "P0/4",
        "group": "P0",
        "category": "english",
        "tokens": 4,
        "max_position": 3,
    }


# ---- the tokenizer ------------------------------------------------------------------------------------------------


def test_pieces_show_what_ids_mean(sample: tuple[GemmaConfig, SentencePieceTokenizer]) -> None:
    _, tokenizer = sample
    text = "Return the  value of *path*."
    assert "".join(map(tokenizer.piece, tokenizer.encode(text))) == text
    assert tokenizer.piece(2) == "<bos>"
    assert tokenizer.piece(3072) == "[3072]"
    assert tokenizer.piece(-1) == "[-1]"
    assert tokenizer.pieces == 3072
    assert len(tokenizer.sha256) == 64


def test_a_gguf_has_its_tokenizer_inside(
    tmp_path: Path, ci: ProbeSet, sample: tuple[GemmaConfig, SentencePieceTokenizer]
) -> None:
    convert(sample_dir(), tmp_path / "out", to="gguf")
    with open_checkpoint(tmp_path / "out") as opened:
        assert build_probes(opened.config, tokenizer_of(opened), "ci").sha256 == ci.sha256


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    config = small("gemma2-2b")
    assert tokenizer_of(checkpoint(config, random_weights(config, 1))) is None
    data = (sample_dir() / "tokenizer.model").read_bytes()
    with pytest.raises(TokenizerError):
        SentencePieceTokenizer(data[:-7])


def test_a_foreign_tokenizer_is_an_error(
    sample: tuple[GemmaConfig, SentencePieceTokenizer],
) -> None:
    config, tokenizer = sample
    with pytest.raises(
        TokenizerError, match=r"token \d+ of .*/english has id \d+; the model's vocabulary has 600"
    ):
        build_probes(config.with_(vocab_size=600), tokenizer, "ci")


# ---- the user's own -----------------------------------------------------------------------------------------------


def test_own_text_takes_the_documents_place(
    tmp_path: Path, sample: tuple[GemmaConfig, SentencePieceTokenizer]
) -> None:
    config, tokenizer = sample
    path = tmp_path / "my.txt"
    path.write_text(heldout_text()[:3000], encoding="utf-8")
    probes = build_probes(config, tokenizer, "ci", text=path)
    own = probes.group("P2")
    assert np.concatenate([p.tokens[1:] for p in own]).tolist() == tokenizer.encode(
        heldout_text()[:3000]
    )
    assert len(own) == 8
    assert len({len(p.tokens) for p in own[:-1]}) == 1
    assert {(p.category, p.scored) for p in own} == {("text", True)}
    assert probes.group("P3", "P10"), "the rest is run too"
    path.write_text(heldout_text(), encoding="utf-8")
    probes = build_probes(config, tokenizer, "smoke", text=str(path))
    assert [len(p.tokens) for p in probes.group("P2")] == [64] * 8
    assert "my.txt after its first 504 tokens" in why(probes, "P2")
    probes = build_probes(config, tokenizer, "ci", text=str(path))
    assert {len(p.tokens) for p in probes.group("P2")[:-1]} == {128}


@pytest.mark.parametrize(("content", "error", "message"), [
    (b"", FormatError, "there is no text in it"),
    (b" \n\n", FormatError, "there is no text in it"),
    (b"ab\xff", FormatError, "not UTF-8 at byte 2"),
    (None, NotFoundError, "no such file"),
])  # fmt: skip
def test_a_text_that_cannot_be_used(
    content: bytes | None, error: type[G2Error], message: str, tmp_path: Path,
    sample: tuple[GemmaConfig, SentencePieceTokenizer],
) -> None:  # fmt: skip
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        build_probes(*sample, "ci", text=path)


def test_a_file_too_large_is_not_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: tuple[GemmaConfig, SentencePieceTokenizer],
) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    monkeypatch.setattr(named_files, "MAX_BYTES", 3)
    for option in ("text", "tokens"):
        with pytest.raises(LimitError, match="4 bytes; at most 3"):
            build_probes(*sample, "ci", **{option: tmp_path / "a"})  # type: ignore[arg-type]


def test_options_that_exclude_each_other(
    sample: tuple[GemmaConfig, SentencePieceTokenizer],
) -> None:
    with pytest.raises(UsageError, match=r"no profile is called 'nightly'.* smoke, ci, full"):
        build_probes(*sample, "nightly")
    with pytest.raises(UsageError, match="text and tokens are both given"):
        build_probes(*sample, "ci", text="a", tokens=[1])
    with pytest.raises(UsageError, match="a text needs a tokenizer"):
        build_probes(sample[0], None, "ci", text="a")


def test_own_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    config = small("gemma2-2b")
    np.save(tmp_path / "ids.npy", np.array([[2, 5, 6], [7, 8, 9]], np.uint16))
    probes = build_probes(config, None, "ci", tokens=tmp_path / "ids.npy")
    own = probes.group("P2")
    assert [p.tokens.tolist() for p in own] == [[2, 5, 6], [7, 8, 9]]
    assert [p.category for p in own] == ["tokens", "tokens without BOS"]
    assert all(p.scored and p.text is None for p in own)
    assert not why(probes, "P2")
    assert [p.tokens.tolist() for p in build_probes(config, None, tokens=[2, 9]).group("P2")] == [
        [2, 9]
    ]


@pytest.mark.parametrize(("tokens", "message"), [
    ([[2, 64]], "token id 64 of document 0, position 1 is outside the vocabulary of 64"),
    ([[2, 3], [-1, 3]], "token id -1 of document 1, position 0"),
    ([1.5], "must be whole numbers"),
    ([], "must be whole numbers"),
    ([[2, 3], [2]], r"are no array.*inhomogeneous"),
    ([[[1]]], r"found int64 \[1, 1, 1\]"),
    (np.array([2**63], np.uint64), "is in no vocabulary"),
    (np.full(65, 3), "document 0 has 65 tokens, the model's context 64"),
    ([True], "found bool"),
])  # fmt: skip
def test_bad_tokens_are_named(tokens: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_probes(small("gemma2-2b"), None, "ci", tokens=tokens)  # type: ignore[arg-type]


def test_token_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    with pytest.raises(NotFoundError, match="no such file"):
        user_tokens(path)
    with pytest.raises(FileIOError, match="this is a directory"):
        user_tokens(tmp_path)
    with pytest.raises(FileIOError, match="not a regular file"):
        user_tokens("/dev/null")
    path.write_text("2 3 4")
    with pytest.raises(FormatError, match=r"not a NumPy file, .*numpy\.save") as e:
        user_tokens(path)
    assert "pickle" not in str(e.value)
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    (tmp_path / "a.npz").rename(path)
    with pytest.raises(FormatError, match=r"not a NumPy array .*numpy\.save"):
        user_tokens(path)
    path.unlink()
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(FormatError, match=r"not a NumPy array .*Python objects") as e:
        user_tokens(path)
    assert "pickle" not in str(e.value)
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(FormatError, match="not a NumPy array"):
        user_tokens(path)


@given(data=st.data())
def test_damaged_token_files_raise_only_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("npy") / "ids.npy"
    np.save(path, np.arange(12).reshape(3, 4))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(G2Error):
        assert all(row.dtype == np.int64 for row in user_tokens(path))
