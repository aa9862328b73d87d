"""How far apart two correct runs of a model are: the measured noise that thresholds are multiples of.

Each estimator is a comparison of two runs that ought to be the same; the floor is the largest of them, metric by metric.
Replaying a run is none: it may repeat itself to the bit and still be wrong by its dtype's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..convert.open import Checkpoint
from ..formats.dtypes import BF16
from ..formats.errors import DependencyError, FormatError, UsageError
from ..model.bootstrap import ratio_interval
from ..model.logits_stats import Stats
from .batches import BATCH_TOKENS, ProbeLike
from .block_errors import BlockError
from .lockstep import LockstepResult, run_lockstep
from .permutation import permuted
from .runners import open_runner
from .runners.base import TAPS, Runner
from .taps import tap_errors
from .views import ChangedTensor, changed

K = 10.0  # KL may be this many times its floor; it grows with the square of the error, everything else with its root
BUDGET = 512  # tokens of probes a floor is measured on
TAP_TOKENS = 256
# one rounding of the compute type: nothing is expected nearer than that
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float64": 2.0**-53}


@dataclass(frozen=True)
class Estimate:
    """One estimator's result.

    Attributes:
        name: what was compared.
        dtype: compute type it speaks for.
        tokens, documents: evidence.
        kl_max: largest KL of a position, nats.
        kl_mean: upper 95 % bound of its mean (documents resampled; with few of them, the largest document's mean).
        rms_logit: largest RMS logit difference of a position, its mean over the vocabulary removed.
        hidden: largest accumulated relative error of embedding, blocks and final norm, in this order; may be empty.
        isolated: largest isolated one, the same order (0 where there is none).
        taps: tap -> largest relative error per block, the block's input the same; may be empty.
    """

    name: str
    dtype: str
    tokens: int
    documents: int
    kl_max: float
    kl_mean: float
    rms_logit: float
    hidden: tuple[float, ...] = ()
    isolated: tuple[float, ...] = ()
    taps: dict[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Floor:
    """The largest of all estimates, and what follows.

    Attributes:
        dtype: compute type.
        estimators: in the order they ran.
        k: factor between floor and threshold for KL; its root for the others.
        skipped: ``(estimator, why)``.
    """

    dtype: str
    estimators: tuple[Estimate, ...]
    k: float = K
    skipped: tuple[tuple[str, str], ...] = ()

    METRICS: ClassVar[tuple[str, ...]] = ("kl_max", "kl_mean", "rms_logit")

    @property
    def kl_max(self) -> float:
        """Nats."""
        return max(e.kl_max for e in self.estimators)

    @property
    def kl_mean(self) -> float:
        """Nats."""
        return max(e.kl_mean for e in self.estimators)

    @property
    def rms_logit(self) -> float:
        """Logits."""
        return max(e.rms_logit for e in self.estimators)

    def hidden(self, layer: int, *, isolated: bool = False) -> float | None:
        """Relative error of a layer's output (-1: the embedding); None where no estimator saw hidden states."""
        seen = [e.isolated if isolated else e.hidden for e in self.estimators]
        values = [v[layer + 1] for v in seen if len(v) > layer + 1]
        return max(*values, _UNIT[self.dtype]) if values else None

    def tap(self, name: str, layer: int) -> float:
        """Relative error of an intermediate, on the same input; the block's own where taps were not measured."""
        values = [e.taps[name][layer] for e in self.estimators if e.taps]
        if not values:
            values = [self.hidden(layer, isolated=True) or 0.0]
        return max(*values, _UNIT[self.dtype])

    def threshold(self, metric: str, layer: int | None = None) -> float | None:
        """What a metric may reach.

        Args:
            metric: ``kl_max``, ``kl_mean``, ``rms_logit``; with a layer ``hidden``, ``isolated`` or a tap's name.
            layer: -1 for the embedding, the number of blocks for the final norm.

        Returns:
            None for hidden states no estimator saw.

        Raises:
            UsageError: no such metric.
        """
        if metric in ("kl_max", "kl_mean"):
            return self.k * float(getattr(self, metric))
        root = math.sqrt(self.k)
        if metric == "rms_logit":
            return root * self.rms_logit
        if layer is not None and metric in ("hidden", "isolated"):
            value = self.hidden(layer, isolated=metric == "isolated")
            return None if value is None else root * value
        if layer is not None and metric in TAPS:
            return root * self.tap(metric, layer)
        raise UsageError(f"a floor has no metric {metric!r}.")

    def plus(self, other: Floor) -> Floor:
        """The floor between a run with this one and a run with the other: errors add, so KL does in its root."""
        return Floor(
            self.dtype if _UNIT[self.dtype] >= _UNIT[other.dtype] else other.dtype,
            (_sum(_most(self), _most(other)),),
            max(self.k, other.k),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: what :meth:`from_json` takes, and ``kl_max``, ``kl_mean``, ``rms_logit`` for readers."""
        return {
            "dtype": self.dtype,
            "k": self.k,
            **{m: getattr(self, m) for m in self.METRICS},
            "estimators": [_plain(e) for e in self.estimators],
            "skipped": [list(s) for s in self.skipped],
        }

    @staticmethod
    def from_json(data: Any) -> Floor:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        try:
            estimates = tuple(_estimate(e) for e in data["estimators"])
            skipped = tuple((str(a), str(b)) for a, b in data["skipped"])
            k = float(data["k"])
            if not estimates or data["dtype"] not in _UNIT or not (math.isfinite(k) and k > 0):
                raise ValueError
            return Floor(data["dtype"], estimates, k, skipped)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FormatError("not a noise floor: fields are missing or unknown.") from None


def _plain(e: Estimate) -> dict[str, Any]:
    taps = None if e.taps is None else {n: list(v) for n, v in e.taps.items()}
    return {**asdict(e), "hidden": list(e.hidden), "isolated": list(e.isolated), "taps": taps}


def _estimate(data: Any) -> Estimate:
    numbers = {n: float(data[n]) for n in Floor.METRICS}
    lists = {n: tuple(float(x) for x in data[n]) for n in ("hidden", "isolated")}
    taps = data["taps"]
    if taps is not None:
        taps = {n: tuple(float(x) for x in taps[n]) for n in TAPS}
    flat = [*numbers.values(), *lists["hidden"], *lists["isolated"]]
    flat += [x for v in (taps or {}).values() for x in v]
    if any(not math.isfinite(x) or x < 0 for x in flat):
        raise ValueError
    return Estimate(
        str(data["name"]), str(data["dtype"]), int(data["tokens"]), int(data["documents"]),
        taps=taps, **numbers, **lists,
    )  # fmt: skip


def _most(floor: Floor) -> Estimate:
    """One estimate that says what the floor says."""
    size = max((len(e.hidden) for e in floor.estimators), default=0)
    layers = range(-1, size - 1)
    return Estimate(
        "+".join(e.name for e in floor.estimators), floor.dtype,
        max(e.tokens for e in floor.estimators), max(e.documents for e in floor.estimators),
        floor.kl_max, floor.kl_mean, floor.rms_logit,
        tuple(floor.hidden(i) or 0.0 for i in layers),
        tuple(floor.hidden(i, isolated=True) or 0.0 for i in layers),
    )  # fmt: skip


def _sum(a: Estimate, b: Estimate) -> Estimate:
    def root(x: float, y: float) -> float:
        return (math.sqrt(x) + math.sqrt(y)) ** 2

    def each(x: tuple[float, ...], y: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(p + q for p, q in zip(x, y, strict=False))

    return Estimate(
        f"{a.name} and {b.name}", a.dtype, min(a.tokens, b.tokens), min(a.documents, b.documents),
        root(a.kl_max, b.kl_max), root(a.kl_mean, b.kl_mean), a.rms_logit + b.rms_logit,
        each(a.hidden, b.hidden), each(a.isolated, b.isolated),
    )  # fmt: skip


def estimate(name: str, dtype: str, result: LockstepResult) -> Estimate:
    """What a comparison of two runs that ought to be the same says about noise.

    Raises:
        UsageError: no position of it is finite.
    """
    stats = Stats.join([r.stats for r in result.records])
    good = stats.select(stats.finite)
    if not len(good):
        raise UsageError(f"the floor's {name} has no finite position.")
    documents = [r.stats.select(r.stats.finite) for r in result.records]
    documents = [s for s in documents if len(s)]
    sums = [math.fsum(s.kl.tolist()) for s in documents]
    interval = ratio_interval(sums, [len(s) for s in documents])
    worst = max(s / len(d) for s, d in zip(sums, documents, strict=True))
    return Estimate(
        name, dtype, len(good), len(documents),
        kl_max=float(good.kl.max()),
        kl_mean=worst if interval.high is None else max(interval.high, interval.estimate or 0.0),
        rms_logit=float(good.rms_diff.max()),
        hidden=tuple(e.reached or 0.0 for e in result.errors),
        isolated=tuple(_alone(e) for e in result.errors),
    )  # fmt: skip


def _alone(e: BlockError) -> float:
    return (e.reached if e.kind == "embedding" else e.own) or 0.0


def floor_probes(probes: Iterable[ProbeLike], budget: int = BUDGET) -> list[ProbeLike]:
    """A few probes of all lengths: the longest that takes at most half of ``budget`` tokens, then short ones of every
    category in turn.
    """
    order = sorted(probes, key=lambda p: (len(p.tokens), p.id))
    if not order:
        raise UsageError("a floor needs at least one probe.")
    half = [p for p in order if len(p.tokens) <= budget // 2]
    chosen = [half[-1] if half else order[0]]
    left = budget - len(chosen[0].tokens)
    ranks: dict[str, int] = {}
    turns = []
    for p in order:
        ranks[p.category] = ranks.get(p.category, 0) + 1
        turns.append((ranks[p.category], len(p.tokens), p.id, p))
    for *_, p in sorted(turns, key=lambda t: t[:3]):
        if p is not chosen[0] and len(p.tokens) <= left:
            chosen.append(p)
            left -= len(p.tokens)
    return chosen


def measure_floor(
    checkpoint: Checkpoint,
    probes: Sequence[ProbeLike],
    dtype: str = "float32",
    *,
    runner: str = "torch",
    device: str | None = None,
    second: str | None = None,
    emulate: str | None = None,
    names: Sequence[str] = ("float64", "permuted", "stochastic", "second", "emulated"),
    tiles: bool = False,
    budget: int = BUDGET,
    batch_tokens: int = BATCH_TOKENS,
    k: float = K,
    progress: Callable[[int, str], None] = lambda tokens, what: None,
) -> Floor:
    """Measure the noise of running a checkpoint in a compute type.

    Args:
        checkpoint: the reference, opened.
        probes: of which :func:`floor_probes` takes some.
        dtype: compute type the thresholds are for.
        runner: ``torch`` or ``jax``: whose arithmetic.
        device: of that runner.
        second: another runner to compare with; left out with its reason where its package is missing.
        emulate: ``llama_cpp``: add its float16 table of GELU, for a candidate run by it.
        names: estimators to run.
        tiles: as the comparison the floor is for has it (:attr:`LockstepResult.head`).
        budget: tokens.
        batch_tokens: largest padded batch.
        k: factor between floor and threshold.
        progress: as in :func:`.lockstep.run_lockstep`.

    Raises:
        UsageError: no estimator is left, or a runner that cannot take part.
    """
    if runner not in ("torch", "jax"):
        raise UsageError(f"a floor is measured with the torch or jax runner, not with {runner!r}.")
    job = _Job(checkpoint, floor_probes(probes, budget), dtype, runner, device, tiles, batch_tokens, progress)  # fmt: skip
    made: list[Estimate] = []
    skipped: list[tuple[str, str]] = []
    for name in names:
        try:
            found = _ESTIMATORS[name](job, {"second": second, "emulated": emulate}.get(name))
        except DependencyError as e:
            skipped.append((name, str(e)))
            continue
        if isinstance(found, str):
            skipped.append((name, found))
        else:
            made.append(found)
    if not made:
        raise UsageError(f"no estimator of the {dtype} floor could run: {skipped}.")
    return Floor(dtype, tuple(made), k, tuple(skipped))


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    probes: list[ProbeLike]
    dtype: str
    runner: str
    device: str | None
    tiles: bool
    batch_tokens: int
    progress: Callable[[int, str], None]

    def open(self, checkpoint: Checkpoint | None = None, **options: Any) -> Runner:
        """The run whose noise is asked for."""
        return open_runner(
            self.runner, checkpoint or self.checkpoint, dtype=self.dtype, device=self.device, **options
        )

    def compare(self, name: str, ref: Runner, cand: Runner) -> Estimate:
        with ref, cand:
            result = run_lockstep(
                ref, cand, self.probes, tiles=self.tiles, batch_tokens=self.batch_tokens,
                progress=self.progress,
            )  # fmt: skip
        return estimate(name, self.dtype, result)


_EXACT = "nothing is more exact than float64"


def _float64(job: _Job, option: str | None) -> Estimate | str:
    """The same weights, rounded as the run rounds them, in float64."""
    if job.dtype == "float64":
        return _EXACT
    same = _rounded(job.checkpoint) if job.dtype == "bfloat16" else job.checkpoint
    found = job.compare(
        "float64 run", open_runner("torch", same, dtype="float64", device=job.device if job.runner == "torch" else None), job.open()
    )
    return replace(found, taps=_tap_floor(job, same))


def _tap_floor(job: _Job, same: Checkpoint) -> dict[str, tuple[float, ...]]:
    """Errors of every block's intermediates over the longest probe that is short enough for whole score matrices."""
    fitting = [p for p in job.probes if len(p.tokens) <= TAP_TOKENS] or job.probes
    tokens = max(fitting, key=lambda p: (len(p.tokens), p.id)).tokens[:TAP_TOKENS]
    with open_runner("torch", same, dtype="float64") as ref, job.open() as cand:
        layers = [errors for _, errors in tap_errors(ref, cand, tokens)]
    return {n: tuple(float(np.nanmax(e[n])) for e in layers) for n in TAPS}


def _permuted(job: _Job, option: str | None) -> Estimate | str:
    """The same function with its sums in another order."""
    return job.compare("permuted weights", job.open(), job.open(permuted(job.checkpoint)))


def _stochastic(job: _Job, option: str | None) -> Estimate | str:
    """Results of matrix products rounded up or down at random."""
    if job.dtype == "float64":
        return _EXACT
    if job.runner != "torch":
        return "needs the torch runner"
    from .rounding import StochasticLinear

    linear = StochasticLinear(seed=0, device=job.device or "cpu")
    return job.compare("stochastic rounding", job.open(), job.open(linear=linear))


def _second(job: _Job, option: str | None) -> Estimate | str:
    """Another implementation."""
    if option is None or option == job.runner:
        return "no second runner was named"
    cand = open_runner(option, job.checkpoint, dtype=job.dtype)
    return job.compare(f"{option} runner", job.open(), cand)


def _emulated(job: _Job, option: str | None) -> Estimate | str:
    """A consumer's known shortcuts, imitated."""
    if option is None:
        return "no consumer to imitate"
    if option != "llama_cpp" or job.runner != "torch":
        raise UsageError(f"no arithmetic of {option!r} is known, for the {job.runner} runner.")
    from .rounding import GeluLinear, table_gelu

    return job.compare("float16 table of GELU", job.open(), job.open(linear=GeluLinear(table_gelu)))


_ESTIMATORS: dict[str, Callable[[_Job, str | None], Estimate | str]] = {
    "float64": _float64,
    "permuted": _permuted,
    "stochastic": _stochastic,
    "second": _second,
    "emulated": _emulated,
}


def _rounded(checkpoint: Checkpoint) -> Checkpoint:
    """Weights rounded to bfloat16, as a bfloat16 run has them."""
    tensors = {}
    for name, t in checkpoint.tensors.items():
        if t.dtype != BF16:
            rows = (lambda a, b, t=t: t.read_rows(a, b).astype(BF16)) if t.streams_rows else None
            tensors[name] = ChangedTensor(t, lambda t=t: t.read().astype(BF16), rows)
    return changed(checkpoint, tensors)
