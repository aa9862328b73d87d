"""Google's Flax gemma library: one set of arrays, several trees around them.

Differences between the trees are data: the prefix, whether MLP leaves end in ``/w``, whether layers
are stacked. What
differs between models is decided by names and shapes: q, k and v fused when heads equal kv_heads,
and the gating
matrix stored ``[2, d, f]`` (Gemma 1, Gemma 2 2B) or ``[2, f, d]`` (Gemma 2 9B and 27B).
"""

from __future__ import annotations

from itertools import product

from ...model import canonical as c
from ..layout import Rule, Variant, rules_for

GATING = {False: "part d f -> f d", True: "part f d -> f d"}

# name -> (prefix, leaf suffix in the MLP, layers stacked, period, what it is)
_TREES: dict[str, tuple[str, str, bool, str]] = {
    "flat": ("transformer/", "/w", False, "Flax FLAT (Kaggle release)"),
    "nested": ("", "", False, "Flax NESTED (gemma library's save_params)"),
    "stacked": ("transformer/", "/w", True, "Flax STACKED layers"),
    "kauldron": ("params/", "", False, "Flax Kauldron trainer checkpoint"),
    "wrapped": ("transformer/", "", False, "Flax NESTED below one transformer level"),
    "params-flat": ("params/transformer/", "/w", False, "Flax FLAT below params"),
    "params-wrapped": ("params/transformer/", "", False, "Flax NESTED below params/transformer"),
}
_TRAINING_STATE = (r"opt_state(/.*)?", r"step", r"collections(/.*)?")


def rules(
    family: str, prefix: str, mlp: str, stacked: bool, fused: bool, transposed: bool
) -> tuple[Rule, ...]:
    """The table of one tree for one kind of model."""
    layer = f"{prefix}stacked_layers/attention_type_{{p}}/" if stacked else f"{prefix}layer_{{i}}/"
    lead = "layer " if stacked else ""

    def rule(leaf: str, names: tuple[str, ...], axes: str) -> Rule:
        return Rule(f"{layer}{leaf}", names, f"{lead}{axes}")

    attention = (
        (rule("attn/qkv_einsum/w", (c.Q, c.K, c.V), "part n d h -> (n h) d"),)
        if fused
        else (
            rule("attn/q_einsum/w", (c.Q,), "n d h -> (n h) d"),
            rule("attn/kv_einsum/w", (c.K, c.V), "part k d h -> (k h) d"),
        )
    )
    norms = {
        "gemma": {"pre_attention_norm": c.INPUT_NORM, "pre_ffw_norm": c.POST_ATTENTION_NORM},
        "gemma2": {
            "pre_attention_norm": c.INPUT_NORM,
            "post_attention_norm": c.POST_ATTENTION_NORM,
            "pre_ffw_norm": c.PRE_FFW_NORM,
            "post_ffw_norm": c.POST_FFW_NORM,
        },
    }[family]
    return (
        Rule(f"{prefix}embedder/input_embedding", (c.EMBED,), "vocab d -> vocab d"),
        *attention,
        rule("attn/attn_vec_einsum/w", (c.O,), "n h d -> d (n h)"),
        rule(f"mlp/gating_einsum{mlp}", (c.GATE, c.UP), GATING[transposed]),
        rule(f"mlp/linear{mlp}", (c.DOWN,), "f d -> d f"),
        *(rule(f"{leaf}/scale", (name,), "d -> d") for leaf, name in norms.items()),
        Rule(f"{prefix}final_norm/scale", (c.FINAL_NORM,), "d -> d"),
    )


def variant(tree: str, fused: bool, transposed: bool) -> Variant:
    """One tree for models with or without fused q, k, v and transposed gating."""
    prefix, mlp, stacked, describe = _TREES[tree]

    def build(family: str) -> tuple[Rule, ...]:
        # fused heads have one size: the table's n stands for k too
        return rules(family, prefix, mlp, stacked, fused, transposed)

    return Variant(
        tree,
        "orbax",
        rules_for(("gemma", "gemma2"), build),
        periods={"gemma2": 2} if stacked else {},
        ignored=_TRAINING_STATE,
        describe=describe,
        options={"fused": fused, "transposed": transposed},
    )


VARIANTS = tuple(
    variant(tree, fused, transposed)
    for tree, fused, transposed in product(_TREES, (False, True), (False, True))
)
