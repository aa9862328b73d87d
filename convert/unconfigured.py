"""What can be said of a checkpoint whose configuration is unknown: everything but the model's hyper-parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..formats.errors import UnknownConfigError
from ..model import canonical
from .contents import contents
from .detect import Match, best_matches, open_container
from .layout import layer_name
from .sidecar import find_sidecars
from .targets import framework_of


def inspection(path: Path, reason: UnknownConfigError) -> dict[str, Any]:
    """The report of ``inspect`` without a configuration; ``config`` is null and ``config_unknown`` says why.

    Args:
        path: the checkpoint.
        reason: what opening it said.
    """
    source = open_container(path)
    try:
        if any(name.endswith(".weight_scaler") for name in source.tensors):
            from ..formats.packed import torch_int8

            source = torch_int8.combine(source)
        fits = best_matches(source)
        candidates = _candidates(fits)
        layouts = {c["layout"] for c in candidates}
        tensors = list(source.tensors.values())
        return {
            "path": str(path),
            "format": source.format,
            "framework": framework_of(fits[0].variant.name),
            "layout": fits[0].variant.name if len(layouts) == 1 else None,
            "describe": fits[0].variant.describe if len(layouts) == 1 else None,
            "candidates": candidates,
            "family": fits[0].family,
            "size": None,
            "parameters": None,
            "elements": sum(math.prod(t.shape) for t in tensors),
            "config": None,
            "config_unknown": {"why": reason.what, "fix": reason.fix},
            "sizes": reason.found or {},
            "unstored": reason.expected or [],
            "origin": {},
            "embedding": {"vocab_size": None, "source_rows": _rows(source.tensors, fits[0])},
            "gating": None,
            "gating_origin": None,
            **contents(source, {}),
            "quantized": sum(t.quantized is not None for t in tensors),
            "sidecars": find_sidecars(path, source.format).names,
            "warnings": [],
            "notes": list(source.notes),
        }
    finally:
        source.close()


def _candidates(fits: list[Match]) -> list[dict[str, Any]]:
    """The tables whose names fit, once each: fused and orientation variants have one name."""
    seen = {
        (f.variant.name, f.family): {
            "layout": f.variant.name,
            "describe": f.variant.describe,
            "family": f.family,
            "layers": f.num_layers,
        }
        for f in reversed(fits)
    }
    return list(reversed(seen.values()))


def _rows(tensors: dict[str, Any], fit: Match) -> int | None:
    rule = next(r for r in fit.variant.rules[fit.family] if canonical.EMBED in r.canonical)
    shape = tensors[layer_name(rule.foreign, 0, fit.variant.periods.get(fit.family, 1))].shape
    return shape[0] if shape else None
