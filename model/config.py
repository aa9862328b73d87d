"""The one description of a Gemma model every folder uses, and the table of released sizes.

Field names are Hugging Face's. Sources: Gemma (arXiv 2403.08295) table 1, Gemma 2 (arXiv 2408.00118) table 1, and the
official code: the 9B divides queries by sqrt(256), not sqrt(224); the 27B by sqrt(4608 / 32) = sqrt(144).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..formats.errors import ConfigError

Family = Literal["gemma", "gemma2"]
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal float32


@dataclass(frozen=True)
class GemmaConfig:
    """Hyper-parameters of one Gemma 1 or Gemma 2 model. No defaults that could be silently wrong.

    Attributes:
        family: ``gemma`` or ``gemma2``.
        num_hidden_layers: decoder blocks.
        hidden_size: embedding width.
        intermediate_size: width of the gate and up projections (each).
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; query head n uses key/value head n // (heads / kv_heads).
        head_dim: width of one head.
        vocab_size: rows of the embedding that a token id can reach.
        query_pre_attn_scalar: queries are multiplied by its -1/2 power.
        attn_logit_softcapping: cap on attention scores; None for Gemma 1.
        final_logit_softcapping: cap on output logits; None for Gemma 1.
        sliding_window: keys a local layer sees, itself included; None for Gemma 1.
        max_position_embeddings: trained context length.
        rope_theta: RoPE base.
        rms_norm_eps: added to the mean square.
        bos_token_id: beginning of sequence.
        eos_token_id: end tokens; instruction-tuned models stop at ``<end_of_turn>`` too.
        pad_token_id: padding.

    Raises:
        ConfigError: values contradict each other.
    """

    family: Family
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_window: int | None
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.family not in ("gemma", "gemma2"):
            raise ConfigError(
                f"model family {self.family!r} is not supported; supported are gemma and gemma2."
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{f.name} must be a whole number, found {value!r}.")
        sizes = (
            "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
        )  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, found {self.head_dim}.")
        positive = ("query_pre_attn_scalar", "rope_theta", "rms_norm_eps",
                    "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not _SMALLEST <= value <= _LARGEST:
                raise ConfigError(
                    f"{name} must be positive and finite (in float32, as every framework computes with it), "
                    f"found {value}."
                )
        gemma2_only = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
        if self.family == "gemma":
            for name in gemma2_only:
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is set, but Gemma 1 has none.")

    @property
    def filler(self) -> int:
        """The id that padding is filled with: ``pad_token_id``, or 0 where a file names one beyond the vocabulary."""
        return self.pad_token_id if 0 <= self.pad_token_id < self.vocab_size else 0

    @property
    def has_post_norms(self) -> bool:
        """Gemma 2 normalises the output of attention and feed-forward too."""
        return self.family == "gemma2"

    def is_local(self, layer: int) -> bool:
        """Whether a layer attends within the sliding window: Gemma 2's even layers, starting at 0."""
        return self.sliding_window is not None and layer % 2 == 0

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Hugging Face's name of every layer's attention."""
        names = ("full_attention", "sliding_attention")
        return tuple(names[self.is_local(i)] for i in range(self.num_hidden_layers))

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the named axes used by every layout table."""
        return {
            "vocab": self.vocab_size,
            "d": self.hidden_size,
            "f": self.intermediate_size,
            "n": self.num_attention_heads,
            "k": self.num_key_value_heads,
            "h": self.head_dim,
        }

    @property
    def num_parameters(self) -> int:
        """Weights, the tied embedding counted once."""
        d, heads = self.hidden_size, 2 * (self.num_attention_heads + self.num_key_value_heads)
        norms = 4 if self.has_post_norms else 2
        layer = d * self.head_dim * heads + 3 * d * self.intermediate_size + norms * d
        return self.num_hidden_layers * layer + d + self.vocab_size * d

    def with_(self, **changes: Any) -> GemmaConfig:
        """A copy with fields replaced, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Preset:
    """A released model: its name in this tool, its config, and the gating orientation its Flax release uses."""

    name: str
    config: GemmaConfig
    gating_transposed: bool = field(default=False)


def _gemma1(layers: int, d: int, f: int, n: int, k: int) -> GemmaConfig:
    return GemmaConfig("gemma", layers, d, f, n, k, 256, 256_000, 256.0, None, None, None)


def _gemma2(layers: int, d: int, f: int, n: int, k: int, h: int, scalar: float) -> GemmaConfig:
    return GemmaConfig("gemma2", layers, d, f, n, k, h, 256_000, scalar, 50.0, 30.0, 4096)


# The Flax release of Gemma 2 9B and 27B stores gating_einsum as [2, f, d], the others as [2, d, f].
_SIZES: tuple[Preset, ...] = (
    Preset("gemma-2b", _gemma1(18, 2048, 16384, 8, 1)),
    Preset("gemma-7b", _gemma1(28, 3072, 24576, 16, 16)),
    Preset("gemma2-2b", _gemma2(26, 2304, 9216, 8, 4, 256, 256.0)),
    Preset("gemma2-9b", _gemma2(42, 3584, 14336, 16, 8, 256, 256.0), gating_transposed=True),
    Preset("gemma2-27b", _gemma2(46, 4608, 36864, 32, 16, 128, 144.0), gating_transposed=True),
)
END_OF_TURN = 107


def _instruction_tuned(preset: Preset) -> Preset:
    config = preset.config.with_(eos_token_id=(1, END_OF_TURN))
    return replace(preset, name=f"{preset.name}-it", config=config)


PRESETS: dict[str, Preset] = {
    p.name: p for base in _SIZES for p in (base, _instruction_tuned(base))
}


def preset(name: str) -> Preset:
    """The released model of that name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(
            f"no preset is called {name!r}.", fix=f"use one of {', '.join(PRESETS)}."
        ) from None
