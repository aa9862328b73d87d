"""GemmaConfig from and to MaxText's model configuration (``configs/models/gemma2-2b.yml``).

For Gemma 2 MaxText counts pairs of one local and one global layer. Its query projections are stored
with the query scale multiplied in, so no key holds the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ..formats.errors import ConfigError, printable
from .config import Family, GemmaConfig
from .config_known import SHAPE_FIELDS, known_size
from .config_reading import MISSING, NO_GEMMA, ConfigReading, Keys, Where

_SIZES = {
    "hidden_size": "base_emb_dim",
    "num_attention_heads": "base_num_query_heads",
    "num_key_value_heads": "base_num_kv_heads",
    "intermediate_size": "base_mlp_dim",
    "head_dim": "head_dim",
    "num_hidden_layers": "base_num_decoder_layers",
    "vocab_size": "vocab_size",
}
GEMMA_TOKENS, GEMMA_ROWS = 256_000, 256_128  # rows are padded to a multiple of 256 for TPUs
# MaxText's base.yml, for keys a model file leaves out
_DEFAULTS: dict[str, Any] = {"rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-6}
_ACTIVATIONS = ["gelu", "linear"]


def from_maxtext(config: Mapping[str, Any], where: Where = None) -> ConfigReading:
    """Read a MaxText model configuration, parsed from YAML or JSON.

    The query scale is the released model's where the sizes identify one. Otherwise it is head_dim,
    which is no guess: MaxText applies no scale at run time, so any number gives the same function
    as long as the conversion divides the stored query projections by the same one.

    Raises:
        ConfigError: another decoder, missing keys (all listed), or options Gemma does not have.
        LimitError: a size no model has.
    """
    keys = Keys(config, where, "MaxText key")
    family = _decoder(keys)
    _refuse(keys, family)
    for name, key in _SIZES.items():
        keys.whole(name, key)
    rest = Keys(_DEFAULTS | dict(keys.mapping), where, "MaxText key")
    rest.real("rope_theta", "rope_max_timescale")
    rest.real("rms_norm_eps", "normalization_layer_epsilon")
    keys.values |= rest.values
    keys.origin |= rest.origin
    if family == "gemma2":
        keys.real("attn_logit_softcapping", "attn_logits_soft_cap", null=True)
        keys.real("final_logit_softcapping", "final_logits_soft_cap", null=True)
        keys.whole("sliding_window", "sliding_window_size")
        if "num_hidden_layers" in keys.values:
            keys.values["num_hidden_layers"] *= 2
            keys.origin["num_hidden_layers"] += " * 2 (pairs)"
    if keys.values.get("vocab_size") == GEMMA_ROWS:
        keys.set("vocab_size", GEMMA_TOKENS, "MaxText key vocab_size, less 128 padding rows")
    _query_scalar(keys, family)
    return keys.reading(fill=False)


def _decoder(keys: Keys) -> Family:
    _, found = keys.raw("decoder_block")
    name = str(found).rpartition(".")[2].lower()
    if name in get_args(Family):
        family: Family = "gemma2" if name == "gemma2" else "gemma"
        keys.set("family", family, f"{keys.label} decoder_block")
        return family
    shown = "missing" if found is MISSING else printable(str(found), 60)
    raise keys.error(
        f"decoder_block is {shown}; supported are gemma and gemma2.",
        "pass a checkpoint of a Gemma 1 or Gemma 2 text model.",
    )


def _refuse(keys: Keys, family: Family) -> None:
    post = family == "gemma2"
    wanted: dict[str, tuple[Any, str]] = {
        "mlp_activations": (_ACTIVATIONS, "Gemma's feed-forward is gelu(gate) * up"),
        "logits_via_embedding": (True, "Gemma's output head is its embedding"),
        "use_post_attn_norm": (post, "Gemma 2 has post norms, Gemma 1 none"),
        "use_post_ffw_norm": (post, "Gemma 2 has post norms, Gemma 1 none"),
        "global_parameter_scale": (1, "scaled models are no Gemma"),
    }
    for key, (right, why) in wanted.items():
        _, found = keys.raw(key)
        if found is not MISSING and found is not None and found != right:
            raise keys.error(
                f"{key} is {printable(str(found), 60)}, expected {right}: {why}.", NO_GEMMA
            )


def _query_scalar(keys: Keys, family: Family) -> None:
    preset = known_size(family, tuple(keys.values.get(name) for name in SHAPE_FIELDS))
    if preset is not None:
        scalar, origin = preset.config.query_pre_attn_scalar, f"preset {preset.name}"
    else:
        scalar = float(keys.values.get("head_dim", 1))
        origin = (
            "head_dim; MaxText stores queries already scaled, so any choice gives the same model"
        )
    keys.set("query_pre_attn_scalar", scalar, origin)


def to_maxtext(config: GemmaConfig) -> dict[str, Any]:
    """The keys of a MaxText model file for this model.

    Raises:
        ConfigError: an odd number of Gemma 2 layers, which do not pair up, or no sliding window.
    """
    layers = config.num_hidden_layers
    out: dict[str, Any] = {
        "base_emb_dim": config.hidden_size,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "base_mlp_dim": config.intermediate_size,
        "base_num_decoder_layers": layers,
        "head_dim": config.head_dim,
        "mlp_activations": list(_ACTIVATIONS),
        "vocab_size": GEMMA_ROWS if config.vocab_size == GEMMA_TOKENS else config.vocab_size,
        "decoder_block": config.family,
        "normalization_layer_epsilon": config.rms_norm_eps,
        "rope_max_timescale": config.rope_theta,
        "logits_via_embedding": True,
    }
    if config.family == "gemma2":
        if layers % 2:
            raise ConfigError(
                f"MaxText stores Gemma 2 in pairs of a local and a global layer; {layers} layers do not pair up.",
                fix="convert to another framework than maxtext.",
            )
        if config.sliding_window is None:
            raise ConfigError(
                "MaxText's Gemma 2 always has a sliding window; this model has none.",
                fix="convert to another framework than maxtext.",
            )
        out |= {
            "base_num_decoder_layers": layers // 2,
            "final_logits_soft_cap": config.final_logit_softcapping,
            "attn_logits_soft_cap": config.attn_logit_softcapping,
            "sliding_window_size": config.sliding_window,
            "use_post_attn_norm": True,
            "use_post_ffw_norm": True,
        }
    return out
