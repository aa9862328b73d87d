"""Quantized weights -> a checkpoint that a real program loads, in one transaction, read back and compared code for code.

Everything that is not quantized comes from the checkpoint through the converter's own plan: names, shapes, tokenizer,
config.json, padding rows. One tensor is in memory per worker, the embedding in blocks of rows.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..convert import digest
from ..convert.open import Checkpoint, open_checkpoint
from ..convert.plan import Options, Task, dtype_label, plan_conversion
from ..convert.progress import Progress, Report, Silent
from ..convert.stream import TaskRecord, run_task
from ..formats.base import Array, ContainerPlan, Slot, iter_row_blocks
from ..formats.dtypes import F32
from ..formats.errors import G2Error, ParityError, UsageError
from ..formats.fingerprint import TensorHasher
from ..formats.manifest import LossyStep, Manifest, TensorEntry
from ..formats.names import listing
from ..formats.output import Output
from ..formats.packed.table import FORMATS
from ..formats.packed.uniform import Grid
from ..model import canonical
from ..model.config_formats import to_plain
from .export_plan import (
    Value,
    effective,
    embedding_scheme,
    grids_of,
    require_same_source,
    schemes_of,
)
from .export_targets import TARGETS, Target, caveats, target_of
from .grid import plain_grid, quantize_to
from .rows import Rows, read_rows
from .scheme import Codes, Scheme

_BLOCK = 16 << 20  # bytes of float32
Codebook = Mapping[str, Value]


@dataclass(frozen=True)
class _Record:
    """One quantized tensor, written: digests of what was and what is, and elements that changed."""

    source: TensorEntry
    output: TensorEntry
    changed: int
    dropped: TensorEntry | None = None


def export(
    codes: Codebook,
    checkpoint: Checkpoint,
    dst: str | Path,
    format: str = "compressed-tensors",
    *,
    dtype: str = "keep",
    max_shard_size: int | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    notes: list[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a quantized checkpoint.

    Args:
        codes: canonical name -> :class:`Codes`, or a float tensor that takes the place of the checkpoint's (tuned norm
            gains). May be lazy; one with ``scheme_of(name)`` is asked that before values are read.
        checkpoint: what was quantized; gives everything that ``codes`` does not.
        dst: directory to make (one file where ``format`` has such and the suffix says so).
        format: one of :data:`.export_targets.TARGETS`.
        dtype: of the tensors that are not quantized: ``keep``, ``bf16``, ``f16`` or ``f32``.
        max_shard_size: bytes of weights per file, or None for one file.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        overwrite: replace ``dst`` once the new copy is complete.
        notes: findings to keep in the manifest.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: format, bytes, bits per weight, tensors, schemes, fingerprints, files, notes.

    Raises:
        UsageError: the format cannot hold a scheme (names those that can), or names that the model does not have.
        LossyError: it cannot hold the values of a scale or zero.
        ParityError: what was written reads back differently; nothing is at ``dst``.
        G2Error: as :func:`g2kit.convert.convert`.
    """
    target = target_of(format)
    job = _Export(codes, checkpoint, Path(dst), target, dtype, max_shard_size, tokenizer)
    job.notes += notes or []
    return job.run(overwrite, progress or Silent())


