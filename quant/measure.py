"""Sensitivities as a document: measured, kept, read again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import __version__
from ..convert import digest
from ..convert.open import Checkpoint, open_checkpoint
from ..convert.progress import Progress, Report, Silent
from ..formats import strict_json
from ..formats.errors import ConflictError, FormatError, UsageError, printable
from ..formats.names import listing
from ..model import canonical
from ..model.config import GemmaConfig
from . import own_text, plan
from .budget import choices_for
from .calibration import SELF, Calibration
from .choose import Target
from .hessian import STAGES
from .known import Known, known_of
from .sensitivity import MEASURES, TOKENS, Options, Sensitivity
from .work import Work

SCHEMA = "g2kit.sensitivity/1"
SUFFIX = ".measuring"


_MOST = 1e30  # a KL; sums of more would not be finite


def measure_path(dst: Path) -> Path:
    """Where a measurement for this file or destination keeps its work."""
    return dst.with_name(dst.name + SUFFIX)


def require_measure(measure: str, tokens: int) -> None:
    """Refuse an unknown way to measure, or no tokens."""
    if measure not in MEASURES:
        raise UsageError(
            f"{printable(measure, 40)} is no way to measure.",
            fix=f"use one of {', '.join(MEASURES)}.",
        )
    if tokens < 1:
        raise UsageError(f"{tokens} tokens to measure on.", fix="use at least 1.")


def sensitivity(
    src: str | Path,
    *,
    format: str = "compressed-tensors",
    choices: Sequence[str] | None = None,
    symmetric: bool = True,
    method: str = "gptq",
    measure: str = "linear",
    tokens: int = TOKENS,
    calibration: str | Path | npt.ArrayLike = SELF,
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: float | None = None,
    seed: int = 0,
    config: str | Path | GemmaConfig | None = None,
    fix_config: bool = False,
    gating: str | None = None,
    max_memory: int | str | None = None,
    device: str = "cpu",
    work: str | Path | None = None,
    resume: bool = True,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure how much each linear weight matters: KL of the original against the model with that weight alone rounded.

    Args:
        src: any checkpoint g2conv opens.
        format: whose schemes are tried; one of :data:`.budget.OVERRIDES`.
        choices: schemes, such as ``4g128`` or ``Q4_K``; None for all the format has.
        symmetric: of uniform schemes.
        method: as :func:`.api.quantize`.
        measure: ``linear``, ``every`` or ``block``; see :mod:`.sensitivity`.
        tokens: held-out tokens to measure on.
        calibration: as :func:`.api.quantize`; so are ``samples``, ``seq_len``, ``held_out``, ``seed``, ``config``,
            ``fix_config``, ``gating``, ``max_memory`` and ``allow_requantize``.
        samples: see there.
        seq_len: see there.
        held_out: see there.
        seed: see there.
        config: see there.
        fix_config: see there.
        gating: see there.
        max_memory: see there.
        device: where the model writes its calibration; it is measured on the processor.
        work: directory to work in, which an interrupted run is continued from; None for a temporary one.
        resume: continue; False starts afresh.
        allow_requantize: see there.
        progress: told of phases and bytes.

    Returns:
        JSON-ready: ``schema``, source, format, ``choices`` (by growing size), ``anchor``, method, measure, calibration,
        ``tokens``, ``tokens_asked``, ``linears`` (weight -> ``weights``, ``choices``: choice -> ``kl``, ``error``, ``measured``,
        ``method``), ``matrix`` (``rows`` layers, ``columns`` and ``kl`` at the anchor), timing.

    Raises:
        G2Error: any subclass.
    """
    began = time.monotonic()
    plan.require_method(method)
    require_measure(measure, tokens)
    limit = plan.memory_limit(max_memory)
    meter = progress or Silent()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(
            open_checkpoint(src, config=config, fix_config=fix_config, gating=gating)
        )
        plan.require_dense(checkpoint, allow=allow_requantize)
        tried = choices_for(format, checkpoint, choices, symmetric=symmetric)
        known = known_of(checkpoint, calibration, samples, seq_len, held_out, device=device)
        if known.direct:
            raise UsageError(
                "without text nothing can be measured.", fix="use another --calibration."
            )
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "work"
        options = Options(tried, method, measure, tokens)
        job = Measurement(checkpoint, format, options, limit, meter, device)
        document, _ = job.run(Path(work), known, seed, resume, done=True)
    document["timing"] = {"total": round(time.monotonic() - began, 3)}
    return document


