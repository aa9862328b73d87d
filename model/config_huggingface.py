"""GemmaConfig from and to Hugging Face's config.json.

Two generations are in use: transformers 4 writes ``rope_theta`` and ``torch_dtype``, transformers 5
``rope_parameters``, ``dtype`` and ``layer_types``. Both are read; the union that both understand is
written (checked with transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np

from ..formats.dtypes import BF16, F16, F32, F64
from ..formats.errors import ConfigError, DtypeError, printable
from .config import Family, GemmaConfig
from .config_reading import MISSING, NO_GEMMA, ConfigReading, ConfigWarning, Keys, Where

_CLASSES: dict[Family, str] = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"}
# what transformers calls the others, for a helpful refusal
_RELATIVES = {
    "gemma3": "Gemma 3 (multimodal)", "gemma3_text": "Gemma 3", "gemma3n": "Gemma 3n",
    "recurrent_gemma": "RecurrentGemma", "paligemma": "PaliGemma", "t5gemma": "T5Gemma",
    "shieldgemma2": "ShieldGemma 2", "embedding_gemma": "EmbeddingGemma",
}  # fmt: skip
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
_TORCH_NAMES = {BF16: "bfloat16", F16: "float16", F32: "float32", F64: "float64"}


def from_huggingface(
    config_json: Mapping[str, Any], where: Where = None, *, label: str = "config.json key"
) -> ConfigReading:
    """Read a parsed config.json of transformers 4 or 5.

    Hyper-parameters that are absent (not null) come from the released model the sizes identify, if
    they do.

    Args:
        config_json: the file, parsed.
        where: its path, for messages.
        label: how origins begin; ``--config key`` for a file the user gave.

    Raises:
        ConfigError: another architecture; missing keys, all listed; a feature Gemma 1 and 2 do not
            have; values that contradict each other.
        LimitError: a size no model has.
    """
    keys = Keys(config_json, where, label)
    family = _family(keys)
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"):  # fmt: skip
        keys.whole(name)
    keys.real("rms_norm_eps")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        keys.token_ids(name)
    _rope(keys)
    _refuse(keys)
    warnings = [*_activation(keys, family), *_tied(keys)]
    if family == "gemma2":
        keys.real("query_pre_attn_scalar")
        keys.real("attn_logit_softcapping", null=True)
        keys.real("final_logit_softcapping", null=True)
        keys.whole("sliding_window", "sliding_window", "sliding_window_size", null=True)
        warnings += _two_windows(keys)
        _layer_types(keys)
    elif "head_dim" in keys.values:
        keys.set("query_pre_attn_scalar", float(keys.values["head_dim"]), keys.origin["head_dim"])
    return keys.reading(warnings)


def _family(keys: Keys) -> Family:
    _, found = keys.raw("model_type")
    if found in get_args(Family):
        family: Family = found
        keys.set("family", family, f"{keys.label} model_type")
        return family
    if found is MISSING or found is None:
        keys.missing["family"] = "model_type"
        return "gemma"  # reading() refuses, with everything else that is missing
    name = printable(str(found), 60)
    raise keys.error(
        f"this is {_RELATIVES.get(name, 'another architecture')} (model_type {name}); supported are "
        "Gemma 1 (gemma) and Gemma 2 (gemma2).",
        "pass a Gemma 1 or Gemma 2 text model.",
    )


def _rope(keys: Keys) -> None:
    """Read the RoPE base from either generation's key; refuse every variant Gemma 1 and 2 do not have."""
    blocks = [_rope_block(keys, key) for key in ("rope_scaling", "rope_parameters")]
    keys.real("rope_theta")
    inner = Keys(blocks[1], keys.where, keys.label)
    inner.real("rope_theta")
    theta = inner.values.get("rope_theta")
    if theta is None:
        if "rope_theta" in keys.missing:
            keys.missing["rope_theta"] = "rope_theta or rope_parameters.rope_theta"
        return
    if keys.values.get("rope_theta", theta) != theta:
        raise keys.error(
            f"rope_theta is {keys.values['rope_theta']} but rope_parameters.rope_theta is {theta}: "
            "transformers 4 reads the one, transformers 5 the other.",
            "make them equal; 10000 in every released model.",
        )
    if keys.missing.pop("rope_theta", None):
        keys.set("rope_theta", theta, f"{keys.label} rope_parameters.rope_theta")


def _rope_block(keys: Keys, key: str) -> Mapping[str, Any]:
    _, block = keys.raw(key)
    if block is MISSING or block is None:
        return {}
    if not isinstance(block, Mapping):
        raise keys.error(f"{key} must be an object, found {printable(str(block), 60)}.")
    kind = block.get("rope_type", block.get("type", "default"))
    plain = {"rope_type": kind, "type": kind, "partial_rotary_factor": 1.0}
    others = [
        str(k) for k, v in block.items() if k != "rope_theta" and v not in (None, plain.get(k))
    ]
    if kind != "default" or others:
        what = f"type {kind}" if kind != "default" else ", ".join(others)
        raise keys.error(
            f"{key} asks for {printable(what, 80)}; Gemma 1 and 2 rotate whole heads with one base.",
            NO_GEMMA,
        )
    return block


