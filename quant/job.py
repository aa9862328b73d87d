"""A run of g2quant once everything is settled: calibrate, round, write, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..convert import digest
from ..convert.open import Checkpoint
from ..convert.progress import Progress, Report
from ..model import canonical
from ..model.config_formats import to_plain
from . import choose, document, export, own_text, plan
from .calibration import Calibration
from .direct import Direct
from .ggml.export import export_gguf
from .ggml.seen import write_matrix
from .kept import Keeper
from .known import Known
from .pipeline import Options, Pipeline
from .recover import recovered
from .work import Work, WorkCodes, work_path


def _settings(goal: plan.Goal, options: Options, known: Known, seed: int) -> dict[str, str]:
    """What decides the codes."""
    targets = plan.plain_targets(goal)
    out = {
        "g2kit's version": __version__,
        "the scheme": ", ".join(sorted(targets)),
        "--method": options.method,
        "--sequential": str(options.sequential),
        "--recover": options.recover,
        "--device": torch.device(options.device).type,
    }
    if goal.is_gguf:
        out["--format"] = goal.format
    return out | known.settings() | own_text.settings(known.text, known.wanted, seed)


def _source_settings(checkpoint: Checkpoint, fingerprint: str, goal: plan.Goal) -> dict[str, str]:
    """What decides the codes and follows from the source: its weights, its configuration, what each weight becomes."""
    config = to_plain(checkpoint.config)
    out = {"the source's weights": fingerprint} | {f"its {k}": str(v) for k, v in config.items()}
    every = len(goal.targets) == len(canonical.linears(checkpoint.tensors))
    if len(set(goal.targets.values())) > 1 or not every:
        text = json.dumps({n: str(t) for n, t in goal.targets.items()}, sort_keys=True)
        out["the weights' own schemes"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return out


class Job:
    """The long part of a run: from the source's fingerprint to the report.

    Args:
        checkpoint: the source.
        dst: where the result goes.
        goal: what every weight becomes.
        options: how it is rounded.
        limit: bytes of memory to work in.
        meter: told of phases and bytes.
        keeper: place for the codes, or None.
        imatrix_out: file for an importance matrix of the inputs seen, or None.
        more: values for the report.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dst: Path,
        goal: plan.Goal,
        options: Options,
        limit: int,
        meter: Progress,
        keeper: Keeper | None = None,
        imatrix_out: str | Path | None = None,
        more: Report | None = None,
    ) -> None:
        self.checkpoint, self.dst, self.goal = checkpoint, dst, goal
        self.options, self.limit, self.meter = options, limit, meter
        self.keeper, self.imatrix_out, self.more = keeper, imatrix_out, more or {}

    def run(self, known: Known, seed: int, *, resume: bool, **files: Any) -> Report:
        """The report.

        Args:
            known: of the inputs.
            seed: of what the model writes.
            resume: continue an interrupted run.
            files: for the exporter: ``dtype``, ``tokenizer``, ``overwrite``, ``max_shard_size``.
        """
        source = self.checkpoint
        self.meter.start(sum(t.nbytes for t in source.tensors.values()), "reading")
        fingerprint = digest.root(digest.digests(source, self.meter, finite=True))
        settings = _settings(self.goal, self.options, known, seed)
        settings |= _source_settings(source, fingerprint, self.goal)
        known.require_source(fingerprint, source.path)
        if self.keeper is not None:
            self.keeper.begin(settings)
        with Work(work_path(self.dst), settings, resume=resume) as work:
            found = known.text if known.direct else work.calibration()
            if found is None:
                found = known.text or own_text.written(
                    source, known.wanted, seed, self.limit, self.meter, self.options.device
                )
                work.keep_calibration(found)
            todo = sum(
                4 * source.tensors[n].shape[0] * source.tensors[n].shape[1]
                for n in self.goal.targets
                if int(n.split(".")[2]) not in work.layers
            )
            job: Direct | Pipeline
            if known.direct:
                job = Direct(source, self.goal.targets, work, known.importance, self.options.device)
            else:
                job = Pipeline(source, self.goal.targets, found, work, self.options)
            todo += job.tuning_bytes if work.tuned is None else 0
            self.meter.start(todo, "quantizing")
            report = job.run(self.meter)
            source.source.check_unchanged()
            notes = choose.summary(report["linears"])
            codes = WorkCodes(work, self.goal.targets, fingerprint, source.config.num_hidden_layers)
            told = known.described(found)
            all_notes = [*told, *self.options.described(), *notes, *recovered(report)]
            written = self._write(codes, all_notes, files)
            if self.imatrix_out is not None:
                write_matrix(self.imatrix_out, work, found, source.config)
            resumed = work.resumed
            work.remove()
        return self._report(report, written, known.whole(found), fingerprint, resumed, notes)

    def _write(self, codes: WorkCodes, notes: list[str], files: Mapping[str, Any]) -> Report:
        place = (codes, self.checkpoint, self.dst, self.goal.format)
        if self.goal.is_gguf:
            return export_gguf(*place, notes=notes, progress=self.meter, **files)
        if self.keeper is not None:
            self.keeper.write(codes, codes.source_fingerprint)
        return export.export(*place, notes=notes, progress=self.meter, **files)

    def _report(
        self, found: dict[str, Any], written: Report, calibration: Calibration, fingerprint: str,
        resumed: int, fallbacks: list[str],
    ) -> Report:  # fmt: skip
        config = self.checkpoint.config
        done = {
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
            "recover": self.options.recover,
            "calibration": {
                "source": calibration.source,
                "sequences": len(calibration.train),
                "tokens": calibration.tokens,
                "held_out_sequences": len(calibration.held),
                "held_out_tokens": calibration.held_tokens,
                "sha256": calibration.sha256,
            },
            **found,
            **self.more,
            "fallbacks": fallbacks,
            "resumed_blocks": resumed,
            "notes": written.get("notes", []),
        }
        return document.complete(done, self.checkpoint, self.goal)
