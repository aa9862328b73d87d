"""How far apart two correct runs of a model are: the measured noise that thresholds are multiples of.

Each estimator is a comparison of two runs that ought to be the same; the floor is the largest of them, metric by metric.
Replaying a run is none: it may repeat itself to the bit and still be wrong by its dtype's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..convert.open import Checkpoint, LazyTensor
from ..convert.progress import SILENT, Tick
from ..formats.dtypes import BF16
from ..formats.errors import DependencyError, UsageError
from ..model.bootstrap import ratio_interval
from ..model.logits_stats import Stats
from .batches import BATCH_TOKENS, ProbeLike
from .block_errors import BlockError
from .lockstep import LockstepResult, run_lockstep
from .noise import Estimate, Floor, K
from .permutation import permuted
from .runners import open_runner
from .runners.base import TAPS, Runner
from .taps import tap_errors
from .views import ChangedTensor, changed

__all__ = ["Estimate", "Floor", "K", "estimate", "floor_probes", "largest_of", "measure_floor"]

BUDGET = 768  # tokens of probes a floor is measured on
TAP_TOKENS = 256


def largest_of(values: Any, positions: int) -> float:
    """Upper 95 % bound of the largest of ``positions`` values of which ``values`` are a sample.

    Noise of logits has a heavy tail: on the bundled sample the largest KL of 15 000 positions is ten times that of 500.
    The tail is taken to be Pareto's; its index is Hill's estimator (1975) over the top tenth.
    """
    x = np.sort(values)[::-1]
    top = len(x) // 10
    if top < 10 or x[top] <= 0:
        return float(x[0])
    index = float(np.log(x[:top] / x[top]).mean())
    beyond = top / len(x) * max(positions, len(x)) / 0.05
    return max(float(x[0]), float(x[top]) * float(beyond**index))


def estimate(
    name: str, dtype: str, result: LockstepResult, positions: int | None = None
) -> Estimate:
    """What a comparison of two runs that ought to be the same says about noise.

    Args:
        name: of the estimator.
        dtype: compute type.
        result: of the two runs.
        positions: how many the comparison has that the floor is for; default as many as ``result``.

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
        kl_max=largest_of(good.kl, positions or len(good)),
        kl_mean=worst if interval.high is None else max(interval.high, interval.estimate or 0.0),
        rms_logit=largest_of(good.rms_diff, positions or len(good)),
        hidden=tuple(e.reached or 0.0 for e in result.errors),
        isolated=tuple(_alone(e) for e in result.errors),
    )  # fmt: skip


def _alone(e: BlockError) -> float:
    return (e.reached if e.kind == "embedding" else e.own) or 0.0


@dataclass(frozen=True)
class _Cut:
    """The beginning of a probe."""

    id: str
    category: str
    tokens: Any
    scored: bool


