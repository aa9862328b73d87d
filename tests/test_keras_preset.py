"""The preset's other files, byte for byte against KerasHub's; and KerasHub itself reading ours."""

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from configs import ARCHITECTURES, small
from plan_writer import materialise

from g2kit.convert import keras_preset
from g2kit.convert.layout import Layout
from g2kit.convert.layouts.keras import VARIANTS
from g2kit.formats import keras_h5
from g2kit.formats.base import Slot
from g2kit.formats.dtypes import BF16, BY_SHORT
from g2kit.formats.errors import ConfigError, DtypeError
from g2kit.model import canonical
from g2kit.model.config import GemmaConfig, preset
from g2kit.model.config_formats import from_keras

DATA = Path(__file__).parent / "data"
OFFICIAL = DATA / "keras" / "preset"
SPM = (DATA / "gguf" / "tokenizer.model").read_bytes()
CONFIG = GemmaConfig("gemma2", 2, 8, 12, 2, 1, 4, 16, 4.0, 50.0, 30.0, 8)  # the official file's


def test_equals_the_official_files():
    files = keras_preset.preset_files(CONFIG, "bf16", None)
    assert set(files) == {"config.json", "metadata.json"}
    assert files["config.json"] == (OFFICIAL / "config.json").read_bytes()
    ours, official = (
        json.loads(text)
        for text in (files["metadata.json"], (OFFICIAL / "metadata.json").read_bytes())
    )
    assert len(official.pop("date_saved")) == len(ours.pop("date_saved"))
    assert ours == official


def test_groups_equal_the_official_files():
    with h5py.File(OFFICIAL / "model.weights.h5") as f:
        found = {}
        f.visititems(
            lambda n, o: found.__setitem__(n, dict(o.attrs)) if n.endswith("vars") else None
        )
    assert keras_preset.preset_groups(CONFIG) == found


def test_tokenizer_travels():
    files = keras_preset.preset_files(CONFIG, "f32", SPM)
    assert files["assets/tokenizer/vocabulary.spm"] == SPM
    tokenizer = json.loads(files["tokenizer.json"])
    assert tokenizer["registered_name"] == "keras_hub>GemmaTokenizer"
    assert tokenizer["config"]["add_bos"] is False
    assert files == keras_preset.preset_files(CONFIG, "f32", SPM)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_config_comes_back(arch):
    config = replace(small(arch), max_position_embeddings=8192)
    text = keras_preset.preset_files(config, "f16", None)["config.json"]
    assert from_keras(json.loads(text)).config == config
    assert json.loads(text)["config"]["dtype"]["config"]["name"] == "float16"


def test_refuses():
    with pytest.raises(DtypeError, match="no dtype policy 'i8'; supported are bf16"):
        keras_preset.keras_config(CONFIG, "i8")
    with pytest.raises(ConfigError, match="KerasHub knows head_dim"):
        keras_preset.keras_config(replace(CONFIG, query_pre_attn_scalar=5.0), "bf16")


def test_notes():
    assert keras_preset.preset_notes(preset("gemma2-2b").config, False) == []
    (scale,) = keras_preset.preset_notes(preset("gemma2-27b").config, False)
    assert "query_head_dim_normalize=False" in scale
    assert "sqrt(128) here instead of sqrt(144)" in scale
    (turns,) = keras_preset.preset_notes(preset("gemma-2b-it").config, True)
    assert "stop_token_ids" in turns
    (epsilon,) = keras_preset.preset_notes(replace(CONFIG, rms_norm_eps=1e-5), False)
    assert "1e-06 instead of 1e-05" in epsilon


# ---------------------------------------------------------------- KerasHub reads ours


@pytest.fixture(scope="module")
def keras_hub():
    pytest.importorskip("keras", reason="needs keras with the torch backend")
    return pytest.importorskip("keras_hub", reason="needs keras-hub")


def random_weights(config: GemmaConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        n: (rng.standard_normal(t.shape) * 0.3).astype(dtype)
        for n, t in canonical.tensors(config).items()
    }


