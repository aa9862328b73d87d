"""What claims are made of: numbers, verdicts, and the evidence they are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..model.bootstrap import Interval
from .identity import Identity
from .ledger import Row

PASS, FAIL, INCONCLUSIVE, ERROR = "PASS", "FAIL", "INCONCLUSIVE", "ERROR"
EXACT = ("float32", "float64")  # compute types in which structural faults show


@dataclass(frozen=True)
class Proof:
    """One number a verdict rests on.

    Attributes:
        metric: what it is.
        value: measured.
        interval: its 95 % interval, or None.
        threshold: what it was held against, or None.
        unit: of value and threshold.
        source: where the threshold came from.
        better: which side of the threshold is the good one, ``lower`` or ``higher``.
    """

    metric: str
    value: float | None
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    unit: str = ""
    source: str = ""
    better: str = "lower"

    def to_json(self) -> dict[str, Any]:
        """The report's row."""
        interval = None if self.interval is None else list(self.interval)
        return {**asdict(self), "interval": interval}


@dataclass(frozen=True)
class Claim:
    """A claim and its verdict.

    Attributes:
        id: ``W1`` to ``X1``.
        title: what is claimed.
        verdict: PASS, FAIL, INCONCLUSIVE or ERROR.
        sentence: the verdict in words.
        evidence: what it rests on.
        missing: what would settle an INCONCLUSIVE.
    """

    id: str
    title: str
    verdict: str
    sentence: str
    evidence: tuple[Proof, ...] = ()
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report's object."""
        return {
            **asdict(self),
            "evidence": [p.to_json() for p in self.evidence],
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class Measured:
    """What running both sides over the probes gave.

    Attributes:
        documents, positions: compared.
        kl_max: largest KL of a position in nats; None without a finite one.
        kl: mean KL of scored sequences with its interval.
        clusters: what that interval resamples: ``documents`` where the probes have any, else ``sequences``.
        kl_mean: mean KL of all positions.
        rms_max: largest RMS logit difference.
        tv: mean total variation, the share of sampled tokens that change.
        non_finite: where the first NaN or infinity is, as a sentence; None without one.
        divergent: the first block beyond its floor, as a phrase; None where no block is, or none was measured.
        block_error, block_threshold: relative error of the block nearest to, or beyond, what the floor allows it.
        lower_bound: KL and its like are lower bounds (a recording of the largest logits only).
    """

    documents: int
    positions: int
    kl_max: float | None
    kl: Interval
    clusters: str = "sequences"
    kl_mean: float | None = None
    rms_max: float | None = None
    tv: float | None = None
    non_finite: str | None = None
    divergent: str | None = None
    block_error: float | None = None
    block_threshold: float | None = None
    lower_bound: bool = False


@dataclass(frozen=True)
class Limits:
    """Thresholds from noise floors.

    Attributes:
        kl_max, rms_max: k times, sqrt(k) times the floor; None where no estimator gave one.
        source: of KL's, in words, such as ``10 x floor (float64 run)``; where there is no floor, why.
        kl_mean: k times the floor of the mean.
        root_source: of the others', with the root of k; "" where it is ``source``.
    """

    kl_max: float | None
    rms_max: float | None
    source: str
    kl_mean: float | None = None
    root_source: str = ""


@dataclass(frozen=True)
class Evidence:
    """Everything claims are judged on.

    Attributes:
        identity: of C0.
        rows: the ledger; None where a side is a recording.
        fingerprints: of reference and candidate, None where unknown.
        dtypes: compute types of reference and candidate.
        recorded: the reference is a recording.
        quantized: the candidate's weights are packed.
        bits: stored bits per weight of the candidate's narrowest matrices.
        measured: reference against candidate; None where nothing was run.
        limits: for ``measured``.
        kernel: dequantized candidate against the kernel that serves it; None where none was run.
        kernel_name: of that runner.
        kernel_limits: for ``kernel``.
        failed_checks: sentences of behaviour checks that failed.
        uncovered: sentences on regimes that a claim about the function needs and the probes did not reach.
        budget: allowed mean KL in nats.
        budget_source: where it came from.
    """

    identity: Identity
    rows: Sequence[Row] | None = None
    fingerprints: tuple[str | None, str | None] = (None, None)
    dtypes: tuple[str, str] = ("float32", "float32")
    recorded: bool = False
    quantized: bool = False
    bits: float = 16.0
    measured: Measured | None = None
    limits: Limits | None = None
    kernel: Measured | None = None
    kernel_name: str = ""
    kernel_limits: Limits | None = None
    failed_checks: Sequence[str] = field(default_factory=tuple)
    uncovered: Sequence[str] = field(default_factory=tuple)
    budget: float = 0.0
    budget_source: str = ""

    @property
    def lossy(self) -> bool:
        """Whether the candidate's weights are meant to differ."""
        return self.quantized or any(r.lossy for r in self.rows or ())

    @property
    def exact(self) -> bool:
        """Whether both sides computed in a type that shows structural faults."""
        return all(d in EXACT for d in self.dtypes)
