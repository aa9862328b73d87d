"""What a conversion did or would do, as plain data, and the manifest that stays with the output."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..formats.manifest import FileEntry, LossyStep, Manifest, TensorEntry
from ..model import canonical
from ..model.config_formats import to_plain
from . import digest
from .plan import Conversion, Task, dtype_counts, dtype_label
from .progress import Report
from .stream import TaskRecord
from .targets import framework_of


def _entries(records: Mapping[str, TaskRecord], side: str) -> dict[str, TensorEntry]:
    """Tensor entries of the ``source`` or the ``output``."""
    return digest.counting({name: getattr(r, side) for name, r in records.items()})


def _source_root(records: Mapping[str, TaskRecord]) -> str:
    entries = _entries(records, "source")
    dropped = records[canonical.EMBED].dropped
    return digest.root(entries | ({canonical.EMBED_PADDING: dropped} if dropped else {}))


def _dropped_values(records: Mapping[str, TaskRecord]) -> int:
    """Elements of embedding rows that were left out although they are not all zero."""
    dropped = records[canonical.EMBED].dropped
    return 0 if dropped is None or digest.is_zero(dropped) else math.prod(dropped.shape)


def _lossy(plan: Conversion, records: Mapping[str, TaskRecord]) -> list[LossyStep]:
    """Every step that may change values, with the number of elements it changed in each tensor."""
    steps: dict[str, dict[str, int]] = {}
    for task in plan.tasks:
        if task.changes:
            name = task.placement.step if task.step else f"to {task.dtype}"
            steps.setdefault(str(name), {})[task.tensor.name] = records[task.tensor.name].changed
    if lost := _dropped_values(records):
        steps["drop_padding"] = {canonical.EMBED_PADDING: lost}
    for task in plan.tasks:
        if rounded := records[task.tensor.name].rounded:
            reading = f"reading {task.tensor.placement.step}"
            steps.setdefault(reading, {})[task.tensor.name] = rounded
    for name in plan.checkpoint.quantized:
        steps.setdefault("dequantize", {})[name] = 0
    return [LossyStep(name, counts) for name, counts in sorted(steps.items())]


def manifest_of(plan: Conversion, records: Mapping[str, TaskRecord]) -> Manifest:
    """The manifest of what was written, without its files."""
    dropped = 0 if _dropped_values(records) else plan.embedding.get("dropped_rows", 0)
    return Manifest(
        tool_version=__version__,
        format=plan.target.container,
        layout=plan.layout.variant.name,
        dtype=dtype_label(plan.slots),
        source_fingerprint=_source_root(records),
        tensors=_entries(records, "output"),
        files={},  # the output knows them
        lossy=tuple(_lossy(plan, records)),
        padding_rows={canonical.EMBED: dropped} if dropped else {},
        notes=tuple(plan.notes),
        config=to_plain(plan.checkpoint.config),
        gating=plan.layout.variant.gating,
    )


def _describe(plan: Conversion, dst: Path) -> tuple[Report, Report]:
    c = plan.checkpoint
    source = {
        "path": str(c.path),
        "framework": framework_of(c.layout.variant.name),
        "layout": c.layout.variant.name,
        "describe": c.layout.variant.describe,
    }
    output = {
        "path": str(dst),
        "framework": plan.target.name,
        "layout": plan.layout.variant.name,
        "describe": plan.layout.variant.describe,
        "dtype": dtype_label(plan.slots),
        "dtypes": dtype_counts(plan.slots),
        "bytes": plan.files.nbytes + sum(map(len, plan.extra.values())),
        "files": [{"name": f.name, "bytes": f.size} for f in plan.files.files]
        + [{"name": n, "bytes": len(b)} for n, b in plan.extra.items()],
    }
    return source, output


def _warnings(plan: Conversion) -> list[str]:
    return [str(w) for w in plan.checkpoint.reading.warnings]


def plan_report(plan: Conversion, dst: Path) -> Report:
    """The report of a dry run."""
    source, output = _describe(plan, dst)
    at = dst.absolute().parent
    while not at.exists():
        at = at.parent
    largest = max((t.tensor.nbytes for t in plan.tasks if not _streams(t)), default=0)
    moved = 2 * plan.nbytes + output["bytes"]
    return {
        "dry_run": True,
        "source": source,
        "output": output,
        "embedding": plan.embedding,
        "lossy_steps": sorted(
            {str(t.placement.step) if t.step else f"to {t.dtype}" for t in plan.tasks if t.changes}
            | ({"dequantize"} if plan.checkpoint.quantized else set())
        ),
        "resources": {
            "free_bytes": shutil.disk_usage(at).free,
            "peak_bytes": digest.WORKERS * 3 * largest + (448 << 20),
            "seconds": [round(moved / 1.5e9, 1), round(moved / 0.3e9, 1)],
        },
        "notes": plan.notes,
        "warnings": _warnings(plan),
    }


def _streams(task: Task) -> bool:
    return task.tensor.streams_rows and task.placement.reorder.is_identity


def result_report(
    plan: Conversion,
    dst: Path,
    records: Mapping[str, TaskRecord],
    files: Mapping[str, FileEntry],
    resumed: int,
    checked: int,
    began: float,
) -> Report:
    """The report of a conversion that was carried out."""
    source, output = _describe(plan, dst)
    source["fingerprint"] = _source_root(records)
    output["fingerprint"] = digest.root(_entries(records, "output"))
    sizes = {t.tensor.name: t.tensor.nbytes // t.tensor.dtype.itemsize for t in plan.tasks}
    lossy = [
        {
            "step": s.name,
            "tensors": len(s.counts),
            "elements": sum(sizes.get(n, s.counts[n]) for n in s.counts),
            "changed": sum(s.counts.values()),
        }
        for s in _lossy(plan, records)
    ]
    bad = {n: r.nonfinite for n, r in records.items() if r.nonfinite}
    warnings = _warnings(plan)
    warnings += [
        f"{n}: {k} element{' is' if k == 1 else 's are'} NaN or infinite; carried over as "
        f"{'it is' if k == 1 else 'they are'}"
        for n, k in bad.items()
    ]
    return {
        "source": source,
        "output": output,
        "embedding": plan.embedding,
        "lossy": lossy,
        "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in sorted(files.items())},
        "checked_tensors": checked,
        "resumed_tensors": resumed,
        "notes": plan.notes,
        "warnings": warnings,
        "timing": {"total": round(time.monotonic() - began, 3)},
    }
