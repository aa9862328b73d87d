"""The GGUF vocabulary against llama.cpp's converter and package, and back to a tokenizer.model."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf as official
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings

from g2kit.convert.gguf_vocab import gguf_vocab, sentencepiece_from_gguf
from g2kit.formats import gguf
from g2kit.formats.errors import G2Error, TokenizerError
from g2kit.formats.sentencepiece_model import PieceType, SentencePieceModel, parse, serialize

from .plan_writer import materialise

DATA = Path(__file__).parent / "data" / "gguf"
MODEL = (DATA / "tokenizer.model").read_bytes()
ROWS = 512
GGML = "tokenizer.ggml."
PARSED = parse(MODEL)


def released_config(**more: Any) -> dict[str, Any]:
    """tokenizer_config.json as the Gemma releases have it: every control and user-defined piece is an added token."""
    special = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}
    listed = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    added = {
        str(i): {"content": piece, "special": piece in special}
        for i, (piece, kind) in enumerate(zip(PARSED.pieces, PARSED.types, strict=True))
        if kind in listed
    }
    tokens = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    flags = {"add_bos_token": True, "add_eos_token": False}
    return {**flags, "added_tokens_decoder": added, **tokens, **more}


def values(rows: list[tuple[str, str, Any]]) -> dict[str, Any]:
    assert len({key for key, _, _ in rows}) == len(rows)
    return {key: value for key, _, value in rows}


def through_a_file(rows: list[tuple[str, str, Any]], directory: Path) -> dict[str, Any]:
    materialise(gguf.plan([], rows), {}, directory)
    return gguf.open_source(directory / "model.gguf").metadata["kv"]


# -- forward ---------------------------------------------------------------------------------------


def test_same_as_llama_cpps_converter() -> None:
    metadata = gguf.open_source(DATA / "bf16.gguf").metadata
    theirs = {k: v for k, v in metadata["kv"].items() if k.startswith("tokenizer.")}
    rows = gguf_vocab(MODEL, ROWS, None, "gemma2")
    ours = values(rows)
    # the converter was run without tokenizer_config.json; these two say what llama.cpp would guess, or guess wrong
    extra = {f"{GGML}unknown_token_id": 3, f"{GGML}add_bos_token": True}
    assert {k: ours.pop(k) for k in extra} == extra
    assert list(ours) == list(theirs)
    for key, type_name, value in rows:
        if key in extra:
            continue
        assert type_name == metadata["kv_types"][key]
        if type_name == "[f32]":  # -0.0 is not 0.0
            assert np.array(value, "<f4").tobytes() == theirs[key].tobytes()
        else:
            assert value == (theirs[key].tolist() if type_name == "[i32]" else theirs[key])


def test_added_tokens_upgrade_types() -> None:
    kv = values(gguf_vocab(MODEL, ROWS, released_config(), "gemma2"))
    found = {
        kv[f"{GGML}tokens"][i]: (kv[f"{GGML}token_type"][i], kv[f"{GGML}scores"][i])
        for i in range(ROWS)
    }
    for control in (
        "<pad>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<2mass>",
        "[@BOS@]",
        "<unused3>",
        "<end_of_turn>",
    ):
        assert found[control] == (3, -1000.0), control
    for user_defined in ("\n", "\n\n", "\t", "  ", "   "):  # runs of spaces lose their U+2581
        assert found[user_defined] == (4, -1000.0), user_defined
    assert "▁▁" not in found
    assert found["<0x0A>"] == (6, 0.0)
    assert found["an"] == (1, -1.0)


@pytest.mark.parametrize("template", ["{{ bos_token }}", None, "", [
    {"name": "default", "template": "d"}, {"name": "tool use", "template": "t"},
    {"name": "rag", "template": "r"},
]])  # fmt: skip
def test_special_keys_as_the_official_package_writes_them(tmp_path: Path, template: Any) -> None:
    config = released_config(chat_template=template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    added = [
        {"id": int(i), "content": t["content"]} for i, t in config["added_tokens_decoder"].items()
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    writer = official.GGUFWriter(None, "gemma2")
    official.SpecialVocab(tmp_path, n_vocab=ROWS).add_to_gguf(writer, quiet=True)
    theirs = {k: v.value for k, v in writer.kv_data[0].items() if k != "general.architecture"}
    names = theirs.get("tokenizer.chat_templates")
    if names:
        names.sort()  # the package writes them in the order of a set
        assert names == ["rag", "tool_use"]
    kv = values(gguf_vocab(MODEL, ROWS, config, "gemma2"))
    skipped = [f"{GGML}{k}" for k in ("model", "pre", "tokens", "scores", "token_type")]
    ours = {k: v for k, v in kv.items() if k not in (*skipped, f"{GGML}add_space_prefix")}
    assert sorted(ours) == sorted(theirs)
    assert ours == theirs
    without_templates = [k for k in ours if "chat_template" not in k]
    assert without_templates == [k for k in theirs if "chat_template" not in k]
    assert list(kv)[-1] == f"{GGML}add_space_prefix"


def test_extra_rows_are_padding() -> None:
    kv = values(gguf_vocab(MODEL, ROWS + 3, None, "gemma2"))
    assert kv[f"{GGML}tokens"][ROWS - 1 :] == [
        PARSED.pieces[-1],
        "[PAD512]",
        "[PAD513]",
        "[PAD514]",
    ]
    assert kv[f"{GGML}token_type"][ROWS:] == [5, 5, 5]
    assert kv[f"{GGML}scores"][ROWS:] == [-10000.0] * 3


def test_tuned_end_token_and_bos_switch() -> None:
    config = released_config(eos_token={"content": "<end_of_turn>"}, add_bos_token=False)
    kv = values(gguf_vocab(MODEL, ROWS, config, "gemma2"))
    assert kv[f"{GGML}eos_token_id"] == PARSED.ids["<end_of_turn>"]
    assert kv[f"{GGML}add_bos_token"] is False


def gemma1_model(end_of_turn: int) -> bytes:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{i}>" for i in range(104))]
    pieces[end_of_turn] = "<end_of_turn>"
    control = [PieceType.CONTROL] * 3 + [PieceType.UNKNOWN]
    types = control + [PieceType.USER_DEFINED] * (len(pieces) - 4)
    names = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
    return serialize(
        SentencePieceModel(
            tuple(pieces), (0.0,) * len(pieces), tuple(types), model_type=2, names=names
        )
    )


def test_gemma_1_extras() -> None:
    def ids(model: bytes, family: Any) -> dict[str, int]:
        known = ("prefix", "suffix", "middle", "eot")
        kv = values(gguf_vocab(model, 108, None, family))
        return {n: kv[f"{GGML}{n}_token_id"] for n in known if f"{GGML}{n}_token_id" in kv}

    released = {"prefix": 67, "suffix": 69, "middle": 68, "eot": 107}
    assert ids(gemma1_model(107), "gemma") == released
    assert ids(gemma1_model(90), "gemma") == {"eot": 90}
    assert ids(gemma1_model(107), "gemma2") == {}


@pytest.mark.parametrize(
    ("model", "rows", "config", "message"),
    [
        (b"", ROWS, None, "empty"),
        (MODEL[:-40], ROWS, None, "announced|does not end"),
        (b"version https://git-lfs.github.com", ROWS, None, "git lfs pull"),
        (MODEL, ROWS - 1, None, "512 pieces, the embedding 511 rows"),
        (
            serialize(SentencePieceModel(("<unk>",), (0.0,), (PieceType.UNKNOWN,))),
            9,
            None,
            "type is 1",
        ),
        (
            serialize(SentencePieceModel(("<unk>",), (0.0,), (PieceType.UNKNOWN,), 2)),
            9,
            None,
            "no bos",
        ),
        (MODEL, ROWS, {"added_tokens_decoder": []}, "not an object"),
        (MODEL, ROWS, {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x' is not an id"),
        (MODEL, ROWS, {"added_tokens_decoder": {"-1": {"content": "a"}}}, "'-1' is not an id"),
        (MODEL, ROWS, {"added_tokens_decoder": {"4": {"content": 5}}}, "'4' is not an id"),
        (MODEL, ROWS, {"added_tokens_decoder": {"4": "x"}}, "'4' is not an id"),
        (
            MODEL,
            ROWS,
            {"added_tokens_decoder": {"512": {"content": "a"}}},
            "id 512; the embedding has",
        ),
        (
            MODEL,
            ROWS,
            {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
            "the embedding has",
        ),
        (MODEL, ROWS, {"added_tokens_decoder": {"4": {"content": "an"}}}, "the same text: 'an'"),
        (MODEL, ROWS, {"eos_token": "</s>"}, "eos_token '</s>' is not in the vocabulary"),
        (MODEL, ROWS, {"chat_template": 5}, "chat_template is neither"),
        (MODEL, ROWS, {"chat_template": [{"name": "a"}]}, "chat_template is neither"),
    ],
)
def test_refused_tokenizers(model: bytes, rows: int, config: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        gguf_vocab(model, rows, config, "gemma2")


# -- back ------------------------------------------------------------------------------------------

PROCESSOR = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
TEXTS = [
    "", " ", "  ", "     five spaces", "Hello world", " leading", "trailing ", "tabs\tand\nlines\n\n\nmore",
    "<start_of_turn>user\nhow are you?<end_of_turn>\n<start_of_turn>model\n", "<bos><eos><pad><unk>",
    "<mask><2mass>[@BOS@]<unused0><unused9><unused10>", "naïve café 漢字 😀 \u2581 x\u2581\u2581y", "0123456789 1e-6",
    "the quick brown fox jumps over the lazy dog, then turns and transforms the information",
    "<0x41> \x00 \x7f \u200b", "ooooorrrrr eeeennnn anananan",
]  # fmt: skip


def sources() -> dict[str, Any]:
    return {
        "llama.cpp's file": gguf.open_source(DATA / "bf16.gguf").metadata["kv"],
        "model file only": values(gguf_vocab(MODEL, ROWS, None, "gemma2")),
        "released config": values(gguf_vocab(MODEL, ROWS, released_config(), "gemma2")),
        "padded": values(gguf_vocab(MODEL, ROWS + 9, released_config(), "gemma2")),
        "tuned": values(
            gguf_vocab(MODEL, ROWS, released_config(eos_token="<end_of_turn>"), "gemma")
        ),
    }


@pytest.mark.parametrize("name", sources())
def test_the_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    kv = sources()[name]
    kv = through_a_file([(k, _type_of(v), v) for k, v in kv.items()], tmp_path)
    rebuilt = sentencepiece_from_gguf(kv)
    again = parse(rebuilt)
    assert again == PARSED
    signs = [struct.pack("<f", s) for s in again.scores]
    assert signs == [struct.pack("<f", s) for s in PARSED.scores]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=rebuilt)
    assert theirs.encode(TEXTS) == PROCESSOR.encode(TEXTS)
    for special in ("bos_id", "eos_id", "pad_id", "unk_id", "vocab_size"):
        assert getattr(theirs, special)() == getattr(PROCESSOR, special)()
    ids = list(range(ROWS))
    assert theirs.decode(ids) == PROCESSOR.decode(ids)
    assert gguf_vocab(rebuilt, ROWS, None, "gemma2") == gguf_vocab(MODEL, ROWS, None, "gemma2")


def _type_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return {"f": "[f32]", "i": "[i32]"}[value.dtype.kind]
    if isinstance(value, list):
        return {str: "[str]", float: "[f32]", int: "[i32]"}[type(value[0])]
    return {str: "str", bool: "bool", int: "u32", float: "f32"}[type(value)]


REBUILT = sentencepiece.SentencePieceProcessor(
    model_proto=sentencepiece_from_gguf(
        values(gguf_vocab(MODEL, ROWS, released_config(), "gemma2"))
    )
)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(PARSED.pieces[:24])
        | st.sampled_from(PARSED.pieces[280:])
        | st.text(max_size=6)
    ).map("".join)
)
def test_any_text_encodes_alike(text: str) -> None:
    try:
        expected = PROCESSOR.encode(text)
    except UnicodeEncodeError:
        return  # lone surrogates
    assert REBUILT.encode(text) == expected


def test_the_user_defined_list_is_kept_for_transformers() -> None:
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    theirs, ours = protobuf.ModelProto(), protobuf.ModelProto()
    theirs.ParseFromString(MODEL)
    ours.ParseFromString(sentencepiece_from_gguf(sources()["released config"]))
    assert list(ours.trainer_spec.user_defined_symbols) == list(
        theirs.trainer_spec.user_defined_symbols
    )
    assert ours.trainer_spec.byte_fallback
    assert not ours.normalizer_spec.add_dummy_prefix
    assert not ours.normalizer_spec.remove_extra_whitespaces


def test_a_lost_sign_of_zero_does_no_harm() -> None:
    kv = values(gguf_vocab(MODEL, ROWS, None, "gemma2"))
    kv[f"{GGML}scores"] = [s + 0.0 for s in kv[f"{GGML}scores"]]  # -0.0 + 0.0 is 0.0
    assert parse(sentencepiece_from_gguf(kv)).types == PARSED.types


def changed(**changes: Any) -> dict[str, Any]:
    kv = values(gguf_vocab(MODEL, ROWS, None, "gemma2"))
    for name, value in changes.items():
        if value is None:
            del kv[GGML + name]
        else:
            kv[GGML + name] = value
    return kv


def replaced(name: str, i: int, value: Any) -> dict[str, Any]:
    column = list(changed()[GGML + name])
    column[i] = value
    return changed(**{name: column})


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({}, "tokenizer.ggml.model is None"),
        (changed(model="gpt2"), "only SentencePiece vocabularies"),
        (changed(tokens=None), "tokenizer.ggml.tokens is missing"),
        (changed(scores=None), "tokenizer.ggml.scores is missing"),
        (changed(token_type=None), "tokenizer.ggml.token_type is missing"),
        (changed(tokens="abc"), "tokens is missing"),
        (changed(tokens=5), "tokens is missing"),
        (changed(tokens=[], scores=[], token_type=[]), "no <bos> token and tokenizer.ggml.bos_token_id is 2"),
        (changed(scores=[0.0]), "lengths differ"),
        (changed(tokens=np.zeros(ROWS)), "tokens holds other things than str"),
        (changed(token_type=np.zeros(ROWS)), "token_type holds other things than int"),
        (replaced("token_type", 300, 7), "token 300 is 'es' with score .* and type 7|type 7"),
        (replaced("scores", 300, float("nan")), "score nan"),
        (replaced("tokens", 300, ""), "token 300 is ''"),
        (replaced("tokens", 300, "a\0b"), "token 300"),
        (replaced("tokens", 300, "a\ud800"), "lone surrogate"),
        (replaced("tokens", 300, "an"), "same text: 'an'"),
        (replaced("tokens", 24, "<0xZZ>"), "SentencePiece refuses"),
        ({**replaced("tokens", 2, "x"), f"{GGML}bos_token_id": 512}, "bos_token_id is 512"),
        ({**replaced("tokens", 2, "x"), f"{GGML}bos_token_id": "2"}, "bos_token_id is '2'"),
    ],
)  # fmt: skip
def test_refused_vocabularies(kv: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        sentencepiece_from_gguf(kv)


def test_other_names_of_special_tokens_come_from_the_keys() -> None:
    model = parse(sentencepiece_from_gguf(replaced("tokens", 2, "<s>")))
    assert (model.special_id("bos"), model.names["bos"]) == (2, "<s>")


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(
                ["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "ab", "\n", " ", "<0x00>", "[PAD3]"]
            )
            | st.text(st.characters(codec="utf-8"), max_size=3),
            st.floats(-1e4, 0, width=32) | st.sampled_from([0.0, -0.0, float("inf")]),
            st.integers(1, 6),
        ),
        max_size=12,
    ),
    ids=st.lists(st.integers(0, 12), min_size=4, max_size=4),
)
def test_odd_vocabularies_never_crash(rows: list[tuple[str, float, int]], ids: list[int]) -> None:
    tokens, scores, types = ([r[k] for r in rows] for k in range(3))
    names = ("bos", "eos", "unknown", "padding")
    kv = changed(tokens=tokens, scores=scores, token_type=types)
    kv |= {f"{GGML}{n}_token_id": i for n, i in zip(names, ids, strict=True)}
    try:
        model = sentencepiece_from_gguf(kv)
    except G2Error:
        return
    sentencepiece.SentencePieceProcessor(model_proto=model).encode("ab\n a<bos> é")


def test_a_full_size_vocabulary() -> None:
    size = 256_000
    pieces = list(PARSED.pieces[:280]) + [f"p{i}" for i in range(size - 280)]
    scores = list(PARSED.scores[:280]) + [-float(i) for i in range(size - 280)]
    types = list(PARSED.types[:280]) + [PieceType.NORMAL] * (size - 280)
    model = SentencePieceModel(
        tuple(pieces), tuple(scores), tuple(types), 2, True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, names=PARSED.names,
    )  # fmt: skip
    kv = values(gguf_vocab(serialize(model), size, None, "gemma2"))
    rebuilt = sentencepiece_from_gguf(kv)
    assert parse(rebuilt) == model
