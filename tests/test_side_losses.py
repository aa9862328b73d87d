"""What goes along with the weights is kept, or the report and the manifest name it as left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

import g2kit.convert
from g2kit.convert import api, convert, open_checkpoint, show
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.plan import Options
from g2kit.convert.tokenizer_json import tokenizer_json
from g2kit.convert.tokenizer_rebuild import sentencepiece_from_json
from g2kit.formats import manifest as manifests
from g2kit.formats.dtypes import F32
from g2kit.formats.errors import ConfigError, FormatError, G2Error, UsageError
from g2kit.formats.sentencepiece_model import parse
from g2kit.model.config import GemmaConfig
from g2kit.model.config_formats import from_plain, to_plain
from g2kit.model.sample import sample_dir

DATA = Path(__file__).parent / "data"
MANIFEST = "g2kit.manifest.json"
OFFICIAL = (DATA / "gguf" / "tokenizer.model").read_bytes()
SINGLE = {"m.safetensors": "safetensors", "m.ckpt": "torch", "m.gguf": "gguf", "m.weights.h5": "keras"}  # fmt: skip


def saved(
    root: Path, config: GemmaConfig, to: str = "safetensors", **options: Any
) -> dict[str, Any]:
    weights = random_weights(config, 1)
    return convert_checkpoint(checkpoint(config, weights), root, Options(to, **options))


def said(report: dict[str, Any], *words: str) -> bool:
    """Whether one note has all of these words."""
    return any(all(w in note for w in words) for note in report["notes"])


# ---- single files


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_keeps_its_configuration(name: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(sample_dir(), src)
    raw = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(raw | {"attention_dropout": 0.5}))
    report = convert(src, tmp_path / name, to=SINGLE[name])
    lost = "generation_config.json" if name == "m.gguf" else "config.json"
    if (src / lost).exists():
        assert said(report, "one file", lost)
    assert said(report, "no key", "attention_dropout")
    with open_checkpoint(src) as c:
        want = c.config
    with open_checkpoint(tmp_path / name) as c:
        assert c.config == want
    assert api.check(tmp_path / name)["fingerprint"] == report["output"]["fingerprint"]
    assert manifests.load(tmp_path / f"{name}.{MANIFEST}").notes == tuple(report["notes"])


def test_a_renamed_single_file(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "a.ckpt", to="torch")
    convert(sample_dir(), tmp_path / "other.ckpt", to="torch")  # no candidate: its file is there
    (tmp_path / "a.ckpt").rename(tmp_path / "b.ckpt")
    with pytest.raises(
        FormatError, match=rf"rename its manifest \(a\.ckpt\.{MANIFEST}\) to b\.ckpt"
    ):
        api.check(tmp_path / "b.ckpt")
    (tmp_path / f"a.ckpt.{MANIFEST}").rename(tmp_path / f"b.ckpt.{MANIFEST}")
    assert api.check(tmp_path / "b.ckpt")["notes"] == ["renamed: the manifest calls it a.ckpt"]
    data = bytearray((tmp_path / "b.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.ckpt").write_bytes(data)
    with pytest.raises(G2Error, match="sha256"):
        api.check(tmp_path / "b.ckpt")


def test_the_manifest_of_other_files_is_not_believed(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", small("gemma2-2b"))
    saved(tmp_path / "b.safetensors", small("gemma2-2b", d=32))
    (tmp_path / "b.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="pass --config"):
        open_checkpoint(tmp_path / "a.safetensors")


# ---- GGUF without a vocabulary


def test_gguf_without_vocabulary_can_be_read_again(tmp_path: Path) -> None:
    config = small("gemma2-2b").with_(eos_token_id=(1, 7), bos_token_id=3)
    saved(tmp_path / "g", config, "gguf")
    with open_checkpoint(tmp_path / "g") as c:
        assert c.config == config  # llama.cpp's keys, and g2kit's own
        assert c.reading.origin["vocab_size"] == "GGUF key gemma2.vocab_size"
        assert c.reading.origin["bos_token_id"] == "GGUF key g2kit.bos_token_id"
    (tmp_path / "g" / "config.json").unlink()
    with open_checkpoint(tmp_path / "g") as c:
        assert c.config == config
        assert c.reading.origin["bos_token_id"] == "GGUF key g2kit.bos_token_id"
    saved(tmp_path / "m.gguf", config, "gguf")
    with open_checkpoint(tmp_path / "m.gguf") as c:
        assert c.config == config
        assert c.reading.origin["bos_token_id"] == "GGUF key g2kit.bos_token_id"


def strip(path: Path, *keys: bytes) -> None:
    """Rename keys of a GGUF file to others of the same length, so that nobody finds them."""
    data = path.read_bytes()
    for key in keys:
        assert data.count(key) == 1
        data = data.replace(key, key[:-1] + b"~")
    path.write_bytes(data)


def test_config_json_supplies_what_gguf_keys_lack(tmp_path: Path) -> None:
    config = small("gemma2-2b")
    saved(tmp_path / "g", config, "gguf")
    (tmp_path / "g" / MANIFEST).unlink()
    strip(tmp_path / "g" / "model.gguf", b"gemma2.vocab_size", b"gemma2.final_logit_softcapping")
    with open_checkpoint(tmp_path / "g") as c:
        assert c.config == config
        assert (
            c.reading.origin["final_logit_softcapping"] == "config.json key final_logit_softcapping"
        )
    raw = json.loads((tmp_path / "g" / "config.json").read_text())
    (tmp_path / "g" / "config.json").write_text(json.dumps(raw | {"hidden_size": 48}))
    with pytest.raises(
        ConfigError, match=r"another model's: hidden_size is 24 in the file, 48 there"
    ):
        open_checkpoint(tmp_path / "g")
    (tmp_path / "g" / "config.json").write_text(json.dumps(raw | {"model_type": "gemma3"}))
    with pytest.raises(ConfigError, match=r"lacks gemma2\.final_logit_softcapping"):
        open_checkpoint(tmp_path / "g")


def test_a_complete_gguf_does_not_care_what_lies_beside_it(tmp_path: Path) -> None:
    saved(tmp_path / "m.gguf", small("gemma2-2b"), "gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with open_checkpoint(tmp_path / "m.gguf") as c:
        assert c.config == small("gemma2-2b")


def json_only(root: Path) -> Path:
    """The sample with tokenizer.json but without tokenizer.model."""
    shutil.copytree(sample_dir(), root)
    raw = (root / "tokenizer.model").read_bytes()
    built, _ = tokenizer_json(raw, parse(raw))
    assert built is not None
    (root / "tokenizer.json").write_bytes(built)
    (root / "tokenizer.model").unlink()
    return root


@pytest.mark.parametrize("to", ["gguf", "keras"])
def test_the_vocabulary_is_built_from_tokenizer_json(to: str, tmp_path: Path) -> None:
    src = json_only(tmp_path / "src")
    report = convert(src, tmp_path / "g", to=to)
    assert said(report, "rebuilt from tokenizer.json")
    with open_checkpoint(tmp_path / "g") as c:
        rebuilt = (
            c.sidecars.tokenizer_model
            if to == "keras"
            else (tmp_path / "g/tokenizer.model").read_bytes()
        )
    want, got = parse((sample_dir() / "tokenizer.model").read_bytes()), parse(rebuilt or b"")
    assert (got.pieces, got.types) == (want.pieces, want.types)


def test_official_pieces_come_back_from_tokenizer_json() -> None:
    built, _ = tokenizer_json(OFFICIAL, parse(OFFICIAL))
    assert built is not None
    data, reason = sentencepiece_from_json(built)
    assert reason is None
    want, got = parse(OFFICIAL), parse(data or b"")
    assert (got.pieces, got.types, got.scores) == (want.pieces, want.types, want.scores)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"]["merges"].reverse(), "its merges are not"),
        (lambda t: t["model"].update(type="Unigram"), "not a BPE model"),
        (lambda t: t["model"]["vocab"].pop("an"), "holes"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "normalises"),
        (lambda t: t.update(added_tokens=[{}]), "damaged"),
        (lambda t: t.pop("model"), "damaged"),
        (lambda t: t["model"].update(merges=[1]), "damaged"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_not_forced(
    change: Any, reason: str, tmp_path: Path
) -> None:
    built, _ = tokenizer_json(OFFICIAL, parse(OFFICIAL))
    tree = json.loads(built or b"")
    change(tree)
    made, why = sentencepiece_from_json(json.dumps(tree).encode())
    assert made is None
    assert reason in str(why)


def test_a_vocabulary_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    src = json_only(tmp_path / "src")
    tree = json.loads((src / "tokenizer.json").read_text())
    tree["model"]["merges"].reverse()
    (src / "tokenizer.json").write_text(json.dumps(tree))
    report = convert(src, tmp_path / "m.gguf", to="gguf")
    assert said(report, "cannot be made a SentencePiece vocabulary exactly", "merges")
    with open_checkpoint(tmp_path / "m.gguf") as c, open_checkpoint(src) as want:
        assert c.config == want.config


# ---- keys of config.json


OTHER = {
    "attention_dropout": 0.25, "initializer_range": 0.5, "use_cache": False, "cache_implementation": "hybrid",
    "id2label": {"0": "x"}, "transformers_version": "4.42.0",
}  # fmt: skip


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A fine-tune whose config.json says more than a Gemma's must."""
    root = tmp_path / "tuned"
    shutil.copytree(sample_dir(), root)
    raw = json.loads((root / "config.json").read_text()) | OTHER
    raw |= {
        "quantization_config": {"bits": 4},
        "auto_map": {"AutoModel": "x.Y"},
        "max_position_embeddings": 4096,
    }
    raw |= {"architectures": ["Gemma2Model"], "torch_dtype": "float64"}
    (root / "config.json").write_text(json.dumps(raw))
    (root / "generation_config.json").write_text('{"top_k": 7, "_from_model_config": true}')
    return root


