"""How far a model's soft-caps are used, and a derived pair of checkpoints in which they are.

A cap changes a score s by a relative (s / cap)^2 / 3 or so: scores that stay below a tenth of it cannot show whether the
cap is there. Where a model, or a model with random weights, never reaches its caps, both sides of a comparison are
changed alike: query projections and the final norm's gain are multiplied by the same powers of two, until scores reach
about twice the cap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..convert.open import Checkpoint, LazyTensor
from ..formats.dtypes import F32
from ..model import canonical
from ..model.config import GemmaConfig
from .checks import Check, Floor, Question, kl, logits_at, worst
from .probes import Probe
from .runners import RUNNERS
from .runners.base import Runner
from .views import ChangedTensor, changed

Array = np.ndarray[Any, np.dtype[Any]]
USED = 0.1  # utilisation from which a missing cap changes scores by 0.3 % and more
AIM = 2.0  # of a derived pair
SCORE_BYTES = 64 << 20  # attention scores of one probe in memory
TAPPED_TOKENS = 1024  # over all probes
TAPPED_PROBES = 3  # JAX compiles anew for every length
TILE_BYTES = 64 << 20
ATTENTION = Question("P5/attention", "Attention scores reach their soft-cap in every layer")
FINAL = Question("P5/final", "Logits reach the final soft-cap")
STRESSED = Question("P5/stressed", "Same logits with soft-caps driven into saturation")


@dataclass(frozen=True)
class Utilisation:
    """Largest score before its cap, over the cap.

    Attributes:
        layers: of every layer's attention; None without a cap or where the runner does not show scores.
        final: of the logits; None without a cap.
        tokens: how many tokens were looked at.
        reason: why ``layers`` are None, else empty.
    """

    layers: tuple[float | None, ...]
    final: float | None
    tokens: int
    reason: str = ""


def utilisation(runner: Runner, probes: Sequence[Probe]) -> Utilisation:
    """Run the longest probes that are affordable and look at scores and logits.

    Args:
        runner: the model; without ``taps`` only the logits are looked at.
        probes: to choose from: up to three whose scores fit into memory, up to 1024 tokens.
    """
    config = runner.config
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    count = config.num_hidden_layers
    chosen = affordable(config, probes)
    if caps == (None, None) or not chosen:
        why = (
            "no probe is short enough to hold its scores" if not chosen else "the model has no cap"
        )
        return Utilisation((None,) * count, None, 0, why)
    tapped = "taps" in runner.gives and caps[0] is not None
    layers, final = np.zeros(count), 0.0
    for probe in chosen:
        runner.start(probe.tokens)
        for i in range(count if tapped else 0):
            layers[i] = np.maximum(layers[i], _largest_score(runner, i))  # NaN stays NaN
        runner.finish()
        final = max(final, _largest_logit(runner, len(probe.tokens)), key=_nan_is_largest)
    return Utilisation(
        tuple(float(x / caps[0]) for x in layers) if tapped and caps[0] else (None,) * count,
        None if caps[1] is None else _before_cap(final, caps[1]) / caps[1],
        sum(len(p.tokens) for p in chosen),
        "" if tapped else f"the {runner.name} runner does not give taps",
    )


def softcap_checks(config: GemmaConfig, used: Utilisation) -> list[Check]:
    """Whether the caps were reached; nothing for a model without."""
    found = []
    if config.attn_logit_softcapping is not None:
        found.append(_attention_check(used))
    if config.final_logit_softcapping is not None and used.final is not None:
        said = f"the largest logit is {_share(used.final)} of the cap before capping, over {used.tokens} tokens"
        found.append(_used(FINAL, used.final, said))
    return found


def _attention_check(used: Utilisation) -> Check:
    seen = [u for u in used.layers if u is not None]
    if not seen:
        return ATTENTION.unanswered(f"{used.reason}.", threshold=USED)
    low = [f"{i}" for i, u in enumerate(used.layers) if u is not None and u < USED]
    least = min(seen, key=lambda u: math.inf if math.isnan(u) else u)
    least = math.nan if any(map(math.isnan, seen)) else least
    said = f"the largest score of a layer is {_share(min(seen))} to {_share(max(seen))} of the cap before capping"
    if low:
        said += f"; too little to see the cap in layers {', '.join(low)}"
    return _used(ATTENTION, least, f"{said}, over {used.tokens} tokens")


def _used(question: Question, value: float, detail: str) -> Check:
    if math.isnan(value) or value >= USED:
        return question.answer(True, value, USED, f"{detail}.")
    return question.unanswered(f"{detail}; a derived pair of checkpoints settles it.", value, USED)


def _share(x: float) -> str:
    return f"{x:.3g}"


def _nan_is_largest(x: float) -> float:
    return math.inf if math.isnan(x) else x


def affordable(config: GemmaConfig, probes: Sequence[Probe]) -> list[Probe]:
    """The longest probes whose scores fit, within the token budget; at least one if any fits."""
    longest = math.isqrt(SCORE_BYTES // (8 * config.num_attention_heads))
    fitting = sorted((p for p in probes if len(p.tokens) <= longest), key=lambda p: -len(p.tokens))
    chosen: list[Probe] = []
    tokens = 0
    for p in fitting:
        room = len(chosen) < TAPPED_PROBES and tokens + len(p.tokens) <= TAPPED_TOKENS
        if not chosen or room:
            chosen.append(p)
            tokens += len(p.tokens)
    return chosen


def _largest_score(runner: Runner, layer: int) -> float:
    """Largest absolute attention score of a layer that a query may look at, before the cap; runs the block."""
    found: list[float] = []
    window = runner.config.sliding_window if runner.config.is_local(layer) else None

    def look(name: str, value: Array) -> None:
        if name == "scores":
            distance = np.subtract.outer(np.arange(value.shape[-2]), np.arange(value.shape[-1]))
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            found.append(float(np.abs(value[..., seen]).max()))

    runner.advance(look)
    return found[0]


def _largest_logit(runner: Runner, length: int) -> float:
    """Largest absolute logit, capped as it is, a stretch of positions at a time."""
    step = max(1, TILE_BYTES // (8 * 8192))
    parts = [slice(i, min(i + step, length)) for i in range(0, length, step)]
    return worst(
        [float(np.abs(t).max()) for p in parts for _, _, t in runner.logit_tiles(positions=p)]
    )


def _before_cap(logit: float, cap: float) -> float:
    """The value whose soft-cap is ``logit``; large but finite where float32 has rounded it to the cap."""
    ratio = min(logit / cap, 1 - 2.0**-24) if math.isfinite(logit) else math.nan
    return cap * math.atanh(ratio)


@dataclass(frozen=True)
class Stress:
    """By how much the derived checkpoints differ from theirs.

    Attributes:
        layers: power of two of every query projection.
        final: power of two of the final norm's gain.
    """

    layers: tuple[int, ...]
    final: int


def stress_for(used: Utilisation) -> Stress:
    """Factors that bring every cap's utilisation to 1.4 to 2.8, where it is below that."""

    def power(u: float | None) -> int:
        if u is None or not math.isfinite(u) or u <= 0:
            return 0
        return max(0, min(24, round(math.log2(AIM / u))))

    return Stress(tuple(power(u) for u in used.layers), power(used.final))