def require_format(
    format: str, schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> dict[str, Grid]:
    """What :func:`export` would refuse, before anything is quantized.

    Args:
        format: as :func:`export`.
        schemes: canonical name -> scheme.
        checkpoint: gives the shapes.

    Raises:
        UsageError: the format cannot hold a scheme; names those that can.
    """
    return grids_of(target_of(format), schemes, checkpoint)


def planned_bytes(
    codes: Codebook, checkpoint: Checkpoint, dst: Path, format: str, *, dtype: str = "keep",
    max_shard_size: int | None = None, tokenizer: str | None = None,
) -> int:  # fmt: skip
    """Bytes of the files of weights that :func:`export` would write; ``codes`` need to know ``scheme_of`` only."""
    job = _Export(codes, checkpoint, dst, target_of(format), dtype, max_shard_size, tokenizer)
    return sum(f.size for f in job.files.files)


class _Export:
    """One export, planned by its constructor."""

    def __init__(
        self,
        codes: Codebook,
        checkpoint: Checkpoint,
        dst: Path,
        target: Target,
        dtype: str,
        max_shard_size: int | None,
        tokenizer: str | None,
    ) -> None:
        self.codes, self.checkpoint, self.dst, self.target = codes, checkpoint, dst, target
        self.packed = FORMATS[target.name]
        given = schemes_of(codes, checkpoint)
        self.schemes = given | embedding_scheme(target, given, checkpoint)
        self.made = self.schemes.keys() - given.keys()  # quantized here, plainly
        self.grids = grids_of(target, self.schemes, checkpoint)
        changed, rounded = effective(codes, self.schemes, checkpoint)
        options = Options(
            target.framework, target.layout, dtype, max_shard_size, tokenizer=tokenizer
        )
        self.plan = plan_conversion(changed, dst, options)
        self.notes = [*self.plan.notes, *rounded, *caveats(target, self.schemes)]
        if self.made:
            self.notes.append("the embedding is stored as int8, rounded to nearest row by row")
        self.packed_slots: list[Slot] = []
        self.slots = self._slots()
        self.files = self._files()
        self.extra = self._extra()

    # ---- planning

    def _quantized_row(self, parts: list[str]) -> bool:
        return any(name in self.schemes for name in parts)

    def _slots(self) -> list[Slot]:
        planned = {s.name: s for s in self.plan.slots}
        slots = []
        for row in self.plan.layout.rows.values():
            parts = [p.canonical for p in row.parts]
            if not self._quantized_row(parts):
                slots.append(planned[row.name])
                continue
            grid = replace(self.grids[parts[0]], out_features=row.shape[0])
            prefix = row.name.removesuffix(".weight")
            made = [
                Slot(prefix + suffix, dtype, shape)
                for suffix, (dtype, shape) in self.packed.layout(grid).items()
            ]
            slots += made
            self.packed_slots += made
        return slots

    def _files(self) -> ContainerPlan:
        return self.target.plan(self.slots, self.plan.options.max_shard_size, self.plan.single_file)

    def _extra(self) -> dict[str, bytes]:
        extra = dict(self.plan.extra)
        modules = {n.removesuffix(".weight"): s for n, s in self.schemes.items()}
        dense = [
            n.removesuffix(".weight")
            for n in canonical.linears(self.checkpoint.tensors)
            if n not in self.schemes
        ]
        settings = self.target.settings(modules, dense)
        if settings:
            config = json.loads(extra["config.json"]) | settings
            extra["config.json"] = _json(config)
        for name in self.target.repeated_in:
            extra[name] = _json(settings["quantization_config"])
        return extra

    # ---- running

    def run(self, overwrite: bool, meter: Progress) -> Report:
        files = self.checkpoint.source.files
        identity = {"the export's version": __version__, "--format": self.target.name}
        with Output(
            self.dst,
            self.files,
            self.slots,
            identity,
            overwrite=overwrite,
            resume=False,  # codes may differ from those of the interrupted run
            sources=(self.checkpoint.path, *files) if files else (),
            single_file=self.plan.single_file,
            extra=self.extra,
        ) as out:
            self.checkpoint.source.scratch = out.partial
            meter.start(self.plan.nbytes, "writing")
            dense, packed = self._write(out, meter)
            self.checkpoint.source.check_unchanged()
            meter.start(self.plan.nbytes, "checking")
            self._check(out.seal(), dense, packed, meter)
            manifest = out.finish(self._manifest(dense, packed))
            self.notes += out.notes  # of this run: the manifest is the same after an interruption
        return self._report(manifest, packed)

    def _write(
        self, out: Output, meter: Progress
    ) -> tuple[dict[str, TaskRecord], dict[str, _Record]]:
        dense: dict[str, TaskRecord] = {}
        packed: dict[str, _Record] = {}

        def job(task: Task) -> Callable[[], None]:
            def run() -> None:
                name = task.tensor.name
                if name in self.schemes:
                    packed[name] = self._write_packed(task, out, meter)
                else:
                    dense[name] = run_task(task, out.write, meter)

            return run

        jobs = {t.tensor.name: job(t) for t in self.plan.tasks}
        digest.run_all(jobs, digest.WORKERS, threading.Event())
        return dense, packed

    def _pieces(self, name: str) -> Iterator[tuple[int, Codes]]:
        """``(first row, codes)`` of a weight; the embedding that is quantized here comes in blocks."""
        if name not in self.made:
            value = self.codes[name]
            assert isinstance(value, Codes)
            yield 0, value
            return
        tensor, scheme = self.checkpoint.tensors[name], self.schemes[name]
        for start, stop in iter_row_blocks(tensor.shape, 4, _BLOCK):
            rows = torch.from_numpy(tensor.read_rows(start, stop).astype(np.float32))
            scales, zeros = plain_grid(rows, scheme)
            yield start, Codes(scheme, quantize_to(rows, scales, zeros, scheme), scales, zeros)

    def _write_packed(self, task: Task, out: Output, meter: Progress) -> _Record:
        name = task.tensor.name
        tensor = self.checkpoint.tensors[name]
        prefix = task.row.name.removesuffix(".weight")
        before = TensorHasher(name, tensor.dtype, tensor.shape)
        after = TensorHasher(name, F32, tensor.shape)
        whole = None if tensor.streams_rows else tensor.read()
        changed = 0
        for first, codes in self._pieces(name):
            _require_sound(name, codes)
            for suffix, array in self._arrays(name, codes).items():
                at = (task.placement.start[0] + first, *(0,) * (array.ndim - 1))
                out.write(
                    prefix + suffix, at if array.ndim and suffix != ".weight_shape" else (0,), array
                )
            for a, b in iter_row_blocks(tuple(codes.codes.shape), 4, _BLOCK):
                rows = (first + a, first + b)
                x = tensor.read_rows(*rows) if whole is None else whole[slice(*rows)]
                y = _dequantized(codes, a, b)
                before.update(np.ascontiguousarray(x))
                after.update(y)
                changed += int(np.count_nonzero(x.astype(np.float32) != y))
                meter(x.nbytes, name)
        dropped = digest.digest(task.dropped) if task.dropped is not None else None
        if dropped is not None and task.refusal is not None and not digest.is_zero(dropped):
            raise task.refusal
        return _Record(digest.entry(before), digest.entry(after), changed, dropped)

    def _arrays(self, name: str, codes: Codes) -> dict[str, Array]:
        grid = replace(self.grids[name], out_features=codes.codes.shape[0])
        zeros = None if codes.zeros is None else codes.zeros.numpy()
        try:
            return self.packed.pack(grid, codes.codes.numpy(), codes.scales.numpy(), zeros)
        except G2Error as e:
            e.tensor = e.tensor or name
            raise

    # ---- checking

    def _check(
        self,
        staged: Path,
        dense: Mapping[str, TaskRecord],
        packed: Mapping[str, _Record],
        meter: Progress,
    ) -> None:
        """Open what was written with the format's own reader; codes, scales and every other tensor must be equal."""
        with open_checkpoint(
            staged, config=self.checkpoint.config, container=self.plan.target.container, staged=True
        ) as back:
            found = digest.digests(back, meter)
            records: dict[str, TaskRecord | _Record] = {**dense, **packed}
            wanted = {n: r.output for n, r in records.items()}
            wrong = [n for n, entry in wanted.items() if found.get(n) != entry]
            if set(back.quantized) != set(self.schemes):
                wrong += sorted(set(back.quantized) ^ set(self.schemes))
            wrong += [n for n in self.schemes if n not in wrong and not self._same_codes(n, back)]
        if wrong:
            raise ParityError(
                f"{len(wrong)} of {len(wanted)} tensors read back differently: {listing(wrong, 3)}.",
                where=staged,
                fix="the disk or memory may be faulty, or this is a bug in g2kit; nothing was put at the destination.",
            )

    def _same_codes(self, name: str, back: Checkpoint) -> bool:
        for first, codes in self._pieces(name):
            for a, b in iter_row_blocks(tuple(codes.codes.shape), 1, _BLOCK):
                if not Rows.of(codes, a, b).same(
                    read_rows(back.tensors[name], first + a, first + b)
                ):
                    return False
        return True

    # ---- telling

    def _manifest(self, dense: Mapping[str, TaskRecord], packed: Mapping[str, _Record]) -> Manifest:
        records: dict[str, TaskRecord | _Record] = {**dense, **packed}
        source: dict[str, TensorEntry] = {n: r.source for n, r in records.items()}
        for name in self.codes.keys() - self.schemes.keys():
            source[name] = digest.digest(self.checkpoint.tensors[name])
        if (dropped := records[canonical.EMBED].dropped) is not None:
            source[canonical.EMBED_PADDING] = dropped
        require_same_source(self.codes, digest.root(source), self.checkpoint)
        steps: dict[str, dict[str, int]] = {}
        for name, record in packed.items():
            steps.setdefault(f"quantize {self.schemes[name]}", {})[name] = record.changed
        for task in self.plan.tasks:
            name = task.tensor.name
            if name in dense and task.changes:
                steps.setdefault(f"to {task.dtype}", {})[name] = dense[name].changed
        for name in self.codes.keys() - self.schemes.keys():
            same = source[name].sha256 == dense[name].output.sha256
            steps.setdefault("tune", {})[name] = 0 if same else int(np.prod(source[name].shape))
        return Manifest(
            tool_version=__version__,
            format=self.plan.target.container,
            layout=self.plan.layout.variant.name,
            dtype=dtype_label(self.slots),
            source_fingerprint=digest.root(source),
            tensors=digest.counting({n: r.output for n, r in records.items()}),
            files={},  # the output knows them
            lossy=tuple(LossyStep(name, counts) for name, counts in sorted(steps.items())),
            padding_rows={},
            notes=tuple(self.notes),
            config=to_plain(self.checkpoint.config),
        )

    def _report(self, manifest: Manifest, packed: Mapping[str, _Record]) -> Report:
        nbytes = sum(s.nbytes for s in self.packed_slots)
        weights = sum(g.out_features * g.in_features for g in self.grids.values())
        return {
            "path": str(self.dst),
            "format": self.target.name,
            "container": self.plan.target.container,
            "readers": self.target.readers,
            "bytes": sum(f.size for f in manifest.files.values()),
            "packed_bytes": nbytes,
            "bits_per_weight": 8 * nbytes / weights,
            "quantized": len(packed),
            "schemes": dict(Counter(str(s) for s in self.schemes.values())),
            "source_fingerprint": manifest.source_fingerprint,
            "fingerprint": manifest.fingerprint,
            "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in manifest.files.items()},
            "notes": self.notes,
        }


def _dequantized(codes: Codes, start: int, stop: int) -> Array:
    zeros = None if codes.zeros is None else codes.zeros[start:stop]
    rows = Codes(codes.scheme, codes.codes[start:stop], codes.scales[start:stop], zeros)
    return np.asarray(rows.dequantize().numpy() + np.float32(0))  # -0 is 0, as readers have it


def _require_sound(name: str, codes: Codes) -> None:
    """Codes that do not fit their bits would run into their neighbours' when packed."""
    top = int(codes.codes.max())
    high = 0 if codes.zeros is None else int(codes.zeros.max())
    if max(top, high) >= codes.scheme.levels:
        raise UsageError(
            f"code or zero {max(top, high)} in {codes.scheme}, whose largest is {codes.scheme.levels - 1}.",
            tensor=name,
        )
    bad = ~torch.isfinite(codes.scales) | (codes.scales == 0)
    if bool(bad.any()):
        raise UsageError(
            f"{int(bad.sum())} of {bad.numel()} scales are zero or not finite.", tensor=name
        )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n"


__all__ = ["TARGETS", "export", "require_format"]
