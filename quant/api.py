"""The library calls behind g2quant: quantize, and export of kept codes. Plain data out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import __version__
from ..convert import digest
from ..convert.api import Progress, Report
from ..convert.chat_template import END, START, tuned_for_chat
from ..convert.open import Checkpoint, open_checkpoint
from ..convert.tokenizer import tokenizer_of
from ..formats.errors import UsageError
from ..formats.sharded import parse_size
from ..model.config import GemmaConfig
from ..model.config_formats import to_plain
from . import choose, export, plan
from .calibration import (
    HELD_OUT,
    SAMPLES,
    SELF,
    SEQ_LEN,
    Calibration,
    Ids,
    Wanted,
    divide,
    read_calibration,
)
from .ggml.export import export_gguf
from .pipeline import Options, Pipeline
from .sampling import chat_prefix, sample_sequences
from .scheme import Scheme
from .weights import Weights
from .work import Work, WorkCodes, work_path


class _Silent:
    def start(self, total: int, what: str) -> None:
        pass

    def __call__(self, nbytes: int, name: str) -> None:
        pass


def quantize(
    src: str | Path,
    dst: str | Path,
    bits: int = 4,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "gptq",
    format: str = "compressed-tensors",
    calibration: str | Path | npt.ArrayLike = SELF,
    samples: int = SAMPLES,
    seq_len: int | None = None,
    held_out: float = HELD_OUT,
    seed: int = 0,
    sequential: bool = True,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    max_shard_size: int | str | None = None,
    max_memory: int | str | None = None,
    keep_codes: str | Path | None = None,
    allow_requantize: bool = False,
    dry_run: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the linear layers of the checkpoint at ``src`` and write them to ``dst`` for a program to load.

    Killed at any moment, the same call goes on from the last finished block (``DST.quantizing/``) and ends with the same bytes.

    Args:
        src: any checkpoint g2conv opens; left untouched.
        dst: directory to make, or a single file where the format has such and the suffix says so (``.gguf``).
        bits: 8, 4, 3 or 2; GGUF formats bring their own.
        group_size: columns that share a scale: 32, 64, 128, or -1 for whole rows.
        symmetric: one zero for all (scales may be negative), or one per group.
        method: ``gptq`` (the better of it and rounding to nearest, weight by weight) or ``rtn``.
        format: one of :data:`.plan.FORMATS`.
        calibration: ``self`` (the model writes it), a text, JSONL or ``.npy`` file, or ids; see
            :func:`.calibration.read_calibration`.
        samples: sequences to gather inputs from.
        seq_len: tokens of each; None for 512, or the model's context where that is shorter.
        held_out: further sequences, as a share of ``samples``, that judge the result.
        seed: of what the model writes.
        sequential: gather every stage of a block behind the rounded ones before it; else all at once, in half the time.
        config: preset name, config.json or GemmaConfig, for checkpoints that carry none.
        fix_config: correct hyper-parameters known to be wrong in published files.
        gating: ``df`` or ``fd``; see :func:`g2kit.convert.open_checkpoint`.
        dtype: of what is not quantized: ``keep``, ``bf16``, ``f16`` or ``f32``.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        max_shard_size: bytes of weights per file, as a number or as in ``"5GB"``.
        max_memory: bytes to work in, for what can lie on disk as well; None for half of what is free.
        keep_codes: directory to keep the codes in, for `g2quant export`; uniform formats only.
        allow_requantize: accept weights that are quantized already.
        dry_run: plan only; write nothing.
        resume: continue an interrupted run; False starts afresh.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: source, output, scheme, method, calibration, ``linears`` (name -> method, errors, damping, fallbacks),
        ``blocks`` (error behind each), ``quality`` (KL, agreement and perplexity on held-out sequences), fallbacks, notes,
        timing.

    Raises:
        G2Error: any subclass; ``dst`` is untouched.
    """
    began = time.monotonic()
    plan.require_method(method)
    limit = plan.memory_limit(parse_size(max_memory) if isinstance(max_memory, str) else max_memory)
    shard = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    dst, meter = Path(dst), progress or _Silent()
    scheme = Scheme(bits, group_size, symmetric)
    with open_checkpoint(src, config=config, fix_config=fix_config, gating=gating) as checkpoint:
        plan.require_dense(checkpoint, allow=allow_requantize)
        goal = plan.goal_of(checkpoint, format, scheme)
        if keep_codes is not None and goal.is_gguf:
            raise UsageError("GGUF blocks are not kept as codes.", fix="leave out --keep-codes.")
        plan.require_destination(dst, format, checkpoint, overwrite=overwrite)
        context = checkpoint.config.max_position_embeddings
        wanted = Wanted(samples, min(SEQ_LEN, context) if seq_len is None else seq_len, held_out)
        given = None
        if not (isinstance(calibration, str) and calibration == SELF):
            given = read_calibration(calibration, checkpoint, wanted)
        elif wanted.seq_len > context:
            raise UsageError(
                f"--seq-len is {wanted.seq_len}, the model's context {context}.",
                fix=f"use at most {context}.",
            )
        rows = (wanted.samples + 2 * wanted.held) * wanted.seq_len
        if given is not None:
            rows = given.tokens + 2 * given.held_tokens
        options = Options(method, sequential, plan.keeps_states(checkpoint.config, rows, limit))
        if dry_run:
            return _planned(checkpoint, goal, wanted, options, dst)
        settings = _settings(goal, options, wanted, given, seed)
        job = _Job(checkpoint, dst, goal, options, limit, meter)
        report = job.run(settings, given, wanted, seed, resume, lambda codes, notes: _write(
            codes, checkpoint, dst, goal, notes, dtype=dtype, max_shard_size=shard,
            tokenizer=None if tokenizer is None else str(tokenizer), overwrite=overwrite,
            keep_codes=keep_codes, meter=meter,
        ))  # fmt: skip
    report["timing"] = {"total": round(time.monotonic() - began, 3)}
    return report


