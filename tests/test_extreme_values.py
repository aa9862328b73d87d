"""Hyper-parameters and key-values at the edge: what is written passes its own check, what cannot be meant is refused."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights
from plan_writer import materialise

from g2kit.convert import api
from g2kit.convert.plan import Options
from g2kit.formats import gguf
from g2kit.formats.base import Slot
from g2kit.formats.errors import ConfigError, FormatError, G2Error, TokenizerError
from g2kit.model.sample import sample_dir


def model(root: Path, **changes: object) -> Path:
    """A Hugging Face checkpoint with keys of its config.json replaced."""
    config = small("gemma2-2b")
    api.convert_checkpoint(
        checkpoint(config, random_weights(config, 1)), root, Options("safetensors")
    )
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (root / "g2kit.manifest.json").unlink()
    return root


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
@pytest.mark.parametrize(
    "change",
    [
        {"query_pre_attn_scalar": 3e38},
        {"query_pre_attn_scalar": 1e-37},
        {"rms_norm_eps": 1.2e-38},
        {"attn_logit_softcapping": 3e38},
    ],
)
def test_what_float32_holds_is_written_and_checks(
    change: dict[str, Any], to: str, tmp_path: Path
) -> None:
    src = model(tmp_path / "src", **change)
    api.convert(src, tmp_path / "dst", to=to, fold_query_scale=True)
    assert api.check(tmp_path / "dst")["tensors"]
    found = api.inspect(tmp_path / "dst")["config"]
    for key, value in change.items():
        assert np.float32(found[key]) == np.float32(value)


@pytest.mark.parametrize(
    "change",
    [
        {"query_pre_attn_scalar": 1e300},
        {"query_pre_attn_scalar": 1e-300},
        {"rms_norm_eps": 1e-60},
        {"rms_norm_eps": 1e-42},
        {"final_logit_softcapping": 1e39},
    ],
)
def test_what_float32_does_not_hold_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    src = model(tmp_path / "src", **change)
    key = next(iter(change))
    with pytest.raises(ConfigError, match=rf"config\.json: {key} must be positive and finite"):
        api.convert(src, tmp_path / "dst", to="safetensors")
    assert not (tmp_path / "dst").exists()


def test_square_gating_matrices_check_without_an_option(tmp_path: Path) -> None:
    config = small("gemma2-2b", d=32, f=32)
    weights = random_weights(config, 1)
    for gating in ("df", "fd"):
        options = Options("flax", gating=gating)
        api.convert_checkpoint(checkpoint(config, weights), tmp_path / gating, options)
        assert api.check(tmp_path / gating)["tensors"]
    same = {api.fingerprint(tmp_path / g) for g in ("df", "fd")}
    assert len(same) == 1


def test_a_gguf_value_that_would_vanish_is_refused() -> None:
    with pytest.raises(FormatError, match="does not fit f32"):
        gguf.plan([], [("x", "f32", 1e-60)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf") / "m.gguf"
    api.convert(sample_dir(), root, to="gguf", check="none")
    return root


def rewritten(path: Path, root: Path, changes: dict[str, tuple[str, Any]]) -> Path:
    """A copy of a GGUF file with key-values replaced or added."""
    with closing(gguf.open_source(path)) as source:
        kv, types = source.metadata["kv"], source.metadata["kv_types"]
        rows = [(k, types[k], v) for k, v in kv.items() if k not in changes]
        rows += [(k, kind, value) for k, (kind, value) in changes.items()]
        slots = [Slot(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        plan = gguf.plan(slots, rows, file_name="m.gguf")
        root.mkdir()
        materialise(plan, {n: t.read() for n, t in source.tensors.items()}, root)
    return root / "m.gguf"


SCALAR = "g2kit.query_pre_attn_scalar"
HOSTILE: dict[str, tuple[str, Any, type[G2Error]]] = {
    "text": ("str", "x", ConfigError),
    "array": ("[f32]", [1.0, 2.0], ConfigError),
    "texts": ("[str]", ["a"], ConfigError),
    "truth": ("bool", True, ConfigError),
    "zero": ("f32", 0.0, ConfigError),
    "nan": ("f32", float("nan"), ConfigError),
    "huge": ("f64", 1e300, ConfigError),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_odd_query_scalar_is_bad_input(case: str, sound: Path, tmp_path: Path) -> None:
    kind, value, error = HOSTILE[case]
    path = rewritten(sound, tmp_path / "g", {SCALAR: (kind, value)})
    with pytest.raises(error, match=r"query_pre_attn_scalar must be") as e:
        api.fingerprint(path)
    assert "m.gguf" in str(e.value)


def test_the_query_scalar_comes_back_as_it_was_written(sound: Path, tmp_path: Path) -> None:
    path = rewritten(sound, tmp_path / "g", {SCALAR: ("f32", 33.3)})
    report = api.inspect(path)
    assert report["config"]["query_pre_attn_scalar"] == 33.3
    assert report["origin"]["query_pre_attn_scalar"] == f"GGUF key {SCALAR}"


def test_scores_that_no_tokenizer_file_holds_are_refused(sound: Path, tmp_path: Path) -> None:
    with closing(gguf.open_source(sound)) as source:
        count = len(source.metadata["kv"]["tokenizer.ggml.tokens"])
    scores = ("[f64]", np.full(count, 1e300))
    path = rewritten(sound, tmp_path / "g", {"tokenizer.ggml.scores": scores})
    with pytest.raises(TokenizerError, match=r"score 1e\+300"):
        api.convert(path, tmp_path / "dst", to="safetensors")
