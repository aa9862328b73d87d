"""Google's gemma_pytorch: canonical orientation, q, k and v in one matrix."""

from __future__ import annotations

from ...model import canonical as c
from ..layout import Rule, Variant, rules_for


def rules(family: str) -> tuple[Rule, ...]:
    """The table of gemma/model.py's state dict."""
    axes = c.LAYER_AXES[family]
    same = [name for name in axes if name not in (c.Q, c.K, c.V)]
    return (
        Rule("embedder.weight", (c.EMBED,), "vocab d -> vocab d"),
        Rule(f"{c.LAYER}self_attn.qkv_proj.weight", (c.Q, c.K, c.V), "cat d -> out d"),
        *(Rule(name, (name,), f"{axes[name]} -> {axes[name]}") for name in same),
        Rule(c.FINAL_NORM, (c.FINAL_NORM,), "d -> d"),
    )


VARIANTS = (
    Variant(
        "gemma_pytorch",
        "torch_pickle",
        rules_for(("gemma", "gemma2"), rules),
        ignored=(r"freqs_cis", r"local_freqs_cis", r"global_freqs_cis"),  # RoPE tables, derived
        describe="gemma_pytorch checkpoint",
    ),
)