@pytest.mark.parametrize("to", ["safetensors", "torch", "flax"])
def test_other_keys_of_config_json_are_passed_on(to: str, tuned: Path, tmp_path: Path) -> None:
    report = convert(tuned, tmp_path / "o", to=to)
    got = json.loads((tmp_path / "o" / "config.json").read_text())
    assert {k: got[k] for k in OTHER} == OTHER
    assert "quantization_config" not in got
    assert "auto_map" not in got
    assert (got["architectures"], got["torch_dtype"]) == (["Gemma2ForCausalLM"], "bfloat16")
    assert said(
        report,
        "left out of config.json",
        "quantization_config (the weights are written unq",
        "auto_map",
    )
    assert said(report, "architectures ['Gemma2Model'] -> ['Gemma2ForCausalLM']")
    assert said(report, "left out of generation_config.json: _from_model_config")
    assert json.loads((tmp_path / "o/generation_config.json").read_text())["top_k"] == 7


def test_keras_names_what_it_has_no_key_for(tuned: Path, tmp_path: Path) -> None:
    report = convert(tuned, tmp_path / "o", to="keras")
    assert said(report, "keras has no room for", "generation_config.json")
    assert said(report, "no key for", "attention_dropout", "cache_implementation")
    assert said(report, "keras has no key for max_position_embeddings (4096)")
    with open_checkpoint(tmp_path / "o") as c:
        assert c.config.max_position_embeddings == 4096
        assert (
            c.reading.origin["max_position_embeddings"] == f"{MANIFEST} key max_position_embeddings"
        )
    back = convert(tmp_path / "o", tmp_path / "back", to="safetensors")
    assert back["output"]["fingerprint"] == report["source"]["fingerprint"]
    assert (
        json.loads((tmp_path / "back/config.json").read_text())["max_position_embeddings"] == 4096
    )