def floor_probes(probes: Iterable[ProbeLike], budget: int = BUDGET) -> list[ProbeLike]:
    """Tokens to measure a floor on.

    The longest probe that takes at most a quarter of ``budget``, then beginnings of others, groups in turn.
    """
    order = sorted(probes, key=lambda p: (len(p.tokens), p.id))
    if not order:
        raise UsageError("a floor needs at least one probe.")
    short = [p for p in order if len(p.tokens) <= budget // 4]
    first = short[-1] if short else order[0]
    chosen = [first]
    left, piece = budget - len(first.tokens), max(2, budget // 8)
    seen: dict[str, int] = {}
    turns: list[tuple[int, int, ProbeLike]] = []
    for p in reversed(order):
        group = p.id.partition("/")[0]
        seen[group] = seen.get(group, 0) + 1
        turns.append((seen[group], -len(p.tokens), p))
    for *_, p in sorted(turns, key=lambda t: (t[0], t[1], t[2].id)):
        size = min(len(p.tokens), piece)
        if p is not first and size <= left:
            chosen.append(_Cut(p.id, p.category, p.tokens[:size], p.scored))
            left -= size
    return chosen


def measure_floor(
    checkpoint: Checkpoint,
    probes: Iterable[ProbeLike],
    dtype: str = "float32",
    *,
    runner: str = "torch",
    device: str | None = None,
    second: str | None = None,
    emulate: str | None = None,
    names: Sequence[str] = ("float64", "far", "permuted", "stochastic", "second", "emulated"),
    tiles: bool = False,
    budget: int = BUDGET,
    batch_tokens: int = BATCH_TOKENS,
    k: float = K,
    progress: Tick = SILENT,
) -> Floor:
    """Measure the noise of running a checkpoint in a compute type.

    Args:
        checkpoint: the reference, opened.
        probes: of the comparison; :func:`floor_probes` takes some.
        dtype: compute type the thresholds are for.
        runner: ``torch`` or ``jax``: whose arithmetic.
        device: of that runner.
        second: another runner to compare with; left out with its reason where its package is missing.
        emulate: ``llama_cpp``: add its float16 table of GELU, for a candidate run by it.
        names: estimators to run.
        tiles: as the comparison the floor is for has it (:attr:`LockstepResult.head`).
        budget: tokens to measure with.
        batch_tokens: largest padded batch.
        k: factor between floor and threshold.
        progress: as in :func:`.lockstep.run_lockstep`.

    Raises:
        UsageError: no estimator is left, or a runner that cannot take part.
    """
    if runner not in ("torch", "jax"):
        raise UsageError(f"a floor is measured with the torch or jax runner, not with {runner!r}.")
    probes = list(probes)
    chosen = floor_probes(probes, budget)
    lengths = [len(p.tokens) for p in probes]
    job = _Job(
        checkpoint, chosen, dtype, runner, device, tiles, batch_tokens, progress,
        lengths, sum(lengths),
    )  # fmt: skip
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
    progress: Tick
    lengths: list[int]
    positions: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def open(self, checkpoint: Checkpoint | None = None, **options: Any) -> Runner:
        """The run whose noise is asked for."""
        return open_runner(
            self.runner,
            checkpoint or self.checkpoint,
            dtype=self.dtype,
            device=self.device,
            **options,
        )

    def compare(self, name: str, ref: Runner, cand: Runner) -> Estimate:
        with ref, cand:
            result = run_lockstep(
                ref, cand, self.probes, tiles=self.tiles, batch_tokens=self.batch_tokens,
                progress=self.progress,
            )  # fmt: skip
        return estimate(name, self.dtype, result, self.positions)


_EXACT = "nothing is more exact than float64"


def _float64(job: _Job, option: str | None) -> Estimate | str:
    """The same weights, rounded as the run rounds them, in float64."""
    return _EXACT if job.dtype == "float64" else _against_float64(job, "float64 run", 0)


def _far(job: _Job, option: str | None) -> Estimate | str:
    """The same at the positions where the longest probe ends: angles of RoPE are off by position x 2^-24 in float32."""
    here = max(len(p.tokens) for p in job.probes)
    if job.dtype == "float64":
        return _EXACT
    if job.longest <= 2 * here:
        return "no probe is much longer than those it is measured with"
    beyond = sum(max(0, n - here) for n in job.lengths)
    name = f"float64 run at positions to {job.longest}"
    return _against_float64(replace(job, positions=beyond), name, job.longest - here)


def _against_float64(job: _Job, name: str, offset: int) -> Estimate:
    same = _rounded(job.checkpoint) if job.dtype == "bfloat16" else job.checkpoint
    device = job.device if job.runner == "torch" else None

    def pair() -> tuple[Runner, Runner]:
        wide = open_runner("torch", same, dtype="float64", device=device, offset=offset)
        return wide, job.open(offset=offset)

    return replace(job.compare(name, *pair()), taps=_tap_floor(job, *pair()))


def _tap_floor(job: _Job, ref: Runner, cand: Runner) -> dict[str, tuple[float, ...]]:
    """Errors of every block's intermediates over the longest probe that is short enough for whole score matrices."""
    fitting = [p for p in job.probes if len(p.tokens) <= TAP_TOKENS] or job.probes
    tokens = max(fitting, key=lambda p: (len(p.tokens), p.id)).tokens[:TAP_TOKENS]
    with ref, cand:
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
    "far": _far,
    "permuted": _permuted,
    "stochastic": _stochastic,
    "second": _second,
    "emulated": _emulated,
}


def _rounded(checkpoint: Checkpoint) -> Checkpoint:
    """Weights rounded to bfloat16, as a bfloat16 run has them."""
    wide = {n: t for n, t in checkpoint.tensors.items() if t.dtype != BF16}
    return changed(checkpoint, {n: _narrow(t) for n, t in wide.items()})


def _narrow(tensor: LazyTensor) -> ChangedTensor:
    def rows(start: int, stop: int) -> Any:
        return tensor.read_rows(start, stop).astype(BF16)

    return ChangedTensor(
        tensor, lambda: tensor.read().astype(BF16), rows if tensor.streams_rows else None
    )
