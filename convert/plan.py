"""Everything decided about a conversion before a byte moves: target table, slots, tasks, side files, declared losses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.base import Array, ContainerPlan, Index, Slot, Tensor
from ..formats.dtypes import BY_SHORT, F32, short
from ..formats.errors import ConfigError, DtypeError, LossyError, UsageError, printable
from ..formats.names import listing
from ..formats.output_resume import CONTENT
from ..model import canonical
from ..model.config import GemmaConfig
from ..model.config_formats import ConfigWarning
from .digest import same_bits
from .extras import (
    extra_files,
    gguf_kv,
    staying_behind,
    travelling,
    with_sentencepiece,
    without_room,
)
from .layout import Layout, Placement, Row
from .open import Checkpoint, LazyTensor
from .steps import STEPS, Step
from .targets import TARGETS, PlanRequest, Target, check_dtype, single_file, target_variant


@dataclass(frozen=True)
class Options:
    """What the user asked for; same names as the command's options.

    Attributes:
        to: framework to write.
        layout: layout of that framework, or None for its default.
        dtype: ``keep``, ``bf16``, ``f16`` or ``f32``.
        max_shard_size: bytes per file, or None.
        gating: ``df``, ``fd`` or None.
        drop_padding: drop embedding rows past vocab_size though they are not zero.
        fold_query_scale: GGUF: multiply the query projection although that rounds.
        tokenizer: path of a tokenizer.model to use instead of the one found.
    """

    to: str
    layout: str | None = None
    dtype: str = "keep"
    max_shard_size: int | None = None
    gating: str | None = None
    drop_padding: bool = False
    fold_query_scale: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Task:
    """One canonical tensor on its way into the target.

    Attributes:
        tensor: where it comes from.
        row: the foreign tensor it goes to.
        placement: where in there.
        dtype: the slot's element type.
        step: arithmetic on the way out, or None.
        read_dtype: dtype in which the target's reader will give it back.
        narrow: the model's dtype, which the reader gives back instead where that loses nothing (norms that the
            format stores wider).
        dropped: rows stored behind this tensor that the target does not hold; read right after it, so that
            a compressed embedding is decoded once.
        refusal: raised when ``dropped`` holds anything but zeros; None where that is accepted.
    """

    tensor: LazyTensor
    row: Row
    placement: Placement
    dtype: np.dtype
    step: Step | None
    read_dtype: np.dtype
    narrow: np.dtype | None = None
    dropped: LazyTensor | None = None
    refusal: LossyError | None = None

    @property
    def changes(self) -> bool:
        """Whether values may differ from the source's."""
        return self.step is not None or self.dtype != self.tensor.dtype


@dataclass
class Conversion:
    """A conversion, planned.

    Attributes:
        checkpoint: the opened source.
        target: the framework.
        layout: the target's table.
        options: what was asked for.
        slots: foreign tensors to write, in file order.
        files: the container's files, laid out.
        tasks: one per canonical tensor, in forward order.
        extra: side files by name.
        single_file: name of the one output file, or None for a directory.
        embedding: rows of the embedding in source and output, and what was dropped or added.
        notes: findings for the report and manifest.
        kv: GGUF key-values, empty for other targets.
    """

    checkpoint: Checkpoint
    target: Target
    layout: Layout
    options: Options
    slots: list[Slot]
    files: ContainerPlan
    tasks: list[Task]
    extra: dict[str, bytes]
    single_file: str | None
    embedding: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    kv: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def in_file_order(self) -> list[Task]:
        """The tasks as their bytes lie in the files, so that files can be hashed while they are written."""
        at = {f.name: k for k, f in enumerate(self.files.files)}

        def place(task: Task) -> tuple[int, int, tuple[int, ...]]:
            first = self.files.chunks[task.row.name][0]
            return at[first.file], first.offset, task.placement.start

        return sorted(self.tasks, key=place)

    @property
    def nbytes(self) -> int:
        """Bytes to read, as canonical tensors."""
        return sum(t.tensor.nbytes for t in self.tasks)


