"""MaxText: constants folded into the weights, layers stacked along axis 1 or one by one.

A Gemma 2 layer there is a (local, global) pair. MaxText stores 1 + w for norms, queries times
the query scale and the embedding times sqrt(d): arithmetic in the stored dtype, so the way back
is not exact (the steps count what changes).
Source: MaxText convert_gemma_chkpt.py and convert_gemma2_chkpt.py.
"""

from __future__ import annotations

from ...model import canonical as c
from ..layout import Rule, Variant, rules_for

_ROOT = "params/params/"
_NORMS = {
    "gemma": {"pre_self_attention_norm": c.INPUT_NORM, "pre_ffw_norm": c.POST_ATTENTION_NORM},
    "gemma2": {
        "pre_self_attention_norm": c.INPUT_NORM,
        "post_self_attention_norm": c.POST_ATTENTION_NORM,
        "pre_ffw_norm": c.PRE_FFW_NORM,
        "post_ffw_norm": c.POST_FFW_NORM,
    },
}
# leaf -> (canonical, first foreign axis, the others, canonical axes, step)
_LEAVES = {
    "self_attention{x}/query": (c.Q, "d", "n h", "(n h) d", "query_scale"),
    "self_attention{x}/key": (c.K, "d", "k h", "(k h) d", None),
    "self_attention{x}/value": (c.V, "d", "k h", "(k h) d", None),
    "self_attention{x}/out": (c.O, "n", "h d", "d (n h)", None),
    "mlp{x}/wi_0": (c.GATE, "d", "f", "f d", None),
    "mlp{x}/wi_1": (c.UP, "d", "f", "f d", None),
    "mlp{x}/wo": (c.DOWN, "f", "d", "d f", None),
}


def rules(family: str, scanned: bool) -> tuple[Rule, ...]:
    """The table of one family; scanned means layers stacked along axis 1."""
    pairs = family == "gemma2"
    x = "_{kind}" if pairs else ""
    layers = "layers" if scanned else ("layers_{j}" if pairs else "layers_{i}")
    at = f"{_ROOT}decoder/{layers}/"
    stack = "layer " if scanned else ""
    return (
        Rule(f"{_ROOT}token_embedder/embedding", (c.EMBED,), "vocab d -> vocab d", "embed_scale"),
        *(
            Rule(f"{at}{leaf.replace('{x}', x)}/kernel", (name,), f"{a} {stack}{b} -> {to}", step)
            for leaf, (name, a, b, to, step) in _LEAVES.items()
        ),
        *(
            Rule(f"{at}{leaf}{x}/scale", (name,), f"d {stack}-> d", "plus_one")
            for leaf, name in _NORMS[family].items()
        ),
        Rule(f"{_ROOT}decoder/decoder_norm/scale", (c.FINAL_NORM,), "d -> d", "plus_one"),
    )


def _variant(name: str, scanned: bool, describe: str) -> Variant:
    return Variant(
        name,
        "orbax",
        rules_for(("gemma", "gemma2"), lambda family: rules(family, scanned)),
        periods={"gemma2": 2},
        ignored=(r"opt_state(/.*)?", r"step"),
        describe=describe,
    )


VARIANTS = (
    _variant("scanned", True, "MaxText, layers stacked along axis 1"),
    _variant("unscanned", False, "MaxText, layers one by one"),
)
