"""Generation against prefill: a cache must give, token by token, what one pass over the whole sequence gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .checks import Check, Floor, Question, kl, limit_of, logits_at, worst
from .probes import Probe, ProbeSet
from .runners.base import Runner

Array = np.ndarray[Any, np.dtype[Any]]
DECODE = Question("P8/decode", "Decoding step by step equals prefill, across the window")
GREEDY = Question("P9/greedy", "Greedy choices while decoding are those of a prefill")
AGREEMENT = Question("P9/agreement", "Both models choose the same tokens greedily")
BEFORE, AFTER = 3, 8  # positions before and after the window's edge that are decoded one by one
LOGIT_BYTES = 256 << 20  # logits of one step
NEAR_TIE = 6.0  # times the noise of a logit (RMS): three deviations of each of the two that compete
GREEDY_PROMPT = 16


def check_decode(runner: Runner, probes: Sequence[Probe] | ProbeSet, floor: Floor | None) -> Check:
    """Prefill up to the window's edge, then single steps across it, against the whole at once."""
    window = runner.config.sliding_window
    chosen = _crossing(runner, probes)
    if "decode" not in runner.gives:
        return DECODE.unanswered(f"the {runner.name} runner does not give decode.")
    if chosen is None:
        return DECODE.unanswered("no probe has three tokens.")
    stop = len(chosen) if window is None else min(len(chosen), window + AFTER)
    edge = stop // 2 if window is None or stop <= window else window
    tokens, start = chosen[:stop], max(1, edge - BEFORE)
    steps = min(stop, edge + AFTER)
    runner.start(tokens[:steps])
    runner.finish()
    want = logits_at(runner, slice(start - 1, steps))[0]
    got = _decoded(runner, tokens[:steps], start)
    value = worst(kl(want, got))
    said = f"largest KL over {len(want)} steps from position {start - 1} on"
    if window is not None and steps <= window and math.isfinite(value):
        return DECODE.unanswered(f"{said}; no probe is longer than the window of {window}.", value)
    return DECODE.at_most(value, floor, "kl_max", f"{said}, cache of {steps} positions.")


def _crossing(runner: Runner, probes: Sequence[Probe] | ProbeSet) -> Array | None:
    """The shortest probe that is longer than the window, else the longest."""
    window = runner.config.sliding_window or 0
    usable = [p.tokens for p in probes if len(p.tokens) > 2]
    past = [t for t in usable if len(t) >= window + 2]
    long = sorted((t for t in past if len(t) >= window + AFTER), key=len)
    if window and past:
        return long[0] if long else max(past, key=len)
    return max((t[: 2 * GREEDY_PROMPT] if not window else t for t in usable), key=len, default=None)


def _decoded(runner: Runner, tokens: Array, start: int) -> Array:
    """Logits of position ``start - 1`` and of every later one, fed one by one ``[steps, vocab]``."""
    decoder = runner.decoder(1, len(tokens))
    rows = []
    for part in _chunks(start, runner.config.vocab_size):
        last = decoder.step(tokens[None, part])[0, -1:]
    rows.append(last)
    rows += [decoder.step(tokens[None, t : t + 1])[0] for t in range(start, len(tokens))]
    return np.concatenate(rows)


def _chunks(length: int, vocab: int) -> Iterator[slice]:
    """Pieces of a prompt whose logits fit into memory."""
    step = max(1, LOGIT_BYTES // (4 * vocab))
    for i in range(0, length, step):
        yield slice(i, min(i + step, length))


def generate(runner: Runner, prompt: Array, count: int) -> tuple[Array, Array]:
    """Greedy continuation with the cache.

    Returns:
        ``(tokens, logits)``: prompt and ``count`` new ids; the logits each was chosen from ``[count, vocab]``.
    """
    decoder = runner.decoder(1, len(prompt) + count)
    ids = [int(i) for i in prompt]
    logits = [decoder.step(prompt[None])[0, -1]]
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        if len(logits) < count:
            logits.append(decoder.step([[ids[-1]]])[0, -1])
    return np.array(ids, np.int64), np.stack(logits)


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
    usable = [p.tokens[:GREEDY_PROMPT] for p in probes if len(p.tokens) > 1]
    count = min(steps, chooser.config.max_position_embeddings - GREEDY_PROMPT)
    if not usable or count < 1:
        return question.unanswered("no probe leaves room in the context to continue it.")
    prompt = max(usable, key=len)
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