def test_somebody_elses_config_json_is_not_passed_on(tmp_path: Path) -> None:
    saved(tmp_path / "s", small("gemma2-2b"))
    (tmp_path / "s" / "config.json").write_text('{"learning_rate": 1}')
    report = convert(tmp_path / "s", tmp_path / "o", to="safetensors", config=small("gemma2-2b"))
    assert "learning_rate" not in json.loads((tmp_path / "o" / "config.json").read_text())
    assert said(report, "config.json is left out and made anew")


@pytest.mark.parametrize("arch", ["gemma-2b", "gemma2-27b"])
def test_plain_configurations_come_back(arch: str) -> None:
    config = small(arch).with_(eos_token_id=(1, 9))
    plain = json.loads(json.dumps(to_plain(config)))
    reading = from_plain(plain, "x")
    assert reading.config == config
    assert set(reading.origin) == set(GemmaConfig.__dataclass_fields__)
    for key, value in (
        ("family", "gemma3"),
        ("hidden_size", None),
        ("head_dim", "8"),
        ("num_hidden_layers", 1 << 40),
    ):
        with pytest.raises(G2Error) as e:
            from_plain(plain | {key: value}, "x")
        assert key in str(e.value)


# ---- training state, tokenizers, shards


def test_training_state_is_named() -> None:
    with open_checkpoint(DATA / "orbax_kauldron", config=DATA / "hf_sharded" / "config.json") as c:
        note = next(n for n in c.notes if "training state" in n)
    for part in ("opt_state/count = 0", "collections/x = 0", "step = 0"):
        assert part in note


