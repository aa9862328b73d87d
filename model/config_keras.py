"""GemmaConfig from and to the config.json of a KerasHub preset (``GemmaBackbone.get_config``).

KerasHub counts gate and up together (``intermediate_dim`` is twice ``intermediate_size``), and
knows two query scales: head_dim, or hidden_dim // num_query_heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.errors import ConfigError, printable
from .config import GemmaConfig
from .config_reading import MISSING, NO_GEMMA, ConfigReading, Keys, Where

_SIZES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "head_dim": "head_dim",
}
# GemmaBackbone's constructor defaults, for presets older than the argument
_DEFAULTS: dict[str, Any] = {
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": False,
    "use_post_attention_norm": False,
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "use_sliding_window_attention": False,
    "sliding_window_size": 4096,
    "layer_norm_epsilon": 1e-6,
}
_OTHER_FORMAT = (
    "convert to another framework, which can express it (safetensors, flax, torch, gguf); if the value is a mistake, "
    "pass the right configuration with --config PRESET|FILE."
)
_NESTS = ("config", "backbone")  # a task holds its backbone, a serialized object its config
_FIXED = "fixed in KerasHub"


def from_keras(config: Mapping[str, Any], where: Where = None) -> ConfigReading:
    """Read a preset's config.json, parsed.

    It may be GemmaBackbone's own arguments, or the serialized backbone or task around them.

    Args:
        config: the file, parsed.
        where: its path, for messages.

    Raises:
        ConfigError: another class, missing keys (all listed), or a combination neither Gemma 1 nor
            2 has.
        LimitError: a size no model has.
    """
    keys = Keys(_backbone(config, where), where, "Keras key")
    for name, key in _SIZES.items():
        keys.whole(name, key)
    flags = {k: _flag(keys, k) for k in _DEFAULTS if k.startswith(("use_", "query_"))}
    post = {flags["use_post_ffw_norm"], flags["use_post_attention_norm"]}
    if len(post) == 2:
        raise keys.error(
            "use_post_ffw_norm and use_post_attention_norm differ; Gemma 2 has both norms, Gemma 1 "
            "neither.",
            NO_GEMMA,
        )
    keys.set("family", "gemma2" if post == {True} else "gemma", "Keras key use_post_ffw_norm")
    _halve(keys)
    with_defaults = Keys(_DEFAULTS | dict(keys.mapping), where, "Keras key")
    with_defaults.real("rms_norm_eps", "layer_norm_epsilon")
    with_defaults.real("attn_logit_softcapping", "attention_logit_soft_cap", null=True)
    with_defaults.real("final_logit_softcapping", "final_logit_soft_cap", null=True)
    with_defaults.whole("sliding_window", "sliding_window_size")
    if not flags["use_sliding_window_attention"]:
        with_defaults.set("sliding_window", None, "Keras key use_sliding_window_attention")
    keys.values |= with_defaults.values
    keys.origin |= with_defaults.origin
    _refuse_gemma1_extras(keys)
    keys.set("rope_theta", 10000.0, _FIXED)
    _query_scalar(keys, flags["query_head_dim_normalize"])
    return keys.reading(fill=False)


def _backbone(config: Mapping[str, Any], where: Where) -> Mapping[str, Any]:
    for _ in range(4):
        if not isinstance(config, Mapping) or "num_layers" in config:
            break
        name = config.get("class_name", "GemmaBackbone")
        if not str(name).startswith("Gemma") or str(name).startswith("Gemma3"):
            raise ConfigError(
                f"this preset is a {printable(str(name), 60)}; supported is GemmaBackbone (Gemma 1 and 2).",
                where=where,
                fix="pass a preset of a Gemma 1 or Gemma 2 text model.",
            )
        nest = next((config[k] for k in _NESTS if isinstance(config.get(k), Mapping)), None)
        if nest is None:
            break
        config = nest
    return config


def _flag(keys: Keys, key: str) -> bool:
    _, found = keys.raw(key)
    if found is MISSING:
        return bool(_DEFAULTS[key])
    if not isinstance(found, bool):
        raise keys.error(f"{key} must be true or false, found {printable(str(found), 60)}.")
    return found


def _halve(keys: Keys) -> None:
    both = keys.values.get("intermediate_size")
    if both is None:
        return
    if both % 2:
        raise keys.error(f"intermediate_dim is {both}; it counts gate and up, so it must be even.")
    keys.values["intermediate_size"] = both // 2
    keys.origin["intermediate_size"] = "Keras key intermediate_dim / 2"


def _refuse_gemma1_extras(keys: Keys) -> None:
    extras = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    found = [n for n in extras if keys.values[n] is not None]
    if keys.values["family"] == "gemma" and found:
        raise keys.error(
            f"{', '.join(found)} set without post norms: neither Gemma 1 (which has none of them) nor "
            "Gemma 2 (which has post norms).",
            NO_GEMMA,
        )


def _query_scalar(keys: Keys, by_head_dim: bool) -> None:
    width, heads = keys.values.get("hidden_size", 0), keys.values.get("num_attention_heads", 0)
    by_width = width // max(heads, 1)  # no heads at all is refused with the other sizes
    scalar = keys.values.get("head_dim", 0) if by_head_dim else by_width
    keys.set("query_pre_attn_scalar", float(scalar), "Keras key query_head_dim_normalize")


def to_keras(config: GemmaConfig) -> dict[str, Any]:
    """GemmaBackbone's arguments for this model.

    Raises:
        ConfigError: KerasHub cannot express its query scale or RoPE base.
    """
    by_head_dim = config.query_pre_attn_scalar == config.head_dim
    if (
        not by_head_dim
        and config.query_pre_attn_scalar != config.hidden_size // config.num_attention_heads
    ):
        raise ConfigError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; KerasHub knows head_dim "
            f"({config.head_dim}) and hidden_size // num_attention_heads "
            f"({config.hidden_size // config.num_attention_heads}).",
            fix=_OTHER_FORMAT,
        )
    if config.rope_theta != 10000.0:
        raise ConfigError(
            f"rope_theta is {config.rope_theta}; KerasHub's Gemma has 10000 only.",
            fix=_OTHER_FORMAT,
            found=config.rope_theta,
            expected=10000.0,
        )
    post = config.has_post_norms
    return {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_size,
        "intermediate_dim": 2 * config.intermediate_size,
        "head_dim": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "dropout": 0,
        "query_head_dim_normalize": by_head_dim,
        "use_post_ffw_norm": post,
        "use_post_attention_norm": post,
        "final_logit_soft_cap": config.final_logit_softcapping,
        "attention_logit_soft_cap": config.attn_logit_softcapping,
        "sliding_window_size": config.sliding_window or 4096,
        "use_sliding_window_attention": config.sliding_window is not None,
    }


def keras_caveats(config: GemmaConfig) -> list[str]:
    """What KerasHub computes differently from this model, one sentence each."""
    if config.query_pre_attn_scalar == config.head_dim:
        return []
    return [
        "keras-hub up to 0.32 ignores query_head_dim_normalize=False: its decoder block always divides queries by "
        f"sqrt(head_dim), sqrt({config.head_dim}) here instead of sqrt({config.query_pre_attn_scalar:g}). The weights "
        "are right, its logits are not."
    ]
