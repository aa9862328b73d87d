"""Every tensor of a Gemma model under its canonical name: Hugging Face's names, ``[out_features, in_features]``.

Norm gains are zero-centred (the layer multiplies by 1 + w). The output head is the embedding, so it is no tensor.
Axes are named; sizes come from the config (:attr:`GemmaConfig.axes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .config import GemmaConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
# Embedding rows past vocab_size that no token id reaches (TPU padding of the Flax releases). Present only when not all zero.
EMBED_PADDING = "model.embed_tokens.padding"
LAYER = "model.layers.{i}."

Q, K, V, O = (f"{LAYER}self_attn.{p}_proj.weight" for p in "qkvo")  # noqa: E741
GATE, UP, DOWN = (f"{LAYER}mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
INPUT_NORM = f"{LAYER}input_layernorm.weight"
# Gemma 1's pre-feed-forward norm, but Gemma 2's norm of the attention output: the same name for two places.
POST_ATTENTION_NORM = f"{LAYER}post_attention_layernorm.weight"
PRE_FFW_NORM = f"{LAYER}pre_feedforward_layernorm.weight"
POST_FFW_NORM = f"{LAYER}post_feedforward_layernorm.weight"

# name template -> axes, out_features first; "(n h)" is one axis of n * h
_LINEARS = {
    Q: "(n h) d", K: "(k h) d", V: "(k h) d", O: "d (n h)",
    GATE: "f d", UP: "f d", DOWN: "d f",
}  # fmt: skip
LAYER_AXES: dict[str, dict[str, str]] = {
    "gemma": {**_LINEARS, INPUT_NORM: "d", POST_ATTENTION_NORM: "d"},
    "gemma2": {
        **_LINEARS, INPUT_NORM: "d", POST_ATTENTION_NORM: "d", PRE_FFW_NORM: "d", POST_FFW_NORM: "d",
    },
}  # fmt: skip


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor of the model: name, named axes and the shape they give."""

    name: str
    axes: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_norm(self) -> bool:
        """Whether this is a norm gain."""
        return len(self.shape) == 1


def axis_groups(axes: str) -> list[tuple[str, ...]]:
    """``"(n h) d"`` as ``[("n", "h"), ("d",)]``."""
    groups: list[tuple[str, ...]] = []
    inside: list[str] | None = None
    for token in axes.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = []
        elif token == ")":
            groups.append(tuple(inside or ()))
            inside = None
        elif inside is not None:
            inside.append(token)
        else:
            groups.append((token,))
    return groups


def shape_of(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Shape that named axes have under ``sizes``."""
    return tuple(math.prod(sizes[a] for a in group) for group in axis_groups(axes))


def tensors(config: GemmaConfig) -> dict[str, CanonicalTensor]:
    """Every tensor of the model in forward order: embedding, layers, final norm."""
    rows: list[tuple[str, str]] = [(EMBED, "vocab d")]
    for i in range(config.num_hidden_layers):
        rows += [(t.format(i=i), axes) for t, axes in LAYER_AXES[config.family].items()]
    rows.append((FINAL_NORM, "d"))
    sizes = config.axes
    return {name: CanonicalTensor(name, axes, shape_of(axes, sizes)) for name, axes in rows}


def layer_names(config: GemmaConfig, layer: int) -> list[str]:
    """Names of one block's tensors."""
    return [t.format(i=layer) for t in LAYER_AXES[config.family]]


def linears(names: Iterable[str]) -> list[str]:
    """The quantizable matrices among ``names``: everything in a block that is not a norm."""
    return [n for n in names if n.startswith("model.layers.") and n.endswith("_proj.weight")]
