"""The library calls behind the commands: convert, inspect, fingerprint, check, sample. Plain data out."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..formats import manifest as manifests
from ..formats.errors import (
    ChecksumError,
    FormatError,
    NotFoundError,
    ParityError,
    ResumeError,
    UnknownConfigError,
    UsageError,
    printable,
)
from ..formats.manifest import FileEntry, LossyStep, Manifest, TensorEntry
from ..formats.names import listing
from ..formats.output import Output
from ..formats.sharded import parse_size
from ..model import canonical
from ..model.config import GemmaConfig
from ..model.config_formats import to_plain
from . import digest, unconfigured
from .contents import contents
from .open import Checkpoint, open_checkpoint
from .plan import (
    Conversion,
    Options,
    Task,
    dtype_counts,
    dtype_label,
    plan_conversion,
    plan_hash_inputs,
)
from .stream import TaskRecord, run_tasks
from .targets import SOURCES, TARGETS, framework_of

Report = dict[str, Any]


class Progress(Protocol):
    """What a caller may pass to watch long work; :class:`g2kit.terminal.Meter` is one."""

    def start(self, total: int, what: str) -> None:
        """A phase of ``total`` bytes begins."""

    def __call__(self, nbytes: int, name: str) -> None:
        """``nbytes`` more are done, of tensor ``name``."""


class _Silent:
    def start(self, total: int, what: str) -> None:
        pass

    def __call__(self, nbytes: int, name: str) -> None:
        pass


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    source: str | None = None,
    layout: str | None = None,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    dtype: str = "keep",
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    check: str = "weights",
    drop_padding: bool = False,
    fold_query_scale: bool = False,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint at ``src`` to ``dst``.

    Args:
        src: any supported checkpoint; left untouched.
        dst: directory to make, or a single file where the suffix says so (``.gguf``, ``.ckpt``, ``.safetensors``…).
        to: ``flax``, ``torch``, ``safetensors``, ``gguf``, ``maxtext`` or ``keras``.
        source: framework the source must be, or None for any.
        layout: layout of the target; None for its usual one.
        config: preset name, config.json or GemmaConfig, for checkpoints that carry none.
        fix_config: correct hyper-parameters known to be wrong in published files.
        gating: ``df`` or ``fd``; see :func:`g2kit.convert.open_checkpoint`.
        dtype: ``keep``, ``bf16``, ``f16`` or ``f32``.
        max_shard_size: bytes of weights per file, as a number or as in ``"5GB"``; None for one file.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        check: ``weights`` re-opens the output and compares every tensor's hash; ``none`` does not.
        drop_padding: leave out embedding rows past vocab_size though they are not all zero.
        fold_query_scale: GGUF: scale the query projection for llama.cpp although that rounds.
        dry_run: plan only; write nothing.
        resume: continue an interrupted run of the same conversion; False starts afresh.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Returns:
        A report: source, output, fingerprints, lossy steps with counts, notes, timing. JSON-ready.

    Raises:
        G2Error: any subclass; ``dst`` is untouched. See :mod:`g2kit.formats.errors`.
    """
    src, dst = Path(src), Path(dst)
    if to not in TARGETS:
        raise UsageError(f"{to!r} is not a framework.", fix=f"use one of {', '.join(TARGETS)}.")
    if check not in ("weights", "none"):
        raise UsageError(f"check must be weights or none, not {check!r}.")
    if dtype not in ("keep", "bf16", "f16", "f32"):
        raise UsageError(f"dtype must be keep, bf16, f16 or f32, not {dtype!r}.")
    if source is not None and source not in TARGETS:
        raise UsageError(f"{source!r} is not a framework.", fix=f"use one of {', '.join(TARGETS)}.")
    if gating not in (None, "df", "fd"):
        raise UsageError(f"gating must be df or fd, not {gating!r}.")
    options = Options(
        to, layout, dtype, _size(max_shard_size), gating, drop_padding, fold_query_scale,
        None if tokenizer is None else str(tokenizer),
    )  # fmt: skip
    with _open(src, source, config, gating, fix_config) as checkpoint:
        return convert_checkpoint(
            checkpoint, dst, options, check=check == "weights", dry_run=dry_run, resume=resume,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip


def _size(given: int | str | None) -> int | None:
    if isinstance(given, str):
        return parse_size(given)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise UsageError(
            f"max_shard_size must be a whole number of bytes, found {given!r}.",
            fix='pass a number such as 5_000_000_000, or a text such as "5GB".',
        )
    return given


def convert_checkpoint(
    checkpoint: Checkpoint,
    dst: Path,
    options: Options,
    *,
    check: bool = True,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """:func:`convert` for a checkpoint that is open already, or that exists in memory only."""
    began = time.monotonic()
    plan = plan_conversion(checkpoint, dst, options)
    if dry_run:
        _output(plan, dst, resume, overwrite).preflight()
        return _plan_report(plan, dst)
    meter = progress or _Silent()
    records, files, resumed, checked = _execute(plan, dst, check, resume, overwrite, meter)
    return _result_report(plan, dst, records, files, resumed, checked, began)


def _open(
    path: Path,
    source: str | None,
    config: str | Path | GemmaConfig | None,
    gating: str | None,
    fix_config: bool,
) -> Checkpoint:
    container = TARGETS[source].container if source else None
    checkpoint = open_checkpoint(
        path, config=config, container=container, gating=gating, fix_config=fix_config
    )
    found = framework_of(checkpoint.layout.variant.name)
    if source is not None and checkpoint.layout.variant.name not in SOURCES[source]:
        checkpoint.close()
        raise UsageError(
            f"the source is {found} ({checkpoint.layout.variant.describe}), the command says {source}.",
            where=path,
            fix=f"use `g2conv {found}-to-…`, or `g2conv convert SRC DST --to …` for any source.",
        )
    return checkpoint


def _output(plan: Conversion, dst: Path, resume: bool, overwrite: bool) -> Output:
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


def _execute(
    plan: Conversion, dst: Path, check: bool, resume: bool, overwrite: bool, meter: Progress
) -> tuple[dict[str, TaskRecord], dict[str, FileEntry], int, int]:
    checkpoint = plan.checkpoint

    with _output(plan, dst, resume, overwrite) as out:
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
        manifest = out.finish(_manifest(plan, records))
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


def _manifest(plan: Conversion, records: Mapping[str, TaskRecord]) -> Manifest:
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


def _plan_report(plan: Conversion, dst: Path) -> Report:
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


def _result_report(
    plan: Conversion,
    dst: Path,
    records: Mapping[str, TaskRecord],
    files: Mapping[str, FileEntry],
    resumed: int,
    checked: int,
    began: float,
) -> Report:
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
    meter = progress or _Silent()
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


def check(
    dst: str | Path,
    *,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare an output of g2conv with its manifest: every file's bytes and every tensor as read.

    Raises:
        ChecksumError: lists what differs.
        FormatError: there is no manifest.
        NotFoundError: there is nothing at that path.
        UsageError: the path is a part of an output; its manifest speaks of the whole.
    """
    dst = Path(dst)
    meter = progress or _Silent()
    at = _manifest_of(dst)
    expected = manifests.load(at)
    meter.start(sum(f.size for f in expected.files.values()), "hashing files")
    surplus = manifests.check_files(dst, expected, lambda n: meter(n, "files"))
    notes = [f"not in the manifest, so not checked: {listing(surplus)}"] if surplus else []
    if not dst.is_dir() and dst.name not in expected.files:
        notes.append(f"renamed: the manifest calls it {printable(next(iter(expected.files), '?'))}")
    with open_checkpoint(
        dst, config=config, container=expected.format, gating=gating, fix_config=fix_config
    ) as c:
        meter.start(sum(t.nbytes for t in c.tensors.values()), "hashing tensors")
        found = digest.counting(digest.digests(c, meter))
    wrong = [
        n for n in expected.tensors.keys() | found.keys() if found.get(n) != expected.tensors.get(n)
    ]
    if wrong:
        raise ChecksumError(
            f"{len(wrong)} tensors differ from the manifest: {digest.names_of(sorted(wrong))}.",
            where=dst,
            fix="convert it again.",
        )
    return {
        "path": str(dst),
        "files": len(expected.files),
        "tensors": len(found),
        "fingerprint": expected.fingerprint,
        "notes": notes,
    }


def _orphans(directory: Path) -> list[str]:
    """Manifests of single files that are not there any more under their names."""
    suffix = f".{manifests.NAME}"
    found = directory.glob(f"*{suffix}")
    return sorted(p.name for p in found if not p.with_name(p.name.removesuffix(suffix)).exists())


def _manifest_of(dst: Path) -> Path:
    """The manifest of an output, or an error that says where to look instead."""
    at = manifests.path_for(dst)
    if not dst.exists():
        raise NotFoundError(
            "no such file or directory.", where=dst, fix="pass an output of g2conv."
        )
    if at.is_file():
        return at
    if (above := manifests.covering(dst)) is not None:
        raise UsageError(
            f"this is a part of an output; the manifest in {printable(str(above.parent))} covers all of it.",
            where=dst,
            fix=f"run `g2conv check {printable(str(above.parent))}`.",
        )
    fix = "compare two checkpoints with `g2conv fingerprint` instead."
    if dst.is_file() and (beside := _orphans(dst.parent)):
        fix = f"if the file was renamed, rename its manifest ({listing(beside)}) to {at.name}; else {fix}"
    raise FormatError("there is no g2kit manifest, so nothing to compare with.", where=at, fix=fix)


def sample(
    directory: str | Path,
    *,
    to: str = "safetensors",
    layout: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the bundled model, a small trained Gemma 2, in any format."""
    from ..model.sample import sample_dir

    return convert(
        sample_dir(), directory, to=to, layout=layout, overwrite=overwrite, progress=progress
    )