def write_preset(
    directory: Path, config: GemmaConfig, dtype: str, limit: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A preset of random weights; returns them under canonical and under Keras names."""
    weights = random_weights(config, BY_SHORT[dtype])
    rows = Layout(VARIANTS[0], config).rows
    arrays = {
        name: row.parts[0].reorder.to_foreign(weights[row.parts[0].canonical]).reshape(row.shape)
        for name, row in rows.items()
    }
    slots = [Slot(n, BY_SHORT[dtype], a.shape) for n, a in arrays.items()]
    groups = keras_preset.preset_groups(config)
    materialise(keras_h5.plan(slots, groups=groups, max_shard_size=limit), arrays, directory)
    for name, data in keras_preset.preset_files(config, dtype, SPM).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return weights, arrays


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("arch", ["gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-27b"])
def test_keras_hub_loads_every_bit(keras_hub, tmp_path, arch, dtype, limit):
    import torch

    config = small(arch, vocab=512)
    _, arrays = write_preset(tmp_path, config, dtype, limit)
    policy = keras_preset._DTYPES[dtype]
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path), dtype=policy)
    assert type(backbone).__name__ == "GemmaBackbone"
    loaded = {}
    for variable in backbone.variables:
        data = variable.value.detach().cpu().view(torch.uint8)
        loaded[variable.path] = data.numpy().tobytes()
    expected = {keras_path(n): a.tobytes() for n, a in arrays.items()}
    assert loaded == expected


def keras_path(name: str) -> str:
    """Keras's own path of the variable that a name in the file stands for."""
    groups = keras_preset.preset_groups(small("gemma2-2b", layers=4)) | {
        f"layers/gemma_decoder_block{n}/{norm}/vars": {"name": norm}
        for n in ("", "_1")
        for norm in ("post_attention_norm", "post_ffw_norm")
    }
    parts = name.split("/")
    # the names of the layers on the way down, "layers" itself being none
    ways = ["/".join(parts[:n]) + "/vars" for n in range(2, len(parts) - 1)]
    leaf = "embeddings" if "embedding" in name else "scale" if "norm" in parts[-3] else "kernel"
    return "/".join([*(groups[w]["name"] for w in ways), leaf])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-9b"])
def test_keras_hub_computes_the_same(keras_hub, tmp_path, arch):
    """Logits of GemmaCausalLM on our preset equal those of our forward pass, in float32."""
    import torch

    from g2kit.model import torch_gemma

    config = small(arch, vocab=512)
    weights, _ = write_preset(tmp_path, config, "f32", None)
    model = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype="float32")
    tokens = np.random.default_rng(1).integers(4, 512, (2, 13))
    out = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    ours = torch_gemma.forward(
        torch.from_numpy(tokens), {n: torch.from_numpy(w) for n, w in weights.items()}, config
    )
    error = float((out.detach().cpu() - ours).abs().max())
    assert error < 2e-3, error
    assert float(ours.std()) > 0.1


@pytest.mark.slow
def test_keras_hub_ignores_the_27b_scale(keras_hub, tmp_path):
    """What keras_caveats says of query_head_dim_normalize is still so; if this fails, drop the caveat."""
    import torch

    from g2kit.model import torch_gemma

    config = small("gemma2-27b", vocab=512)
    assert config.query_pre_attn_scalar != config.head_dim
    weights, _ = write_preset(tmp_path, config, "f32", None)
    model = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype="float32")
    tokens = np.random.default_rng(1).integers(4, 512, (2, 13))
    out = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}).detach().cpu()
    table = {n: torch.from_numpy(w) for n, w in weights.items()}
    right = torch_gemma.forward(torch.from_numpy(tokens), table, config)
    wrong = replace(config, query_pre_attn_scalar=float(config.head_dim))
    assumed = torch_gemma.forward(torch.from_numpy(tokens), table, wrong)
    assert float((out - assumed).abs().max()) < 2e-3
    assert float((out - right).abs().max()) > 1e-2


@pytest.mark.slow
def test_keras_hub_tokenizer(keras_hub, tmp_path):
    import sentencepiece

    write_preset(tmp_path, small("gemma2-2b", vocab=512), "f32", None)
    tokenizer = keras_hub.models.Tokenizer.from_preset(str(tmp_path))
    spm = sentencepiece.SentencePieceProcessor(model_proto=SPM)
    text = "Hello, world!\n  12"
    assert [int(t) for t in tokenizer(text)] == spm.encode(text)


@pytest.mark.slow
def test_round_trip_through_keras_hub(keras_hub, tmp_path):
    """Ours, loaded and saved by KerasHub, opens as the same tensors."""
    _, arrays = write_preset(tmp_path / "ours", small("gemma2-2b", vocab=512), "bf16", None)
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path / "ours"), dtype="bfloat16")
    backbone.save_to_preset(str(tmp_path / "theirs"))
    source = keras_h5.open_source(tmp_path / "theirs")
    assert set(source.tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = source.tensors[name]
        assert tensor.dtype == BF16
        assert tensor.read().tobytes() == array.tobytes()
