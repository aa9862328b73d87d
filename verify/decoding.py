"""Generation against prefill: a cache must give, token by token, what one pass over the whole sequence gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.config import GemmaConfig
from .checks import Check, Floor, Question, kl, limit_of, logits_at, worst
from .probes import Probe, ProbeSet
from .profiles import is_small
from .runners.base import Runner

Array = np.ndarray[Any, np.dtype[Any]]
DECODE = Question("P8/decode", "Decoding step by step equals prefill, across the window")
GREEDY = Question("P9/greedy", "Greedy choices while decoding are those of a prefill")
AGREEMENT = Question("P9/agreement", "Both models choose the same tokens greedily")
BEFORE, AFTER, SMALL_AFTER = 3, 8, 64  # positions around the window's edge decoded one by one
NEAR_TIE = 6.0  # times the noise of a logit (RMS): three deviations of each of the two that compete
GREEDY_PROMPT = 16


@dataclass(frozen=True)
class Crossing:
    """What is decoded: ``tokens``, single steps from ``start`` on."""

    tokens: Array
    start: int


def crossing(config: GemmaConfig, probes: Iterable[Probe]) -> Crossing | None:
    """The beginning of a probe, to some positions past the window where one is long enough; None without any.

    Small models decode further, so that a cache of the window's size is written over completely.
    """
    window, after = config.sliding_window or 0, SMALL_AFTER if is_small(config) else AFTER
    usable = [p.tokens for p in probes if len(p.tokens) > 2]
    if not usable:
        return None
    enough = [t for t in usable if len(t) >= window + after]
    tokens = (min(enough, key=len) if enough else max(usable, key=len))[: window + after]
    edge = window if 0 < window < len(tokens) else len(tokens) // 2
    return Crossing(tokens, max(1, edge - BEFORE))


def check_decode(runner: Runner, probes: Sequence[Probe] | ProbeSet, floor: Floor | None) -> Check:
    """Prefill up to the window's edge, then single steps across it, against the whole at once."""
    if "decode" not in runner.gives:
        return DECODE.unanswered(f"the {runner.name} runner does not give decode.")
    plan = crossing(runner.config, probes)
    if plan is None:
        return DECODE.unanswered("no probe has three tokens.")
    count, window = len(plan.tokens), runner.config.sliding_window
    runner.start(plan.tokens)
    runner.finish()
    want = logits_at(runner, slice(plan.start - 1, count))[0]
    values = kl(want, _decoded(runner, plan.tokens, plan.start))
    said = f"over {len(want)} steps from position {plan.start - 1} on"
    if window is not None and count <= window and np.isfinite(values).all():
        why = f"largest KL {said}; no probe is longer than the window of {window}."
        return DECODE.unanswered(why, worst(values))
    return DECODE.is_noise(values, floor, f"{said}, cache of {count} positions.")


def _decoded(runner: Runner, tokens: Array, start: int) -> Array:
    """Logits of position ``start - 1`` and of every later one, fed one by one ``[steps, vocab]``."""
    decoder = runner.decoder(1, len(tokens))
    rows = [decoder.step(tokens[None, :start], last=1)[0]]
    rows += [decoder.step(tokens[None, t : t + 1])[0] for t in range(start, len(tokens))]
    return np.concatenate(rows)


def generate(runner: Runner, prompt: Array, count: int) -> tuple[Array, Array]:
    """Greedy continuation with the cache.

    Returns:
        ``(tokens, logits)``: prompt and ``count`` new ids; the logits each was chosen from ``[count, vocab]``.
    """
    decoder = runner.decoder(1, len(prompt) + count)
    ids = [int(i) for i in prompt]
    logits = [decoder.step(prompt[None], last=1)[0, -1]]
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        if len(logits) < count:
            logits.append(decoder.step([[ids[-1]]])[0, -1])
    return np.array(ids, np.int64), np.stack(logits)


def greedy_prompt(config: GemmaConfig, probes: Iterable[Probe], steps: int) -> tuple[Array, int]:
    """The beginning of the first of the longest probes, and by how many tokens to continue it, 0 if there is no room."""
    usable = [p.tokens[:GREEDY_PROMPT] for p in probes if len(p.tokens) > 1]
    if not usable:
        return np.zeros(0, np.int64), 0
    prompt = max(usable, key=len)
    return prompt, max(0, min(steps, config.max_position_embeddings - len(prompt)))


def check_greedy(
    runner: Runner, probes: Sequence[Probe] | ProbeSet, floor: Floor | None, *, steps: int = 64
) -> Check:
    """Tokens chosen with the cache against the choices of one pass over them."""
    return _greedy(GREEDY, runner, runner, probes, floor, steps)


def check_greedy_agreement(
    ref: Runner,
    cand: Runner,
    probes: Sequence[Probe] | ProbeSet,
    floor: Floor | None,
    *,
    steps: int = 64,
) -> Check:
    """Tokens the reference chooses with its cache against the candidate's choices at the same places.

    Both see the same tokens at every step, so a near-tie early on does not end the comparison.
    """
    return _greedy(AGREEMENT, ref, cand, probes, floor, steps)


def _greedy(
    question: Question, chooser: Runner, judge: Runner, probes: Sequence[Probe] | ProbeSet,
    floor: Floor | None, steps: int,
) -> Check:  # fmt: skip
    if "decode" not in chooser.gives:
        return question.unanswered(f"the {chooser.name} runner does not give decode.")
    prompt, count = greedy_prompt(chooser.config, probes, steps)
    if not count:
        return question.unanswered("no probe leaves room in the context to continue it.")
    ids, logits = generate(chooser, prompt, count)
    judge.start(ids[:-1])
    judge.finish()
    judged = logits_at(judge, slice(len(prompt) - 1, len(ids) - 1))[0]
    bad = ~(np.isfinite(judged).all(1) & np.isfinite(logits).all(1))
    if bad.any():
        return question.answer(False, math.nan, 0.0, f"logits at step {int(bad.argmax())}.")
    margin = _margins(logits, judged)
    flips = np.flatnonzero(margin > 0)
    limit = limit_of(floor, "rms_logit")
    if limit is None and len(flips):
        return question.unanswered(
            f"no noise floor was measured; {len(flips)} of {count} choices differ.",
            float(len(flips)),
            0.0,
        )
    real = [i for i in flips if margin[i] > NEAR_TIE * (limit or 0.0)]
    said = (
        f"{count} tokens, {len(flips)} other choices, {len(flips) - len(real)} of them at near-ties"
    )
    if real:
        said += f"; the first at step {real[0]}, where the margin is {margin[real[0]]:.3g}"
    return question.answer(not real, float(len(real)), 0.0, f"{said}.")


def _margins(one: Array, two: Array) -> Array:
    """By how much the other's choice falls behind, in whichever logits of the two say more; 0 where they choose alike."""
    rows = np.arange(len(one))
    a, b = one.argmax(1), two.argmax(1)
    gaps = [np.abs(x[rows, a].astype(np.float64) - x[rows, b]) for x in (one, two)]
    return np.where(a == b, 0.0, np.maximum(np.maximum(*gaps), np.finfo(np.float64).tiny))
