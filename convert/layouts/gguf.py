"""GGUF as llama.cpp's converter writes it: canonical orientation, norms 1 + w in float32."""

from __future__ import annotations

from ...formats.dtypes import F32
from ...model import canonical as c
from ..layout import Rule, Variant, rules_for

_LINEARS = {
    "attn_q": c.Q, "attn_k": c.K, "attn_v": c.V, "attn_output": c.O,
    "ffn_gate": c.GATE, "ffn_up": c.UP, "ffn_down": c.DOWN,
}  # fmt: skip
_NORMS = {
    "gemma": {"attn_norm": c.INPUT_NORM, "ffn_norm": c.POST_ATTENTION_NORM},
    "gemma2": {
        "attn_norm": c.INPUT_NORM,
        "post_attention_norm": c.POST_ATTENTION_NORM,
        "ffn_norm": c.PRE_FFW_NORM,
        "post_ffw_norm": c.POST_FFW_NORM,
    },
}


def rules(family: str) -> tuple[Rule, ...]:
    """The table of one family; the query step is 1 unless llama.cpp assumes another scale."""
    axes = c.LAYER_AXES[family]
    return (
        Rule("token_embd.weight", (c.EMBED,), "vocab d -> vocab d"),
        *(
            Rule(
                f"blk.{{i}}.{leaf}.weight",
                (name,),
                f"{axes[name]} -> {axes[name]}",
                "llama_query_scale" if name == c.Q else None,
            )
            for leaf, name in _LINEARS.items()
        ),
        *(
            Rule(f"blk.{{i}}.{leaf}.weight", (name,), "d -> d", "plus_one", F32)
            for leaf, name in _NORMS[family].items()
        ),
        Rule("output_norm.weight", (c.FINAL_NORM,), "d -> d", "plus_one", F32),
    )


VARIANTS = (
    Variant("gguf", "gguf", rules_for(("gemma", "gemma2"), rules), describe="GGUF (llama.cpp)"),
)
