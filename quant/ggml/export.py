"""Blocks -> a GGUF file that llama.cpp loads, in one transaction, read back and compared byte for byte.

Everything that is not in blocks comes from the checkpoint through the converter's own plan: names, norms, tokenizer,
key-values.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ... import __version__
from ...convert import digest
from ...convert.open import Checkpoint, open_checkpoint
from ...convert.plan import Options, Task, plan_conversion
from ...convert.progress import Progress, Report, Silent
from ...convert.stream import TaskRecord, run_task
from ...convert.targets import TARGETS, PlanRequest
from ...formats.base import Array, ContainerPlan, Slot, iter_row_blocks
from ...formats.dtypes import F32
from ...formats.errors import LossyError, NonFiniteError, ParityError, ShapeError, UsageError
from ...formats.fingerprint import TensorHasher
from ...formats.gguf import BlockSlot
from ...formats.manifest import LossyStep, Manifest, TensorEntry
from ...formats.names import listing
from ...formats.output import Output
from ...formats.packed.ggml_blocks import GgmlBlocks
from ...model import canonical
from ...model.config_formats import to_plain
from ..export_plan import effective, require_same_source
from . import layout
from .encode import Blocks, encode
from .mixes import Mix, mix_of, tensor_types
from .types import FORMATS, BlockFormat, block_format, to_half

_BLOCK = 16 << 20  # bytes of float32
_U8 = np.dtype(np.uint8)
Value = Blocks | Tensor


@dataclass(frozen=True)
class _Record:
    source: TensorEntry
    output: TensorEntry
    changed: int


def require_mix(mix: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Canonical name -> block type that :func:`export_gguf` expects for a preset.

    Raises:
        UsageError: no such preset, or it does not fit the model; names those that do.
    """
    c = checkpoint.config
    shapes = {n: t.shape for n, t in checkpoint.tensors.items() if n != canonical.EMBED_PADDING}
    return tensor_types(
        mix_of(mix), shapes, heads_per_kv=c.num_attention_heads // c.num_key_value_heads
    )