def test_a_rebuilt_tokenizer_is_named(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "m.gguf", to="gguf")
    report = convert(tmp_path / "m.gguf", tmp_path / "o", to="safetensors")
    assert said(report, "tokenizer.model is rebuilt from the GGUF vocabulary")


@pytest.mark.parametrize("to", ["safetensors", "keras", "torch"])
def test_a_tensor_larger_than_a_shard_is_named(to: str, tmp_path: Path) -> None:
    report = convert(sample_dir(), tmp_path / "o", to=to, max_shard_size="200kB")
    assert said(report, "larger than --max-shard-size (200000 bytes)", "embed", "bytes)")
    # exactly the embedding's bytes: only the file's header makes it larger
    limit = 3072 * 256 * 2
    report = convert(sample_dir(), tmp_path / "p", to=to, max_shard_size=limit)
    assert not said(report, "get a file each")
    note = next(n for n in report["notes"] if "counts weights only" in n)
    found = re.search(r"larger, (\S+) by (\d+) bytes", note)
    assert found
    assert (tmp_path / "p" / found[1]).stat().st_size == limit + int(found[2])


# ---- gating


def test_the_orientation_is_noted_and_used(tmp_path: Path) -> None:
    config = small("gemma2-2b", d=24, f=24)
    for gating in ("df", "fd"):
        saved(tmp_path / gating, config, "flax", gating=gating)
        with open_checkpoint(tmp_path / gating) as c:
            got = c.tensors["model.layers.1.mlp.up_proj.weight"].read()
        want = random_weights(config, 1)["model.layers.1.mlp.up_proj.weight"]
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
        api.check(tmp_path / gating)
        report = api.inspect(tmp_path / gating)
        assert (report["gating"], report["gating_origin"]) == (gating, MANIFEST)
        assert f"({gating}), from {MANIFEST}" in show.inspection(report)
    other = api.inspect(tmp_path / "df", gating="fd")
    assert (other["gating"], other["gating_origin"]) == ("fd", "--gating")
    plain = saved(tmp_path / "plain", small("gemma2-2b"), "flax")
    assert plain["output"]["layout"] == "flat"
    assert api.inspect(tmp_path / "plain")["gating_origin"] == "the shapes"
    assert api.inspect(sample_dir())["gating"] is None


# ---- what inspect says


def test_checksums_of_orbax_are_in_the_manifest(tmp_path: Path) -> None:
    saved(tmp_path / "o", small("gemma2-2b"), "flax")
    assert any("g2kit's manifest has them" in n for n in api.inspect(tmp_path / "o")["notes"])
    (tmp_path / "o" / MANIFEST).unlink()
    assert any("a flipped bit cannot be noticed" in n for n in api.inspect(tmp_path / "o")["notes"])


def test_stored_bytes_are_those_of_the_weights(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "o", to="flax")
    arrays = sum(
        f.stat().st_size
        for f in (tmp_path / "o").rglob("*")
        if f.is_file() and "transformer" in str(f.parent)
    )
    assert api.inspect(tmp_path / "o")["bytes"] == arrays


def test_dtypes_have_one_spelling(tmp_path: Path) -> None:
    for to in ("flax", "torch", "safetensors", "keras", "maxtext"):
        saved(tmp_path / to, small("gemma2-2b"), to)
        report = api.inspect(tmp_path / to)
        assert set(report["dtypes"]) == {"bf16"}, to
        assert {t["dtype"] for t in report["tensors"]} == {"bf16"}
        assert all(t["stored"] for t in report["tensors"])
        assert "bfloat16" not in show.inspection(report, tensors=True)


