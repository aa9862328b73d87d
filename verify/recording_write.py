"""Making a recording: one pass over the probes, batch by batch, block by block, straight into the file.

In memory at a time: one batch's hidden states, a tile of its logits, and what the runner needs itself.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..convert import digest
from ..convert.progress import SILENT, Tick
from ..formats import output_fs as ofs
from ..formats import safetensors
from ..formats.base import Chunk
from ..formats.errors import NonFiniteError, UsageError
from ..formats.files import InputFile
from ..formats.manifest import TensorEntry, file_digest
from ..model import canonical
from ..sealed import unicode
from . import recording_schema as schema
from .batches import BATCH_TOKENS, padded, plan_batches, targets
from .runners import RUNNERS, Runner
from .side import Side
from .staging import StagedDirectory

if TYPE_CHECKING:
    from ..convert.open import Checkpoint
    from .floor import Floor
    from .probes import ProbeSet
    from .recording_logits import Kept

Array = npt.NDArray[Any]
_TILE_BYTES = 16 << 20
_METADATA = {"format": schema.SCHEMA}


def record(
    runner: Runner,
    probes: ProbeSet,
    out: str | Path,
    *,
    checkpoint: Checkpoint,
    floor: Floor | None = None,
    environment: Mapping[str, Any] | None = None,
    entries: Mapping[str, TensorEntry] | None = None,
    with_embedding: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    overwrite: bool = False,
    command: str | None = None,
    progress: Tick = SILENT,
    fs: ofs.Filesystem = ofs.REAL,
) -> dict[str, Any]:
    """Run a model over probes and keep what another machine needs to compare with it.

    A runner without ``blocks`` (llama_cpp) gives a recording of kind ``top-k``: what is found with it later is a lower bound.

    Args:
        runner: the model.
        probes: what to run; at least one position.
        out: directory to create.
        checkpoint: what the runner runs, for its fingerprints.
        floor: this run's noise floor; None for not measured.
        environment: versions and devices, plain data; default what :func:`environment_of` finds.
        entries: the checkpoint's tensor hashes, where they are known; else all weights are read and hashed.
        with_embedding: carry the embedding along, so that the reader needs no checkpoint with the same one.
        batch_tokens: tokens per batch, padding included; a longer probe runs alone.
        overwrite: replace an existing recording.
        command: for the ``run`` object.
        progress: called with the number of tokens that just went through the whole model.
        fs: the file system.

    Returns:
        The document, as in ``recording.json``. Everything but its ``run`` and ``self_sha256`` is the same for the same
        runner, probes and machine.

    Raises:
        UsageError: no probes; or a probe's tokens are not the model's.
        NonFiniteError: a NaN or infinity, with its probe, position and block.
        ConflictError, SpaceError, FileIOError, UnsafePathError: the output; nothing is left behind.
    """
    started = time.time()
    work = _Work.of(runner, probes, checkpoint, with_embedding)
    plan = safetensors.plan(schema.slots(work.sizes), stem="arrays", metadata=_METADATA)
    side = Side(checkpoint.path, checkpoint, None)
    later = [schema.DOCUMENT, schema.TOKENIZER]
    with StagedDirectory(
        Path(out), plan.files, later, overwrite=overwrite,
        sources=_read_from(checkpoint), fs=fs,
    ) as staged:  # fmt: skip
        writer = _Writer(staged, plan.chunks)
        model = _model(checkpoint, digest.digests(checkpoint) if entries is None else entries)
        for batch in plan_batches([len(p.tokens) for p in probes.probes], batch_tokens):
            _run_batch(work, batch, writer)
            progress(sum(len(probes.probes[i].tokens) for i in batch), "recording")
        writer.put("tokens", 0, work.tokens.astype(np.int32))
        writer.put("sample_at", 0, work.sample_at)
        if work.sizes.embedding is not None:
            _write_embedding(writer, checkpoint, work.sizes.embedding)
        if work.sizes.kind == schema.HIDDEN:
            norm = checkpoint.tensors[canonical.FINAL_NORM].read()
            writer.put("final_norm", 0, norm.astype(np.float64))
        files = {schema.ARRAYS: _file_entry(staged, schema.ARRAYS)}
        if side.tokenizer_bytes is not None:
            staged.add(schema.TOKENIZER, side.tokenizer_bytes)
            files[schema.TOKENIZER] = _file_entry(staged, schema.TOKENIZER)
        document = {
            "schema": schema.SCHEMA,
            "kind": work.sizes.kind,
            "model": {**model, "tokenizer": _tokenizer(side)},
            "runner": runner_identity(runner),
            "settings": _settings(work, batch_tokens),
            "environment": environment_of(runner) if environment is None else dict(environment),
            "floor": None if floor is None else floor.to_json(),
            "probes": _probes(probes),
            "files": files,
            "run": {
                "command": None if command is None else unicode(command),
                "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - started, 3),
                "host": platform.node(),
            },
        }
        content = schema.dumps(document)
        staged.add(schema.DOCUMENT, content)
        staged.commit()
    document["id"] = schema.content_id(document)
    return {**document, "self_sha256": schema.self_sha256(document)}


def check_output(out: str | Path, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Whether :func:`record` would refuse ``out`` at its end: asked before anything is run.

    Raises:
        ConflictError, UsageError, FileIOError: it would.
    """
    names = (schema.ARRAYS, schema.DOCUMENT, schema.TOKENIZER)
    sources = _read_from(checkpoint)
    StagedDirectory(Path(out), (), names, overwrite=overwrite, sources=sources).check()


