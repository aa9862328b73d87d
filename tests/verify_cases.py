"""Small models, probes and floors shared by the tests of the verifier's comparison."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.formats.dtypes import F32
from g2kit.model.config import GemmaConfig
from g2kit.model.sample import heldout_text, sample_dir
from g2kit.verify.floor import Floor, measure_floor
from g2kit.verify.probes import Probe


def model(
    arch: str = "gemma2-2b",
    seed: int = 1,
    layers: int = 4,
    *,
    scale: float = 0.3,
    dtype: np.dtype = F32,
    **sizes: int,
) -> Checkpoint:
    """A random model whose soft-caps, norms and window matter, in memory."""
    config = small(arch, layers=layers, **sizes)
    weights = {
        n: (w.astype(F32) * F32.type(scale)).astype(dtype)
        for n, w in random_weights(config, seed).items()
    }
    return checkpoint(config, weights)


def probe(name: str, tokens: Any, *, scored: bool = True) -> Probe:
    group = name.partition("/")[0]
    return Probe(name, group, group.lower(), name, np.asarray(tokens, np.int64), None, scored)


def random_probes(config: GemmaConfig, lengths: Sequence[int], seed: int = 3) -> list[Probe]:
    rng = np.random.default_rng(seed)
    return [
        probe(f"P{i % 3}/{i}", [config.bos_token_id, *rng.integers(0, config.vocab_size, n - 1)])
        for i, n in enumerate(lengths)
    ]


@cache
def sample() -> Checkpoint:
    """The bundled model; stays open."""
    return open_checkpoint(sample_dir())


@cache
def sample_probes() -> tuple[Probe, ...]:
    """English and random ids, two of them longer than the window of 64."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(sample_dir() / "tokenizer.model"))
    text = sp.encode(heldout_text())
    cuts = [(0, 90), (200, 40), (400, 24), (600, 33), (800, 17), (1000, 48), (1200, 7)]
    found = [probe(f"P2/{i}", [2, *text[a : a + n]]) for i, (a, n) in enumerate(cuts)]
    ids = np.random.default_rng(5).integers(0, 3072, 69)
    return (*found, probe("P10/0", [2, *ids], scored=False))


@cache
def sample_floor() -> Floor:
    """In float32."""
    return measure_floor(sample(), sample_probes())
