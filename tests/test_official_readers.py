"""What we write is loaded by its real consumers, by their own code, and means the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2kit.convert import convert, open_checkpoint
from g2kit.model import torch_gemma
from g2kit.model.sample import heldout_text, sample_dir

transformers = pytest.importorskip("transformers")
LENGTH = 200  # more than three sliding windows of the sample
# fp32 rounding over four layers of up to 512 terms, for logits of magnitude up to 30
ATOL = 30 * 2**-23 * 512


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model in every format."""
    root = tmp_path_factory.mktemp("outputs")
    made = {}
    for name, options in {
        "flax": {"to": "flax"},
        "nested": {"to": "flax", "layout": "nested"},
        "kauldron": {"to": "flax", "layout": "kauldron"},
        "maxtext": {"to": "maxtext"},
        "safetensors": {"to": "safetensors"},
        "sharded": {"to": "safetensors", "max_shard_size": 2 << 20},
        "bin": {"to": "torch", "layout": "huggingface-bin"},
        "bin-sharded": {"to": "torch", "layout": "huggingface-bin", "max_shard_size": 2 << 20},
        "ckpt": {"to": "torch"},
        "gguf": {"to": "gguf"},
        "gguf-f32": {"to": "gguf", "dtype": "f32"},
        "keras": {"to": "keras"},
    }.items():
        made[name] = root / name
        convert(sample_dir(), made[name], **options)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(sample_dir() / "tokenizer.model"))
    return torch.tensor([[sp.bos_id(), *sp.encode(heldout_text())][:LENGTH]])


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with open_checkpoint(sample_dir()) as c:
        return {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in c.tensors.items()}


@pytest.fixture(scope="module")
def logits(tokens: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The forward pass of this package, in float32."""
    with open_checkpoint(sample_dir()) as c:
        return torch_gemma.forward(tokens, weights, c.config)


@pytest.mark.parametrize("name", ["safetensors", "sharded", "bin", "bin-sharded"])
def test_transformers(
    name: str, outputs: dict[str, Path], tokens: torch.Tensor, logits: torch.Tensor
) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        outputs[name], dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits, atol=ATOL, rtol=0)


def test_transformers_generates_with_the_converted_tokenizer(outputs: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(outputs["safetensors"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        outputs["safetensors"], attn_implementation="eager"
    )
    batch = tokenizer("The function returns", return_tensors="pt")
    assert batch["input_ids"][0, 0] == 2
    assert (batch["input_ids"] == 2).sum() == 1, "BOS exactly once"
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("The function returns")
    assert len(text) > len("The function returns") + 5


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, (*prefix, key))
    return found


ORBAX = {  # output -> (item directory, a leaf, its canonical tensor, axes)
    "flax": ("", ("transformer/layer_1/mlp/linear", "w"), "mlp.down_proj", "fd->df"),
    "nested": ("", ("layer_1", "mlp", "linear"), "mlp.down_proj", "fd->df"),
    "kauldron": ("default", ("params", "layer_1", "mlp", "linear"), "mlp.down_proj", "fd->df"),
}


@pytest.mark.parametrize("checkpointer", ["StandardCheckpointer", "PyTreeCheckpointer"])
@pytest.mark.parametrize("name", ORBAX)
def test_orbax(
    name: str, checkpointer: str, outputs: dict[str, Path], weights: dict[str, torch.Tensor]
) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    item, leaf, module, axes = ORBAX[name]
    tree = _leaves(getattr(ocp, checkpointer)().restore((outputs[name] / item).absolute()))
    with open_checkpoint(outputs[name]) as c:
        ours = set(c.source.tensors)
    restored = {"/".join(k) for k, v in tree.items() if hasattr(v, "shape") and v.shape}
    assert restored == {n for n in ours if n != "step"}
    got = np.asarray(tree[leaf]).astype(np.float32)
    want = weights[f"model.layers.1.{module}.weight"].numpy()
    np.testing.assert_array_equal(np.einsum(axes, got), want)


def test_orbax_restores_maxtext(outputs: dict[str, Path]) -> None:
    """The tree MaxText's load_parameters expects, layers stacked along axis 1."""
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = ocp.PyTreeCheckpointer().restore((outputs["maxtext"] / "0" / "items").absolute())
    assert set(tree) == {"opt_state", "params", "step"}
    layers = tree["params"]["params"]["decoder"]["layers"]
    with open_checkpoint(sample_dir()) as c:
        n = c.config
    kernel = layers["self_attention_local"]["query"]["kernel"]
    assert kernel.shape == (
        n.hidden_size,
        n.num_hidden_layers // 2,
        n.num_attention_heads,
        n.head_dim,
    )


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_load(mmap: bool, outputs: dict[str, Path], weights: dict[str, torch.Tensor]) -> None:
    found = torch.load(outputs["ckpt"] / "model.ckpt", weights_only=True, mmap=mmap)
    state = found["model_state_dict"]
    fused = state["model.layers.2.self_attn.qkv_proj.weight"]
    want = torch.cat([weights[f"model.layers.2.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.float(), want, atol=0, rtol=0)
    torch.testing.assert_close(
        state["embedder.weight"].float(), weights["model.embed_tokens.weight"], atol=0, rtol=0
    )


def test_gguf_reader(outputs: dict[str, Path], weights: dict[str, torch.Tensor]) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(outputs["gguf"] / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "gemma2"
    tensors = {t.name: t for t in reader.tensors}
    up = np.asarray(tensors["blk.3.ffn_up.weight"].data).view(np.uint16).astype(np.uint32) << 16
    want = weights["model.layers.3.mlp.up_proj.weight"].numpy()
    np.testing.assert_array_equal(up.view(np.float32).reshape(want.shape), want)
    norm = np.asarray(tensors["blk.3.ffn_norm.weight"].data)
    name = "model.layers.3.pre_feedforward_layernorm.weight"
    np.testing.assert_array_equal(norm, weights[name].numpy() + np.float32(1))


@pytest.mark.llama
def test_llama_cpp(outputs: dict[str, Path], tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """llama.cpp computes the same logits and splits text into the same tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(outputs["gguf-f32"] / "model.gguf"),
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_batch=256,
    )
    ids = tokens[0].tolist()
    model.eval(ids)
    got = np.array(model.scores[: len(ids)])
    # its attention computes in float16 where it may: far looser than fp32, far tighter than any wrong conversion
    assert np.abs(got - logits[0].numpy()).max() < 0.05
    text = heldout_text()[:2000]
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(sample_dir() / "tokenizer.model"))
    assert model.tokenize(text.encode(), add_bos=False) == sp.encode(text)


def test_config_says_what_the_model_is(outputs: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(outputs["safetensors"])
    raw = json.loads((sample_dir() / "config.json").read_text())
    for key in ("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "head_dim"):
        assert getattr(config, key) == raw[key]
