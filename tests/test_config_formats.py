"""GemmaConfig against every framework's own configuration: official files, inverses, known mistakes, bad input."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from configs import ARCHITECTURES, small
from gguf.utility import model_weight_count_rounded_notation
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from g2kit.formats.dtypes import BF16, F16, F32, I8
from g2kit.formats.errors import (
    ConfigError,
    DtypeError,
    G2Error,
    LimitError,
    UnknownConfigError,
)
from g2kit.model import config_formats as cf
from g2kit.model.config import PRESETS, GemmaConfig

DATA = Path(__file__).parent / "data"
BASES = [name for name in PRESETS if not name.endswith("-it")]
# google/gemma-2-9b's config.json as first published, in transformers 4's style
V4_9B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
    "query_pre_attn_scalar": 224, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
# google/gemma-2b's, in the style of its first week
V4_GEMMA1 = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
    "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192,
    "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18,
    "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "torch_dtype": "bfloat16", "vocab_size": 256000,
}  # fmt: skip


def official() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DATA / "hf_sharded" / "config.json").read_text())
    return loaded


def nine_b(**changes: Any) -> dict[str, Any]:
    return V4_9B | {"query_pre_attn_scalar": 256} | changes


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


def refused(read: Callable[[], object], *parts: str, kind: type[G2Error] = ConfigError) -> None:
    refusal(read, kind, *parts)


# ---- Hugging Face


def test_official_v5_file() -> None:
    reading = cf.from_huggingface(official())
    assert reading.config == GemmaConfig(
        "gemma2", 4, 64, 192, 4, 2, 32, 512, 32.0, 50.0, 30.0, 8, max_position_embeddings=64
    )
    assert reading.warnings == []
    assert reading.origin["rope_theta"] == "config.json key rope_parameters.rope_theta"
    assert set(reading.origin) == set(GemmaConfig.__dataclass_fields__)


def test_v4_files() -> None:
    assert cf.from_huggingface(nine_b()).config == PRESETS["gemma2-9b"].config
    reading = cf.from_huggingface(V4_GEMMA1)
    assert reading.config == PRESETS["gemma-2b"].config  # its "gelu" means the tanh form
    assert reading.warnings == []
    assert reading.origin["query_pre_attn_scalar"] == "config.json key head_dim"
    assert reading.origin["attn_logit_softcapping"] == "Gemma 1 has none"


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = PRESETS[name].config
    ours = cf.to_huggingface(config, BF16)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert str(theirs.dtype) == "torch.bfloat16"
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    for key, value in ours.items():
        if key not in ("rope_theta", "torch_dtype", "dtype", "hidden_act", "rope_parameters"):
            assert getattr(theirs, key) == value, key
    again = cf.from_huggingface(json.loads(theirs.to_json_string()))
    assert (again.config, again.warnings) == (config, [])


@given(
    st.sampled_from(sorted(ARCHITECTURES)), st.integers(1, 9), st.sampled_from([BF16, F16, F32]),
    st.floats(1e-7, 1e-3), st.integers(1, 200), st.lists(st.integers(0, 99), min_size=1, max_size=3),
)  # fmt: skip
def test_huggingface_inverse(
    arch: str, layers: int, dtype: Any, eps: float, vocab: int, eos: list[int]
) -> None:
    config = small(arch, layers=layers, vocab=vocab).with_(
        rms_norm_eps=eps, rope_theta=eps * 1e9, eos_token_id=tuple(eos)
    )
    written = cf.to_huggingface(config, dtype)
    assert list(written) == sorted(written)
    assert cf.from_huggingface(json.loads(json.dumps(written))).config == config


def test_a_config_of_either_generation_reads_the_same() -> None:
    both = cf.to_huggingface(PRESETS["gemma2-2b"].config, BF16)
    v4 = without(both, "rope_parameters", "dtype", "layer_types", "tie_word_embeddings")
    v5 = without(both, "rope_theta", "torch_dtype", "hidden_act")
    assert cf.from_huggingface(v4).config == cf.from_huggingface(v5).config


def test_all_missing_keys_are_listed_at_once() -> None:
    bad = without(nine_b(), "head_dim", "vocab_size", "hidden_size")
    refused(lambda: cf.from_huggingface(bad, "a/config.json"),
            "a/config.json: the configuration lacks hidden_size, head_dim, vocab_size.", "--config")  # fmt: skip
    refused(lambda: cf.from_huggingface({}), "lacks model_type, num_hidden_layers,", "rms_norm_eps")


def test_missing_hyperparameters_come_from_the_released_size_only() -> None:
    gone = ("attn_logit_softcapping", "query_pre_attn_scalar", "rope_theta", "sliding_window_size",
            "sliding_window", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    reading = cf.from_huggingface(without(V4_9B, *gone))
    assert reading.config == PRESETS["gemma2-9b"].config
    assert reading.origin["query_pre_attn_scalar"] == "preset gemma2-9b"
    unknown = without(nine_b(num_hidden_layers=41), *gone)
    refused(
        lambda: cf.from_huggingface(unknown),
        "lacks max_position_embeddings, rms_norm_eps, rope_theta or rope_parameters.rope_theta, "
        "query_pre_attn_scalar, attn_logit_softcapping, sliding_window or sliding_window_size.",
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gemma3_text"}, ("this is Gemma 3 (model_type gemma3_text)", "gemma2")),
        ({"model_type": "llama"}, ("another architecture (model_type llama)",)),
        ({"model_type": ["gemma2"]}, ("model_type ['gemma2']",)),
        ({"hidden_size": "3584"}, ("hidden_size must be a whole number, found 3584",)),
        ({"hidden_size": True}, ("hidden_size must be a whole number, found True",)),
        ({"hidden_size": 3584.5}, ("hidden_size must be a whole number",)),
        ({"hidden_size": math.inf}, ("hidden_size must be a whole number",)),
        ({"head_dim": 255}, ("head_dim must be even",)),
        ({"num_key_value_heads": 7}, ("not a multiple of",)),
        ({"num_key_value_heads": 0}, ("num_key_value_heads must be at least 1",)),
        ({"rms_norm_eps": math.nan}, ("rms_norm_eps must be a finite number",)),
        ({"rms_norm_eps": "1e-6"}, ("rms_norm_eps must be a finite number",)),
        ({"rope_theta": 10**400}, ("rope_theta must be a finite number",)),
        ({"attn_logit_softcapping": -1}, ("attn_logit_softcapping must be positive",)),
        ({"eos_token_id": "1"}, ("eos_token_id must be a whole number",)),
        ({"eos_token_id": [1, -2]}, ("eos_token_id must hold token ids",)),
        ({"hidden_activation": "silu"}, ("hidden_activation is silu", "gelu_pytorch_tanh")),
        ({"hidden_act": ["gelu"]}, ("hidden_act is ['gelu']",)),
        ({"attention_bias": True}, ("attention_bias is True",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention is True",)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling asks for type linear",)),
        ({"rope_scaling": 2}, ("rope_scaling must be an object",)),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("rope_parameters asks for type yarn",)),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}},
            ("rope_parameters asks for sliding_attention",),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            ("rope_theta is 10000.0 but rope_parameters.rope_theta is 1000000.0",),
        ),
        ({"layer_types": ["sliding_attention"]}, ("layer_types must list 42 layers, found 1",)),
        ({"layer_types": "x"}, ("layer_types must list 42 layers, found x",)),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 21},
            ("layer_types[0] is full_attention, but layer 0 of Gemma 2 is sliding", "42 of 42"),
        ),
        ({"layer_types": [{}] * 42}, ("layer_types[0] is {}",)),
    ],
)  # fmt: skip
def test_bad_config_json(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: cf.from_huggingface(nine_b(**changes)), *parts)


def test_sizes_no_model_has() -> None:
    for change in ({"num_hidden_layers": 10**9}, {"vocab_size": 2**40}):
        refused(lambda c=change: cf.from_huggingface(nine_b(**c)), "no model has", kind=LimitError)
    refused(lambda: cf.from_huggingface([1]), "must be a set of keys")  # type: ignore[arg-type]


def test_no_window_at_all() -> None:
    config = small("gemma2-2b", layers=4).with_(sliding_window=None)
    written = cf.to_huggingface(config)
    assert written["layer_types"] == ["full_attention"] * 4
    assert cf.from_huggingface(written).config == config


def test_what_hugging_face_cannot_express() -> None:
    odd = small("gemma-2b").with_(query_pre_attn_scalar=9.0)
    refused(lambda: cf.to_huggingface(odd), "query_pre_attn_scalar is 9.0, head_dim 8")
    with pytest.raises(DtypeError, match="loads no int8 weights"):
        cf.to_huggingface(small("gemma-2b"), I8)
    half = small("gemma2-2b").with_(query_pre_attn_scalar=2.5)
    assert cf.to_huggingface(half)["query_pre_attn_scalar"] == 2.5
    assert isinstance(cf.to_huggingface(small("gemma2-2b"))["query_pre_attn_scalar"], int)


# ---- mistakes of others


def test_the_9b_scale_of_224() -> None:
    reading = cf.from_huggingface(V4_9B, "9b/config.json")
    assert reading.config.query_pre_attn_scalar == 224.0  # read as it stands, not silently mended
    (warning,) = reading.warnings
    assert (warning.field, warning.found, warning.right) == ("query_pre_attn_scalar", 224.0, 256.0)
    assert str(warning).startswith("query_pre_attn_scalar is 224, the right value is 256: ")
    assert "transformers#31891" in warning.why
    assert "1.0690 times" in warning.why  # sqrt(256 / 224)
    fixed = cf.fix(reading)
    assert (fixed.config, fixed.warnings) == (PRESETS["gemma2-9b"].config, [])
    assert fixed.origin["query_pre_attn_scalar"] == (
        "--fix-config (was 224, from config.json key query_pre_attn_scalar)"
    )
    assert reading.origin["query_pre_attn_scalar"] == "config.json key query_pre_attn_scalar"


def test_the_27b_scale_of_128() -> None:
    written = cf.to_huggingface(PRESETS["gemma2-27b"].config) | {"query_pre_attn_scalar": 128}
    (warning,) = cf.from_huggingface(written).warnings
    assert warning.right == 144.0
    assert "sqrt(144)" in warning.why
    assert "1.0607 times" in warning.why  # sqrt(144 / 128)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("attn_logit_softcapping", None, 50.0),
        ("final_logit_softcapping", None, 30.0),
        ("final_logit_softcapping", 50.0, 30.0),
        ("sliding_window", 2048, 4096),
        ("rope_theta", 1e6, 10000.0),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("query_pre_attn_scalar", 128, 256.0),
    ],
)
def test_other_deviations_from_a_released_size(key: str, value: Any, right: Any) -> None:
    reading = cf.from_huggingface(without(nine_b(**{key: value}), "sliding_window_size"))
    (warning,) = reading.warnings
    assert (warning.field, warning.found, warning.right) == (key, value, right)
    assert "on purpose" in warning.why
    assert cf.fix(reading).config == PRESETS["gemma2-9b"].config


def test_an_unknown_size_is_only_warned_about_missing_caps() -> None:
    config = small("gemma2-2b").with_(attn_logit_softcapping=None, sliding_window=3, rope_theta=5.0)
    reading = cf.from_huggingface(cf.to_huggingface(config))
    (warning,) = reading.warnings
    assert (warning.field, warning.found, warning.right) == ("attn_logit_softcapping", None, None)
    assert str(warning).startswith("attn_logit_softcapping is null: every released")
    assert cf.fix(reading).config == config  # nothing says what it should be


def test_notes_on_keys_that_are_no_hyperparameters() -> None:
    odd = nine_b(tie_word_embeddings=False, hidden_activation="gelu", sliding_window_size=2048)
    reading = cf.from_huggingface(odd)
    assert [w.field for w in reading.warnings] == [
        "hidden_activation", "tie_word_embeddings", "sliding_window_size",
    ]  # fmt: skip
    assert cf.fix(reading).config == reading.config == PRESETS["gemma2-9b"].config
    assert len(cf.fix(reading).warnings) == 3


# ---- GGUF


def official_kv() -> dict[str, tuple[str, Any]]:
    names = {"STRING": "str", "UINT32": "u32", "FLOAT32": "f32", "BOOL": "bool"}
    reader = gguf.GGUFReader(DATA / "gguf" / "bf16.gguf")
    return {
        key: (names.get(f.types[0].name, f.types[0].name), f.contents())
        for key, f in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def test_gguf_keys_are_llama_cpps() -> None:
    theirs = official_kv()
    reading = cf.from_gguf({k: v for k, (_, v) in theirs.items()})
    assert reading.config == cf.from_huggingface(official()).config
    assert reading.config.rms_norm_eps == 1e-6  # not float32's 9.99999997e-07
    ours = cf.to_gguf(reading.config, "Hf", 32)
    expected = [(k, t, v) for k, (t, v) in theirs.items() if not k.startswith("tokenizer.")]
    assert [row[:2] for row in ours] == [row[:2] for row in expected]
    for (key, kind, mine), (_, _, right) in zip(ours, expected, strict=True):
        assert (np.float32(mine) if kind == "f32" else mine) == right, key


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(1, 60), st.sampled_from([1e4, 5e5, 0.3]))
@settings(max_examples=40)
def test_gguf_inverse(arch: str, layers: int, theta: float) -> None:
    config = small(arch, layers=layers).with_(rope_theta=theta)
    config = config.with_(query_pre_attn_scalar=cf.llama_cpp_query_scalar(config))
    kv: dict[str, Any] = {k: v for k, _, v in cf.to_gguf(config, "x", 0)}
    kv["tokenizer.ggml.tokens"] = [str(i) for i in range(config.vocab_size)]
    assert cf.from_gguf(kv).config == config
    assert ("gemma.rope.freq_base" in kv or "gemma2.rope.freq_base" in kv) == (theta != 1e4)


def test_llama_cpp_tells_the_27b_by_its_layers() -> None:
    scalars = {name: cf.llama_cpp_query_scalar(PRESETS[name].config) for name in BASES}
    right = {name: PRESETS[name].config.query_pre_attn_scalar for name in BASES}
    assert scalars == right
    assert (
        cf.llama_cpp_query_scalar(PRESETS["gemma2-27b"].config.with_(num_hidden_layers=44)) == 128
    )
    odd = small("gemma2-2b", layers=46, d=22)
    assert cf.llama_cpp_query_scalar(odd) == 5.0  # 22 // 4: llama.cpp divides whole numbers


def gguf_kv(**changes: Any) -> dict[str, Any]:
    rows = cf.to_gguf(small("gemma2-2b", vocab=8), "x", 32)
    kv: dict[str, Any] = {k: v for k, _, v in rows} | {"tokenizer.ggml.tokens": list("abcdefgh")}
    kv |= {k.replace("__", "."): v for k, v in changes.items()}
    return {k: v for k, v in kv.items() if v is not ...}


def test_gguf_of_mid_2024_is_refused() -> None:
    old = gguf_kv(gemma2__attn_logit_softcapping=..., gemma2__final_logit_softcapping=...)
    old.pop("gemma2.attention.sliding_window")
    refused(
        lambda: cf.from_gguf(old, "old.gguf"),
        "old.gguf: the file's metadata lacks gemma2.attn_logit_softcapping, "
        "gemma2.final_logit_softcapping, gemma2.attention.sliding_window.",
        "make the file again",
    )
    # even where the sizes are a released model's: the file itself would run wrongly
    nine = {k: v for k, _, v in cf.to_gguf(PRESETS["gemma2-9b"].config, "x", 32)}
    nine |= {"tokenizer.ggml.tokens": ["a"]}
    del nine["gemma2.attention.layer_norm_rms_epsilon"]
    refused(lambda: cf.from_gguf(nine), "lacks gemma2.attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"general__architecture": "llama"}, ("general.architecture is llama", "gemma2")),
        ({"general__architecture": ...}, ("general.architecture is missing",)),
        ({"tokenizer__ggml__tokens": ...}, ("lacks tokenizer.ggml.tokens",)),
        ({"tokenizer__ggml__tokens": "abc"}, ("lacks tokenizer.ggml.tokens",)),
        ({"gemma2__block_count": [1, 2]}, ("gemma2.block_count must be a whole number",)),
        ({"gemma2__attention__value_length": 4}, ("key_length is 8", "value_length is 4")),
        ({"gemma2__rope__scaling__type": "yarn"}, ("rope.scaling.type is yarn",)),
        ({"gemma2__attention__head_count": 0}, ("num_attention_heads must be at least 1",)),
        ({"gemma2__attn_logit_softcapping": 1e300}, ("attn_logit_softcapping must be positive",)),
    ],
)
def test_bad_gguf_keys(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: cf.from_gguf(gguf_kv(**changes)), *parts)


def test_gguf_vocabulary_and_end_tokens() -> None:
    padded = [*"abcdefgh", "[PAD8]", "[PAD9]"]
    reading = cf.from_gguf(gguf_kv(tokenizer__ggml__tokens=padded))
    assert reading.config.vocab_size == 8
    assert "2 of 10 are padding" in reading.origin["vocab_size"]
    chat = ["<pad>", "<eos>", "<bos>", "<end_of_turn>"]
    template = "{{ '<start_of_turn>' }}{{ '<end_of_turn>' }}"
    kv = gguf_kv(tokenizer__ggml__tokens=chat, tokenizer__ggml__eos_token_id=1,
                 tokenizer__chat_template=template)  # fmt: skip
    assert cf.from_gguf(kv).config.eos_token_id == (1, 3)
    assert cf.from_gguf(kv | {"tokenizer.chat_template": "{{ x }}"}).config.eos_token_id == (1,)


def test_gguf_cannot_leave_a_cap_out() -> None:
    config = small("gemma2-2b").with_(attn_logit_softcapping=None)
    refused(lambda: cf.to_gguf(config, "x", 0), "without attn_logit_softcapping", "--fix-config")


@given(st.integers(1, 10**13))
def test_size_label_is_gguf_pys(parameters: int) -> None:
    assert cf.size_label(parameters) == model_weight_count_rounded_notation(parameters)


# ---- Keras


KERAS = {
    "module": "keras_hub.src.models.gemma.gemma_backbone",
    "class_name": "GemmaBackbone",
    "config": {
        "name": "gemma_backbone", "trainable": True, "dtype": {"class_name": "DTypePolicy"},
        "vocabulary_size": 512, "num_layers": 3, "num_query_heads": 4, "num_key_value_heads": 2,
        "hidden_dim": 64, "intermediate_dim": 384, "head_dim": 32, "layer_norm_epsilon": 1e-06,
        "dropout": 0, "query_head_dim_normalize": True, "use_post_ffw_norm": True,
        "use_post_attention_norm": True, "final_logit_soft_cap": 30.0,
        "attention_logit_soft_cap": 50.0, "sliding_window_size": 8,
        "use_sliding_window_attention": True,
    },
    "registered_name": "keras_hub>GemmaBackbone",
}  # fmt: skip


def keras(**changes: Any) -> dict[str, Any]:
    inner = {k: v for k, v in (KERAS["config"] | changes).items() if v is not ...}  # type: ignore[operator]
    return KERAS | {"config": inner}


def test_keras_as_keras_hub_saves_it() -> None:
    reading = cf.from_keras(KERAS)
    assert reading.config == GemmaConfig("gemma2", 3, 64, 192, 4, 2, 32, 512, 32.0, 50.0, 30.0, 8)
    assert reading.origin["intermediate_size"] == "Keras key intermediate_dim / 2"
    task = {"class_name": "GemmaCausalLM", "config": {"backbone": KERAS, "name": "x"}}
    assert cf.from_keras(task) == reading
    assert cf.from_keras(KERAS["config"]) == reading  # type: ignore[arg-type]
    ours = cf.to_keras(reading.config)
    theirs = without(KERAS["config"], "name", "trainable", "dtype")  # type: ignore[arg-type]
    assert ours == theirs


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(1, 9), st.integers(1, 50))
@settings(max_examples=40)
def test_keras_inverse(arch: str, layers: int, f: int) -> None:
    config = small(arch, layers=layers, f=f).with_(max_position_embeddings=8192)
    assert cf.from_keras(cf.to_keras(config)).config == config


@pytest.mark.parametrize("name", BASES)
def test_keras_presets(name: str) -> None:
    config = PRESETS[name].config
    assert cf.from_keras(cf.to_keras(config)).config == config
    assert bool(cf.keras_caveats(config)) == (name == "gemma2-27b")


def test_the_first_keras_presets_have_fewer_keys() -> None:
    old = without(cf.to_keras(PRESETS["gemma-2b"].config), "query_head_dim_normalize",
                  "use_post_ffw_norm", "use_post_attention_norm", "final_logit_soft_cap",
                  "attention_logit_soft_cap", "sliding_window_size", "use_sliding_window_attention")  # fmt: skip
    assert cf.from_keras(old).config == PRESETS["gemma-2b"].config


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (keras(head_dim=..., num_layers=...), ("lacks num_layers, head_dim",)),
        (keras(intermediate_dim=385), ("intermediate_dim is 385", "even")),
        (keras(use_post_ffw_norm=False), ("use_post_ffw_norm and use_post_attention_norm differ",)),
        (keras(use_post_ffw_norm=1), ("use_post_ffw_norm must be true or false",)),
        (
            keras(use_post_ffw_norm=False, use_post_attention_norm=False),
            ("set without post norms", "attn_logit_softcapping"),
        ),
        (keras(num_query_heads=0), ("num_attention_heads must be at least 1",)),
        (keras(query_head_dim_normalize=False, num_query_heads=0), ("at least 1",)),
        (KERAS | {"class_name": "LlamaBackbone"}, ("is a LlamaBackbone",)),
        (KERAS | {"class_name": "Gemma3Backbone", "config": {}}, ("is a Gemma3Backbone",)),
        (
            {"config": {"config": {"config": {"config": {"config": {}}}}}},
            ("lacks vocabulary_size",),
        ),
        ({"config": []}, ("lacks vocabulary_size",)),
    ],
)
def test_bad_keras_config(config: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: cf.from_keras(config, "config.json"), *parts)


def test_what_keras_cannot_express() -> None:
    refused(
        lambda: cf.to_keras(small("gemma2-2b").with_(query_pre_attn_scalar=7.0)),
        "query_pre_attn_scalar is 7.0; KerasHub knows head_dim (8) and", "(6)",
    )  # fmt: skip
    refused(lambda: cf.to_keras(small("gemma2-2b").with_(rope_theta=2.0)), "rope_theta is 2.0")


# ---- MaxText


def test_maxtext_27b_yml() -> None:
    # AI-Hypercomputer/maxtext configs/models/gemma2-27b.yml
    yml = {
        "base_emb_dim": 4608, "base_num_query_heads": 32, "base_num_kv_heads": 16,
        "base_mlp_dim": 36864, "base_num_decoder_layers": 23, "head_dim": 128,
        "mlp_activations": ["gelu", "linear"], "vocab_size": 256128, "decoder_block": "gemma2",
        "normalization_layer_epsilon": 1e-06, "logits_via_embedding": True,
        "final_logits_soft_cap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 4096,
        "use_post_attn_norm": True, "use_post_ffw_norm": True,
    }  # fmt: skip
    reading = cf.from_maxtext(yml)
    assert reading.config == PRESETS["gemma2-27b"].config
    assert reading.origin["num_hidden_layers"] == "MaxText key base_num_decoder_layers * 2 (pairs)"
    assert reading.origin["query_pre_attn_scalar"] == "preset gemma2-27b"
    ours = cf.to_maxtext(reading.config)
    assert without(ours, "rope_max_timescale") == yml


@pytest.mark.parametrize("name", BASES)
def test_maxtext_presets(name: str) -> None:
    config = PRESETS[name].config
    assert cf.from_maxtext(cf.to_maxtext(config)).config == config


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(1, 6), st.integers(1, 50))
@settings(max_examples=40)
def test_maxtext_inverse(arch: str, pairs: int, f: int) -> None:
    config = small(arch, layers=2 * pairs, f=f)
    back = cf.from_maxtext(cf.to_maxtext(config))
    assert back.config == config.with_(max_position_embeddings=8192, query_pre_attn_scalar=8.0)
    assert "any choice" in back.origin["query_pre_attn_scalar"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"decoder_block": "llama2"}, ("decoder_block is llama2",)),
        ({"decoder_block": "gemma3"}, ("decoder_block is gemma3",)),
        ({"mlp_activations": ["silu", "linear"]}, ("mlp_activations is ['silu', 'linear']",)),
        ({"logits_via_embedding": False}, ("logits_via_embedding is False",)),
        ({"use_post_attn_norm": False}, ("use_post_attn_norm is False",)),
        ({"global_parameter_scale": 2}, ("global_parameter_scale is 2",)),
        ({"base_emb_dim": "24"}, ("base_emb_dim must be a whole number",)),
    ],
)
def test_bad_maxtext_config(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: cf.from_maxtext(cf.to_maxtext(small("gemma2-2b")) | changes), *parts)


def test_what_maxtext_cannot_express() -> None:
    refused(lambda: cf.to_maxtext(small("gemma2-2b", layers=3)), "3 layers do not pair up")
    refused(lambda: cf.to_maxtext(small("gemma2-2b").with_(sliding_window=None)), "window")
    partial = without(cf.to_maxtext(small("gemma2-2b")), "head_dim", "sliding_window_size")
    refused(lambda: cf.from_maxtext(partial), "lacks head_dim, sliding_window_size")


# ---- shapes


@pytest.mark.parametrize("name", BASES)
def test_every_released_size_is_known_by_its_shapes(name: str) -> None:
    config = PRESETS[name].config
    sizes = cf.axis_sizes(config)
    reading = cf.from_shapes(config.family, sizes)
    assert (reading.config, reading.warnings) == (config, [])
    assert reading.origin["hidden_size"] == f"shapes (preset {name})"
    assert reading.origin["rope_theta"] == f"preset {name}"
    products = {axis: sizes[axis] for axis in ("layers", "d", "f", "(n h)", "(k h)")}
    assert cf.from_shapes(config.family, products).config == config
    assert cf.closest_preset(config.family, products | {"layers": 3}) == name


def test_embedding_rows() -> None:
    config = PRESETS["gemma2-2b"].config
    sizes = cf.axis_sizes(config)
    padded = cf.from_shapes("gemma2", sizes | {"vocab": 256_128})
    assert padded.config == config
    assert padded.origin["vocab_size"] == "shapes (256128 rows, 128 of them padding)"
    longer = cf.from_shapes("gemma2", sizes | {"vocab": 256_005})
    assert longer.config == config.with_(vocab_size=256_005)


def test_unknown_shapes_are_never_guessed() -> None:
    sizes = {"layers": 4, "d": 64, "f": 192, "n": 4, "k": 2, "h": 32, "vocab": 512}
    refused(
        lambda: cf.from_shapes("gemma2", sizes, "flax"),
        "flax: no released gemma2 model has these shapes: num_hidden_layers 4, hidden_size 64",
        "does not store query_pre_attn_scalar, attn_logit_softcapping",
        "pass --config FILE", '"model_type": "gemma2", "num_hidden_layers": 4', kind=UnknownConfigError,
    )  # fmt: skip
    assert cf.closest_preset("gemma2", sizes) is None
    near = cf.axis_sizes(PRESETS["gemma2-9b"].config) | {"h": 128}
    refused(
        lambda: cf.from_shapes("gemma2", near),
        "It looks like gemma2-9b, but head_dim is 256 there",
        kind=UnknownConfigError,
    )
    # the same numbers of the other family are unknown too
    seven = cf.axis_sizes(PRESETS["gemma-7b"].config)
    refused(
        lambda: cf.from_shapes("gemma2", seven), "no released gemma2 model", kind=UnknownConfigError
    )
    with pytest.raises(ValueError, match="needs the axes layers, f"):
        cf.from_shapes("gemma2", {"d": 2304})


def test_check_shapes_shows_every_axis() -> None:
    config = PRESETS["gemma2-2b"].config
    cf.check_shapes(config, cf.axis_sizes(config))
    cf.check_shapes(config, {"vocab": 256_128})
    refused(
        lambda: cf.check_shapes(config, {"vocab": 255_999}), "embedding rows 256000 / 255999 (!)"
    )
    refused(
        lambda: cf.check_shapes(config, cf.axis_sizes(PRESETS["gemma2-9b"].config), "x"),
        "x: the configuration does not belong to these weights (configuration / weights): ",
        "hidden_size 2304 / 3584 (!)", "head_dim 256 / 256;", "look like gemma2-9b",
        "Fix: pass --config gemma2-9b.",
    )  # fmt: skip


def test_presets_by_name() -> None:
    reading = cf.from_preset("gemma2-2b-it", "--config")
    assert reading.config.eos_token_id == (1, 107)
    assert set(reading.origin.values()) == {"--config gemma2-2b-it"}
    refused(lambda: cf.from_preset("gemma2-3b"), "no preset is called 'gemma2-3b'", "gemma2-27b-it")


# ---- anything at all

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-3, 300) | st.text(max_size=2), max_size=3),
    st.dictionaries(st.text(string.ascii_lowercase, max_size=9), st.integers(), max_size=2),
)  # fmt: skip
READERS: dict[str, tuple[Callable[[Any], cf.ConfigReading], dict[str, Any]]] = {
    "huggingface": (cf.from_huggingface, cf.to_huggingface(small("gemma2-2b"), BF16)),
    "huggingface_gemma1": (cf.from_huggingface, V4_GEMMA1),
    "gguf": (cf.from_gguf, gguf_kv(tokenizer__chat_template="<end_of_turn>")),
    "keras": (cf.from_keras, cf.to_keras(small("gemma2-27b"))),
    "keras_nested": (cf.from_keras, keras()),
    "maxtext": (cf.from_maxtext, cf.to_maxtext(small("gemma2-9b"))),
}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60)
def test_mutated_configurations_raise_only_our_errors(name: str, data: st.DataObject) -> None:
    read, valid = READERS[name]
    mutated = dict(valid)
    extra = ["rope_parameters", "rope_scaling", "layer_types", "tie_word_embeddings"]
    for key in data.draw(st.lists(st.sampled_from([*valid, *extra]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            mutated[key] = data.draw(ODD)
        else:
            mutated.pop(key, None)
    try:
        reading = read(mutated)
    except G2Error:
        pass
    else:
        assert set(reading.origin) == set(GemmaConfig.__dataclass_fields__)
        cf.fix(reading)
