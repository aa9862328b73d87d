"""The sizes a benchmark can be asked for. Imports nothing large: a child's peak memory counts from its parent's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g2kit.model.config import GemmaConfig

PRESETS = {"2b": "gemma2-2b", "9b": "gemma2-9b", "27b": "gemma2-27b"}


def model_config(size: str, layers: int | None) -> GemmaConfig:
    """A released size, with fewer layers where asked."""
    from g2kit.model.config import preset

    config = preset(PRESETS[size]).config
    return config.with_(num_hidden_layers=layers) if layers else config