def export_gguf(
    blocks: Mapping[str, Value],
    checkpoint: Checkpoint,
    dst: str | Path,
    mix: str,
    *,
    dtype: str = "keep",
    embedding: str | None = "mix",
    tokenizer: str | None = None,
    overwrite: bool = False,
    notes: list[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a GGUF file.

    Args:
        blocks: canonical name -> :class:`Blocks`, or a float tensor that takes the place of the checkpoint's (tuned norm
            gains). May be lazy; one with ``type_of(name)`` (block type or None) is asked that before values are read.
        checkpoint: what was quantized; gives everything else.
        dst: the file (``.gguf``), or a directory to make.
        mix: the preset, which says the file's type and what an embedding not among ``blocks`` becomes. Other types than
            the preset's are kept as they are given.
        dtype: of matrices that are in no blocks: ``keep``, ``bf16``, ``f16`` or ``f32``.
        embedding: block type of an embedding that is not among ``blocks``: ``mix`` for the preset's, None to leave it in
            floats.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        overwrite: replace ``dst`` once the new copy is complete.
        notes: findings to keep in the manifest.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: format, bytes, bits per weight, types, fingerprints, files, notes.

    Raises:
        UsageError: names the model does not have, or nothing is quantized.
        ShapeError: blocks of another shape than the model's tensor.
        LossyError: llama.cpp wants the query projection scaled by what its blocks cannot take exactly.
        ParityError: what was written reads back differently; nothing is at ``dst``.
    """
    job = _Export(blocks, checkpoint, Path(dst), mix_of(mix), dtype, embedding, tokenizer)
    job.notes += notes or []
    return job.run(overwrite, progress or Silent())


def planned_bytes(
    blocks: Mapping[str, Value], checkpoint: Checkpoint, dst: Path, mix: str, *, dtype: str = "keep",
    tokenizer: str | None = None,
) -> int:  # fmt: skip
    """Bytes of the file that :func:`export_gguf` would write; ``blocks`` need to know ``type_of`` only."""
    job = _Export(blocks, checkpoint, dst, mix_of(mix), dtype, "mix", tokenizer)
    return sum(f.size for f in job.files.files)


class _Export:
    def __init__(
        self, blocks: Mapping[str, Value], checkpoint: Checkpoint, dst: Path, mix: Mix, dtype: str,
        embedding: str | None, tokenizer: str | None,
    ) -> None:  # fmt: skip
        self.blocks, self.checkpoint, self.dst, self.mix = blocks, checkpoint, dst, mix
        self.types = _types(blocks, checkpoint)
        self.made = _embedding(mix, embedding, self.types, checkpoint)
        self.types |= self.made
        self.floats = {n: _float(blocks[n]) for n in blocks if n not in self.types}
        shown, rounded = effective(self.floats, {}, _dequantizable(checkpoint, self.types))
        self.plan = plan_conversion(shown, dst, Options("gguf", dtype=dtype, tokenizer=tokenizer))
        self.notes = [*self.plan.notes, *rounded]
        if self.made:
            self.notes.append(
                f"the embedding is stored as {self.made[canonical.EMBED].name}, without importance"
            )
        self.tasks = [
            _norms_as_read(t) if canonical.EMBED in self.types else t for t in self.plan.tasks
        ]
        self.slots = self._slots()
        self.files = self._files()

    def _slots(self) -> list[Slot]:
        rows = {t.row.name: t.tensor.name for t in self.tasks}
        slots: list[Slot] = []
        for slot in self.plan.slots:
            f = self.types.get(rows[slot.name])
            if f is None:
                slots.append(slot)
                continue
            out, width = slot.shape
            slots.append(
                BlockSlot(slot.name, _U8, (out, f.row_bytes(width)), f.code, f.weights, f.nbytes)
            )
        return slots

    def _files(self) -> ContainerPlan:
        kv = [
            (k, t, self.mix.file_type if k == "general.file_type" else v)
            for k, t, v in self.plan.kv
        ]
        request = PlanRequest(self.plan.layout, self.slots, None, self.plan.single_file, kv)
        return TARGETS["gguf"].plan(request)

    def run(self, overwrite: bool, meter: Progress) -> Report:
        files = self.checkpoint.source.files
        identity = {"the export's version": __version__, "--format": f"gguf-{self.mix.name}"}
        with Output(
            self.dst, self.files, self.slots, identity, overwrite=overwrite, resume=False,
            sources=(self.checkpoint.path, *files) if files else (), single_file=self.plan.single_file,
            extra=self.plan.extra,
        ) as out:  # fmt: skip
            self.checkpoint.source.scratch = out.partial
            meter.start(self.plan.nbytes, "writing")
            records = self._write(out, meter)
            self.checkpoint.source.check_unchanged()
            meter.start(self.plan.nbytes, "checking")
            self._check(out.seal(), records, meter)
            manifest = out.finish(self._manifest(records))
            self.notes += out.notes  # of this run: the manifest is the same after an interruption
        return self._report(manifest)

    def _write(self, out: Output, meter: Progress) -> dict[str, TaskRecord | _Record]:
        def job(task: Task) -> Callable[[], TaskRecord | _Record]:
            if task.tensor.name in self.types:
                return lambda: self._write_blocks(task, out, meter)
            return lambda: run_task(task, out.write, meter)

        jobs = {t.tensor.name: job(t) for t in self.tasks}
        return digest.run_all(jobs, digest.WORKERS, threading.Event())

    def _stored(self, task: Task, start: int, stop: int) -> Blocks:
        """Rows as they are stored."""
        name = task.tensor.name
        if name in self.made:
            x = torch.from_numpy(
                self.checkpoint.tensors[name].read_rows(start, stop).astype(np.float32)
            )
            return encode(x, self.made[name].name)
        value = _checked_blocks(name, self.blocks[name], self.checkpoint)
        return _stepped(Blocks(value.format, value.data[start:stop]), task)

    def _write_blocks(self, task: Task, out: Output, meter: Progress) -> _Record:
        tensor = self.checkpoint.tensors[task.tensor.name]
        before = TensorHasher(tensor.name, tensor.dtype, tensor.shape)
        after = TensorHasher(tensor.name, F32, tensor.shape)
        whole = None if tensor.streams_rows else tensor.read()
        changed = 0
        for a, b in iter_row_blocks(tensor.shape, 4, _BLOCK):
            stored = self._stored(task, a, b)
            out.write(task.row.name, (a, 0), stored.data.numpy())
            x = tensor.read_rows(a, b) if whole is None else whole[a:b]
            y: Array = stored.dequantize().numpy()
            _require_finite(y, tensor.name)
            if task.step is not None:
                y = task.step.inverse(y, tensor.config, F32)
            before.update(np.ascontiguousarray(x))
            after.update(y)
            changed += int(np.count_nonzero(x.astype(np.float32) != y))
            meter(x.nbytes, tensor.name)
        if task.dropped is not None:
            dropped = digest.digest(task.dropped)
            if task.refusal is not None and not digest.is_zero(dropped):
                raise task.refusal
        return _Record(digest.entry(before), digest.entry(after), changed)

    def _check(
        self, staged: Path, records: Mapping[str, TaskRecord | _Record], meter: Progress
    ) -> None:
        """Open the file with the reader: blocks must be equal byte for byte, every other tensor bit for bit."""
        with open_checkpoint(
            staged, config=self.checkpoint.config, container="gguf", staged=True
        ) as back:
            found = digest.digests(back, meter)
            wrong = [n for n, r in records.items() if found.get(n) != r.output]
            for task in self.tasks:
                name = task.tensor.name
                if name in self.types and name not in wrong and not self._same_bytes(task, back):
                    wrong.append(name)
        if wrong:
            raise ParityError(
                f"{len(wrong)} of {len(records)} tensors read back differently: {listing(wrong, 3)}.", where=staged,
                fix="the disk or memory may be faulty, or this is a bug in g2kit; nothing was put at the destination.",
            )  # fmt: skip

    def _same_bytes(self, task: Task, back: Checkpoint) -> bool:
        packed = back.tensors[task.tensor.name].source.quantized
        if (
            not isinstance(packed, GgmlBlocks)
            or packed.block.code != self.types[task.tensor.name].code
        ):
            return False
        return all(
            np.array_equal(packed.raw_rows(a, b), self._stored(task, a, b).data.numpy())
            for a, b in iter_row_blocks(task.tensor.shape, 4, _BLOCK)
        )

    def _manifest(self, records: Mapping[str, TaskRecord | _Record]) -> Manifest:
        steps: dict[str, dict[str, int]] = {}
        for name, r in records.items():
            if isinstance(r, _Record):
                steps.setdefault(f"quantize {self.types[name].name}", {})[name] = r.changed
        for task in self.tasks:
            name = task.tensor.name
            if name not in self.types and task.changes:
                label = task.placement.step if task.step else f"to {task.dtype}"
                steps.setdefault(str(label), {})[name] = records[name].changed
        source = {n: r.source for n, r in records.items()}
        for name, value in self.floats.items():
            source[name] = digest.digest(self.checkpoint.tensors[name])
            same = source[name].sha256 == records[name].source.sha256
            steps.setdefault("tune", {})[name] = 0 if same else value.numel()
        require_same_source(self.blocks, digest.root(source), self.checkpoint)
        return Manifest(
            tool_version=__version__, format="gguf", layout="gguf", dtype=self.mix.base,
            source_fingerprint=digest.root(source),
            tensors=digest.counting({n: r.output for n, r in records.items()}), files={},
            lossy=tuple(LossyStep(n, c) for n, c in sorted(steps.items())), padding_rows={},
            notes=tuple(self.notes), config=to_plain(self.checkpoint.config),
        )  # fmt: skip

    def _report(self, manifest: Manifest) -> Report:
        packed = [s for s in self.slots if isinstance(s, BlockSlot)]
        weights = sum(int(np.prod(s.stored_shape)) for s in packed)
        nbytes = sum(s.nbytes for s in packed)
        return {
            "path": str(self.dst),
            "format": f"gguf-{self.mix.name}",
            "container": "gguf",
            "readers": "llama.cpp and what is built on it",
            "bytes": sum(f.size for f in manifest.files.values()),
            "packed_bytes": nbytes,
            "bits_per_weight": 8 * nbytes / weights,
            "quantized": len(packed),
            "types": dict(Counter(f.name for f in self.types.values())),
            "source_fingerprint": manifest.source_fingerprint,
            "fingerprint": manifest.fingerprint,
            "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in manifest.files.items()},
            "notes": self.notes,
        }


def _types(blocks: Mapping[str, Value], checkpoint: Checkpoint) -> dict[str, BlockFormat]:
    if unknown := sorted(blocks.keys() - checkpoint.tensors.keys()):
        raise UsageError(
            f"{len(unknown)} names are no tensors of this model: {listing(unknown)}.", where=checkpoint.path,
            fix="pass the checkpoint that was quantized.",
        )  # fmt: skip
    ask: Callable[[str], str | None] | None = getattr(blocks, "type_of", None)
    types = {}
    for name in blocks:
        told = ask(name) if ask else _checked(name, blocks[name], checkpoint)
        if told is not None:
            types[name] = block_format(told)
    if odd := sorted(types.keys() - {*canonical.linears(checkpoint.tensors), canonical.EMBED}):
        raise UsageError(
            f"only linear weights and the embedding are quantized, not {listing(odd)}."
        )
    if not types:
        raise UsageError("nothing is quantized.", where=checkpoint.path)
    return types


def _checked(name: str, value: Value, checkpoint: Checkpoint) -> str | None:
    """The value's block type, None for floats."""
    if tuple(value.shape) != checkpoint.tensors[name].shape:
        raise ShapeError(
            f"it is {list(value.shape)}, the checkpoint's {list(checkpoint.tensors[name].shape)}.", tensor=name,
            fix="pass the checkpoint that was quantized.",
        )  # fmt: skip
    return value.format.name if isinstance(value, Blocks) else None


def _checked_blocks(name: str, value: Value, checkpoint: Checkpoint) -> Blocks:
    _checked(name, value, checkpoint)
    assert isinstance(value, Blocks)
    return value


def _float(value: Value) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _embedding(
    mix: Mix, wanted: str | None, types: Mapping[str, BlockFormat], checkpoint: Checkpoint
) -> dict[str, BlockFormat]:
    """The embedding's type where it is quantized here."""
    if canonical.EMBED in types or wanted is None:
        return {}
    width = checkpoint.tensors[canonical.EMBED].shape[1]
    names = [mix.embedding, "Q8_0"] if wanted == "mix" else [wanted.upper()]
    fit = [n for n in names if n in FORMATS and width % FORMATS[n].weights == 0]
    if not fit and wanted != "mix":
        raise UsageError(
            f"the embedding has rows of {width} weights and cannot be {wanted}.",
            fix=f"use {', '.join(f.name for f in FORMATS.values() if width % f.weights == 0) or 'no block type'}.",
        )
    return {canonical.EMBED: FORMATS[fit[0]]} if fit else {}


def _dequantizable(checkpoint: Checkpoint, types: Mapping[str, BlockFormat]) -> Checkpoint:
    """Names and shapes of what is quantized here, as if plain: their values are never read through this view."""
    hidden = {n: f for n, f in types.items() if checkpoint.tensors[n].source.quantized is not None}
    shown, _ = effective({}, dict.fromkeys(hidden), checkpoint)  # type: ignore[arg-type]
    return shown


def _norms_as_read(task: Task) -> Task:
    """Beside an embedding in blocks there is no dtype that the reader could give norms back in."""
    return replace(task, narrow=None)


def _stepped(blocks: Blocks, task: Task) -> Blocks:
    """The query projection scaled as llama.cpp wants it, through the float16 scales."""
    if task.step is None:
        return blocks
    factor = task.step.factor(task.tensor.config)
    fields = blocks.fields()
    halves = [fields.d] if fields.dmin is None else [fields.d, fields.dmin]
    scaled = [to_half(x * factor) for x in halves]
    if not all(torch.equal(y, x * factor) for x, y in zip(halves, scaled, strict=True)):
        raise LossyError(
            f"llama.cpp wants the query projection times {factor:.6g}, which its float16 scales cannot hold exactly.",
            tensor=task.tensor.name, fix="leave this weight in bf16.",
        )  # fmt: skip
    return Blocks(
        blocks.format,
        layout.pack(replace(fields, d=scaled[0], dmin=scaled[1] if scaled[1:] else None)),
    )


def _require_finite(values: Array, name: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            "its blocks hold NaN or infinity.", tensor=name, fix="nothing was written."
        )


__all__ = ["export_gguf", "require_mix"]