def _settings(
    goal: plan.Goal, options: Options, wanted: Wanted, given: Calibration | None, seed: int
) -> dict[str, str]:
    """What decides the codes."""
    targets = plan.plain_targets(goal)
    out = {
        "g2kit's version": __version__,
        "the scheme": ", ".join(sorted(targets)),
        "--method": options.method,
        "--sequential": str(options.sequential),
    }
    if goal.is_gguf:
        out["--format"] = goal.format
    if given is not None:
        return out | {"the calibration's ids": given.sha256[:16]}
    return out | {
        "--calibration": SELF,
        "--samples": str(wanted.samples),
        "--seq-len": str(wanted.seq_len),
        "the held-out share": str(wanted.held_out),
        "--seed": str(seed),
    }


class _Job:
    """The long part of a run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dst: Path,
        goal: plan.Goal,
        options: Options,
        limit: int,
        meter: Progress,
    ) -> None:
        self.checkpoint, self.dst, self.goal = checkpoint, dst, goal
        self.options, self.limit, self.meter = options, limit, meter

    def run(
        self,
        settings: dict[str, str],
        given: Calibration | None,
        wanted: Wanted,
        seed: int,
        resume: bool,
        write: Any,
    ) -> Report:
        source = self.checkpoint
        self.meter.start(sum(t.nbytes for t in source.tensors.values()), "reading")
        fingerprint = digest.root(digest.digests(source, self.meter))
        settings = settings | {"the source's weights": fingerprint}
        with Work(work_path(self.dst), settings, resume=resume) as work:
            found = work.calibration()
            if found is None:
                found = given or self._written(wanted, seed)
                work.keep_calibration(found)
            todo = sum(
                4 * source.tensors[n].shape[0] * source.tensors[n].shape[1]
                for n in self.goal.targets
                if int(n.split(".")[2]) not in work.layers
            )
            self.meter.start(todo, "quantizing")
            report = Pipeline(source, self.goal.targets, found, work, self.options).run(self.meter)
            source.source.check_unchanged()
            notes = choose.summary(report["linears"])
            codes = WorkCodes(work, self.goal.targets, fingerprint)
            written = write(codes, _notes(found, self.options, notes))
            resumed = work.resumed
            work.remove()
        return self._report(report, written, found, fingerprint, resumed, notes)

    def _written(self, wanted: Wanted, seed: int) -> Calibration:
        """Sequences of the model's own."""
        count = wanted.total
        self.meter.start(count * (wanted.seq_len - 1), "writing calibration text (tokens)")
        ids: list[Ids] = sample_sequences(
            Weights(self.checkpoint, self.limit // 2), count, wanted.seq_len, seed=seed,
            prefix=_chat_prefix(self.checkpoint), memory=self.limit // 4, progress=self.meter,
        )  # fmt: skip
        return divide(ids, SELF, self.checkpoint.config, wanted)

    def _report(
        self, found: dict[str, Any], written: Report, calibration: Calibration, fingerprint: str,
        resumed: int, fallbacks: list[str],
    ) -> Report:  # fmt: skip
        config = self.checkpoint.config
        return {
            "source": {
                "path": str(self.checkpoint.path),
                "fingerprint": fingerprint,
                "layout": self.checkpoint.layout.variant.name,
                "config": to_plain(config),
                "parameters": config.num_parameters,
            },
            "output": written,
            "format": self.goal.format,
            "targets": plan.plain_targets(self.goal),
            "bits_per_weight": self.goal.bits_per_weight(self.checkpoint),
            "method": self.options.method,
            "sequential": self.options.sequential,
            "calibration": {
                "source": calibration.source,
                "sequences": len(calibration.train),
                "tokens": calibration.tokens,
                "held_out_sequences": len(calibration.held),
                "held_out_tokens": calibration.held_tokens,
                "sha256": calibration.sha256,
            },
            **found,
            "fallbacks": fallbacks,
            "resumed_blocks": resumed,
            "notes": written.get("notes", []),
        }


def _chat_prefix(checkpoint: Checkpoint) -> list[int]:
    """A user's turn, where the model was tuned for chat."""
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        return []
    ends = tokenizer.encode(END)
    end = ends[0] if len(ends) == 1 else None
    tuned, _ = tuned_for_chat(None, checkpoint.config.eos_token_id, end, None, checkpoint.path)
    return chat_prefix(tokenizer.encode, START) if tuned else []


def _notes(found: Calibration, options: Options, fallbacks: list[str]) -> list[str]:
    """For the manifest."""
    source = "written by the model itself" if found.source == SELF else Path(found.source).name
    return [
        f"calibration: {len(found.train)} sequences, {found.tokens} tokens, {source}, sha256 {found.sha256}",
        f"method: {options.method}{', stage after stage' if options.sequential else ''}",
        *fallbacks,
    ]


def _write(
    codes: WorkCodes, checkpoint: Checkpoint, dst: Path, goal: plan.Goal, notes: list[str], *,
    dtype: str, max_shard_size: int | None, tokenizer: str | None, overwrite: bool,
    keep_codes: str | Path | None, meter: Progress,
) -> Report:  # fmt: skip
    if goal.is_gguf:
        return export_gguf(
            codes, checkpoint, dst, goal.format, dtype=dtype, tokenizer=tokenizer,
            overwrite=overwrite, notes=notes, progress=meter,
        )  # fmt: skip
    if keep_codes is not None:
        from .codes_file import write_codes

        write_codes(
            keep_codes, codes, checkpoint, source_fingerprint=codes.source_fingerprint,
            overwrite=overwrite,
        )  # fmt: skip
    return export.export(
        codes, checkpoint, dst, goal.format, dtype=dtype, max_shard_size=max_shard_size,
        tokenizer=tokenizer, overwrite=overwrite, notes=notes, progress=meter,
    )  # fmt: skip


def _planned(
    checkpoint: Checkpoint, goal: plan.Goal, wanted: Wanted, options: Options, dst: Path
) -> Report:
    return {
        "dry_run": True,
        "source": {
            "path": str(checkpoint.path),
            "layout": checkpoint.layout.variant.name,
            "parameters": checkpoint.config.num_parameters,
        },
        "output": {"path": str(dst), "format": goal.format},
        "targets": plan.plain_targets(goal),
        "bits_per_weight": goal.bits_per_weight(checkpoint),
        "method": options.method,
        "calibration": {
            "sequences": wanted.samples,
            "held_out_sequences": wanted.held,
            "seq_len": wanted.seq_len,
        },
        "resources": plan.needs(checkpoint, goal, wanted, options, dst),
        "warnings": [str(w) for w in checkpoint.reading.warnings],
    }


def export_codes(
    codes: str | Path,
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "compressed-tensors",
    config: str | Path | GemmaConfig | None = None,
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write kept codes, or those of a quantized checkpoint, in another format; nothing is rounded again.

    Args:
        codes: directory that ``keep_codes`` made, or a checkpoint of a uniform format.
        src: the checkpoint that was quantized, for everything else; the same as ``codes`` for a quantized checkpoint.
        dst: directory to make.
        format: one of :data:`.export_targets.TARGETS`.
        config: as :func:`quantize`.
        dtype: as :func:`quantize`.
        tokenizer: as :func:`quantize`.
        max_shard_size: as :func:`quantize`.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Raises:
        G2Error: any subclass; ``dst`` is untouched.
    """
    from .codes_file import NAME, CodesFile
    from .rows import CheckpointCodes

    shard = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_shard_size": shard,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "overwrite": overwrite,
        "progress": progress,
    }
    with open_checkpoint(src, config=config) as checkpoint:
        if (Path(codes) / NAME).is_file():
            with CodesFile(codes) as kept:
                return export.export(kept, checkpoint, dst, format, **options)
        with open_checkpoint(codes, config=checkpoint.config) as quantized:
            found: Mapping[str, Any] = CheckpointCodes(quantized)
            return export.export(found, checkpoint, dst, format, **options)
