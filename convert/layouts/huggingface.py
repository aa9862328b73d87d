"""Hugging Face names in safetensors or ``pytorch_model.bin``: the canonical names themselves."""

from __future__ import annotations

from ...model import canonical as c
from ..layout import Rule, Variant, rules_for


def rules(family: str) -> tuple[Rule, ...]:
    """Every tensor under its own name."""
    layer = c.LAYER_AXES[family]
    return (
        Rule(c.EMBED, (c.EMBED,), "vocab d -> vocab d"),
        *(Rule(name, (name,), f"{axes} -> {axes}") for name, axes in layer.items()),
        Rule(c.FINAL_NORM, (c.FINAL_NORM,), "d -> d"),
    )


# a transient buffer old transformers versions saved, derived from the config
_DERIVED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

VARIANTS = tuple(
    Variant(
        name,
        container,
        rules_for(("gemma", "gemma2"), rules),
        ignored=_DERIVED,
        describe=describe,
    )
    for name, container, describe in (
        ("huggingface", "safetensors", "Hugging Face safetensors"),
        ("huggingface-bin", "torch_pickle", "Hugging Face pytorch_model.bin"),
    )
)