def plan_conversion(checkpoint: Checkpoint, dst: Path, options: Options) -> Conversion:
    """Decide everything about writing ``checkpoint`` to ``dst``.

    Reads at most the embedding's padding rows and a stored output head.

    Raises:
        UsageError: options do not fit the target.
        LossyError: the target cannot hold the weights exactly and the loss was not asked for.
        DtypeError: the target cannot hold the element type.
    """
    target = TARGETS[options.to]
    config = checkpoint.config
    if options.max_shard_size is not None and not target.shards:
        sharded = ", ".join(t.name for t in TARGETS.values() if t.shards)
        raise UsageError(
            f"--max-shard-size applies to {sharded}, not to {target.name}.",
            fix="leave it out.",
        )
    notes = list(checkpoint.notes)
    _check_head(checkpoint, notes)
    rows, embedding = _embedding_rows(checkpoint, target, options, notes)
    variant = target_variant(target, options.layout, config, options.gating)
    layout = Layout(variant, config, rows)
    tasks = _tasks(checkpoint, layout, options, notes)
    if embedding.get("dropped_rows"):
        tasks[0] = _dropping(checkpoint, tasks[0], target, options)
    slots = _slots(layout, tasks, target)
    single = single_file(dst, target)
    if single and options.max_shard_size is not None:
        raise UsageError(
            f"{printable(dst.name)} is one file, but --max-shard-size asks for several.",
            fix="name a directory as the destination.",
        )
    kv, extra = _side_files(checkpoint, target, slots, options, single, notes)
    request = PlanRequest(layout, slots, options.max_shard_size, single, kv)
    files = target.plan(request)
    notes += _oversized(files, slots, options.max_shard_size)
    return Conversion(
        checkpoint,
        target,
        layout,
        options,
        slots,
        files,
        tasks,
        extra,
        single,
        embedding,
        notes,
        kv,
    )


def _oversized(files: ContainerPlan, slots: list[Slot], limit: int | None) -> list[str]:
    """Notes on files that --max-shard-size could not keep small, and why."""
    if limit is None:
        return []
    notes = []
    if large := [s for s in slots if s.nbytes > limit]:
        listed = listing([f"{s.name} ({s.nbytes} bytes)" for s in large], 3)
        notes.append(
            f"{len(large)} tensors are larger than --max-shard-size ({limit} bytes) and get a file each: {listed}"
        )
    alone = {chunk.file for s in large for chunk in files.chunks[s.name]}
    over = [f for f in files.files if f.size > limit and f.name not in alone]
    if over:
        worst = max(over, key=lambda f: f.size)
        notes.append(
            f"--max-shard-size counts weights only: with headers and padding, {len(over)} files are larger, "
            f"{worst.name} by {worst.size - limit} bytes"
        )
    return notes


def _side_files(
    checkpoint: Checkpoint,
    target: Target,
    slots: list[Slot],
    options: Options,
    single: str | None,
    notes: list[str],
) -> tuple[list[tuple[str, str, Any]], dict[str, bytes]]:
    """GGUF key-values and the files beside the weights."""
    source = checkpoint.source
    kv = source.metadata.get("kv", {}) if source.format == "gguf" else {}
    sidecars = checkpoint.sidecars
    if kv or options.tokenizer is not None:
        before = sidecars.notes
        sidecars = travelling(checkpoint.path, source.format, kv, options.tokenizer)
        notes[:] = [n for n in notes if n not in before or n in sidecars.notes]
        notes += [n for n in sidecars.notes if n not in before]
    config, unheard = checkpoint.config, list[str]()
    sidecars = with_sentencepiece(target.name, sidecars, notes)
    pairs = gguf_kv(sidecars, config, slots, notes) if target.name == "gguf" else []
    extra: dict[str, bytes] = {}
    if single is None:
        # GGUF has said already what there is to say
        said = unheard if target.name == "gguf" else notes
        extra = extra_files(target.name, sidecars, config, _main_dtype(slots), said)
    notes += without_room(target.name, single, sidecars, config, extra)
    notes += staying_behind(checkpoint.path, source.format, sidecars)
    return pairs, extra


def _check_head(checkpoint: Checkpoint, notes: list[str]) -> None:
    """A stored output head must be the embedding, bit for bit."""
    head = checkpoint.head
    if head is None:
        return
    embedding = checkpoint.tensors[canonical.EMBED]
    aliases = checkpoint.source.metadata.get("aliases", {})
    if (
        aliases.get(head.name) == embedding.source.name
        or aliases.get(embedding.source.name) == head.name
    ):
        notes.append("the stored lm_head shares the embedding's bytes; written once")
        return
    equal = head.shape == embedding.shape and head.dtype == embedding.dtype
    if equal:
        equal = all(same_bits(x, head.read((slice(a, b),))) for a, b, x in embedding.blocks())
    if not equal:
        raise LossyError(
            "lm_head differs from the embedding: this model's head is untied, and no Gemma format can hold it.",
            where=head.where,
            tensor=head.name,
            fix="tie the head (copy the embedding over it or remove it) if that is what you mean, and convert again.",
        )
    notes.append("the stored lm_head equals the embedding bit for bit; written once")


