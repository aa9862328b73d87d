"""GemmaConfig from and to GGUF key-values, as llama.cpp's converter writes and its loader reads them.

Three things are in no key: the vocabulary size (the length of the token list), the RoPE base (10000
unless a key says otherwise) and the query scale, which llama.cpp derives from the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from ..formats.errors import ConfigError, printable
from .config import Family, GemmaConfig
from .config_plain import supply
from .config_reading import MISSING, NO_GEMMA, ConfigReading, Keys, Where

_LAYERS_OF_27B = 46
# field -> key behind the architecture's prefix
_SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
_REGENERATE = (
    "make the file again with a llama.cpp of July 2024 or later (or with g2conv); older converters left these "
    "keys out, and the model runs wrongly without them."
)
_END_OF_TURN = "<end_of_turn>"
# type of g2kit's own key of a field, written where llama.cpp's keys would give back another value
_OWN: dict[str, str] = {
    "query_pre_attn_scalar": "f64",
    "attn_logit_softcapping": "f64",
    "final_logit_softcapping": "f64",
    "rope_theta": "f64",
    "rms_norm_eps": "f64",
    "bos_token_id": "u32",
    "eos_token_id": "[u32]",
    "pad_token_id": "u32",
}


def llama_cpp_query_scalar(config: GemmaConfig) -> float:
    """The query scalar llama.cpp computes with; it reads none.

    Its loader takes 46 layers of Gemma 2 for the 27B and divides queries by sqrt(D // H),
    everything else by sqrt(head_dim) (llama.cpp ``load_hparams``, integer division included). A
    file whose model has another scalar is right only if its query projections are multiplied by
    ``sqrt(llama_cpp_query_scalar / query_pre_attn_scalar)``.
    """
    return _assumed_scalar(vars(config))


def _assumed_scalar(sizes: Mapping[str, Any]) -> float:
    if sizes["family"] == "gemma2" and sizes["num_hidden_layers"] == _LAYERS_OF_27B:
        return float(sizes["hidden_size"] // max(sizes["num_attention_heads"], 1))
    return float(sizes["head_dim"])


def from_gguf(
    kv: Mapping[str, Any], where: Where = None, beside: ConfigReading | None = None
) -> ConfigReading:
    """Read GGUF metadata.

    Args:
        kv: key -> value; numbers may be NumPy scalars, arrays any sequence.
        where: the file, for messages.
        beside: what a config.json or manifest beside the file says; supplies keys that the file lacks.

    Returns:
        The reading; its query scalar is the one llama.cpp runs the file with, unless g2kit noted the model's own.

    Raises:
        ConfigError: another architecture, missing keys (all listed), or a feature Gemma does not
            have.
        LimitError: a size no model has.
    """
    keys = Keys(kv, where, "GGUF key")
    arch = _architecture(keys)
    for name, key in _SIZES.items():
        keys.whole(name, f"{arch}.{key}")
    _head_dim(keys, arch)
    _short_real(keys, "rms_norm_eps", f"{arch}.attention.layer_norm_rms_epsilon")
    if arch == "gemma2":
        _short_real(keys, "attn_logit_softcapping", f"{arch}.attn_logit_softcapping")
        _short_real(keys, "final_logit_softcapping", f"{arch}.final_logit_softcapping")
        keys.whole("sliding_window", f"{arch}.attention.sliding_window")
    _rope(keys, arch)
    _vocabulary(keys, arch)
    supply(keys, beside)
    if keys.missing:
        lacks = ", ".join(keys.missing.values())
        raise keys.error(f"the file's metadata lacks {lacks}.", _REGENERATE)
    origin = "llama.cpp's rule for this number of layers, there is no key"
    keys.set("query_pre_attn_scalar", _assumed_scalar(keys.values), origin)
    for name, kind in _OWN.items():
        if (key := f"g2kit.{name}") not in kv:
            continue
        if kind == "f64":
            _short_real(keys, name, key)
        else:
            keys.token_ids(name, key)
    return keys.reading(fill=False)


def own_keys(config: GemmaConfig, kv: Iterable[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """g2kit's keys for what llama.cpp's do not give back: other token ids than the tokenizer's, numbers that are no float32.

    Args:
        config: the model.
        kv: the file's other metadata, vocabulary included.

    Returns:
        ``(key, type, value)`` such as ``g2kit.eos_token_id``.
    """
    stored = {key: np.float32(value) if kind == "f32" else value for key, kind, value in kv}
    told = from_gguf(stored).config
    out: list[tuple[str, str, Any]] = []
    if told.vocab_size != config.vocab_size:
        out.append((f"{config.family}.vocab_size", "u32", config.vocab_size))
    for name, kind in _OWN.items():
        value = getattr(config, name)
        if value != getattr(told, name):
            out.append((f"g2kit.{name}", kind, list(value) if isinstance(value, tuple) else value))
    return out


def _architecture(keys: Keys) -> Family:
    _, found = keys.raw("general.architecture")
    if found in get_args(Family):
        family: Family = found
        keys.set("family", family, f"{keys.label} general.architecture")
        return family
    shown = "missing" if found is MISSING else printable(str(found), 60)
    raise keys.error(
        f"general.architecture is {shown}; supported are gemma (Gemma 1) and gemma2 (Gemma 2).",
        "pass a GGUF file of a Gemma 1 or Gemma 2 text model.",
    )


def _short_real(keys: Keys, name: str, key: str) -> None:
    """A number; a float32 as the shortest decimal that means the same float32: 1e-06, not 9.99999997e-07."""
    keys.real(name, key)
    if name in keys.values:
        value = keys.values[name]
        with np.errstate(over="ignore"):
            narrow = np.float32(value)
        keys.values[name] = float(str(narrow)) if float(narrow) == value else value


def _head_dim(keys: Keys, arch: str) -> None:
    key, value = f"{arch}.attention.key_length", f"{arch}.attention.value_length"
    keys.whole("head_dim", key)
    other = Keys(keys.mapping, keys.where, keys.label)
    other.whole("head_dim", value)
    if other.values and keys.values.get("head_dim") not in (None, other.values["head_dim"]):
        raise keys.error(
            f"{key} is {keys.values['head_dim']}, {value} is {other.values['head_dim']}; Gemma's heads "
            "have one width.",
            NO_GEMMA,
        )


def _rope(keys: Keys, arch: str) -> None:
    _, kind = keys.raw(f"{arch}.rope.scaling.type")
    if kind not in (MISSING, None, "none"):
        raise keys.error(
            f"{arch}.rope.scaling.type is {printable(str(kind), 60)}; Gemma 1 and 2 have no RoPE scaling.",
            NO_GEMMA,
        )
    base = f"{arch}.rope.freq_base"
    if base in keys.mapping:
        _short_real(keys, "rope_theta", base)
    else:
        keys.set("rope_theta", 10000.0, f"llama.cpp's default, there is no key {base}")


def _vocabulary(keys: Keys, arch: str) -> None:
    name, tokens = keys.raw("tokenizer.ggml.tokens")
    listed = list(tokens) if isinstance(tokens, list | tuple | np.ndarray) else []
    real = len(listed)
    while real and listed[real - 1] == f"[PAD{real - 1}]":  # llama.cpp's name of a padding row
        real -= 1
    noted = keys.mapping.get(f"{arch}.vocab_size")
    if listed and isinstance(noted, int) and real <= noted <= len(listed):
        keys.whole("vocab_size", f"{arch}.vocab_size")  # rows of a fine-tune that have no piece
    elif listed:
        padding = len(listed) - real
        note = f" ({padding} of {len(listed)} are padding)" if padding else ""
        keys.set("vocab_size", real, f"{keys.label} {name}{note}")
    else:
        keys.whole("vocab_size", f"{arch}.vocab_size")
    if "vocab_size" in keys.missing:
        keys.missing["vocab_size"] = name
    for field, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        keys.token_ids(f"{field}_token_id", f"tokenizer.ggml.{key}_token_id")
    _, template = keys.raw("tokenizer.chat_template")
    if isinstance(template, str) and _END_OF_TURN in template and _END_OF_TURN in listed:
        eos = keys.values.get("eos_token_id", (1,))
        turn = (listed.index(_END_OF_TURN),)
        if turn[0] not in eos:
            keys.set("eos_token_id", eos + turn, f"{keys.label} tokenizer.chat_template")


def to_gguf(config: GemmaConfig, name: str, file_type: int) -> list[tuple[str, str, Any]]:
    """The metadata llama.cpp's converter writes for this model, tokenizer keys left out.

    Args:
        config: the model.
        name: ``general.name``.
        file_type: ``general.file_type``: 0 for F32, 1 F16, 32 BF16, …

    Returns:
        ``(key, type, value)`` in the converter's order; types are ``str``, ``u32``, ``f32``. The
        last entry is ``general.quantization_version``; tokenizer keys go before it.

    Raises:
        ConfigError: llama.cpp's Gemma 2 always has soft-caps and a window; this model lacks one.
    """
    arch = config.family
    out: list[tuple[str, str, Any]] = [
        ("general.architecture", "str", arch),
        ("general.type", "str", "model"),
        ("general.name", "str", name),
        ("general.size_label", "str", size_label(config.num_parameters)),
    ]
    out += [(f"{arch}.{key}", "u32", getattr(config, field)) for field, key in _SIZES.items()]
    if config.rope_theta != 10000.0:
        out.append((f"{arch}.rope.freq_base", "f32", config.rope_theta))
    out.append((f"{arch}.attention.layer_norm_rms_epsilon", "f32", config.rms_norm_eps))
    out.append((f"{arch}.attention.key_length", "u32", config.head_dim))
    out.append((f"{arch}.attention.value_length", "u32", config.head_dim))
    out.append(("general.file_type", "u32", file_type))
    if arch == "gemma2":
        out += _gemma2_keys(config)
    return [*out, ("general.quantization_version", "u32", 2)]


def _gemma2_keys(config: GemmaConfig) -> list[tuple[str, str, Any]]:
    rows = [
        ("attn_logit_softcapping", "f32", config.attn_logit_softcapping),
        ("final_logit_softcapping", "f32", config.final_logit_softcapping),
        ("attention.sliding_window", "u32", config.sliding_window),
    ]
    absent = [key for key, _, value in rows if value is None]
    if absent:
        raise ConfigError(
            f"GGUF cannot express a Gemma 2 without {', '.join(absent)}: llama.cpp would use its defaults.",
            fix="convert to another format, or correct the configuration (--fix-config).",
        )
    return [(f"gemma2.{key}", kind, value) for key, kind, value in rows]


def size_label(parameters: int) -> str:
    """A parameter count as gguf-py rounds it for ``general.size_label``: two digits at least, such as ``2.6B``."""
    units = ((1e-12, "T"), (1e-9, "B"), (1e-6, "M"))
    scale, suffix = next(((x, u) for x, u in units if parameters * x > 1), (1e-3, "K"))
    value = parameters * scale
    digits = max(2 - len(str(round(value)).lstrip("0")), 0)
    return f"{value:.{digits}f}{suffix}"
