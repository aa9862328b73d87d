"""Mistakes known to go round in configurations of the released sizes, and how to tell those sizes.

Sources: Gemma 2 (arXiv 2408.00118) table 1 and section 2; google/gemma_pytorch ``config.py``;
huggingface/transformers #31891 and google/gemma_pytorch commit 03e6575 (query scale of the 9B);
AI-Hypercomputer/maxtext ``hf_model_configs.py`` and ``param_mapping.py``, which still carry both
wrong query scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .config import PRESETS, Family, GemmaConfig, Preset

BASES: dict[str, Preset] = {n: p for n, p in PRESETS.items() if not n.endswith("-it")}

# released model, field, wrong value -> why it is wrong
_KNOWN_BUGS: dict[tuple[str, str, Any], str] = {
    ("gemma2-9b", "query_pre_attn_scalar", 224.0): (
        "224 is hidden_size / num_attention_heads, taken for the 9B in early Hugging Face releases and MaxText's "
        "exports; Google's code divides queries by sqrt(256) (transformers#31891, gemma_pytorch commit 03e6575)"
    ),
    ("gemma2-27b", "query_pre_attn_scalar", 128.0): (
        "128 is head_dim, as MaxText's and keras-hub's converters take it; Google's code divides the 27B's queries by "
        "sqrt(hidden_size / num_attention_heads) = sqrt(144) (gemma_pytorch config.py)"
    ),
}
# field -> what every released size of the family has it for
_RELEASED: dict[str, str] = {
    "query_pre_attn_scalar": "queries of the released {name} are divided by sqrt({right})",
    "attn_logit_softcapping": "every released Gemma 2 caps attention scores (arXiv 2408.00118, section 2)",
    "final_logit_softcapping": "every released Gemma 2 caps its logits (arXiv 2408.00118, section 2)",
    "sliding_window": "even layers of every released Gemma 2 see 4096 keys (arXiv 2408.00118, section 2)",
    "rope_theta": "every released Gemma 1 and 2 was trained with RoPE base 10000",
    "rms_norm_eps": "every released Gemma 1 and 2 adds 1e-06 in its norms",
}
_ON_PURPOSE = "; leave it only if a fine-tune changed it on purpose"


# the sizes that tell the released models apart: L, D, F, H, K, h
SHAPE_FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


def shape_key(config: GemmaConfig) -> tuple[int, ...]:
    """The config's values of :data:`SHAPE_FIELDS`."""
    return tuple(getattr(config, name) for name in SHAPE_FIELDS)


def known_size(family: Family | None, key: tuple[Any, ...]) -> Preset | None:
    """The released base model with exactly these values of :data:`SHAPE_FIELDS`."""
    for preset in BASES.values():
        if preset.config.family == family and shape_key(preset.config) == key:
            return preset
    return None


def audit(config: GemmaConfig) -> Iterator[tuple[str, Any, Any, str]]:
    """``(field, found, right, why)`` of every hyper-parameter that a released size has otherwise.

    For an unknown size only missing soft-caps of Gemma 2 are reported, with no right value: nothing
    says what it is.
    """
    preset = known_size(config.family, shape_key(config))
    if preset is None:
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.family == "gemma2" and getattr(config, name) is None:
                yield name, None, None, _RELEASED[name]
        return
    for name, reason in _RELEASED.items():
        found, right = getattr(config, name), getattr(preset.config, name)
        if _differ(found, right):
            why = _KNOWN_BUGS.get((preset.name, name, found))
            why = why or reason.format(name=preset.name, right=right) + _ON_PURPOSE
            if name == "query_pre_attn_scalar":
                ratio = math.sqrt(right / found)
                why += f". Attention scores would come out {ratio:.4f} times as large"
            yield name, found, right, why


def _differ(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is not b
    return not math.isclose(a, b, rel_tol=1e-6)  # a float32 of a container is the same number