def derive(checkpoint: Checkpoint, stress: Stress) -> Checkpoint:
    """A view of a checkpoint with scaled queries and final norm, for runners that read weights through it.

    Both sides of a comparison must be derived with the same ``stress``. Powers of two change no digit of the query
    projection; the gain of the final norm becomes float32 2^n (1 + w) - 1, the same for the same w in any dtype.
    Closing either closes both.
    """
    names = [canonical.Q.format(i=i) for i in range(len(stress.layers))]
    powers = dict(zip(names, stress.layers, strict=True))
    tensors = {n: _scaled(checkpoint.tensors[n], p, 0.0) for n, p in powers.items() if p}
    if stress.final:
        norm = checkpoint.tensors[canonical.FINAL_NORM]
        tensors[canonical.FINAL_NORM] = _scaled(norm, stress.final, 1.0)
    return changed(checkpoint, tensors)


def _scaled(tensor: LazyTensor, power: int, offset: float) -> LazyTensor:
    """``2^power (offset + x) - offset`` in float32, float64 where x is."""

    def scale(x: Array) -> Array:
        return np.ldexp(x.astype(np.float64) + offset, power) - offset

    made = ChangedTensor(
        tensor, lambda: scale(tensor.read()), lambda a, b: scale(tensor.read_rows(a, b))
    )
    made.dtype = tensor.dtype if tensor.dtype.itemsize > 4 else F32
    return made


def reads_views(runner: str) -> bool:
    """Whether a runner computes with a derived checkpoint; consumers of files would silently take the files."""
    return RUNNERS[runner].reads == "any format"


def stressed_check(
    ref: Runner, cand: Runner, probes: Sequence[Probe], floor: Floor | None
) -> Check:
    """Compare two runners over checkpoints derived with the same stress.

    Args:
        ref: over the derived reference.
        cand: over the derived candidate.
        probes: one is chosen.
        floor: measured on the derived reference, whose logits are sharper than the original's.
    """
    for runner in (ref, cand):
        if not reads_views(runner.name):
            return STRESSED.unanswered(
                f"the {runner.name} runner reads files, so it cannot run a derived checkpoint."
            )
    chosen = affordable(ref.config, probes)[:1]
    if not chosen:
        return STRESSED.unanswered("no probe is short enough to hold its scores.")
    used = utilisation(ref, chosen)
    low = [u for u in (*used.layers, used.final) if u is not None and not u >= 5 * USED]
    if low or used.tokens == 0:
        return STRESSED.unanswered("the derived checkpoint does not reach its caps either.")
    tokens, found = chosen[0].tokens, []
    step = max(1, TILE_BYTES // (8 * ref.config.vocab_size))
    for runner in (ref, cand):
        runner.start(tokens)
        runner.finish()
    for i in range(0, len(tokens), step):
        part = slice(i, min(i + step, len(tokens)))
        found.append(kl(logits_at(ref, part)[0], logits_at(cand, part)[0]))
    most = max(u for u in (*used.layers, used.final) if u is not None)
    detail = f"over {len(tokens)} tokens, scores up to {most:.2g} times their cap."
    return STRESSED.is_noise(np.concatenate(found), floor, detail)
