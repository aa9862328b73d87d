"""The report of a run as one document, ``g2kit.quant-report/1``: sizes, what to exclude, machine, and an id over all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import FormatError
from ..machine import described
from ..sealed import plain, sealed

if TYPE_CHECKING:  # reports are read without torch
    from ..convert.open import Checkpoint
    from .plan import Goal

Report = dict[str, Any]
SCHEMA = "g2kit.quant-report/1"
_WEIGHTS = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
# what the clock or an interruption changes
_PASSING = frozenset({"content_id", "resumed_blocks", "run", "seconds", "timing"})
# notes of the manifest that say what other fields do
_SAID = ("calibration: ", "method: ")


def complete(found: Mapping[str, Any], checkpoint: Checkpoint, goal: Goal) -> Report:
    """The document of a run.

    Args:
        found: what it gives: ``linears``, ``blocks``, ``quality``, ``output`` and the like.
        checkpoint: what was quantized.
        goal: to what.

    Returns:
        JSON values only. ``content_id`` is over everything but ``run``, ``timing``, ``seconds`` and ``resumed_blocks``.
    """
    config = checkpoint.config
    kinds = {True: "local", False: "global"}
    local = [config.is_local(i) for i in range(config.num_hidden_layers)]
    notes = [n for n in found["notes"] if not n.startswith(_SAID)]
    linears = {n: r | _stored(n, checkpoint, goal) for n, r in found["linears"].items()}
    document = {
        **found,
        "schema": SCHEMA,
        "kind": "quantize",
        "linears": linears,
        "blocks": [
            {**b, "kind": kinds[local[b["layer"]]] if any(local) else None} for b in found["blocks"]
        ],
        "size": _size(found["output"], linears, checkpoint),
        "notes": notes,
        "warnings": [str(w) for w in checkpoint.reading.warnings],
        "environment": _environment(),
    }
    return seal(document | {"exclude": exclude(document)})


def seal(document: Mapping[str, Any]) -> Report:
    """The document with its ``content_id``; numbers that do not exist are null."""
    found: Report = plain(document)
    return {**found, "content_id": sealed(_lasting(found))["content_id"], "run": found.get("run")}


def check_seal(document: Mapping[str, Any], where: Path) -> None:
    """Refuse a document that was changed after it was written.

    Raises:
        FormatError: its ``content_id`` does not fit.
    """
    if seal(document)["content_id"] != document["content_id"]:
        raise FormatError(
            "the report was changed after it was written: its content_id does not fit.",
            where=where,
            fix="use the file as g2quant wrote it.",
        )


def with_sensitivity(document: Mapping[str, Any], measured: Mapping[str, Any]) -> Report:
    """The document with what `g2quant sensitivity` measured of the same model: what to exclude is ranked by that then.

    Args:
        document: of a run.
        measured: ``linears``: name -> ``choices``: scheme -> ``kl``.
    """
    joined = {**document, "sensitivity": dict(measured)}
    return seal(joined | {"exclude": exclude(joined)})


def exclude(document: Mapping[str, Any]) -> Report | None:
    """Linear weights by what leaving them unquantized would gain; None where nothing is known of that.

    By KL per byte where the KL of each alone was measured, else by the error of its own output.
    """
    linears = document["linears"]
    kl = {n: _sensitivity(document, n, r) for n, r in linears.items()}
    by_kl = bool(kl) and all(v is not None for v in kl.values())
    rows = []
    for name, record in linears.items():
        error = record["error"]
        gain = kl[name] if by_kl else None if error is None else error**0.5
        if gain is not None:
            cost = max(0, (record.get("source_bytes") or 0) - record["bytes"])
            rows.append({"name": name, "gain": gain, "error": error, "bytes": cost})
    if not any(r["gain"] for r in rows):
        return None

    def rank(r: Report) -> tuple[float, str]:
        return -float(r["gain"]) / (max(1, r["bytes"]) if by_kl else 1), r["name"]

    return {"by": "kl" if by_kl else "output error", "rows": sorted(rows, key=rank)}


def _sensitivity(document: Mapping[str, Any], name: str, record: Mapping[str, Any]) -> float | None:
    measured = (document.get("sensitivity") or {}).get("linears", {}).get(name, {})
    found = measured.get("choices", {}).get(record["scheme"], {}).get("kl")
    return None if found is None else max(0.0, float(found))


def _stored(name: str, checkpoint: Checkpoint, goal: Goal) -> Report:
    tensor = checkpoint.tensors[name]
    return {
        "shape": list(tensor.shape),
        "bytes": round(goal.bits(name, checkpoint) / 8),
        "source_bytes": tensor.nbytes,
    }


def _size(output: Mapping[str, Any], linears: Mapping[str, Any], checkpoint: Checkpoint) -> Report:
    files = output.get("files") or {}
    weights = sum(f["size"] for n, f in files.items() if Path(n).suffix in _WEIGHTS)
    return {
        "weights_before": sum(t.nbytes for t in checkpoint.tensors.values()),
        "weights_after": weights or None,
        "linears_before": sum(r["source_bytes"] for r in linears.values()),
        "linears_after": sum(r["bytes"] for r in linears.values()),
        "files_after": output["bytes"],
        "bits_per_parameter": 8 * (weights or output["bytes"]) / checkpoint.config.num_parameters,
    }


def _environment() -> Report:
    import torch

    return described(("numpy", "torch")) | {"threads": torch.get_num_threads()}


def _lasting(value: Any) -> Any:
    """Without what passes."""
    if isinstance(value, Mapping):
        return {k: _lasting(v) for k, v in value.items() if k not in _PASSING}
    return [_lasting(v) for v in value] if isinstance(value, list) else value