class Measurement:
    """A measurement with its calibration, in a work directory.

    Args:
        checkpoint: the model.
        format: whose schemes are tried.
        options: how.
        limit: bytes of memory.
        meter: told of phases and bytes.
        device: where the model writes.
    """

    def __init__(
        self, checkpoint: Checkpoint, format: str, options: Options, limit: int, meter: Progress,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.checkpoint, self.format, self.options = checkpoint, format, options
        self.limit, self.meter, self.device = limit, meter, device

    def run(
        self, path: Path, known: Known, seed: int, resume: bool, *, done: bool
    ) -> tuple[Report, Calibration]:
        """The document and the sequences it was measured with.

        Args:
            path: work directory.
            known: sequences, or how many the model is to write.
            seed: of what the model writes.
            resume: continue an interrupted run.
            done: remove the work directory at the end.
        """
        source = self.checkpoint
        self.meter.start(sum(t.nbytes for t in source.tensors.values()), "reading")
        fingerprint = digest.root(digest.digests(source, self.meter))
        with Work(path, self._settings(fingerprint, known, seed), resume=resume) as work:
            found = work.calibration()
            if found is None:
                found = known.text or own_text.written(
                    source, known.wanted, seed, self.limit, self.meter, self.device
                )
                work.keep_calibration(found)
            linears = canonical.linears(source.tensors)
            todo = sum(4 * math.prod(source.tensors[n].shape) for n in linears)
            self.meter.start(todo, "measuring sensitivity")
            measured = Sensitivity(source, found, work, self.options).run(self.meter)
            source.source.check_unchanged()
            if done:
                work.remove()
        return self._document(measured, fingerprint, found), found

    def _settings(self, fingerprint: str, known: Known, seed: int) -> dict[str, str]:
        o = self.options
        return {
            "g2kit's version": __version__,
            "the choices": ", ".join(map(str, o.choices)),
            "--method": o.method,
            "--measure": o.measure,
            "the tokens to measure on": str(o.tokens),
            "the source's weights": fingerprint,
        } | own_text.settings(known.text, known.wanted, seed)

    def _document(self, found: Report, fingerprint: str, calibration: Calibration) -> Report:
        source, o = self.checkpoint, self.options
        return {
            "schema": SCHEMA,
            "source": {
                "path": str(source.path),
                "fingerprint": fingerprint,
                "layout": source.layout.variant.name,
                "parameters": source.config.num_parameters,
            },
            "format": self.format,
            "choices": [str(c) for c in o.choices],
            "anchor": found["anchor"],
            "method": o.method,
            "measure": o.measure,
            "tokens": found["tokens"],
            "tokens_asked": o.tokens,
            "calibration": {
                "source": calibration.source,
                "tokens": calibration.tokens,
                "sha256": calibration.sha256,
            },
            "linears": found["linears"],
            "matrix": _matrix(found["linears"], found["anchor"]),
        }


def _matrix(linears: Mapping[str, Any], anchor: str) -> Report:
    """KL by layer and matrix, for a heat map."""
    templates = [t for stage in STAGES for t in stage.templates]
    layers = sorted({int(n.split(".")[2]) for n in linears})
    return {
        "rows": layers,
        "columns": [t.split(".")[-2] for t in templates],
        "kl": [
            [linears[t.format(i=i)]["choices"][anchor]["kl"] for t in templates] for i in layers
        ],
    }


def read_sensitivity(path: str | Path) -> Report:
    """A document that was kept.

    Raises:
        FormatError: not one.
    """
    found = strict_json.load_object(Path(path))
    linears = found.get("linears")
    if found.get("schema") != SCHEMA or not isinstance(linears, dict):
        raise FormatError(
            "no sensitivities.", where=path, fix="pass a file that `g2quant sensitivity` wrote."
        )
    for name, entry in linears.items():
        choices = entry.get("choices") if isinstance(entry, dict) else None
        for choice in choices.values() if isinstance(choices, dict) else [None]:
            kl = choice.get("kl") if isinstance(choice, dict) else None
            if isinstance(kl, bool) or not isinstance(kl, int | float) or not 0 <= kl <= _MOST:
                raise FormatError("a KL is missing or no number.", where=path, tensor=name)
    said = found.get("choices")
    if not isinstance(found.get("source"), dict) or not (
        isinstance(said, list) and all(isinstance(c, str) for c in said)
    ):
        raise FormatError("what was measured is not said.", where=path)
    return found


def require_fitting(
    document: Mapping[str, Any],
    checkpoint: Checkpoint,
    choices: Sequence[Target],
    where: str | Path,
) -> None:
    """Refuse sensitivities of another model or other schemes.

    Raises:
        ConflictError: says what differs.
    """
    linears = document["linears"]
    wanted = canonical.linears(checkpoint.tensors)
    if set(linears) != set(wanted):
        raise ConflictError(
            f"measured on a model with other weights: {listing(sorted(set(linears) ^ set(wanted)), 3)}.",
            where=where, fix="measure this model.",
        )  # fmt: skip
    missing = [str(c) for c in choices if any(str(c) not in linears[n]["choices"] for n in wanted)]
    if missing:
        raise ConflictError(
            f"not measured: {', '.join(missing)}; measured: {', '.join(document['choices'])}.",
            where=where,
            fix="pass --choices with what was measured, in words such as 4g128 or Q4_K, or measure again.",
        )  # fmt: skip
