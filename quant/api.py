"""The library call behind g2quant. Plain data out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..convert.open import Checkpoint, open_checkpoint
from ..convert.progress import Progress, Report, Silent
from ..formats.errors import UsageError
from ..formats.named_files import existing
from ..formats.sharded import size_of
from ..machine import Stopwatch
from ..model.config import GemmaConfig
from . import plan
from .budget import planned_bytes
from .calibration import SELF
from .ggml.seen import require_matrix_file
from .job import Job
from .kept import Keeper
from .known import Known, known_of, require_device
from .pipeline import Options
from .recover import require_recovery
from .scheme import Scheme
from .sensitivity import TOKENS
from .targeted import targeted_of, wish_of
from .work import work_path


def quantize(
    src: str | Path,
    dst: str | Path,
    bits: int = 4,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    method: str | None = None,
    format: str = "compressed-tensors",
    exclude: Sequence[str] = (),
    calibration: str | Path | npt.ArrayLike = SELF,
    moments: Sequence[str | Path] = (),
    imatrix: str | Path | None = None,
    imatrix_out: str | Path | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: float | None = None,
    seed: int = 0,
    sequential: bool = True,
    recover: str = "none",
    target_size: int | str | None = None,
    target_bpw: float | str | None = None,
    choices: Sequence[str] | None = None,
    sensitivity: str | Path | None = None,
    measure: str = "linear",
    measure_tokens: int = TOKENS,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    dtype: str = "keep",
    tokenizer: str | Path | None = None,
    max_shard_size: int | str | None = None,
    max_memory: int | str | None = None,
    device: str = "cpu",
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
        method: ``gptq`` (the better of it and rounding to nearest, weight by weight), ``gptq+`` (also tries to make up for
            what earlier rounding did to a layer's inputs) or ``rtn``; None for ``gptq``, or ``rtn`` where the model is not run.
        format: one of :data:`.plan.FORMATS`.
        exclude: names of linear weights that stay as they are, or patterns of them (``*.down_proj.weight``).
        calibration: ``self`` (the model writes it), ``none`` (the model is not run, weights are rounded to nearest), a text,
            JSONL or ``.npy`` file, or ids; see :func:`.calibration.read_calibration`.
        moments: directories that :func:`.moments.gather_moments` made, in place of a calibration.
        imatrix: importance matrix in place of a calibration: the model is not run.
        imatrix_out: file for the importance matrix of the inputs seen; the old form where it ends in ``.dat``.
        samples: sequences to gather inputs from; None for 128, or 32 for a model above 1e9 parameters on a processor.
        seq_len: tokens of each; None for 512, or the model's context where that is shorter.
        held_out: further sequences, as a share of ``samples``, that judge the result; None for an eighth.
        seed: of what the model writes.
        sequential: gather every stage of a block behind the rounded ones before it; else all at once, in half the time.
        recover: ``scales`` tunes scales and norm gains when codes are chosen, each block to the original's output and then
            all together to its logits, on the calibration sequences; ``codes`` moves codes too, in each block; ``none``
            leaves them.
        target_size: bytes (or ``"1.6GiB"``) that the files of weights may have, embedding and norms included: bits and
            groups are then chosen weight by weight, for the least divergence.
        target_bpw: the same by stored bits per linear weight.
        choices: schemes to choose from, such as ``4g128``, ``8row`` or ``Q4_K``; None for all the format has.
        sensitivity: file of :func:`.measure.sensitivity`, in place of measuring.
        measure: ``linear``, ``every`` or ``block``; see :mod:`.sensitivity`.
        measure_tokens: held-out tokens to measure on.
        config: preset name, config.json or GemmaConfig, for checkpoints that carry none.
        fix_config: correct hyper-parameters known to be wrong in published files.
        gating: ``df`` or ``fd``; see :func:`g2kit.convert.open_checkpoint`.
        dtype: of what is not quantized: ``keep``, ``bf16``, ``f16`` or ``f32``.
        tokenizer: tokenizer.model to put into the output instead of the one found.
        max_shard_size: bytes of weights per file, as a number or as in ``"5GB"``.
        max_memory: bytes to work in, for what can lie on disk as well; None for half of what is free.
        device: ``cpu``, ``cuda`` or ``cuda:0``: where blocks run and weights are rounded.
        keep_codes: directory to keep the codes in, for `g2quant export`; uniform formats only.
        allow_requantize: accept weights that are quantized already.
        dry_run: plan only; write nothing.
        resume: continue an interrupted run; False starts afresh.
        overwrite: replace ``dst`` once the new copy is complete.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: source, output, scheme, method, calibration, ``linears`` (name -> method, errors, damping, fallbacks),
        ``blocks`` (error behind each), ``quality`` (KL, agreement and perplexity on held-out sequences), ``recovery`` (what
        tuning gained, and the tensors beside linear weights that it changed), fallbacks, notes, timing.

    Raises:
        G2Error: any subclass; ``dst`` is untouched.
    """
    watch = Stopwatch()
    require_device(device)
    require_recovery(recover)
    limit = plan.memory_limit(max_memory)
    shard = size_of("max_shard_size", max_shard_size)
    dst, meter = Path(dst), progress or Silent()
    scheme = Scheme(bits, group_size, symmetric)
    wish = wish_of(
        target_size, target_bpw, symmetric, choices, sensitivity, measure, measure_tokens
    )
    kept = None if tokenizer is None else str(tokenizer)
    with open_checkpoint(src, config=config, fix_config=fix_config, gating=gating) as checkpoint:
        plan.require_dense(checkpoint, allow=allow_requantize)
        targeted = targeted_of(
            checkpoint, dst, format, wish, dtype=dtype, max_shard_size=shard, tokenizer=kept
        )
        if targeted is not None and exclude:
            raise UsageError(
                "--exclude does not go with a target size, which decides for every weight."
            )
        goal = (
            plan.goal_of(checkpoint, format, scheme, exclude) if targeted is None else targeted.goal
        )
        if keep_codes is not None and goal.is_gguf:
            raise UsageError("GGUF blocks are not kept as codes.", fix="leave out --keep-codes.")
        read = existing(calibration, imatrix, sensitivity, config, *moments)
        plan.require_destination(dst, goal.format, checkpoint, overwrite=overwrite, inputs=read)
        apart = [*plan.sources_of(checkpoint), *read, *existing(kept), dst, work_path(dst)]
        keeper = None
        if keep_codes is not None:
            keeper = Keeper(keep_codes, dst, checkpoint, overwrite=overwrite, inputs=read)
            apart.append(keeper.place)
        known = known_of(
            checkpoint, calibration, samples, seq_len, held_out, moments=moments, imatrix=imatrix, device=device
        )  # fmt: skip
        given, wanted = known.text, known.wanted
        method = known.method(
            method, recover=recover, imatrix_out=imatrix_out, sequential=sequential
        )
        require_matrix_file(imatrix_out, overwrite=overwrite, apart=apart)
        copies = 2 if recover != "none" or method == "gptq+" else 1
        rows = (copies * wanted.samples + 2 * wanted.held) * wanted.seq_len
        if given is not None:
            rows = copies * given.tokens + 2 * given.held_tokens
        keeps = plan.keeps_states(checkpoint.config, rows, limit)
        options = Options(
            method, sequential, keeps, recover=recover, memory=limit // 4, device=device, merged=known.merged
        )  # fmt: skip
        more: Report = {}
        if targeted is not None:
            goal, known = targeted.run(
                known, seed, method, limit, meter, device=device, resume=resume, keep=not dry_run
            )
            more = targeted.told()
        files: dict[str, Any] = {"dtype": dtype, "tokenizer": kept}
        if not goal.is_gguf:
            files["max_shard_size"] = shard
        nbytes = planned_bytes(goal.targets, checkpoint, dst, goal.format, **files)
        if dry_run:
            return _planned(checkpoint, goal, known, options, dst, limit, nbytes) | more
        job = Job(checkpoint, dst, goal, options, limit, meter, keeper, imatrix_out, more)
        report = job.run(known, seed, resume=resume, overwrite=overwrite, **files)
        if targeted is not None:
            targeted.finish()
    report["run"] = watch.run()
    report["timing"] = {"total": report["run"]["seconds"]}
    return report


def _planned(
    checkpoint: Checkpoint,
    goal: plan.Goal,
    known: Known,
    options: Options,
    dst: Path,
    limit: int,
    nbytes: int,
) -> Report:
    wanted = known.wanted
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
            "source": known.source,
            "sequences": 0 if known.direct else wanted.samples,
            "held_out_sequences": 0 if known.direct else wanted.held,
            "seq_len": wanted.seq_len,
        },
        "resources": plan.needs(checkpoint, goal, known, options, dst, limit, nbytes),
        "warnings": [str(w) for w in checkpoint.reading.warnings],
    }