def _read_from(checkpoint: Checkpoint) -> tuple[Path, ...]:
    files = checkpoint.source.files
    return (checkpoint.path, *files) if files else ()


@dataclass(frozen=True)
class _Work:
    """One recording in the making."""

    runner: Runner
    probes: ProbeSet
    sizes: schema.Sizes
    tokens: npt.NDArray[np.int64]
    offsets: Sequence[int]
    sample_at: npt.NDArray[np.int64]
    matrix: npt.NDArray[np.float64]

    @staticmethod
    def of(runner: Runner, probes: ProbeSet, checkpoint: Checkpoint, embedding: bool) -> _Work:
        """Checked, before anything is written."""
        config = runner.config
        if not probes.probes or not all(len(p.tokens) for p in probes.probes):
            raise UsageError("there is nothing to record: no probes, or one without tokens.")
        tokens = np.concatenate([np.asarray(p.tokens, np.int64) for p in probes.probes])
        wrong = np.flatnonzero((tokens < 0) | (tokens >= config.vocab_size))
        if len(wrong):
            raise UsageError(
                f"token id {tokens[wrong[0]]} of the probes is outside the vocabulary of {config.vocab_size}.",
                fix=f"give ids from 0 to {config.vocab_size - 1}, made by this model's tokenizer.",
            )
        kind = schema.HIDDEN if "blocks" in runner.gives else schema.TOP_K
        if embedding and kind == schema.TOP_K:
            raise UsageError(
                f"the {runner.name} runner gives no hidden states, so the embedding would be of no use.",
                fix="leave out --with-embedding.",
            )
        table = checkpoint.tensors[canonical.EMBED]
        sizes = schema.Sizes(
            kind, len(tokens), config.hidden_size, config.num_hidden_layers, config.vocab_size,
            runner.dtype, schema.carried(table.dtype) if embedding else None,
        )  # fmt: skip
        lengths = [len(p.tokens) for p in probes.probes]
        offsets = [0, *np.cumsum(lengths).tolist()]
        at = schema.sampled_positions(len(tokens), probes.sha256)
        return _Work(runner, probes, sizes, tokens, offsets, at, schema.signs(config.hidden_size))


