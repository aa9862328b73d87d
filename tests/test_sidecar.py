"""Files that travel beside the weights: found in every framework's place, checked, and readable by transformers."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert.chat_template import GEMMA_TEMPLATE, tuned_for_chat
from g2kit.convert.sidecar import (
    Sidecars,
    check_tokenizer,
    check_tokenizer_json,
    find_sidecars,
    huggingface_files,
)
from g2kit.convert.tokenizer_json import tokenizer_json
from g2kit.formats.dtypes import BF16
from g2kit.formats.errors import (
    FormatError,
    G2Error,
    LimitError,
    NotFoundError,
    TokenizerError,
    UnsafePathError,
)
from g2kit.formats.sentencepiece_model import PieceType, parse, serialize
from g2kit.model.config import PRESETS, GemmaConfig

OFFICIAL = (Path(__file__).parent / "data" / "gguf" / "tokenizer.model").read_bytes()
CONFIG = GemmaConfig("gemma2", 4, 64, 192, 4, 2, 32, 512, 32.0, 50.0, 30.0, 8)
END_OF_TURN = 18  # in the fixture's vocabulary
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4241003\n"


@cache
def official_json() -> bytes:
    built, _ = tokenizer_json(OFFICIAL, parse(OFFICIAL))
    assert built is not None
    return built


def directory(root: Path, /, **files: Any) -> Path:
    """Files by name, ``__`` for ``/`` and ``_`` before the suffix for ``.``; JSON for anything but bytes."""
    for key, content in files.items():
        name = key.replace("__", "/")
        stem, _, suffix = name.rpartition("_")
        path = root / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def written(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """huggingface_files of a directory: parsed where JSON, and the notes."""
    notes: list[str] = []
    sidecars = find_sidecars(tmp_path, "safetensors")
    files = huggingface_files(sidecars, CONFIG, BF16, notes=notes, **options)
    assert list(files) == sorted(files)
    parsed = {k: json.loads(v) if k.endswith(".json") else v for k, v in files.items()}
    return parsed, notes


# ---- finding


def test_hugging_face_directory(tmp_path: Path) -> None:
    directory(tmp_path, tokenizer_model=OFFICIAL, config_json={"model_type": "gemma2"},
              generation_config_json={"eos_token_id": [1, 2]}, chat_template_jinja=b"{{ x }}")  # fmt: skip
    found = find_sidecars(tmp_path, "safetensors")
    assert found.names == [
        "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.model",
    ]  # fmt: skip
    assert found.tokenizer_model == OFFICIAL
    assert found.config == {"model_type": "gemma2"}
    assert found.config_path == tmp_path / "config.json"
    assert found.chat_template == "{{ x }}"
    assert (found.tokenizer_config, found.notes) == (None, ())
    # a file in it finds the same
    directory(tmp_path, model_safetensors=b"x")
    assert find_sidecars(tmp_path / "model.safetensors", "safetensors").names == found.names


def test_kaggle_puts_the_tokenizer_above_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "gemma2-2b"
    checkpoint.mkdir()
    directory(tmp_path, tokenizer_model=OFFICIAL, config_json={"model_type": "other"})
    found = find_sidecars(checkpoint, "orbax")
    assert found.names == ["tokenizer.model"]  # nothing but the tokenizer is taken from there
    assert found.notes == (f"tokenizer.model is taken from {tmp_path}, above the weights",)
    assert find_sidecars(checkpoint, "gguf").names == []  # GGUF metadata hold a tokenizer
    # but not from farther up, and not where the checkpoint has a tokenizer of its own
    deeper = checkpoint / "x"
    deeper.mkdir()
    assert find_sidecars(deeper, "orbax").names == []
    directory(checkpoint, tokenizer_json={"a": 1})
    assert find_sidecars(checkpoint, "orbax").names == ["tokenizer.json"]


def test_training_runs_are_climbed(tmp_path: Path) -> None:
    items = tmp_path / "run" / "checkpoints" / "0" / "items"
    items.mkdir(parents=True)
    directory(tmp_path / "run", tokenizer_model=OFFICIAL)
    assert find_sidecars(items, "orbax").names == ["tokenizer.model"]


def test_keras_preset(tmp_path: Path) -> None:
    directory(tmp_path, assets__tokenizer__vocabulary_spm=OFFICIAL, tokenizer_json={"a": 1},
              config_json={"class_name": "GemmaBackbone"})  # fmt: skip
    found = find_sidecars(tmp_path, "keras_h5")
    assert found.names == ["tokenizer.model"]  # its other files are Keras's own
    assert found.tokenizer_model == OFFICIAL
    assert found.config is None


def test_gemma_pytorchs_stub_is_no_tokenizer(tmp_path: Path) -> None:
    directory(tmp_path, tokenizer_model=b"")
    found = find_sidecars(tmp_path, "torch_pickle")
    assert found.tokenizer_model is None
    assert "is empty" in found.notes[0]
    (tmp_path / "tokenizer.json").mkdir()
    assert "is not a regular file" in find_sidecars(tmp_path, "torch_pickle").notes[1]


def test_somebody_elses_config_json(tmp_path: Path) -> None:
    directory(tmp_path, config_json={"learning_rate": 1})
    assert find_sidecars(tmp_path, "orbax").config is None
    assert find_sidecars(tmp_path, "safetensors").config == {"learning_rate": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer.model", TokenizerError),
        ("tokenizer.json", TokenizerError),
        ("config.json", FormatError),
    ],
)
def test_git_lfs_pointers(tmp_path: Path, name: str, kind: type[G2Error]) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(kind, match=r"Git LFS pointer.*git lfs pull") as info:
        find_sidecars(tmp_path, "safetensors").read(name)
    assert name in str(info.value)


def test_a_huge_sidecar_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as f:
        f.truncate(1 << 33)
    with pytest.raises(LimitError, match="at most"):
        _ = find_sidecars(tmp_path, "safetensors").chat_template


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    directory(tmp_path / "a", secret_txt=b"x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "chat_template.jinja").symlink_to(tmp_path / "a" / "secret.txt")
    with pytest.raises(UnsafePathError, match="outside its directory"):
        find_sidecars(tmp_path / "b", "safetensors")


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    assert find_sidecars(tmp_path, "safetensors").tokenizer_model is None


def test_the_users_tokenizer_wins(tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    directory(source, tokenizer_model=LFS, tokenizer_json={}, special_tokens_map_json={},
              tokenizer_config_json={"chat_template": "{{ t }}"}, config_json={"model_type": "gemma"})  # fmt: skip
    directory(other, my_model=OFFICIAL)
    found = find_sidecars(source, "safetensors", other / "my.model")
    assert found.tokenizer_model == OFFICIAL
    # the old tokenizer's files are gone; the template is the model's
    assert found.names == ["chat_template.jinja", "config.json", "tokenizer.model"]
    assert found.chat_template == "{{ t }}"
    shutil.move(other / "my.model", other / "tokenizer.model")
    assert find_sidecars(source, "safetensors", other).tokenizer_model == OFFICIAL
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        find_sidecars(source, "safetensors", tmp_path)
    with pytest.raises(NotFoundError, match=r"no such file.*Fix: pass the tokenizer\.model"):
        find_sidecars(source, "safetensors", tmp_path / "nowhere")
    (tmp_path / "empty.model").touch()
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        find_sidecars(source, "safetensors", tmp_path / "empty.model")


def test_rows_of_an_earlier_embedding(tmp_path: Path) -> None:
    from g2kit.formats.manifest import Manifest, TensorEntry
    from g2kit.model.canonical import EMBED

    entry = TensorEntry("bf16", (512, 64), "0" * 64)
    mine = Manifest("0.1", "safetensors", "huggingface", "bf16", "g2:sha256:" + "0" * 64,
                    {EMBED: entry}, {}, padding_rows={EMBED: 128})  # fmt: skip
    (tmp_path / "g2kit.manifest.json").write_bytes(mine.dumps())
    assert find_sidecars(tmp_path, "safetensors").manifest_embedding == {"source_rows": 640}
    (tmp_path / "g2kit.manifest.json").write_bytes(mine.dumps().replace(b"128", b"129"))
    assert find_sidecars(tmp_path, "safetensors").manifest_embedding == {}
    plain = replace(mine, padding_rows={})
    (tmp_path / "g2kit.manifest.json").write_bytes(plain.dumps())
    assert find_sidecars(tmp_path, "safetensors").manifest_embedding == {}


# ---- checking


def test_check_tokenizer() -> None:
    info = check_tokenizer(OFFICIAL, CONFIG)
    assert (info.pieces, info.padding, info.notes) == (512, 0, ())
    assert (info.pad_id, info.eos_id, info.bos_id, info.unk_id) == (0, 1, 2, 3)
    assert (info.start_of_turn_id, info.end_of_turn_id) == (17, 18)
    chat = check_tokenizer(OFFICIAL, CONFIG.with_(eos_token_id=(18,)))
    assert chat.notes == ("<eos> (id 1) does not end the model's output: eos_token_id is [18]",)


def shorter(pieces: int) -> bytes:
    m = parse(OFFICIAL)
    cut = replace(m, pieces=m.pieces[:pieces], scores=m.scores[:pieces], types=m.types[:pieces])
    return serialize(cut)


@pytest.mark.parametrize(("pieces", "rows"), [(512, 640), (505, 512), (383, 512), (512, 520)])
def test_padding_rows_are_no_mismatch(pieces: int, rows: int) -> None:
    info = check_tokenizer(shorter(pieces), CONFIG.with_(vocab_size=rows))
    assert (info.pieces, info.padding) == (pieces, rows - pieces)
    assert info.notes == (
        f"the embedding has {rows - pieces} rows more than the tokenizer has ids ({rows} and {pieces}); "
        "no text leads to them",
    )


@pytest.mark.parametrize("rows", [511, 256_000])
def test_another_models_tokenizer(rows: int) -> None:
    with pytest.raises(TokenizerError) as info:
        check_tokenizer(OFFICIAL, CONFIG.with_(vocab_size=rows), where="x/tokenizer.model")
    assert str(info.value).startswith(
        f"x/tokenizer.model: the tokenizer has 512 pieces, the model's vocabulary {rows}."
    )
    assert "with --tokenizer none" in str(info.value)


def test_tokens_added_by_a_fine_tune() -> None:
    config = CONFIG.with_(vocab_size=514, eos_token_id=(1, 513))
    assert check_tokenizer(OFFICIAL, config, highest_id=513).padding == 0
    assert check_tokenizer(OFFICIAL, CONFIG, highest_id=513).padding == 0
    with pytest.raises(TokenizerError, match="eos_token_id 513 is none of the 513 ids"):
        check_tokenizer(OFFICIAL, config, highest_id=512)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bos_token_id": 1}, "<bos> has id 2, the configuration's bos_token_id is 1"),
        ({"eos_token_id": (1, 512)}, "eos_token_id 512 is none of the 512 ids"),
    ],
)
def test_ids_that_mean_something_else(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(TokenizerError) as info:
        check_tokenizer(OFFICIAL, CONFIG.with_(**changes))
    assert part in str(info.value)


def test_check_tokenizer_json() -> None:
    model, tree = parse(OFFICIAL), json.loads(official_json())
    assert check_tokenizer_json(tree, model, CONFIG) == []
    vocab = tree["model"]["vocab"]
    # as transformers does for the tab, and as fine-tunes do with spare pieces
    vocab["\x07"] = vocab.pop("<0x07>")
    assert check_tokenizer_json(tree, model, CONFIG) == []
    vocab["<tool>"] = vocab.pop("<unused3>")
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "<unused3>"]
    assert check_tokenizer_json(tree, model, CONFIG) == [
        "tokenizer.json names 1 special ids differently from tokenizer.model, such as '<tool>'"
    ]
    vocab["or"], vocab["an"] = vocab["an"], vocab["or"]
    with pytest.raises(
        TokenizerError, match=r"disagree on 2 ids.*280 is 'an' / 'or', 281 is 'or' / 'an'"
    ):
        check_tokenizer_json(tree, model, CONFIG)
    assert check_tokenizer_json(tree, None, CONFIG) == []
    with pytest.raises(TokenizerError, match="highest id is 511, the model's vocabulary has 500"):
        check_tokenizer_json(tree, model, CONFIG.with_(vocab_size=500))
    vocab["x"] = "1"
    with pytest.raises(TokenizerError, match="token 'x' has id '1'"):
        check_tokenizer_json(tree, model, CONFIG)
    for odd in (
        {},
        {"model": []},
        {"model": {"vocab": []}},
        {"model": {"vocab": {}}, "added_tokens": 3},
    ):
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
            check_tokenizer_json(odd, model, CONFIG)


# ---- a Hugging Face directory


def test_made_from_tokenizer_model_alone(tmp_path: Path) -> None:
    files, notes = written(directory(tmp_path, tokenizer_model=OFFICIAL))
    assert notes == []
    assert list(files) == ["config.json", "generation_config.json", "special_tokens_map.json",
                           "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
    assert files["tokenizer.model"] == OFFICIAL
    assert files["generation_config.json"] == {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = files["tokenizer_config.json"]
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["tokenizer_class"] == "GemmaTokenizer"
    assert config["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]
    assert "chat_template" not in config
    listed = config["added_tokens_decoder"]
    model = parse(OFFICIAL)
    special = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
    assert {int(i) for i in listed} == {i for i, t in enumerate(model.types) if t in special}
    assert listed["18"]["special"]
    assert not listed["7"]["special"]
    assert files["special_tokens_map.json"]["eos_token"]["content"] == "<eos>"


def save(files: dict[str, bytes], to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for name, data in files.items():
        (to / name).write_bytes(data)
    return to


def test_transformers_loads_our_directory(tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    found = find_sidecars(directory(tmp_path, tokenizer_model=OFFICIAL), "orbax")
    out = save(huggingface_files(found, CONFIG, BF16, instruction_tuned=True), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    right = sentencepiece.SentencePieceProcessor(model_proto=OFFICIAL)
    texts = ["hello  world\n\n", "naïve é 12", "<start_of_turn>user\nx<end_of_turn>", "   ", "a\tb"]
    for text in texts:
        assert theirs(text).input_ids == [2, *right.encode(text)]
        assert theirs.decode(right.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    assert theirs.convert_tokens_to_ids("<end_of_turn>") == END_OF_TURN
    assert len(theirs) == 512
    turns = [{"role": "user", "content": " hello "}]
    asked = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    text = "<start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    assert asked == [2, *right.encode(text)]  # <bos> once
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 4
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, END_OF_TURN]
    again = save(
        {k: v for k, v in ((p.name, p.read_bytes()) for p in out.iterdir())}, tmp_path / "copy"
    )
    theirs.save_pretrained(again)
    assert AutoTokenizer.from_pretrained(again)("hello world").input_ids == [
        2,
        *right.encode("hello world"),
    ]


def test_files_of_the_source_are_kept_and_mended(tmp_path: Path) -> None:
    kept = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": False, "chat_template": "{{ mine }}",
            "auto_map": {"AutoTokenizer": "x.y"}, "model_max_length": 8192}  # fmt: skip
    directory(tmp_path, tokenizer_model=OFFICIAL, tokenizer_config_json=kept,
              tokenizer_json=official_json() + b"\n", special_tokens_map_json={"bos_token": "<bos>"},
              generation_config_json={"eos_token_id": [1, 18], "cache_implementation": "hybrid",
                                      "_from_model_config": True, "pad_token_id": 1,
                                      "transformers_version": "4.42"})  # fmt: skip
    files, notes = written(tmp_path)
    assert files["tokenizer_config.json"] == {
        "tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True, "chat_template": "{{ mine }}",
        "model_max_length": 8192,
    }  # fmt: skip
    assert files["generation_config.json"] == {
        "bos_token_id": 2, "eos_token_id": [1, 18], "pad_token_id": 1, "cache_implementation": "hybrid",
        "transformers_version": "4.42",
    }  # fmt: skip
    assert files["special_tokens_map.json"] == {"bos_token": "<bos>"}
    raw = huggingface_files(find_sidecars(tmp_path, "safetensors"), CONFIG, BF16)
    assert raw["tokenizer.json"] == official_json() + b"\n"  # byte for byte
    assert [n.split(",")[0] for n in notes] == [
        "taken for an instruction-tuned model (<end_of_turn> ends its output): generation stops at "
        "<end_of_turn> too",
        "left out of generation_config.json: _from_model_config",
        "tokenizer_config.json's auto_map",
        "tokenizer_config.json had add_bos_token false; Gemma needs <bos>",
    ]


def test_only_tokenizer_json(tmp_path: Path) -> None:
    files, notes = written(directory(tmp_path, tokenizer_json=official_json()))
    assert "tokenizer.model" not in files
    assert "tokenizer.json" in files
    assert "need tokenizer.model" in notes[0]


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    files, notes = written(tmp_path)
    assert list(files) == ["config.json", "generation_config.json"]
    assert "pass --tokenizer FILE" in notes[0]


def test_a_tokenizer_json_that_cannot_be_built_is_said_so(tmp_path: Path) -> None:
    odd = serialize(replace(parse(OFFICIAL), add_dummy_prefix=True))
    files, notes = written(directory(tmp_path, tokenizer_model=odd))
    assert "tokenizer.json" not in files
    assert files["tokenizer.model"] == odd
    assert notes == ["tokenizer.json is left out, transformers will read tokenizer.model: it puts a space before "
                     "the text"]  # fmt: skip


def test_added_tokens_explain_a_longer_vocabulary(tmp_path: Path) -> None:
    config = CONFIG.with_(vocab_size=514)
    decoder = {"512": {"content": "<a>"}, "513": {"content": "<b>"}, "9" * 5000: {}, "x": {}}
    sidecars = find_sidecars(
        directory(
            tmp_path,
            tokenizer_model=OFFICIAL,
            tokenizer_config_json={"added_tokens_decoder": decoder},
        ),
        "safetensors",
    )
    notes: list[str] = []
    assert "tokenizer.model" in huggingface_files(sidecars, config, BF16, notes=notes)
    assert not [n for n in notes if "rows more" in n]
    huggingface_files(sidecars, CONFIG.with_(vocab_size=600), BF16, notes=notes)
    assert [n for n in notes if "has 86 rows more than the tokenizer has ids (600 and 514)" in n]


def test_a_tokenizer_from_other_metadata(tmp_path: Path) -> None:
    sidecars = find_sidecars(tmp_path, "gguf").with_content(
        "tokenizer.model", OFFICIAL, origin=tmp_path / "m.gguf"
    )
    assert sidecars.names == ["tokenizer.model"]
    files = huggingface_files(sidecars, CONFIG, BF16)
    assert files["tokenizer.json"] == official_json()
    fewer = huggingface_files(sidecars, CONFIG, BF16, build_tokenizer_json=False)
    assert fewer == {k: v for k, v in files.items() if k != "tokenizer.json"}


def test_same_input_same_bytes(tmp_path: Path) -> None:
    directory(tmp_path, tokenizer_model=OFFICIAL)
    runs = [huggingface_files(find_sidecars(tmp_path, "orbax"), CONFIG, BF16) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_damaged_json_is_named(tmp_path: Path, name: str) -> None:
    directory(tmp_path, tokenizer_model=OFFICIAL)
    for text in (b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(FormatError) as info:
            _ = find_sidecars(tmp_path, "safetensors").json(name)
        assert str(info.value).startswith(str(tmp_path / name))


ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 600) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=80)
def test_odd_sidecars_raise_only_our_errors(data: st.DataObject) -> None:
    tree = json.loads(official_json())
    for key in data.draw(
        st.lists(st.sampled_from(["added_tokens", "model", "normalizer"]), max_size=1)
    ):
        tree[key] = data.draw(ODD)
    config = {k: data.draw(ODD) for k in data.draw(st.lists(st.sampled_from([
        "chat_template", "added_tokens_decoder", "add_bos_token", "auto_map", "x"]), max_size=3))}  # fmt: skip
    generation = {k: data.draw(ODD) for k in data.draw(st.lists(st.sampled_from([
        "eos_token_id", "bos_token_id", "cache_implementation"]), max_size=2))}  # fmt: skip
    contents = {
        "tokenizer.model": OFFICIAL,
        "tokenizer.json": json.dumps(tree).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
        "special_tokens_map.json": json.dumps(data.draw(ODD)).encode(),
    }
    optional = ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
    for name in data.draw(st.sets(st.sampled_from(optional))):
        del contents[name]
    sidecars = Sidecars(Path("x"), contents=contents)
    try:
        files = huggingface_files(sidecars, CONFIG, BF16)
    except G2Error:
        return
    assert {"config.json", "generation_config.json", "tokenizer.model"} <= set(files)


# ---- instruction-tuned or not


def rendered(turns: list[tuple[str, str]], prompt: bool = True) -> str:
    from jinja2 import Environment
    from jinja2.exceptions import TemplateError

    def refuse(message: str) -> None:
        raise TemplateError(message)

    text = [
        Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(GEMMA_TEMPLATE).render(
            bos_token="<bos>", add_generation_prompt=prompt, raise_exception=refuse,
            messages=[{"role": r, "content": c} for r, c in turns],
        )
        for trim in (True, False)
    ]  # fmt: skip
    assert text[0] == text[1]
    return text[0]


def test_chat_template() -> None:
    assert rendered([("user", " hi\n"), ("assistant", "yes"), ("user", "a  b")]) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\na  b<end_of_turn>\n<start_of_turn>model\n"
    )
    assert rendered([("user", "x"), ("model", "y")], prompt=False) == (
        "<bos><start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\ny<end_of_turn>\n"
    )
    assert "\n" not in GEMMA_TEMPLATE


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ([("system", "x"), ("user", "y")], "no system role"),
        ([("assistant", "x")], "must alternate"),
        ([("user", "x"), ("user", "y")], "must alternate"),
        ([("user", "x"), ("tool", "y")], "must alternate"),
        ([("user", "x"), ("system", "y")], "no system role"),
    ],
)
def test_chat_template_refuses(turns: list[tuple[str, str]], part: str) -> None:
    with pytest.raises(Exception, match=part):
        rendered(turns)


@pytest.mark.parametrize(
    ("stated", "eos", "template", "name", "tuned"),
    [
        (None, (1,), None, "gemma2-2b", False),
        (None, (1, 107), None, "gemma2-2b", True),
        (None, (1,), "{{ '<end_of_turn>' }}", "gemma2-2b", True),
        (None, (1,), "{{ 'other' }}", "gemma2-2b", False),
        (None, (1,), None, "gemma-2-2b-it", True),
        (None, (1,), None, "gemma2_it.v2", True),
        (None, (1,), None, "Gemma-Instruct", True),
        (None, (1,), None, "2b-it-flax", True),
        (None, (1,), None, "edit-bits-git", False),
        (False, (1, 107), None, "gemma-2-2b-it", False),
        (True, (1,), None, "gemma2-2b", True),
    ],
)
def test_signs_of_instruction_tuning(
    stated: bool | None, eos: tuple[int, ...], template: str | None, name: str, tuned: bool
) -> None:
    assert tuned_for_chat(stated, eos, 107, template, Path("/m") / name)[0] is tuned
    assert tuned_for_chat(None, eos, None, template, Path("/m") / name)[0] is False


def test_an_it_preset_gets_template_and_stop_token(tmp_path: Path) -> None:
    there = directory(tmp_path / "gemma2-2b-it", tokenizer_model=OFFICIAL)
    files, notes = written(there)
    assert files["tokenizer_config.json"]["chat_template"] == GEMMA_TEMPLATE
    assert files["generation_config.json"]["eos_token_id"] == [1, END_OF_TURN]
    assert notes == ["taken for an instruction-tuned model (its name is gemma2-2b-it): generation stops at "
                     "<end_of_turn> too"]  # fmt: skip
    base, _ = written(there, instruction_tuned=False)
    assert "chat_template" not in base["tokenizer_config.json"]
    assert base["generation_config.json"]["eos_token_id"] == 1
    # without a tokenizer the released vocabulary's id is known
    bare = Sidecars(Path("gemma2-2b-it"))
    released = huggingface_files(bare, PRESETS["gemma2-2b"].config, BF16)
    assert json.loads(released["generation_config.json"])["eos_token_id"] == [1, 107]