def _embedding_rows(
    checkpoint: Checkpoint, target: Target, options: Options, notes: list[str]
) -> tuple[int, dict[str, Any]]:
    """Rows the output's embedding gets, and the account of the difference."""
    vocab, found = checkpoint.config.vocab_size, checkpoint.layout.embedding_rows
    account: dict[str, Any] = {"vocab_size": vocab, "source_rows": found, "rows": found}
    padding = found - vocab
    if target.holds_padding:
        if padding == 0:
            account["rows"] = max(vocab, _released_rows(checkpoint))
            account["added_zero_rows"] = account["rows"] - vocab
            if account["added_zero_rows"]:
                notes.append(
                    f"{account['added_zero_rows']} zero rows appended to the embedding, as {target.name} has them"
                )
        return account["rows"], account
    if padding == 0:
        return vocab, account
    account |= {"rows": vocab, "dropped_rows": padding}
    kind = (
        "whatever they hold (--drop-padding)"
        if options.drop_padding
        else "once every one of them is found to be all zero"
    )
    notes.append(f"{padding} embedding rows past vocab_size are padding and left out, {kind}")
    return vocab, account


def _dropping(checkpoint: Checkpoint, task: Task, target: Target, options: Options) -> Task:
    """The embedding's task, made to look at the rows that are left out."""
    padding = checkpoint.tensors[canonical.EMBED_PADDING]
    vocab, extra = checkpoint.config.vocab_size, padding.shape[0]
    refusal = LossyError(
        f"the embedding has {vocab + extra} rows, {extra} more than vocab_size {vocab}, and they are not all zero; "
        f"{target.name} cannot hold them.",
        where=checkpoint.path,
        tensor=padding.source.name,
        fix="pass --drop-padding to leave them out (no token id reaches them), or convert to flax or maxtext.",
    )
    return replace(task, dropped=padding, refusal=None if options.drop_padding else refusal)


TPU_ROWS = {256_000: 256_128}  # what the Flax releases pad Gemma's vocabulary to


def _released_rows(checkpoint: Checkpoint) -> int:
    """Rows a padded embedding had before, from the source's manifest, else as the Flax releases have them."""
    vocab = checkpoint.config.vocab_size
    earlier = checkpoint.sidecars.manifest_embedding.get("source_rows")
    if isinstance(earlier, int) and vocab <= earlier <= vocab + 4096:
        return earlier
    return TPU_ROWS.get(vocab, vocab)


def _tasks(
    checkpoint: Checkpoint, layout: Layout, options: Options, notes: list[str]
) -> list[Task]:
    wanted = None if options.dtype == "keep" else BY_SHORT[options.dtype]
    if wanted is None and checkpoint.quantized:
        raise LossyError(
            f"{len(checkpoint.quantized)} tensors are quantized ({_kinds(checkpoint)}); they can only be "
            "dequantized, not kept.",
            where=checkpoint.path,
            fix="pass --dtype f32 (exact values), bf16 or f16.",
        )
    tasks = []
    model_dtype = wanted or checkpoint.tensors[canonical.EMBED].dtype
    for name, tensor in checkpoint.tensors.items():
        if name not in layout.placements:
            continue  # padding rows that were accounted for
        row, placement = layout.placements[name]
        step = STEPS[placement.step] if placement.step else None
        if step is not None and step.is_identity(checkpoint.config):
            step = None
        if placement.step == "llama_query_scale" and step is not None:
            _check_query_scale(checkpoint.config, checkpoint.reading.warnings, step, options, notes)
        dtype = row.dtype or wanted or tensor.dtype
        read_dtype = wanted or tensor.dtype
        narrow = None
        if step is not None and len(tensor.shape) == 1 and dtype.itemsize > model_dtype.itemsize:
            read_dtype, narrow = dtype, model_dtype
        tasks.append(Task(tensor, row, placement, dtype, step, read_dtype, narrow))
    if canonical.EMBED_PADDING in layout.placements.keys() - checkpoint.tensors.keys():
        tasks.insert(1, _zero_rows(layout, tasks[0]))
    return tasks


class _Zeros(Tensor):
    """Embedding rows the source does not have."""

    def read(self, index: Index = ()) -> Array:
        """Zeros of the shape that indexing gives."""
        return np.zeros(self.shape, self.dtype)[index]


