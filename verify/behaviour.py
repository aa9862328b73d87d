"""What one runner must do whatever the other says: keep to its window, ignore padding and batch mates, use BOS, decode.

Two runners that agree may share a fault; these checks ask each by itself. A check that a runner has not the abilities for, or
that the probes do not reach, is INCONCLUSIVE and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.config import GemmaConfig
from .checks import Check, Floor, Question, kl, limit_of, logits_at, nearest, share
from .coverage import coverage, queries_past_window
from .decoding import (
    check_decode,
    check_greedy,
    check_greedy_agreement,
    crossing,
    greedy_prompt,
)
from .probes import Probe, ProbeSet, is_small
from .runners.base import Runner
from .softcap import Utilisation, affordable, softcap_checks, utilisation

__all__ = [
    "Check", "Cost", "Floor", "check_decode", "check_greedy", "check_greedy_agreement", "check_mask",
    "cost", "coverage", "run_checks", "utilisation",
]  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
WINDOW = Question("P3/window", "The sliding window is crossed")
MASK = Question("P3/mask", "Every layer sees exactly the keys it should")
PADDING = Question("P6/padding", "Batch mates and padding change nothing")
BOS = Question("P7/bos", "A missing or doubled BOS is noticed (negative control)")
EPSILON = {"bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-52}
NOISE = 4  # epsilons of relative error of a hidden state in which a masked key may still differ
ABRUPT = 100  # times the noise: effects that large over a window do not fade to nothing at its end
MASK_ROWS = 4
PROMPT_TOKENS = 256  # of a prompt that is run nine times over
SHOWN = 32  # last positions of a prompt that are compared
PAD = 5
REPEATS = 10.0  # times what the same prompt differs by in another batch: less is no effect
# runners that take the sequences of a batch apart, so that a batch shows nothing of the consumer itself
UNBATCHED = {"llama_cpp": "runs sequences one after the other, without padding"}


def run_checks(
    runner: Runner, probes: ProbeSet, floor: Floor | None, *, used: Utilisation | None = None
) -> list[Check]:
    """All checks of the profile that make sense for the model.

    Args:
        runner: what is checked; its batch is forgotten.
        probes: of :func:`g2kit.verify.probes.build_probes`.
        floor: the runner's noise; without it, what needs a threshold is INCONCLUSIVE.
        used: soft-cap utilisation, where it was measured already.

    Raises:
        G2Error: the runner fails.
    """
    config = runner.config
    found = [_check_window(runner, probes)] if config.sliding_window is not None else []
    if probes.profile == "smoke":
        return found
    used = utilisation(runner, list(probes)) if used is None else used
    found += softcap_checks(config, used)
    if _runs_mask(config, probes):
        found.append(check_mask(runner, probes))
    found += [check_padding(runner, probes, floor), check_bos(runner, probes, floor)]
    return [
        *found,
        check_decode(runner, probes, floor),
        check_greedy(runner, probes, floor, steps=_greedy_steps(config, probes)),
    ]


@dataclass(frozen=True)
class Cost:
    """What :func:`run_checks` takes of a runner with all abilities.

    Attributes:
        tokens: tokens run, padding included; a token is one forward pass.
        passes: times that all blocks are gone through, which a streaming runner reads from its files each time.
    """

    tokens: int
    passes: int


def cost(config: GemmaConfig, probes: ProbeSet) -> Cost:
    """Work of :func:`run_checks` with ``used`` not given."""
    if probes.profile == "smoke":
        return Cost(0, 0)
    capped = config.attn_logit_softcapping or config.final_logit_softcapping
    parts = [Cost(len(p.tokens), 1) for p in affordable(config, list(probes)) if capped]
    mask = _mask_batch(config, probes) if _runs_mask(config, probes) else None
    if mask is not None:
        parts.append(Cost(2 * mask.size, 1))
    prompt = _prompt(config, probes)
    if prompt is not None:
        batches = [_mixed(prompt, b.shift, 0)[0].size for b in _BATCHES]
        parts += [Cost(n, 1) for n in (len(prompt), *batches)]
    bos = _bos_prompt(config, probes)
    if bos is not None:
        parts.append(Cost(3 * len(bos), 3))
    plan = crossing(config, probes)
    if plan is not None:
        single = len(plan.tokens) - plan.start
        parts.append(Cost(2 * len(plan.tokens), 2 + single))
    start, count = greedy_prompt(config, probes, _greedy_steps(config, probes))
    if count:
        parts.append(Cost(2 * (len(start) + count - 1), 1 + count))
    return Cost(sum(p.tokens for p in parts), sum(p.passes for p in parts))


def _greedy_steps(config: GemmaConfig, probes: ProbeSet) -> int:
    return 64 if probes.profile == "full" or is_small(config) else 8


def _runs_mask(config: GemmaConfig, probes: ProbeSet) -> bool:
    """Where the sequence past the window is not the most expensive part of the profile, four times over."""
    return config.sliding_window is not None and (probes.profile == "full" or is_small(config))


def _check_window(runner: Runner, probes: ProbeSet) -> Check:
    window, queries = runner.config.sliding_window, queries_past_window(runner.config, probes)
    assert window is not None
    if not queries:
        return WINDOW.unanswered(f"no probe is longer than the window of {window}.", 0.0, 1.0)
    layers = sum(map(runner.config.is_local, range(runner.config.num_hidden_layers)))
    return WINDOW.answer(
        True, float(queries), 1.0,
        f"queries whose window of {window} leaves out a key, in each of {layers} local layers.",
    )  # fmt: skip


# ---- the mask, layer by layer ---------------------------------------------------------------------------------------


def check_mask(runner: Runner, probes: Sequence[Probe] | ProbeSet) -> Check:
    """Change one position's input of every layer by itself and see how far on it is felt.

    Rows of a batch are the same tokens, each changed at another position, so that one query that happens to look
    elsewhere does not decide.
    """
    config, window = runner.config, runner.config.sliding_window
    if "replay" not in runner.gives:
        return MASK.unanswered(f"the {runner.name} runner does not give replay.")
    if window is None:
        return MASK.unanswered("the model has no sliding window.")
    tokens = _mask_batch(config, probes)
    if tokens is None:
        return MASK.unanswered(f"no probe is longer than the window of {window} by two.")
    rows = np.arange(len(tokens))
    before = runner.start(tokens)
    wrong: list[str] = []
    faded: list[str] = []
    for layer in range(config.num_hidden_layers):
        assert before is not None
        after, moved = runner.advance(), before.copy()
        moved[rows, rows] *= -1
        seen, sharp = _reach(after, runner.replay(moved), EPSILON[runner.dtype] * NOISE)
        local = config.is_local(layer)
        if seen != window if local else seen <= window:
            said = (
                f"layer {layer} sees {seen} keys, {'' if local else 'more than '}{window} expected"
            )
            (wrong if sharp or (local and seen > window) else faded).append(said)
        before = after
    count = config.num_hidden_layers
    right = float(count - len(wrong) - len(faded))
    if wrong or not faded:
        said = "; ".join(wrong) or f"local layers see {window} keys, global ones more"
        return MASK.answer(not wrong, right, float(count), f"{said}.")
    why = f"the effect of a key is too small to see: {'; '.join(faded)}."
    return MASK.unanswered(why, right, float(count))


def _mask_batch(config: GemmaConfig, probes: Iterable[Probe]) -> Array | None:
    """Rows of the same tokens, some more than the window; None where no probe has two more."""
    window = config.sliding_window or 0
    past = [p.tokens for p in probes if len(p.tokens) > window + 1]
    if not past:
        return None
    tokens = min([t for t in past if len(t) > window + PAD] or past, key=len)[: window + PAD + 1]
    return np.repeat(tokens[None], min(MASK_ROWS, len(tokens) - window), 0)


def _reach(one: Array, two: Array, noise: float) -> tuple[int, bool]:
    """How many positions feel a key, itself included, and whether the effect is strong up to there.

    Args:
        one: a layer's outputs ``[rows, length, hidden]``.
        two: outputs after a change of row b at position b.
        noise: relative error that is no effect.
    """
    step = np.sqrt(np.square(two.astype(np.float64) - one).mean(2))
    size = np.sqrt(np.square(one.astype(np.float64)).mean(2))
    effect = step / np.maximum(size, 1e-30)
    effect[np.isnan(effect)] = math.inf  # is felt
    length = one.shape[1]
    by_distance = [
        max(effect[b, b + d] for b in range(len(one)) if b + d < length) for d in range(length)
    ]
    felt = [d for d, e in enumerate(by_distance) if e > noise]
    last = felt[-1] if felt else 0
    strong = last > 0 and bool(np.median(by_distance[1 : last + 1]) >= ABRUPT * noise)
    return last + 1, strong


# ---- padding and batch mates ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """A batch with the prompt in its first and last row, shifted by ``shift`` columns."""

    name: str
    shift: int


_BATCHES = (_Batch("right-padded", 0), _Batch("left-padded", PAD))


def check_padding(runner: Runner, probes: Sequence[Probe] | ProbeSet, floor: Floor | None) -> Check:
    """A prompt alone against the same in mixed-length batches, padded left and right, first and last."""
    if runner.name in UNBATCHED:
        return PADDING.unanswered(f"the {runner.name} runner {UNBATCHED[runner.name]}.")
    prompt = _prompt(runner.config, probes)
    if prompt is None:
        return PADDING.unanswered("no probe leaves room for padding in the context.")
    n = len(prompt)
    shown = min(n, SHOWN)
    runner.start(prompt)
    runner.finish()
    want = logits_at(runner, slice(n - shown, n))[0]
    found: dict[str, Array] = {}
    for batch in _BATCHES:
        tokens, real = _mixed(prompt, batch.shift, runner.config.filler)
        runner.start(tokens, real)
        runner.finish()
        columns = slice(n - shown + batch.shift, n + batch.shift)
        got = logits_at(runner, columns)
        for row, place in ((0, "first"), (len(tokens) - 1, "last")):
            found[f"{place} in a {batch.name} batch"] = kl(want, got[row])
    where = max(found, key=lambda place: share(*nearest(found[place], floor)[:2]))
    window = runner.config.sliding_window
    crossed = (
        "" if window is None else (", past the window" if n > window else ", within the window")
    )
    said = f"against the prompt alone, {where} ({len(found)} places, {n} tokens{crossed})."
    return PADDING.is_noise(found[where], floor, said)


def _prompt(config: GemmaConfig, probes: Iterable[Probe]) -> Array | None:
    """The longest probe that is cheap and leaves room for padding."""
    most = min(PROMPT_TOKENS, config.max_position_embeddings - PAD)
    fitting = [p.tokens for p in probes if len(p.tokens) <= most]
    return max(fitting, key=len) if fitting else None


def _mixed(prompt: Array, shift: int, pad: int) -> tuple[Array, Array]:
    """Rows: prompt, a full-length mate, a mate half as long, prompt; all but the second padded on the side of ``shift``."""
    n, width = len(prompt), len(prompt) + PAD
    tokens = np.full((4, width), pad, np.int64)
    real = np.zeros(tokens.shape, bool)
    mate = np.concatenate([prompt[:1], prompt[:0:-1], prompt[:PAD]])[:width]
    mate = np.resize(mate, width)
    half = mate[: max(1, n // 2)]
    for row, ids in enumerate((prompt, mate, half, prompt)):
        start = (width - len(ids)) if shift else 0
        tokens[row, start : start + len(ids)] = ids
        real[row, start : start + len(ids)] = True
    return tokens, real


# ---- BOS --------------------------------------------------------------------------------------------------------------


def check_bos(runner: Runner, probes: Sequence[Probe] | ProbeSet, floor: Floor | None) -> Check:
    """A text without BOS, and with two, must be far from the text with one: else the runner adds or drops BOS by itself."""
    prompt = _bos_prompt(runner.config, probes)
    if prompt is None:
        return BOS.unanswered("no probe begins with BOS and goes on.")
    n = len(prompt) - 1
    variants = {
        "correct": prompt, "missing": prompt[1:], "doubled": np.concatenate([prompt[:1], prompt]),
    }  # fmt: skip
    logits = {name: _last_logits(runner, tokens[None], n)[0] for name, tokens in variants.items()}
    found = {v: _mean(kl(logits["correct"], logits[v])) for v in ("missing", "doubled")}
    value = math.nan if any(map(math.isnan, found.values())) else min(found.values())
    limit = limit_of(floor, "kl_mean")
    detail = f"mean KL over {n} tokens: {found['missing']:.3g} without BOS, {found['doubled']:.3g} with two"
    if limit is None and math.isfinite(value):
        return BOS.unanswered(f"no noise floor was measured; {detail}.", value)
    passed = limit is not None and value > limit
    if math.isfinite(value) and not passed and runner.dtype == "bfloat16":
        pair = _last_logits(runner, np.repeat(prompt[None], 2, 0), n)
        again = max(_mean(kl(logits["correct"], x)) for x in pair)
        if value > REPEATS * again:
            return BOS.unanswered(f"{detail}, which bfloat16's noise hides.", value, limit)
    return BOS.answer(passed, value, limit, f"{detail}; it must be more than noise.")


def _last_logits(runner: Runner, tokens: Array, count: int) -> Array:
    """Logits of the last positions of a batch without padding ``[batch, count, vocab]``."""
    runner.start(tokens)
    runner.finish()
    return logits_at(runner, slice(tokens.shape[1] - count, tokens.shape[1]))


def _mean(values: Array) -> float:
    return float(np.mean(values)) if np.isfinite(values).all() else math.nan


def _bos_prompt(config: GemmaConfig, probes: Iterable[Probe]) -> Array | None:
    """The beginning of a probe that begins with BOS and leaves room for another."""
    most = min(SHOWN, config.max_position_embeddings - 1)
    fitting = [p.tokens for p in probes if p.tokens[0] == config.bos_token_id]
    fitting = [t[:most] for t in fitting if len(t[:most]) > 2]
    return max(fitting, key=len) if fitting else None
