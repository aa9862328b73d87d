"""How many tokens of each group of probes a profile runs, by the model's size."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import GemmaConfig

DEFAULT_PROFILE = "ci"
SMALL = 50_000_000  # parameters up to which a model runs many tokens in a moment
CHUNK = 512  # tokens of a document, at most


@dataclass(frozen=True)
class Profile:
    """How much of each group is run.

    Attributes:
        snippet: tokens of a P1 snippet, at most.
        documents: P2 documents, at most.
        document: tokens of one, at most.
        every_edge: all lengths of P3, or only the longest.
        long: tokens of P4, at most; 0 for none.
        rows: vocabulary rows of P10, at most.
    """

    snippet: int
    documents: int
    document: int
    every_edge: bool
    long: int
    rows: int


# profile -> (for models that run in a moment, for others)
PROFILES: dict[str, tuple[Profile, Profile]] = {
    "smoke": (Profile(64, 0, 0, False, 0, 0), Profile(16, 0, 0, False, 0, 0)),
    "ci": (Profile(64, 96, 128, True, 2048, 4096), Profile(24, 24, 44, False, 1500, 256)),
    "full": (Profile(64, 4096, CHUNK, True, 1 << 40, 1 << 40),) * 2,
}


def is_small(config: GemmaConfig) -> bool:
    """Whether a model is run on many tokens even in the smaller profiles."""
    return config.num_parameters <= SMALL
