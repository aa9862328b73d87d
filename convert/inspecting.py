"""What a checkpoint is: its description and its fingerprint, as plain data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..formats.errors import UnknownConfigError
from ..model import canonical
from ..model.config import GemmaConfig
from . import digest, unconfigured
from .contents import contents
from .open import open_checkpoint
from .progress import Progress, Report, Silent
from .targets import framework_of


def inspect(
    path: str | Path,
    *,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
) -> Report:
    """What a checkpoint is: format, layout, configuration and its origins, tensors, findings. Reads headers only.

    Where nothing says what the configuration is, ``config`` is None and ``config_unknown`` tells why; the rest is there.
    """
    try:
        return _inspect(path, config, fix_config, gating)
    except UnknownConfigError as e:
        return unconfigured.inspection(Path(path), e)


def _inspect(
    path: str | Path, config: str | Path | GemmaConfig | None, fix_config: bool, gating: str | None
) -> Report:
    with open_checkpoint(path, config=config, gating=gating, fix_config=fix_config) as c:
        held = {row.name: [p.canonical for p in row.parts] for row in c.layout.rows.values()}
        rows = c.layout.embedding_rows
        return {
            "path": str(path),
            "format": c.source.format,
            "framework": framework_of(c.layout.variant.name),
            "layout": c.layout.variant.name,
            "describe": c.layout.variant.describe,
            "family": c.config.family,
            "size": _released_name(c.config),
            "parameters": c.config.num_parameters,
            "config": {k: _plain(getattr(c.config, k)) for k in c.config.__dataclass_fields__},
            "origin": c.reading.origin,
            "embedding": {"vocab_size": c.config.vocab_size, "source_rows": rows},
            "gating": c.layout.variant.gating,
            "gating_origin": c.gating or None,
            **contents(c.source, held),
            "quantized": len(c.quantized),
            "sidecars": c.sidecars.names,
            "warnings": [str(w) for w in c.reading.warnings],
            "notes": c.notes,
        }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _released_name(config: GemmaConfig) -> str | None:
    from ..model.config import PRESETS

    def shape(c: GemmaConfig) -> tuple[object, ...]:
        return (c.family, c.num_hidden_layers, *(v for k, v in c.axes.items() if k != "vocab"))

    wanted = shape(config)
    return next((n for n, p in PRESETS.items() if shape(p.config) == wanted), None)


def fingerprint_report(
    path: str | Path,
    *,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """The fingerprint with what it is made of."""
    meter = progress or Silent()
    with open_checkpoint(path, config=config, gating=gating, fix_config=fix_config) as c:
        meter.start(sum(t.nbytes for t in c.tensors.values()), "hashing")
        records = digest.digests(c, meter)
        return {
            "path": str(path),
            "fingerprint": digest.root(records),
            "tensors": len(digest.counting(records)),
            "dtypes": dict(Counter(r.dtype for r in records.values())),
            "quantized": len(c.quantized),
            "padding_rows": c.layout.embedding_rows - c.config.vocab_size,
            "padding_counts": canonical.EMBED_PADDING in digest.counting(records),
        }


def fingerprint(path: str | Path, *, config: str | Path | GemmaConfig | None = None) -> str:
    """The checkpoint's fingerprint: equal for equal weights in any lossless format, ``g2:sha256:<hex>``."""
    report = fingerprint_report(path, config=config)
    return str(report["fingerprint"])
