"""Models whose vocabulary, token ids or numbers are not the tokenizer's or llama.cpp's: kept, told of, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import api, convert, fingerprint, open_checkpoint
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.cli import g2conv
from g2kit.convert.plan import Options
from g2kit.formats.errors import TokenizerError
from g2kit.model.config_formats import from_gguf, to_gguf
from g2kit.model.config_gguf import own_keys
from g2kit.model.sample import sample_dir
from g2kit.terminal import run_cli

TOKENIZER = Path(__file__).parent / "data" / "gguf" / "tokenizer.model"
PIECES, ROWS = 512, 520
TOKENIZER_FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}  # fmt: skip


def padded(root: Path, rows: int = ROWS, **config: Any) -> Path:
    """A fine-tune with other than ``PIECES`` rows, none of them zero."""
    model = small("gemma2-2b", vocab=rows).with_(**config)
    convert_checkpoint(checkpoint(model, random_weights(model, 1)), root, Options("safetensors"))
    shutil.copy(TOKENIZER, root / "tokenizer.model")
    (root / "g2kit.manifest.json").unlink()
    return root


def named(report: dict[str, Any], *words: str) -> bool:
    return any(all(w in note for w in words) for note in report["notes"])


# ---- more rows than pieces


@pytest.mark.parametrize("to", ["gguf", "keras", "flax", "maxtext", "torch"])
def test_rows_without_a_piece_are_kept(to: str, tmp_path: Path) -> None:
    src, out = padded(tmp_path / "src"), tmp_path / "o"
    report = convert(src, out, to=to)
    assert named(report, "the embedding has 8 rows more than the tokenizer has ids (520 and 512)")
    assert api.check(out)["tensors"] == report["checked_tensors"]
    if to != "maxtext":
        assert fingerprint(out) == fingerprint(src)
    back = convert(out, tmp_path / "back", to="safetensors")
    with open_checkpoint(tmp_path / "back") as c:
        assert (c.config.vocab_size, c.layout.embedding_rows) == (ROWS, ROWS)
    assert back["source"]["fingerprint"] == report["output"]["fingerprint"]
    assert api.fingerprint(tmp_path / "back") == report["output"]["fingerprint"]


def test_a_gguf_file_alone_tells_the_rows(tmp_path: Path) -> None:
    convert(padded(tmp_path / "src"), tmp_path / "o.gguf", to="gguf")
    (tmp_path / "o.gguf.g2kit.manifest.json").unlink()
    with open_checkpoint(tmp_path / "o.gguf") as c:
        assert c.config.vocab_size == ROWS
        assert c.reading.origin["vocab_size"] == "GGUF key gemma2.vocab_size"
        tokens = c.source.metadata["kv"]["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[-1]) == (ROWS, "[PAD519]")


def test_a_vocabulary_size_that_cannot_be_is_not_believed() -> None:
    config = small("gemma2-2b", vocab=4)
    kv = {key: value for key, _, value in to_gguf(config, "m", 0)}
    kv["tokenizer.ggml.tokens"] = ["a", "b", "[PAD2]", "[PAD3]"]
    found = {n: from_gguf(kv | {"gemma2.vocab_size": n}).config.vocab_size for n in (1, 2, 3, 4, 5)}
    assert found == {1: 2, 2: 2, 3: 3, 4: 4, 5: 2}


def test_fewer_rows_than_pieces_need_another_tokenizer_or_none(tmp_path: Path) -> None:
    src = padded(tmp_path / "src", 500)
    with pytest.raises(TokenizerError, match="512 pieces, the model's vocabulary 500") as e:
        convert(src, tmp_path / "o", to="torch")
    assert e.value.where == str(src / "tokenizer.model")
    assert "--tokenizer none" in str(e.value.fix)


@pytest.mark.parametrize("to", ["torch", "gguf", "keras"])
def test_the_tokenizer_can_be_left_out(to: str, tmp_path: Path) -> None:
    report = convert(sample_dir(), tmp_path / "o", to=to, tokenizer="none")
    assert named(report, "the tokenizer is left out (--tokenizer none)")
    files = {f.name for f in (tmp_path / "o").rglob("*") if f.is_file()}
    assert not files & (TOKENIZER_FILES | {"vocabulary.spm"})
    assert fingerprint(tmp_path / "o") == fingerprint(sample_dir())
    # out of a GGUF file too, whose vocabulary is in its metadata
    convert(sample_dir(), tmp_path / "m.gguf", to="gguf")
    convert(tmp_path / "m.gguf", tmp_path / "p", to=to, tokenizer="none")
    files = {f.name for f in (tmp_path / "p").rglob("*") if f.is_file()}
    assert not files & (TOKENIZER_FILES | {"vocabulary.spm"})


# ---- what llama.cpp has no key for

ODD: dict[str, Any] = {
    "eos_token_id": (1, 3, 4), "pad_token_id": 511, "rms_norm_eps": 1.23456789e-6,
    "rope_theta": 12345.6789, "final_logit_softcapping": 29.123456789,
}  # fmt: skip


@pytest.mark.parametrize("ids", [(511,), (1, 3, 4), (4, 1)])
def test_the_configuration_comes_back_from_gguf(ids: tuple[int, ...], tmp_path: Path) -> None:
    src = padded(tmp_path / "src", PIECES, **ODD | {"eos_token_id": ids})
    report = convert(src, tmp_path / "o.gguf", to="gguf")
    (tmp_path / "o.gguf.g2kit.manifest.json").unlink()
    with open_checkpoint(src) as want, open_checkpoint(tmp_path / "o.gguf") as c:
        assert c.config == want.config
        assert c.reading.origin["eos_token_id"] == "GGUF key g2kit.eos_token_id"
        assert c.source.metadata["kv"]["tokenizer.ggml.eos_token_id"] == 1, "llama.cpp's own"
    assert named(report, "llama.cpp takes its special tokens", f"eos_token_id {ids}", "pad_token_id 511")  # fmt: skip


def test_a_usual_model_needs_no_key_of_ours() -> None:
    for name in ("gemma-2b", "gemma2-2b"):
        config = small(name)
        kv = [*to_gguf(config, "m", 0), (f"{config.family}.vocab_size", "u32", config.vocab_size)]
        keys = [key for key, _, _ in own_keys(config, kv)]
        assert keys == ([] if config.query_pre_attn_scalar == config.head_dim else ["g2kit.query_pre_attn_scalar"])  # fmt: skip


def test_ids_no_model_has_are_left_out_of_generation_config(tmp_path: Path) -> None:
    src = padded(tmp_path / "src", PIECES)
    given = {"eos_token_id": [1, 99999999999], "pad_token_id": -1, "bos_token_id": "x", "top_k": 3}
    (src / "generation_config.json").write_text(json.dumps(given))
    report = convert(src, tmp_path / "o", to="torch")
    for word in ("eos_token_id 99999999999", "pad_token_id -1", "bos_token_id x"):
        assert named(
            report, "left out of generation_config.json", word, "none of the 512 token ids"
        )
    made = json.loads((tmp_path / "o" / "generation_config.json").read_text())
    assert made == {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "top_k": 3}


# ---- places


def rewritten(path: Path, **values: Any) -> Path:
    """A GGUF file of the sample model with other metadata, as the official package reads and writes it."""
    from gguf import GGUFReader, GGUFWriter

    convert(sample_dir(), path.with_name("sound.gguf"), to="gguf")
    reader = GGUFReader(path.with_name("sound.gguf"))
    writer = GGUFWriter(path, "gemma2")
    for field in reader.fields.values():
        key = field.name
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = values.get(key.rpartition(".")[2], field.contents())
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], sub)
    for t in reader.tensors:
        data = np.asarray(t.data)
        writer.add_tensor(t.name, data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("values", [{"bos_token_id": 77}, {"model": "gpt2x", "eos_token_id": 88}])
def test_errors_of_a_gguf_vocabulary_name_the_gguf_file(
    values: dict[str, Any], tmp_path: Path
) -> None:
    bad = rewritten(tmp_path / "bad.gguf", **values)
    if "model" in values:
        report = convert(bad, tmp_path / "o", to="torch")
        assert named(report, "no tokenizer")
        return
    with pytest.raises(TokenizerError) as e:
        convert(bad, tmp_path / "o", to="torch")
    assert e.value.where == str(bad)


def test_a_damaged_gguf_vocabulary_names_the_file(tmp_path: Path) -> None:
    bad = rewritten(tmp_path / "bad.gguf", scores=[float("nan")] * 3072)
    with pytest.raises(TokenizerError, match="token 0 is") as e:
        convert(bad, tmp_path / "o", to="torch")
    assert e.value.where == str(bad)


def test_a_configuration_that_is_no_file_is_told_of(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "m", to="safetensors")
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "g2kit.manifest.json").unlink()
    os.mkfifo(tmp_path / "m" / "config.json")
    note = "config.json is not a regular file; ignored"
    report = api.inspect(tmp_path / "m", config=sample_dir())
    assert [n for n in report["notes"] if n.endswith(note)]


EMPTY = (
    ("inspect", ""),
    ("inspect", str(sample_dir()), "--config="),
    ("convert", str(sample_dir()), "o", "--to", "torch", "--tokenizer", ""),
)


@pytest.mark.parametrize("args", EMPTY)
def test_empty_arguments_are_refused(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(sample_dir() if args == ("inspect", "") else tmp_path)
    assert run_cli(g2conv, list(args)) == 2
    assert capsys.readouterr().err.startswith("error[E_USAGE]: an argument is empty")
    assert not list(tmp_path.iterdir())
