"""Carrying a plan out: weights moved into the staged output, read back, and put in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats.errors import ParityError, ResumeError
from ..formats.manifest import FileEntry
from ..formats.output import Output
from . import digest
from .conversion_report import manifest_of
from .open import Checkpoint, open_checkpoint
from .plan import Conversion, plan_hash_inputs
from .progress import Progress
from .stream import TaskRecord, run_tasks


def output_of(plan: Conversion, dst: Path, resume: bool, overwrite: bool) -> Output:
    """The transaction that a plan is written in."""
    checkpoint = plan.checkpoint
    files = checkpoint.source.files
    identity = {"source": _source_identity(checkpoint), "tool": __version__}
    return Output(
        dst,
        plan.files,
        plan.slots,
        plan_hash_inputs(plan, identity),
        overwrite=overwrite,
        resume=resume,
        sources=(checkpoint.path, *files) if files else (),
        single_file=plan.single_file,
        extra=plan.extra,
    )


def execute(
    plan: Conversion, dst: Path, check: bool, resume: bool, overwrite: bool, meter: Progress
) -> tuple[dict[str, TaskRecord], dict[str, FileEntry], int, int]:
    """Move everything; records of tensors, files, how many were resumed and how many read back."""
    checkpoint = plan.checkpoint

    with output_of(plan, dst, resume, overwrite) as out:
        checkpoint.source.scratch = out.partial
        state = _state_of_files(checkpoint)
        _require_same_source(plan, out.done, state)

        def complete(name: str, record: Mapping[str, Any]) -> None:
            out.complete(name, {**record, "state": state})

        meter.start(plan.nbytes, "converting")
        moved = run_tasks(plan.in_file_order, out.write, complete, out.done, meter)
        records = {t.tensor.name: moved[t.tensor.name] for t in plan.tasks}
        checkpoint.source.check_unchanged()
        checked = 0
        if check:
            meter.start(plan.nbytes, "checking")
            checked = _check_written(plan, out.seal(), records, meter)
        manifest = out.finish(manifest_of(plan, records))
        plan.notes += out.notes
        return records, dict(manifest.files), len(out.done), checked


def _state_of_files(checkpoint: Checkpoint) -> str:
    """Differs wherever a file of the source may have been written or replaced, whatever was done to its times."""
    stats = [(f.name, f.stat()) for f in checkpoint.source.files]
    kept = [(n, st.st_dev, st.st_ino, st.st_mtime_ns, st.st_ctime_ns) for n, st in stats]
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]


def _source_identity(checkpoint: Checkpoint) -> str:
    """Names, shapes, dtypes and file sizes of the source; its bytes are compared where the files may have changed."""
    h = hashlib.sha256()
    for t in checkpoint.source.tensors.values():
        h.update(repr((t.name, t.stored, t.shape)).encode())
    for f in checkpoint.source.files:
        h.update(repr((f.name, f.stat().st_size)).encode())
    return h.hexdigest()


def _require_same_source(
    plan: Conversion, done: Mapping[str, Mapping[str, Any]], state: str
) -> None:
    """Where the source's files may have changed since the interrupted run, hash again what was taken from them."""
    for task in plan.tasks:
        record = done.get(task.tensor.name)
        if record is None or record.get("state") == state:
            continue
        then = TaskRecord.from_json(record)
        dropped = digest.digest(task.dropped) if task.dropped is not None else None
        if (digest.digest(task.tensor), dropped) != (then.source, then.dropped):
            raise ResumeError(
                "the source changed since the run that is to be continued.",
                where=plan.checkpoint.path,
                tensor=task.tensor.name,
                fix="start afresh with --no-resume.",
            )


def _check_written(
    plan: Conversion, staged: Path, records: Mapping[str, TaskRecord], meter: Progress
) -> int:
    """Read every tensor back through the output format's own reader and compare hashes."""
    with open_checkpoint(
        staged,
        config=plan.checkpoint.config,
        container=plan.target.container,
        gating=plan.layout.variant.gating,
        staged=True,
    ) as back:
        back.source.scratch = plan.checkpoint.source.scratch
        found = digest.digests(back, meter)
        wrong = [
            f"{name}: {found[name].dtype} {found[name].sha256[:16]}, expected {r.output.dtype} {r.output.sha256[:16]}"
            for name, r in records.items()
            if found.get(name) != r.output
        ]
    if wrong:
        raise ParityError(
            f"{len(wrong)} of {len(records)} tensors read back differently: {'; '.join(wrong[:3])}.",
            where=staged,
            fix="the disk or memory may be faulty, or this is a bug in g2kit; nothing was put at the destination.",
        )
    return len(records)
