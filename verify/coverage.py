"""Which parts of the model a set of probes used: the evidence without which a PASS would say little."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..model.config import GemmaConfig
from .checks import Check
from .probes import Probe, ProbeSet, describe
from .softcap import USED, Utilisation

# without one of these, the same function is not shown
REQUIRED = ("window crossed", "attention soft-cap", "final soft-cap")
MIN_DOCUMENTS = 64
# check -> regime
_CHECKED = {
    "P3/mask": "mask of every layer", "P6/padding": "batch and padding", "P7/bos": "BOS control",
    "P8/decode": "decoding across the window", "P9/greedy": "greedy decoding",
}  # fmt: skip


def queries_past_window(config: GemmaConfig, probes: Iterable[Probe]) -> int:
    """Queries whose window leaves out at least one key; the same in every local layer."""
    window = config.sliding_window
    return 0 if window is None else sum(max(0, len(p.tokens) - window) for p in probes)


def coverage(
    config: GemmaConfig,
    probes: ProbeSet,
    checks: Sequence[Check] = (),
    used: Utilisation | None = None,
) -> dict[str, Any]:
    """The report's ``coverage`` object.

    Args:
        config: the model.
        probes: what was compared.
        checks: of :func:`g2kit.verify.behaviour.run_checks`, and others.
        used: soft-cap utilisation of the reference.

    Returns:
        ``probes``, ``skipped``, ``regimes`` (``name``, ``exercised``, ``value``, ``needed``, ``detail``), ``softcap`` (of
        every layer), ``final_softcap``, ``checks``.
    """
    layers = used.layers if used is not None else (None,) * config.num_hidden_layers
    has_cap = config.attn_logit_softcapping is not None
    return {
        "probes": describe(probes),
        "skipped": [dict(s) for s in probes.skipped],
        "regimes": regimes(config, probes, checks, used),
        "softcap": [
            {"layer": i, "kind": _kind(config, i), "utilisation": _finite(u)}
            for i, u in enumerate(layers)
            if has_cap
        ],
        "final_softcap": None if used is None else _finite(used.final),
        "checks": [c.to_json() for c in checks],
    }


def regimes(
    config: GemmaConfig, probes: ProbeSet, checks: Sequence[Check], used: Utilisation | None
) -> list[dict[str, Any]]:
    """Parts of the model's behaviour and whether they were used; those the model does not have are left out."""
    lengths = [len(p.tokens) for p in probes]
    longest, context = max(lengths, default=0), config.max_position_embeddings
    ids = np.unique(np.concatenate([p.tokens for p in probes])) if len(probes) else np.array([])
    texts = len(probes.group("P2"))
    scored = sum(p.scored for p in probes)
    clusters = "documents that intervals are computed from"
    if not texts:
        clusters = (
            f"no documents; intervals are computed from the {scored or len(probes)} sequences"
        )
    rows = [
        _regime("full context", longest >= context, longest, context, "tokens of the longest probe"),
        _regime("every vocabulary row", len(ids) >= config.vocab_size, len(ids), config.vocab_size,
                "different token ids as input; as output, every position has every row"),
        _regime("documents", texts >= MIN_DOCUMENTS, texts, MIN_DOCUMENTS, clusters),
        _regime("kinds of text", len(kinds := {p.category for p in probes.group("P1", "P2")}) > 1,
                len(kinds), 2, ", ".join(sorted(kinds)) or "none"),
    ]  # fmt: skip
    rows += _window(config, probes) + _caps(config, used, checks)
    by_id = {c.id: c for c in checks}
    for check, name in _CHECKED.items():
        if check in by_id:
            c = by_id[check]
            rows.append(_regime(name, c.verdict != "INCONCLUSIVE", c.value, c.threshold, c.detail))
    return rows


def _window(config: GemmaConfig, probes: ProbeSet) -> list[dict[str, Any]]:
    if config.sliding_window is None:
        return []
    local = [i for i in range(config.num_hidden_layers) if config.is_local(i)]
    queries = queries_past_window(config, probes)
    detail = (
        f"queries whose window of {config.sliding_window} leaves out a key, in each of the local layers "
        f"{', '.join(map(str, local))}"
    )
    return [_regime("window crossed", queries > 0, queries, 1, detail)]


def _caps(
    config: GemmaConfig, used: Utilisation | None, checks: Sequence[Check]
) -> list[dict[str, Any]]:
    """Utilisation, or a derived pair that stood in for it."""
    stressed = any(c.id == "P5/stressed" and c.verdict != "INCONCLUSIVE" for c in checks)
    seen = [u for u in used.layers if u is not None] if used is not None else []
    rows = []
    for name, cap, value in (
        ("attention soft-cap", config.attn_logit_softcapping, min(seen) if seen else None),
        ("final soft-cap", config.final_logit_softcapping, None if used is None else used.final),
    ):
        if cap is None:
            continue
        reached = value is not None and value >= USED
        detail = "least utilisation of a layer" if name.startswith("att") else "utilisation"
        detail += f": largest score before the cap, over the cap of {cap:g}"
        if stressed and not reached:
            detail += "; exercised in a derived pair of checkpoints"
        rows.append(_regime(name, reached or stressed, value, USED, detail))
    return rows


def _regime(
    name: str, exercised: bool, value: float | None, needed: float | None, detail: str
) -> dict[str, Any]:
    return {
        "name": name, "exercised": bool(exercised), "value": _finite(value), "needed": needed,
        "detail": detail,
    }  # fmt: skip


def _kind(config: GemmaConfig, layer: int) -> str:
    return "local" if config.is_local(layer) else "global"


def _finite(x: float | None) -> float | None:
    return x if x is not None and np.isfinite(x) else None
