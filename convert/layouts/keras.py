"""Keras-hub GemmaBackbone weights (``model.weights.h5``).

Einsum-dense kernels, one matrix each, zero-centred norms. Keras gives the first block no
number: ``gemma_decoder_block``, ``…_1``, ``…_2``.
"""

from __future__ import annotations

from ...model import canonical as c
from ..layout import Rule, Variant, rules_for

_LEAVES = {
    "attention/query_dense": (c.Q, "n d h -> (n h) d"),
    "attention/key_dense": (c.K, "k d h -> (k h) d"),
    "attention/value_dense": (c.V, "k d h -> (k h) d"),
    "attention/output_dense": (c.O, "n h d -> d (n h)"),
    "gating_ffw": (c.GATE, "d f -> f d"),
    "gating_ffw_2": (c.UP, "d f -> f d"),
    "ffw_linear": (c.DOWN, "f d -> d f"),
}
_NORMS = {
    "gemma": {"pre_attention_norm": c.INPUT_NORM, "pre_ffw_norm": c.POST_ATTENTION_NORM},
    "gemma2": {
        "pre_attention_norm": c.INPUT_NORM,
        "post_attention_norm": c.POST_ATTENTION_NORM,
        "pre_ffw_norm": c.PRE_FFW_NORM,
        "post_ffw_norm": c.POST_FFW_NORM,
    },
}


def rules(family: str) -> tuple[Rule, ...]:
    """The table of one family."""
    at = "layers/gemma_decoder_block{suffix}/"
    return (
        Rule("layers/reversible_embedding/vars/0", (c.EMBED,), "vocab d -> vocab d"),
        *(Rule(f"{at}{leaf}/vars/0", (name,), axes) for leaf, (name, axes) in _LEAVES.items()),
        *(Rule(f"{at}{leaf}/vars/0", (name,), "d -> d") for leaf, name in _NORMS[family].items()),
        Rule("layers/rms_normalization/vars/0", (c.FINAL_NORM,), "d -> d"),
    )


VARIANTS = (
    Variant(
        "keras", "keras_h5", rules_for(("gemma", "gemma2"), rules), describe="Keras-hub preset"
    ),
)