def _zero_rows(layout: Layout, embedding: Task) -> Task:
    row, placement = layout.placements[canonical.EMBED_PADDING]
    at = placement.reorder.canonical_shape
    dtype = embedding.tensor.dtype
    zeros = _Zeros(placement.canonical, dtype, at, embedding.tensor.source.where, "zeros")
    whole = replace(placement, start=(0,) * len(at))
    tensor = LazyTensor(zeros, whole, None, layout.config)
    return Task(tensor, row, placement, embedding.dtype, None, embedding.read_dtype)


def _kinds(checkpoint: Checkpoint) -> str:
    kinds = {checkpoint.tensors[n].source.stored for n in checkpoint.quantized}
    return ", ".join(sorted(kinds))


def _check_query_scale(
    config: GemmaConfig,
    warnings: list[ConfigWarning],
    step: Step,
    options: Options,
    notes: list[str],
) -> None:
    text = (
        f"llama.cpp multiplies queries by a scale it derives from the layer count; this model's is "
        f"{config.query_pre_attn_scalar:g}^-1/2, so the query projection must be multiplied by "
        f"{step.factor(config):.6g}"
    )
    doubted = next((w for w in warnings if w.field == "query_pre_attn_scalar"), None)
    if doubted is not None:
        raise ConfigError(
            f"{doubted}.", fix="pass --fix-config, or the right configuration with --config."
        )
    if not step.is_exact(config) and not options.fold_query_scale:
        raise LossyError(
            f"{text}, which is not a power of two and rounds.",
            fix="pass --fold-query-scale to accept that (the manifest counts the changed elements).",
        )
    said = f"{text} ({'exact' if step.is_exact(config) else 'rounded, --fold-query-scale'})"
    if said not in notes:
        notes.append(said)


def _slots(layout: Layout, tasks: list[Task], target: Target) -> list[Slot]:
    dtypes: dict[str, dict[np.dtype, str]] = {}
    for task in tasks:
        dtypes.setdefault(task.row.name, {}).setdefault(task.dtype, task.tensor.name)
    slots = []
    for row in layout.rows.values():
        found = dtypes[row.name]
        if len(found) > 1:
            listed = ", ".join(f"{name} {short(d)}" for d, name in found.items())
            raise DtypeError(
                f"{target.name} holds these in one tensor, but their dtypes differ: {listed}.",
                tensor=row.name,
                fix="pass --dtype bf16 or --dtype f32.",
            )
        dtype = next(iter(found))
        check_dtype(target, dtype)
        slots.append(Slot(row.name, dtype, row.shape))
    return slots


def dtype_counts(slots: list[Slot]) -> dict[str, int]:
    """Element type -> how many foreign tensors have it, the one holding most bytes first."""
    sizes: dict[np.dtype, int] = {}
    for s in slots:
        sizes[s.dtype] = sizes.get(s.dtype, 0) + s.nbytes
    ranked = sorted(sizes, key=lambda d: -sizes[d])
    return {short(d): sum(s.dtype == d for s in slots) for d in ranked}


def dtype_label(slots: list[Slot]) -> str:
    """The one element type of the output, or ``mixed``."""
    counts = dtype_counts(slots)
    return next(iter(counts), short(F32)) if len(counts) < 2 else "mixed"


def _main_dtype(slots: list[Slot]) -> np.dtype:
    """The element type holding most bytes, which config.json names."""
    return BY_SHORT[next(iter(dtype_counts(slots)), short(F32))]


def plan_hash_inputs(conversion: Conversion, source_identity: Mapping[str, str]) -> dict[str, str]:
    """What must be equal for a partial output to be resumed; the keys are words for the user.

    ``--drop-padding`` is among them: without it the run looks at the rows left out, which an embedding that is done
    already would escape. ``--fold-query-scale`` is not: where it matters, planning refuses without it.
    """
    o = conversion.options
    config = conversion.checkpoint.config
    return {
        "the source (names, shapes and sizes)": source_identity["source"],
        **{f"config {k}": str(getattr(config, k)) for k in config.__dataclass_fields__},
        "the framework": o.to,
        "--layout": conversion.layout.variant.name,
        "--gating (of the source)": conversion.checkpoint.layout.variant.gating or "",
        "--gating": conversion.layout.variant.gating or "",
        "--dtype": o.dtype,
        "--max-shard-size": str(o.max_shard_size),
        "--drop-padding": "given" if o.drop_padding else "",
        "rows of the embedding": str(conversion.layout.embedding_rows),
        "g2kit's version": source_identity["tool"],
        **{
            f"{CONTENT}{name}": hashlib.sha256(data).hexdigest()
            for name, data in conversion.extra.items()
        },
    }