class _Writer:
    """Rows of arrays into their places in the file."""

    def __init__(self, staged: StagedDirectory, chunks: Mapping[str, tuple[Chunk, ...]]) -> None:
        self._staged = staged
        self._chunks = {name: some[0] for name, some in chunks.items()}

    def put(self, name: str, row: int, values: Array) -> None:
        """``values`` as rows ``row:`` of an array, already of its type."""
        chunk = self._chunks[name]
        values = np.ascontiguousarray(values)
        stride = values.dtype.itemsize * int(np.prod(chunk.shape[1:], dtype=np.int64))
        data = values.reshape(-1).view(np.uint8).data
        self._staged.write(chunk.file, data, chunk.offset + row * stride)


def _run_batch(work: _Work, batch: Sequence[int], writer: _Writer) -> None:
    runner, lengths = work.runner, [len(work.probes.probes[i].tokens) for i in batch]
    sequences = [work.probes.probes[i].tokens for i in batch]
    ids, real = padded(sequences, runner.config.filler)
    place = _Place(work, batch, lengths)
    first = runner.start(ids, real)
    if work.sizes.kind == schema.HIDDEN:
        assert first is not None
        _record_blocks(work, first[real], real, place, writer)
    _record_logits(work, real, place, writer)


@dataclass(frozen=True)
class _Place:
    """Where a batch's positions, one probe after the other, go in the arrays."""

    work: _Work
    batch: Sequence[int]
    lengths: Sequence[int]

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row of every position."""
        starts = [self.work.offsets[i] for i in self.batch]
        return np.concatenate(
            [np.arange(a, a + n) for a, n in zip(starts, self.lengths, strict=True)]
        )

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """Next token of every position, -1 for none."""
        return np.concatenate([targets(self.work.probes.probes[i]) for i in self.batch])

    def put(self, writer: _Writer, name: str, values: Array) -> None:
        """A batch's values, probe by probe."""
        done = 0
        values = values.astype(_dtype(self.work, name), copy=False)
        for i, n in zip(self.batch, self.lengths, strict=True):
            writer.put(name, self.work.offsets[i], values[done : done + n])
            done += n

    def check(self, finite: Array, what: str) -> None:
        """Raise for the first position that is not finite."""
        bad = np.flatnonzero(~finite)
        if not len(bad):
            return
        ends = np.cumsum(self.lengths)
        index = int(np.searchsorted(ends, bad[0], side="right"))
        at = int(bad[0] - (ends[index] - self.lengths[index]))
        probe = self.work.probes.probes[self.batch[index]]
        raise NonFiniteError(
            f"{what} has a NaN or infinity at position {at} of probe {probe.id}; a model that breaks can be no "
            "reference.",
            fix="check the weights with `g2conv check`, or record in float32.",
        )


def _dtype(work: _Work, name: str) -> np.dtype:
    return next(s.dtype for s in schema.slots(work.sizes) if s.name == name)


def _record_blocks(work: _Work, first: Array, real: Array, place: _Place, writer: _Writer) -> None:
    points = work.sizes.layers + 1
    projected = np.empty((len(first), points, schema.DIMS), work.sizes.wide)
    norms = np.empty((len(first), points), work.sizes.wide)
    for point in range(points):
        x = first if point == 0 else work.runner.advance()[real]
        place.check(
            np.asarray(np.isfinite(x).all(1)),
            "the embedding" if point == 0 else f"block {point - 1}",
        )
        projected[:, point], norms[:, point] = schema.project(x, work.matrix)
    place.put(writer, "projection", projected)
    place.put(writer, "norm", norms)
    final = work.runner.final_hidden()[real]
    place.check(np.asarray(np.isfinite(final).all(1)), "the final norm's output")
    place.put(writer, "final_hidden", final)


def _record_logits(work: _Work, real: Array, place: _Place, writer: _Writer) -> None:
    kept = _keep(work, real, place)
    place.check(kept.finite, "the logits' row")
    place.put(writer, "lse", kept.lse)
    place.put(writer, "topk_id", kept.ids)
    place.put(writer, "topk_logit", kept.logits)
    place.put(writer, "next_logit", kept.next_logit)
    inside = np.flatnonzero(np.isin(work.sample_at, place.rows))
    for row, i in enumerate(inside):
        writer.put("sample_logits", int(i), kept.rows[row : row + 1])


