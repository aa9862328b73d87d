"""A run whose schemes are decided by a size: sensitivities first, then the allocation, then the goal as any other run has it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..convert import digest
from ..convert.open import Checkpoint
from ..convert.progress import Progress, Report
from ..formats.errors import ConflictError, UsageError
from .budget import (
    GGUF,
    Allocation,
    Budget,
    allocate,
    choices_for,
    preset_of,
    require_overrides,
    require_reachable,
)
from .choose import Target
from .known import Known
from .measure import Measurement, measure_path, read_sensitivity, require_fitting, require_measure
from .plan import Goal
from .sensitivity import TOKENS, Options
from .work import Work


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Attributes:
        budget: the size.
        choices: schemes to choose from, None for all the format has.
        symmetric: of uniform schemes.
        measure: how sensitivities are measured.
        tokens: on how many held-out tokens.
        sensitivity: file of sensitivities that were measured before.
    """

    budget: Budget
    choices: Sequence[str] | None = None
    symmetric: bool = True
    measure: str = "linear"
    tokens: int = TOKENS
    sensitivity: str | Path | None = None


def wish_of(
    size: int | str | None, bits: float | str | None, symmetric: bool, choices: Sequence[str] | None,
    sensitivity: str | Path | None, measure: str, tokens: int,
) -> Wish | None:  # fmt: skip
    """What was asked for, None where no size was.

    Raises:
        UsageError: two sizes, or what only goes with one.
    """
    budget = Budget.of(size, bits)
    if budget is not None:
        return Wish(budget, choices, symmetric, measure, tokens, sensitivity)
    given = {"--choices": choices is not None, "--sensitivity": sensitivity is not None}
    if odd := [n for n, yes in given.items() if yes]:
        raise UsageError(
            f"{' and '.join(odd)} without a size to reach.",
            fix="add --target-size or --target-bpw.",
        )
    return None


def targeted_of(
    checkpoint: Checkpoint, dst: Path, format: str, wish: Wish | None, **options: Any
) -> Targeted | None:
    """As :class:`Targeted`; None where no size was asked for."""
    if wish is not None:
        return Targeted(checkpoint, dst, format, wish, options)
    if format == GGUF:
        raise UsageError(
            "gguf is for mixes made to a size.", fix="add --target-size, or use a type or preset such as gguf-q4_k_m."
        )  # fmt: skip
    return None


class Targeted:
    """The part of a run that comes before its goal is known.

    Args:
        checkpoint: what is quantized.
        dst: where it will go.
        format: one that can hold different schemes.
        wish: what was asked for.
        options: of the export that change sizes: ``dtype``, ``max_shard_size``, ``tokenizer``.

    Attributes:
        goal: of the smallest allocation, until :meth:`run` has found the best.

    Raises:
        UsageError: the format has one scheme for all, or the size is out of reach; says what is not.
    """

    def __init__(
        self, checkpoint: Checkpoint, dst: Path, format: str, wish: Wish, options: dict[str, Any]
    ) -> None:
        require_overrides(format)
        require_measure(wish.measure, wish.tokens)
        self.checkpoint, self.dst, self.format, self.wish = checkpoint, dst, format, wish
        self.options = {k: v for k, v in options.items() if format != GGUF or k != "max_shard_size"}
        self.choices = choices_for(format, checkpoint, wish.choices, symmetric=wish.symmetric)
        smallest = require_reachable(
            checkpoint, dst, format, wish.budget, self.choices, **self.options
        )
        self.goal = _goal(format, smallest, checkpoint)
        self._allocation: Allocation | None = None
        self._document: Report | None = None
        if wish.sensitivity is not None:
            self._document = read_sensitivity(wish.sensitivity)
            require_fitting(self._document, checkpoint, self.choices, wish.sensitivity)

    def run(
        self, known: Known, seed: int, method: str, limit: int, meter: Progress, *, device: str,
        resume: bool, keep: bool,
    ) -> tuple[Goal, Known]:  # fmt: skip
        """Measure and allocate.

        Args:
            known: of the inputs.
            seed: of what the model writes.
            method: of rounding.
            limit: bytes of memory.
            meter: told of phases and bytes.
            device: where the model writes.
            resume: continue an interrupted run.
            keep: work beside the destination, so that it can be continued; else in a temporary directory.

        Returns:
            The goal, and what is known with the sequences that it was measured on.

        Raises:
            UsageError: there is no text to measure on.
            ConflictError: the sensitivities are those of other weights.
        """
        if self._document is None:
            if known.direct or known.merged is not None:
                raise UsageError(
                    "a target needs sensitivities, and these calibration text to run the model on.",
                    fix="use another --calibration, or give --sensitivity FILE.",
                )
            options = Options(self.choices, method, self.wish.measure, self.wish.tokens)
            job = Measurement(self.checkpoint, self.format, options, limit, meter, device)
            with ExitStack() as stack:
                path = measure_path(self.dst)
                if not keep:
                    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "work"
                self._document, found = job.run(path, known, seed, resume, done=not keep)
            known = replace(known, text=found)
        else:
            self._require_same(self._document, meter)
        self._allocation = allocate(
            self._document, self.checkpoint, self.dst, self.format, self.wish.budget, self.choices,
            **self.options,
        )  # fmt: skip
        self.goal = _goal(self.format, self._allocation.targets, self.checkpoint)
        return self.goal, known

    def _require_same(self, document: Report, meter: Progress) -> None:
        """Refuse sensitivities of other weights."""
        source = self.checkpoint
        meter.start(sum(t.nbytes for t in source.tensors.values()), "reading")
        fingerprint = digest.root(digest.digests(source, meter))
        measured = document["source"].get("fingerprint")
        if measured != fingerprint:
            raise ConflictError(
                "measured on other weights than this checkpoint's.",
                where=self.wish.sensitivity, fix="measure this checkpoint.",
                found=measured, expected=fingerprint,
            )  # fmt: skip

    def told(self) -> Report:
        """``allocation`` and ``sensitivity`` of the report."""
        allocation, document = self._allocation, self._document
        assert allocation is not None
        assert document is not None
        said = {
            "budget": str(self.wish.budget),
            "predicted_kl": allocation.kl,
            "weights_bytes": allocation.nbytes,
            "bits_per_weight": allocation.bits,
            "smallest": allocation.smallest,
            "largest": allocation.largest,
            "choices": [str(c) for c in self.choices],
            "measure": document.get("measure"),
            "targets": {n: str(t) for n, t in allocation.targets.items()},
        }
        measured = {k: document.get(k) for k in ("tokens", "anchor", "linears")}
        return {"allocation": said, "sensitivity": measured}

    def finish(self) -> None:
        """The result is in its place: the measurement's work is not needed any more."""
        path = measure_path(self.dst)
        if path.exists():
            with Work(path, {}, resume=False) as work:
                work.remove()


def _goal(format: str, targets: Mapping[str, Target], checkpoint: Checkpoint) -> Goal:
    return Goal(preset_of(targets, checkpoint) if format == GGUF else format, targets)