def test_mixed_dtypes_are_called_mixed(tmp_path: Path) -> None:
    report = saved(tmp_path / "m.gguf", small("gemma2-2b"), "gguf")
    assert report["output"]["dtype"] == "mixed"
    assert set(report["output"]["dtypes"]) == {"bf16", "f32"}
    assert manifests.load(tmp_path / f"m.gguf.{MANIFEST}").dtype == "mixed"
    assert re.search(r"mixed: \d+ bf16, \d+ f32", show.result(report))
    config = small("gemma2-2b")
    weights = {n: w.astype(F32) for n, w in random_weights(config, 1).items()}
    same = convert_checkpoint(checkpoint(config, weights), tmp_path / "f.gguf", Options("gguf"))
    assert same["output"]["dtype"] == "f32"


# ---- check


def test_check_teaches(tmp_path: Path) -> None:
    saved(tmp_path / "o", small("gemma2-2b"))
    with pytest.raises(UsageError, match=r"part of an output.*run `g2conv check .*/o`"):
        api.check(tmp_path / "o" / "model.safetensors")
    with pytest.raises(G2Error, match="no such file or directory"):
        api.check(tmp_path / "nowhere")
    (tmp_path / "o" / "README.md").touch()
    (tmp_path / "o" / ".gitattributes").touch()
    report = api.check(tmp_path / "o")
    assert report["notes"] == ["not in the manifest, so not checked: .gitattributes, README.md"]
    assert "README.md" in show.checked(report)
    (tmp_path / "alone.safetensors").touch()
    with pytest.raises(FormatError, match="no g2kit manifest"):
        api.check(tmp_path / "alone.safetensors")


# ---- the Python interface


def test_sizes_may_be_words(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "o", to="safetensors", max_shard_size="3MB")
    assert len(list((tmp_path / "o").glob("model-*"))) > 1
    for wrong in ("many", 0, -1, 1.5, True):
        with pytest.raises(UsageError, match="size"):
            convert(sample_dir(), tmp_path / "x", to="safetensors", max_shard_size=wrong)  # type: ignore[arg-type]


def test_rows_outside_a_tensor_are_refused() -> None:
    with open_checkpoint(sample_dir()) as c:
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            tensor = c.tensors[name]
            rows = tensor.shape[0]
            assert tensor.read_rows(rows, rows).shape[0] == 0
            for start, stop in ((-1, 2), (3, 2), (0, rows + 1), (rows + 1, rows + 2)):
                with pytest.raises(
                    UsageError, match=f"{start}:{stop} of a tensor with {rows} rows"
                ):
                    tensor.read_rows(start, stop)


def test_printing_a_checkpoint_is_short() -> None:
    with open_checkpoint(sample_dir()) as c:
        text = repr(c)
    assert text.startswith("<Checkpoint ")
    assert len(text) < 300
    for part in ("gemma2", "4 layers", "bf16", "Hugging Face safetensors"):
        assert part in text


def test_the_package_lists_what_it_offers() -> None:
    assert set(g2kit.convert.__all__) <= set(dir(g2kit.convert))


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that feeds an opened checkpoint to the forward pass, as it stands."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    block = next(b for b in blocks if "torch_gemma" in b)
    monkeypatch.chdir(tmp_path)
    convert(sample_dir(), tmp_path / "sample", to="safetensors")
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert scope["logits"].shape[-1] == scope["checkpoint"].config.vocab_size
    assert bool(scope["torch"].isfinite(scope["logits"]).all())


def test_other_files_beside_the_weights_are_named(tmp_path: Path) -> None:
    source = tmp_path / "tuned"
    api.sample(source)
    (source / "README.md").write_text("a fine-tune")
    (source / "adapter_config.json").write_text("{}")
    (source / "runs").mkdir()
    (source / ".gitattributes").write_text("")
    notes = convert(source, tmp_path / "out", to="flax")["notes"]
    assert "not taken along: README.md, adapter_config.json, runs/" in notes
    assert any("merge it first" in n for n in notes)
    assert not any(
        "not taken along" in n
        for n in convert(tmp_path / "out", tmp_path / "b", to="torch")["notes"]
    )