def _keep(work: _Work, real: Array, place: _Place) -> Kept:
    from .recording_logits import LogitKeeper  # torch

    s, rows = work.sizes, place.rows
    where = {int(r): k for k, r in enumerate(rows)}
    chosen = np.array([where[int(r)] for r in work.sample_at if int(r) in where], np.int64)
    keeper = LogitKeeper(len(rows), s.vocab, s.top, chosen, place.targets, s.wide)
    tile_rows = max(64, _TILE_BYTES // (real.size * s.wide.itemsize))
    for start, stop, tile in work.runner.logit_tiles(tile_rows):
        keeper.add(start, stop, tile[real])
    return keeper.finish()


def _write_embedding(writer: _Writer, checkpoint: Checkpoint, dtype: np.dtype) -> None:
    for start, _, rows in schema.table_blocks(checkpoint.tensors[canonical.EMBED]):
        writer.put("embedding", start, rows.astype(dtype, copy=False))


def _file_entry(staged: StagedDirectory, name: str) -> dict[str, Any]:
    with InputFile(staged.sync(name)) as file:
        return {"size": file.size, "sha256": file_digest(file)}


def _tokenizer(side: Side) -> dict[str, Any] | None:
    """What the document says of the tokenizer; the file itself lies beside it."""
    found = side.describe_tokenizer()
    return None if found is None else {**found, "rebuilt": side.tokenizer_rebuilt}


def _model(checkpoint: Checkpoint, entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    table = checkpoint.tensors[canonical.EMBED]
    dtypes: dict[str, int] = {}
    for t in checkpoint.tensors.values():
        dtypes[t.dtype.name] = dtypes.get(t.dtype.name, 0) + 1
    return {
        "config": schema.config_to_json(checkpoint.config),
        "fingerprint": digest.root(entries),
        "embedding_sha256": schema.embedding_sha256(schema.table_blocks(table)),
        "embedding_dtype": schema.carried(table.dtype).name,
        "format": checkpoint.source.format,
        "layout": checkpoint.layout.variant.name,
        "dtypes": dtypes,
        "quantized": len(checkpoint.quantized),
        "parameters": checkpoint.config.num_parameters,
    }


def _settings(work: _Work, batch_tokens: int) -> dict[str, Any]:
    return {
        "batch_tokens": batch_tokens,
        "positions": work.sizes.positions,
        "top": work.sizes.top,
        "sampled": work.sizes.sampled,
        "projection": schema.DIMS if work.sizes.kind == schema.HIDDEN else 0,
        "embedding": work.sizes.embedding is not None,
    }


def _probes(probes: ProbeSet) -> dict[str, Any]:
    return {
        "profile": probes.profile,
        "seed": probes.seed,
        "sha256": probes.sha256,
        "skipped": list(probes.skipped),
        "list": [
            {
                "id": p.id,
                "group": p.group,
                "category": p.category,
                "document": p.document,
                "scored": p.scored,
                "length": len(p.tokens),
                "tokens_sha256": schema.tokens_sha256(np.asarray(p.tokens)),
            }
            for p in probes.probes
        ],
    }


def runner_identity(runner: Runner) -> dict[str, Any]:
    """Name, dtype, device and version of what computed."""
    package = RUNNERS[runner.name].package
    device = getattr(runner, "_device", None)
    return {
        "name": runner.name,
        "dtype": runner.dtype,
        "device": "cpu" if device is None else getattr(device, "platform", str(device)),
        "version": _version(package),
    }


def environment_of(runner: Runner) -> dict[str, Any]:
    """Versions and machine; what could explain a difference."""
    packages = sorted({"numpy", "torch", RUNNERS[runner.name].package})
    return {
        "g2kit": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "tf32": False,
        **{p: _version(p) for p in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
