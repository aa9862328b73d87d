"""GemmaConfig from and to g2kit's manifest: the fields as they are, and what fills gaps in other files.

A checkpoint in one file has no room for a config.json, and some formats have no key for some fields. The manifest
beside such an output keeps all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, get_args

from ..formats.errors import ConfigError
from .config import Family, GemmaConfig
from .config_reading import DEFAULT, GEMMA2_ONLY, ConfigReading, Keys, Where

_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_NUMBERS = ("query_pre_attn_scalar", "rope_theta", "rms_norm_eps")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LABEL = "g2kit.manifest.json key"
_DEFAULTED = ("max_position_embeddings", *_IDS)  # some formats have no key for these


def to_plain(config: GemmaConfig) -> dict[str, Any]:
    """Every field, ready for JSON."""
    return asdict(config) | {"eos_token_id": list(config.eos_token_id)}


def from_plain(mapping: Mapping[str, Any], where: Where = None) -> ConfigReading:
    """The inverse of :func:`to_plain`.

    Args:
        mapping: the manifest's ``config``, parsed.
        where: the manifest, for messages.

    Raises:
        ConfigError: keys are missing (all listed) or contradict each other.
        LimitError: a size no model has.
    """
    keys = Keys(mapping, where, _LABEL)
    family = mapping.get("family")
    if family not in get_args(Family):
        raise keys.error(f"config.family is {family!r}; supported are gemma and gemma2.")
    keys.set("family", family, f"{_LABEL} family")
    for name in _SIZES:
        keys.whole(name)
    for name in _NUMBERS:
        keys.real(name)
    for name in _IDS:
        keys.token_ids(name)
    if family == "gemma2":
        keys.real("attn_logit_softcapping", null=True)
        keys.real("final_logit_softcapping", null=True)
        keys.whole("sliding_window", null=True)
    elif any(mapping.get(name) is not None for name in GEMMA2_ONLY):
        raise keys.error(f"config has {', '.join(GEMMA2_ONLY)}, but Gemma 1 has none.")
    return keys.reading(fill=False)


def completed(reading: ConfigReading, others: Iterable[ConfigReading]) -> ConfigReading:
    """The reading, with fields that its own file leaves to a default taken from the first other file that tells.

    Another model's file is passed over: one that contradicts a field that is told.
    """
    config, origin = reading.config, dict(reading.origin)
    told = [n for n in GemmaConfig.__dataclass_fields__ if n not in _DEFAULTED]
    for other in others:
        if any(getattr(other.config, n) != getattr(config, n) for n in told):
            continue
        for name in _DEFAULTED:
            if origin.get(name) == DEFAULT and other.origin.get(name, DEFAULT) != DEFAULT:
                origin[name] = other.origin[name]
                config = config.with_(**{name: getattr(other.config, name)})
    return ConfigReading(config, origin, reading.warnings)


def supply(keys: Keys, other: ConfigReading | None) -> None:
    """Give a reading in progress the fields that it misses, from another file about the same model.

    Raises:
        ConfigError: the other file is about another model.
    """
    if other is None or not keys.missing:
        return
    for name, value in keys.values.items():
        told = getattr(other.config, name)
        if name in ("family", *_SIZES[:6]) and value != told:
            raise ConfigError(
                f"the file's metadata lack {', '.join(keys.missing.values())}, and the configuration beside it is "
                f"another model's: {name} is {value} in the file, {told} there ({other.origin.get(name, '?')}).",
                where=keys.where,
                fix="pass the configuration of this model with --config.",
            )
    for name in list(keys.missing):
        del keys.missing[name]
        keys.set(name, getattr(other.config, name), other.origin.get(name, "?"))
    for name in _IDS:
        if name not in keys.values:
            keys.set(name, getattr(other.config, name), other.origin.get(name, "?"))
