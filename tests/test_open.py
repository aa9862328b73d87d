"""What official tools wrote opens as the same canonical checkpoint, and damaged or contradictory input says so."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import small
from memory import MemoryTensor, checkpoint, random_weights

from g2kit.convert import fingerprint, open_checkpoint
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.detect import best_matches
from g2kit.convert.plan import Options
from g2kit.formats.base import Source
from g2kit.formats.errors import (
    ConfigError,
    ExtraTensorError,
    FormatError,
    InputError,
    MissingTensorError,
    ShapeError,
)
from g2kit.model import torch_gemma
from g2kit.model.config import PRESETS, GemmaConfig, preset

DATA = Path(__file__).parent / "data"
CONFIG = DATA / "hf_sharded" / "config.json"
OFFICIAL = {
    "transformers, sharded": "hf_sharded",
    "gemma_pytorch": "gemma_pytorch/model.ckpt",
    "gemma_pytorch, sharded": "gemma_pytorch_sharded",
    "llama.cpp": "gguf",
    "Flax FLAT": "orbax_flat",
    "Flax FLAT, zarr 3": "orbax_flat_zarr3",
    "Flax FLAT, msgpack": "orbax_flat_legacy",
    "Kauldron": "orbax_kauldron",
    "Kauldron, step": "orbax_kauldron/ckpt_0",
}
# canonical.npz key -> canonical name
NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def expected() -> dict[str, np.ndarray]:
    """Canonical name -> bfloat16 bits."""
    found = {}
    for key, value in np.load(DATA / "canonical.npz").items():
        if key == "embed":
            found["model.embed_tokens.weight"] = value
        elif key == "final_norm":
            found["model.norm.weight"] = value
        elif key.startswith("l"):
            layer, _, leaf = key[1:].partition(".")
            found[f"model.layers.{layer}.{NAMES[leaf]}.weight"] = value
    return found


@pytest.mark.parametrize("writer", OFFICIAL)
def test_official_files_hold_the_canonical_weights(writer: str) -> None:
    want = expected()
    with open_checkpoint(DATA / OFFICIAL[writer], config=CONFIG) as c:
        assert set(c.tensors) == set(want)
        for name, tensor in c.tensors.items():
            np.testing.assert_array_equal(tensor.read().view(np.uint16), want[name], err_msg=name)


def test_official_files_have_one_fingerprint() -> None:
    assert len({fingerprint(DATA / path, config=CONFIG) for path in OFFICIAL.values()}) == 1


@pytest.mark.parametrize("official", ["logits_gemma_jax_f32.npy", "logits_hf_f32.npy"])
def test_the_forward_pass_gives_official_logits(official: str) -> None:
    with open_checkpoint(DATA / "orbax_flat", config=CONFIG) as c:
        weights = {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in c.tensors.items()}
        tokens = torch.from_numpy(np.load(DATA / "token_ids.npy")).long()
        got = torch_gemma.forward(tokens, weights, c.config).numpy()
    assert np.abs(got - np.load(DATA / official)).max() < 2e-3


def test_maxtext_comes_back_as_near_as_its_arithmetic_allows() -> None:
    """Official MaxText files hold rounded products: matrices without a constant are exact, the others near."""
    want = expected()
    with open_checkpoint(DATA / "maxtext_scan", config=CONFIG) as c:
        for name, tensor in c.tensors.items():
            got, true = tensor.read(), want[name]
            if "norm" in name or "q_proj" in name or "embed" in name:
                a = got.astype(np.float32)
                b = (true.astype(np.uint32) << 16).view(np.float32)
                assert np.abs(a - b).max() <= 2**-7 * max(1.0, float(np.abs(b).max())), name
            else:
                np.testing.assert_array_equal(got.view(np.uint16), true, err_msg=name)


def test_int8_opens_as_quantized() -> None:
    with open_checkpoint(DATA / "gemma_pytorch" / "model-quant.ckpt", config=CONFIG) as c:
        assert len(c.quantized) == 1 + 4 * 7
        tensor = c.tensors["model.layers.0.mlp.up_proj.weight"]
        want = (expected()[tensor.name].astype(np.uint32) << 16).view(np.float32)
        error = np.abs(tensor.read() - want).max(axis=1)
        assert (error <= np.abs(want).max(axis=1) / 127).all()


def test_rows_can_be_read_alone() -> None:
    for path in OFFICIAL.values():
        with open_checkpoint(DATA / path, config=CONFIG) as c:
            for tensor in c.tensors.values():
                whole = tensor.read()
                part = tensor.read_rows(1, 3)
                np.testing.assert_array_equal(part.view(np.uint16), whole[1:3].view(np.uint16))


# ---- configuration


def saved(root: Path, config: GemmaConfig, to: str = "safetensors", **options: str) -> Path:
    convert_checkpoint(checkpoint(config, random_weights(config, 1)), root, Options(to, **options))  # type: ignore[arg-type]
    return root


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.endswith("-it")])
@pytest.mark.parametrize("to", ["flax", "torch", "safetensors"])
def test_released_sizes_are_known_by_their_shapes(name: str, to: str, tmp_path: Path) -> None:
    """Files of the real shapes, all holes: the configuration comes from the shapes alone."""
    config = preset(name).config
    make_hollow(tmp_path / "x", config, to)
    with open_checkpoint(tmp_path / "x") as c:
        assert c.config == config
        assert name in c.reading.origin["query_pre_attn_scalar"]


def make_hollow(root: Path, config: GemmaConfig, to: str) -> None:
    """A checkpoint of a config with sparse files of zeros: headers only."""
    from g2kit.convert.layout import Layout
    from g2kit.convert.targets import TARGETS, PlanRequest, target_variant
    from g2kit.formats.base import Slot
    from g2kit.formats.dtypes import BF16

    layout = Layout(target_variant(TARGETS[to], None, config, None), config)
    slots = [Slot(r.name, BF16, r.shape) for r in layout.rows.values()]
    plan = TARGETS[to].plan(PlanRequest(layout, slots, None, None))
    for f in plan.files:
        path = root / f.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            out.truncate(f.size)
            for offset, data in f.fixed:
                out.seek(offset)
                out.write(data)


def test_unknown_shapes_ask_for_a_configuration(tmp_path: Path) -> None:
    src = saved(tmp_path / "x", small("gemma2-9b"))
    (src / "config.json").unlink()
    (src / "g2kit.manifest.json").unlink()  # it knows the configuration too
    with pytest.raises(ConfigError, match=r"sliding_window.*pass --config FILE"):
        open_checkpoint(src)


def test_a_configuration_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    make_hollow(tmp_path / "x", preset("gemma2-2b").config, "flax")
    with pytest.raises(ConfigError, match=r"26 layers.*42 layers.*looks like gemma2-2b"):
        open_checkpoint(tmp_path / "x", config="gemma2-9b")
    wrong = preset("gemma2-2b").config.with_(hidden_size=2560)
    with pytest.raises(
        ShapeError, match=r"expected.*looks like gemma2-2b; pass --config gemma2-2b"
    ):
        open_checkpoint(tmp_path / "x", config=wrong)


def test_equal_sizes_leave_the_orientation_open(tmp_path: Path) -> None:
    config = small("gemma2-2b", d=24, f=24)
    saved(tmp_path / "x", config, "flax", gating="fd")
    (tmp_path / "x" / "g2kit.manifest.json").unlink()  # which notes the orientation
    with pytest.raises(ConfigError, match=r"both 24.*--gating df or --gating fd"):
        open_checkpoint(tmp_path / "x", config=config)
    want = random_weights(config, 1)["model.layers.1.mlp.up_proj.weight"]
    with open_checkpoint(tmp_path / "x", config=config, gating="fd") as c:
        got = c.tensors["model.layers.1.mlp.up_proj.weight"].read()
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_maxtext_and_keras_configurations_are_read(tmp_path: Path) -> None:
    from g2kit.model.config_formats import to_keras, to_maxtext

    config = small("gemma2-2b").with_(max_position_embeddings=8192)
    src = saved(tmp_path / "x", config)
    for name, tree in (("maxtext", to_maxtext(config)), ("keras", to_keras(config))):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(tree))
        with open_checkpoint(src, config=file) as c:
            assert c.config == config, name


# ---- names


def edit(src: Path, change: object) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(src / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, src / "model.safetensors")


def test_every_missing_and_unknown_name_is_listed(tmp_path: Path) -> None:
    src = saved(tmp_path / "x", small("gemma2-2b"))

    def change(t: dict[str, np.ndarray]) -> None:
        del t["model.layers.0.mlp.up_proj.weight"], t["model.layers.1.self_attn.k_proj.weight"]
        t["model.layers.0.mlp.bias"] = np.zeros(2, np.float32)

    edit(src, change)
    with pytest.raises(MissingTensorError) as e:
        open_checkpoint(src)
    for part in (
        "2 tensors are missing",
        "0.mlp.up_proj",
        "1.self_attn.k_proj",
        "1 tensors are unknown",
        "mlp.bias",
    ):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("base_model.model.layers.0.lora_A.weight", "merge the LoRA"),
        ("model.layers.0.self_attn.q_norm.weight", "Gemma 3"),
        ("vision_tower.x", "multimodal"),
    ],
)
def test_names_of_other_models_are_recognised(name: str, advice: str, tmp_path: Path) -> None:
    src = saved(tmp_path / "x", small("gemma2-2b"))
    edit(src, lambda t: t.update({name: np.zeros(2, np.float32)}))
    with pytest.raises(ExtraTensorError, match=advice):
        open_checkpoint(src)


def test_an_equal_head_is_dropped_and_said(tmp_path: Path) -> None:
    src = saved(tmp_path / "x", small("gemma2-2b"))
    edit(src, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    with open_checkpoint(src) as c:
        report = convert_checkpoint(c, tmp_path / "y", Options("torch"))
    assert any("lm_head equals the embedding" in n for n in report["notes"])


def test_two_formats_in_one_directory_are_not_guessed_between(tmp_path: Path) -> None:
    src = saved(tmp_path / "x", small("gemma2-2b"))
    shutil.copy(DATA / "gguf" / "bf16.gguf", src)
    with pytest.raises(
        FormatError, match=r"several checkpoints: safetensors, gguf.*pass the one file"
    ):
        open_checkpoint(src)
    with open_checkpoint(src / "bf16.gguf") as c:
        assert c.source.format == "gguf"
    with open_checkpoint(src, container="safetensors") as c:
        assert c.source.format == "safetensors"


def test_gemma1_and_gemma2_norms_are_told_apart(tmp_path: Path) -> None:
    """post_attention_layernorm means another place in Gemma 1."""
    for arch in ("gemma-2b", "gemma2-2b"):
        config = small(arch)
        saved(tmp_path / arch, config, "flax")
        with open_checkpoint(tmp_path / arch) as c:
            row, _ = c.layout.placements["model.layers.0.post_attention_layernorm.weight"]
        leaf = {"gemma-2b": "pre_ffw_norm", "gemma2-2b": "post_attention_norm"}[arch]
        assert row.name == f"transformer/layer_0/{leaf}/scale"


HOSTILE_NAMES = {
    "numbered": lambda i: f"t{i}",
    "layers": lambda i: f"model.layers.{i}.input_layernorm.weight",
    "long": lambda i: f"{i % 7}" + "/x_1." * 150 + f"{i}",
}


@pytest.mark.parametrize("container", ["safetensors", "orbax", "torch_pickle", "gguf", "keras_h5"])
@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_a_hundred_thousand_unknown_names_cost_little(container: str, kind: str) -> None:
    name = HOSTILE_NAMES[kind]
    count = 20_000 if kind == "long" else 100_000
    tensors = {name(i): MemoryTensor(name(i), np.zeros(1, np.uint8)) for i in range(count)}
    source = Source(container, Path("hostile"), dict(tensors))
    began = time.process_time()
    with pytest.raises(InputError):
        best_matches(source)
    assert (
        time.process_time() - began < 4
    )  # 10 and more with a regular expression per name and rule
