"""Random small models of all five architectures, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from g2kit.model.config import GemmaConfig

# (family, heads, kv_heads) of Gemma 1 2B (MQA) and 7B (MHA), Gemma 2 2B, 9B (GQA) and 27B
ARCHITECTURES = {
    "gemma-2b": ("gemma", 4, 1),
    "gemma-7b": ("gemma", 4, 4),
    "gemma2-2b": ("gemma2", 4, 2),
    "gemma2-9b": ("gemma2", 6, 3),
    "gemma2-27b": ("gemma2", 8, 4),
}


def small(
    arch: str, *, layers: int = 2, d: int = 24, f: int = 40, head_dim: int = 8, vocab: int = 64
) -> GemmaConfig:
    """A tiny model of one of the five architectures."""
    family, n, k = ARCHITECTURES[arch]
    gemma2 = family == "gemma2"
    # the 27B divides queries by sqrt(d / heads), the others by sqrt(head_dim)
    scalar = d / n if arch == "gemma2-27b" else float(head_dim)
    return GemmaConfig(
        family,  # type: ignore[arg-type]
        layers, d, f, n, k, head_dim, vocab, scalar,
        50.0 if gemma2 else None, 30.0 if gemma2 else None, 4 if gemma2 else None,
        max_position_embeddings=64,
    )  # fmt: skip


@st.composite
def random_configs(draw: st.DrawFn) -> GemmaConfig:
    """Any of the five architectures with random small sizes."""
    return small(
        draw(st.sampled_from(sorted(ARCHITECTURES))),
        layers=draw(st.integers(1, 4)),
        d=draw(st.integers(3, 12)) * 2,
        f=draw(st.integers(3, 40)),
        head_dim=draw(st.integers(1, 8)) * 2,
        vocab=draw(st.integers(8, 80)),
    )