def _activation(keys: Keys, family: Family) -> Iterator[ConfigWarning]:
    for key in ("hidden_activation", "hidden_act"):
        _, found = keys.raw(key)
        if found is MISSING or found is None or found == "gelu_pytorch_tanh":
            continue
        if found not in _ACTIVATIONS:
            raise keys.error(
                f"{key} is {printable(str(found), 60)}; Gemma 1 and 2 use gelu_pytorch_tanh.",
                NO_GEMMA,
            )
        # Gemma 1's first releases say gelu and mean the tanh form; for Gemma 2 transformers would
        # take it at its word
        if family == "gemma2" and key == "hidden_activation":
            why = "Gemma 2 was trained with the tanh form of GELU, and is converted as such"
            yield ConfigWarning(key, found, "gelu_pytorch_tanh", why)


def _tied(keys: Keys) -> Iterator[ConfigWarning]:
    _, found = keys.raw("tie_word_embeddings")
    if found is not MISSING and found is not True:  # readers take null, 0 and "" for no
        why = "Gemma's output head is its embedding; a separate lm_head.weight must equal it"
        yield ConfigWarning("tie_word_embeddings", found, True, why)


def _refuse(keys: Keys) -> None:
    for key, why in (
        ("attention_bias", "Gemma 1 and 2 have no biases"),
        ("use_bidirectional_attention", "Gemma 1 and 2 attend to the past only"),
    ):
        _, found = keys.raw(key)
        if found not in (MISSING, None, False):
            raise keys.error(f"{key} is {printable(str(found), 60)}; {why}.", NO_GEMMA)


def _two_windows(keys: Keys) -> Iterator[ConfigWarning]:
    window, other = (keys.mapping.get(k) for k in ("sliding_window", "sliding_window_size"))
    if window is not None and other is not None and window != other:
        why = "transformers reads sliding_window only; the older sliding_window_size is ignored"
        yield ConfigWarning("sliding_window_size", other, window, why)


def _layer_types(keys: Keys) -> None:
    _, found = keys.raw("layer_types")
    layers = keys.values.get("num_hidden_layers")
    if found is MISSING or found is None or layers is None:
        return
    if not isinstance(found, list) or len(found) != layers:
        count = len(found) if isinstance(found, list) else printable(str(found), 60)
        raise keys.error(
            f"layer_types must list {layers} layers, found {count}.",
            "correct num_hidden_layers or layer_types, or pass the right configuration with --config PRESET|FILE.",
        )
    pair = ("sliding_attention", "full_attention")
    if keys.values.get("sliding_window") is None and all(kind == pair[1] for kind in found):
        return  # no window anywhere
    wrong = [i for i, kind in enumerate(found) if kind != pair[i % 2]]
    if wrong:
        i = wrong[0]
        raise keys.error(
            f"layer_types[{i}] is {printable(str(found[i]), 60)}, but layer {i} of Gemma 2 is "
            f"{pair[i % 2]} (even layers slide, odd ones see everything); {len(wrong)} of {layers} "
            "differ.",
            NO_GEMMA,
        )


def to_huggingface(config: GemmaConfig, dtype: np.dtype | None = None) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read as this model.

    Args:
        config: the model.
        dtype: element type of the weights; None leaves it to the reader.

    Returns:
        The keys in alphabetical order, ready for JSON.

    Raises:
        ConfigError: Hugging Face's class cannot express the model.
        DtypeError: transformers does not load such weights.
    """
    out: dict[str, Any] = {
        "architectures": [_CLASSES[config.family]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_list(config.eos_token_id),
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.family,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if dtype is not None:
        out |= dict.fromkeys(("dtype", "torch_dtype"), _torch_name(dtype))
    if config.family == "gemma2":
        out |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "layer_types": list(config.layer_types),
            "query_pre_attn_scalar": _plain_scalar(config),
            "sliding_window": config.sliding_window,
        }
    elif config.query_pre_attn_scalar != config.head_dim:
        raise ConfigError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, head_dim {config.head_dim}: "
            "Hugging Face's Gemma 1 always divides queries by sqrt(head_dim).",
            fix="if that query scale is a mistake, pass the right configuration with --config PRESET|FILE; if it is "
            "not, convert to a layout that needs no Hugging Face config.json.",
        )
    return dict(sorted(out.items()))


def one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    """Token ids as Hugging Face writes them: one number, or a list of several."""
    return ids[0] if len(ids) == 1 else list(ids)


def _torch_name(dtype: np.dtype) -> str:
    try:
        return _TORCH_NAMES[np.dtype(dtype)]
    except KeyError:
        raise DtypeError(
            f"transformers loads no {dtype} weights; it loads {', '.join(_TORCH_NAMES.values())}.",
            fix="pass --dtype bf16, f16 or f32.",
        ) from None


def _plain_scalar(config: GemmaConfig) -> int | float:
    """A whole number where it is one: transformers 5 declares the field an int and refuses others."""
    scalar = config.query_pre_attn_scalar
    return int(scalar) if scalar == int(scalar) else scalar
