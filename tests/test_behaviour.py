"""The checks of one runner: sound runners pass, and each check fails on a runner with just the fault it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint
from verify_cases import model

from g2kit.convert import convert, open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.formats.dtypes import BF16, F32
from g2kit.model import canonical
from g2kit.model.config import PRESETS, GemmaConfig
from g2kit.model.sample import sample_dir
from g2kit.verify import behaviour, decoding, softcap
from g2kit.verify.behaviour import (
    check_decode,
    check_greedy,
    check_greedy_agreement,
    check_mask,
    coverage,
    run_checks,
)
from g2kit.verify.checks import Check, Question
from g2kit.verify.coverage import REQUIRED, queries_past_window
from g2kit.verify.probes import ProbeSet, build_probes, tokenizer_of
from g2kit.verify.runners import Runner, open_runner
from g2kit.verify.runners.base import Array, Decoder, Tap, Tokens
from g2kit.verify.softcap import Utilisation, derive, stress_for, stressed_check, utilisation

torch = pytest.importorskip("torch")

CROSSING = {"P3/window", "P3/mask"}
IDS = [
    "P3/window",
    "P5/attention",
    "P5/final",
    "P3/mask",
    "P6/padding",
    "P7/bos",
    "P8/decode",
    "P9/greedy",
]


@dataclass
class FakeFloor:
    """Noise of float32 on the small models and the sample: their KL between float32 and float64 is below 1e-10."""

    limits: dict[str, float | None] = field(
        default_factory=lambda: {"kl_max": 1e-9, "kl_mean": 1e-10, "rms_logit": 1e-4}
    )

    def threshold(self, metric: str) -> float | None:
        return self.limits[metric]


FLOOR = FakeFloor()


@pytest.fixture(scope="module")
def good() -> Checkpoint:
    return model()


@pytest.fixture(scope="module")
def probes(good: Checkpoint) -> ProbeSet:
    return build_probes(good.config, None, "ci")


class Wrapped(Runner):
    """A runner that passes everything on; faults are put in by subclasses and arguments.

    Args:
        inner: what computes.
        config: what it claims to be.
        decodes: what its decoders come from.
        gives: its abilities.
    """

    name = "torch"
    gives = frozenset({"logits", "blocks", "replay", "taps", "decode"})
    dtypes = ("float32",)

    def __init__(
        self, inner: Runner, config: GemmaConfig | None = None, decodes: Runner | None = None,
        gives: str | None = None,
    ) -> None:  # fmt: skip
        self.inner, self.decodes = inner, decodes or inner
        self.config = config or inner.config
        self.dtype = inner.dtype
        if gives is not None:
            self.gives = frozenset(gives.split())  # type: ignore[misc]

    def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
        self.layer = 0
        return self.inner.start(tokens, padding)

    def advance(self, tap: Tap | None = None) -> Array:
        self.layer += 1
        return self.inner.advance(tap)

    def finish(self) -> None:
        self.inner.finish()

    def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
        return self.inner.replay(hidden, tap)

    def final_hidden(self) -> Array:
        return self.inner.final_hidden()

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        yield from self.inner.logit_tiles(rows, positions)

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        return self.decodes.decoder(batch, capacity)

    def close(self) -> None:
        self.inner.close()


def by_id(checks: list[Check]) -> dict[str, Check]:
    assert len({c.id for c in checks}) == len(checks)
    return {c.id: c for c in checks}


def other(checkpoint: Checkpoint, **changes: Any) -> Runner:
    """A runner with another configuration on the same weights."""
    return open_runner("torch", checkpoint, config=checkpoint.config.with_(**changes))


# ---- sound runners ------------------------------------------------------------------------------------------------


def test_the_sample_passes_every_check() -> None:
    with open_checkpoint(sample_dir()) as opened, open_runner("torch", opened) as runner:
        chosen = build_probes(opened.config, tokenizer_of(opened), "ci")
        used = utilisation(runner, list(chosen))
        checks = run_checks(runner, chosen, FLOOR, used=used)
        assert [c.id for c in checks] == IDS
        assert {c.verdict for c in checks} == {"PASS"}, [c for c in checks if c.verdict != "PASS"]
        found = coverage(opened.config, chosen, checks, used)
    regimes = {r["name"]: r for r in found["regimes"]}
    assert all(r["exercised"] for r in regimes.values()), regimes
    assert set(REQUIRED) <= set(regimes)
    assert regimes["window crossed"]["value"] == sum(max(0, len(p.tokens) - 64) for p in chosen)
    assert [s["kind"] for s in found["softcap"]] == ["local", "global"] * 2
    assert min(s["utilisation"] for s in found["softcap"]) > 0.25
    assert 0.5 < found["final_softcap"] < 1
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("arch", ["gemma-7b", "gemma2-27b"])
def test_small_random_models_pass(arch: str) -> None:
    opened = model(arch)
    chosen = build_probes(opened.config, None, "ci")
    with open_runner("torch", opened) as runner:
        checks = run_checks(runner, chosen, FLOOR)
    assert {c.verdict for c in checks} == {"PASS"}, checks
    gemma2 = opened.config.family == "gemma2"
    assert [c.id for c in checks] == (IDS if gemma2 else IDS[4:]), (
        "Gemma 1 has no window and no caps"
    )
    names = {r["name"] for r in coverage(opened.config, chosen, checks)["regimes"]}
    assert set(REQUIRED) <= names if gemma2 else not set(REQUIRED) & names


@pytest.mark.parametrize("name", [pytest.param("jax", marks=pytest.mark.slow), "transformers"])
def test_other_runners_pass_what_they_can(name: str) -> None:
    pytest.importorskip(name)
    with open_checkpoint(sample_dir()) as opened, open_runner(name, opened) as runner:
        chosen = build_probes(opened.config, tokenizer_of(opened), "ci")
        found = by_id(run_checks(runner, chosen, FLOOR))
    blind = {i for i, c in found.items() if c.verdict == "INCONCLUSIVE"}
    assert blind == (set() if name == "jax" else {"P5/attention", "P3/mask"})
    assert not [c for c in found.values() if c.verdict == "FAIL"]


@pytest.mark.llama
def test_llama_cpp_passes_what_it_can(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "out", to="gguf", dtype="f32")
    # GELU from a table of float16: see test_runners
    floor = FakeFloor({"kl_max": 1e-6, "kl_mean": 1e-7, "rms_logit": 1e-2})
    with (
        open_checkpoint(sample_dir()) as opened,
        open_runner("llama_cpp", tmp_path / "out") as runner,
    ):
        chosen = build_probes(opened.config, tokenizer_of(opened), "ci")
        found = by_id(run_checks(runner, chosen, floor))
    assert {i for i, c in found.items() if c.verdict == "INCONCLUSIVE"} == {
        "P5/attention", "P3/mask", "P6/padding",
    }  # fmt: skip
    assert "one after the other" in found["P6/padding"].detail
    assert not [c for c in found.values() if c.verdict == "FAIL"]


def test_smoke_looks_at_the_window_only(good: Checkpoint) -> None:
    with open_runner("torch", good) as runner:
        assert [
            c.id for c in run_checks(runner, build_probes(good.config, None, "smoke"), None)
        ] == ["P3/window"]


# ---- each check can fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"sliding_window": 5}, "layer 0 sees 5 keys, 4 expected; layer 2 sees 5"),
    ({"sliding_window": 3}, "layer 0 sees 3 keys, 4 expected"),
    ({"sliding_window": 60}, "layer 0 sees 10 keys, 4 expected"),
])  # fmt: skip
def test_another_window_is_seen(
    changes: dict[str, Any], message: str, good: Checkpoint, probes: ProbeSet
) -> None:
    check = check_mask(Wrapped(other(good, **changes), good.config), probes)
    assert (check.verdict, check.value, check.threshold) == ("FAIL", 2.0, 4.0)
    assert message in check.detail


def test_swapped_local_and_global_layers_are_seen(good: Checkpoint, probes: ProbeSet) -> None:
    class Swapped(type(good.config)):  # type: ignore[misc]
        def is_local(self, layer: int) -> bool:
            return layer % 2 == 1

    values = {n: getattr(good.config, n) for n in GemmaConfig.__dataclass_fields__}
    check = check_mask(Wrapped(open_runner("torch", good), Swapped(**values)), probes)
    assert (check.verdict, check.value) == ("FAIL", 0.0)
    assert "layer 1 sees 10 keys, 4 expected" in check.detail
    assert "layer 0 sees 4 keys, more than 4 expected" in check.detail


def test_an_effect_too_small_to_see_is_no_verdict(probes: ProbeSet) -> None:
    opened = model()
    for i in range(4):  # values so small that no key changes a hidden state
        source: Any = opened.tensors[canonical.POST_ATTENTION_NORM.format(i=i)].source
        source.array = np.full_like(source.array, -1 + 2.0**-22)
    with open_runner("torch", opened) as runner:
        check = check_mask(runner, probes)
    assert check.verdict == "INCONCLUSIVE"
    assert "too small to see" in check.detail


class IgnoresPadding(Wrapped):
    def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
        return super().start(tokens, None)


class MixesRows(Wrapped):
    """The last row gets its neighbour's logits."""

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        for start, stop, tile in self.inner.logit_tiles(rows, positions):
            yield start, stop, np.concatenate([tile[:-1], tile[-2:-1]]) if len(tile) > 1 else tile


@pytest.mark.parametrize(("fault", "where"), [
    (IgnoresPadding, "left-padded"), (MixesRows, "last in a"),
])  # fmt: skip
def test_broken_padding_is_seen(
    fault: type[Wrapped], where: str, good: Checkpoint, probes: ProbeSet
) -> None:
    check = behaviour.check_padding(fault(open_runner("torch", good)), probes, FLOOR)
    assert check.verdict == "FAIL"
    assert check.value is not None
    assert check.value > 1e-3
    assert where in check.detail


class AddsBos(Wrapped):
    """Puts BOS in front where it is missing, as some consumers do."""

    def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
        ids = np.atleast_2d(np.asarray(tokens))
        self.cut = int(ids[0, 0] != self.config.bos_token_id)
        front = np.full((len(ids), self.cut), self.config.bos_token_id)
        return super().start(np.concatenate([front, ids], 1), padding)

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        for start, stop, tile in self.inner.logit_tiles(rows):
            yield start, stop, tile[:, self.cut :][:, positions]


class DropsBos(AddsBos):
    """Removes the second of two, and answers for the first twice."""

    def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
        ids = np.atleast_2d(np.asarray(tokens))
        self.cut = 0
        self.twice = bool((ids[0, :2] == self.config.bos_token_id).all())
        return Wrapped.start(self, ids[:, int(self.twice) :], padding)

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        for start, stop, tile in self.inner.logit_tiles(rows):
            whole = np.concatenate([tile[:, :1], tile], 1) if self.twice else tile
            yield start, stop, whole[:, positions]


@pytest.mark.parametrize("fault", [AddsBos, DropsBos])
def test_a_runner_with_its_own_mind_about_bos_is_seen(
    fault: type[Wrapped], good: Checkpoint, probes: ProbeSet
) -> None:
    check = behaviour.check_bos(fault(open_runner("torch", good)), probes, FLOOR)
    assert check.verdict == "FAIL"
    assert check.value is not None
    assert check.value < 1e-9


def test_an_effect_of_bos_that_bfloat16_hides_is_no_verdict(
    good: Checkpoint, probes: ProbeSet
) -> None:
    coarse = FakeFloor({"kl_max": 1e3, "kl_mean": 1e3, "rms_logit": 1.0})
    with open_runner("torch", good, dtype="bfloat16") as runner:
        assert behaviour.check_bos(runner, probes, coarse).verdict == "INCONCLUSIVE"
        assert behaviour.check_bos(AddsBos(runner), probes, coarse).verdict == "FAIL", (
            "not the least"
        )
    with open_runner("torch", good) as runner:
        assert behaviour.check_bos(runner, probes, coarse).verdict == "FAIL"


class LosesTokens(Decoder):
    """A cache that keeps only the last few steps' tokens."""

    def __init__(self, runner: Runner, keep: int) -> None:
        self.runner, self.keep, self.ids = runner, keep, np.zeros((1, 0), np.int64)

    def step(self, tokens: Tokens, padding: Any = None, *, last: int | None = None) -> Array:
        new = np.atleast_2d(np.asarray(tokens))
        self.ids = np.concatenate([self.ids, new], 1)
        return self.runner.logits(self.ids[:, -self.keep :])[:, -(last or new.shape[1]) :]


class Watched(Wrapped):
    """Notes of every step of its decoders how many tokens were fed and positions given."""

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner)
        self.steps: list[tuple[int, int]] = []

    def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
        made = super().decoder(batch, capacity)
        step = made.step

        def watched(tokens: Tokens, **options: Any) -> Array:
            out = step(tokens, **options)
            self.steps.append((np.size(tokens), out.shape[1]))
            return out

        made.step = watched  # type: ignore[method-assign]
        return made


@pytest.mark.parametrize("window", [3, 5, 64])
def test_a_cache_with_another_window_is_seen(
    window: int, good: Checkpoint, probes: ProbeSet
) -> None:
    runner = Wrapped(open_runner("torch", good), decodes=other(good, sliding_window=window))
    check = check_decode(runner, probes, FLOOR)
    assert check.verdict == "FAIL"
    assert check.value is not None
    assert check.value > 1e-3


def test_a_cache_that_forgets_is_seen(good: Checkpoint, probes: ProbeSet) -> None:
    class Forgets(Wrapped):
        keep = 8

        def decoder(self, batch: int = 1, capacity: int | None = None) -> Decoder:
            return LosesTokens(open_runner("torch", good), self.keep)

    runner = Forgets(open_runner("torch", good))
    assert check_decode(runner, probes, FLOOR).verdict == "FAIL"
    runner.keep = 64
    assert check_decode(runner, probes, FLOOR).verdict == "PASS"


def test_decoding_starts_within_the_window_and_ends_past_it(
    good: Checkpoint, probes: ProbeSet
) -> None:
    runner = Watched(open_runner("torch", good))
    assert check_decode(runner, probes, FLOOR).verdict == "PASS"
    assert runner.steps == [(1, 1)] * 64, (
        "a window of 4 in a context of 64: one by one, many times round the cache"
    )


@pytest.mark.parametrize("arch", ["gemma-2b", "gemma2-2b", "sample"])
def test_the_estimate_is_what_is_run(arch: str) -> None:
    opened = open_checkpoint(sample_dir()) if arch == "sample" else model(arch)
    chosen = build_probes(opened.config, tokenizer_of(opened), "ci")
    ran: list[tuple[int, int]] = []  # tokens, passes

    class Counts(Watched):
        def start(self, tokens: Tokens, padding: Any = None) -> Array | None:
            ran.append((np.size(tokens), 1))
            return super().start(tokens, padding)

        def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
            if self.layer == 1:  # of the block that is there already
                ran.append((hidden.shape[0] * hidden.shape[1], 0))
            return super().replay(hidden, tap)

    with opened, open_runner("torch", opened) as inner:
        runner = Counts(inner)
        run_checks(runner, chosen, FLOOR)
    ran += [(fed, 1) for fed, _ in runner.steps]
    found = behaviour.cost(opened.config, chosen)
    assert (found.tokens, found.passes) == (sum(t for t, _ in ran), sum(p for _, p in ran))
    big = PRESETS["gemma2-2b"].config
    assert 0 < behaviour.cost(big, build_probes(big, None, "ci")).tokens < 12_000
    assert behaviour.cost(big, build_probes(big, None, "smoke")) == behaviour.Cost(0, 0)


def test_a_prompt_is_run_once_and_gives_one_position(
    good: Checkpoint, probes: ProbeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "BEFORE", -3)
    runner = Watched(open_runner("torch", good))
    assert check_decode(runner, probes, FLOOR).verdict == "PASS"
    assert runner.steps == [(7, 1)] + [(1, 1)] * 57


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[Checkpoint, ProbeSet]]:
    """The sample: a random model with a tied head only repeats its last token."""
    with open_checkpoint(sample_dir()) as opened:
        yield opened, build_probes(opened.config, tokenizer_of(opened), "smoke")


def test_other_greedy_choices_are_seen(trained: tuple[Checkpoint, ProbeSet]) -> None:
    opened, chosen = trained
    runner = Wrapped(open_runner("torch", opened), decodes=other(opened, rope_theta=1000.0))
    check = check_greedy(runner, chosen, FLOOR, steps=32)
    assert check.verdict == "FAIL"
    assert check.value is not None
    assert check.value > 0
    assert "the first at step" in check.detail
    loose = FakeFloor({"kl_max": 1e-9, "kl_mean": 1e-10, "rms_logit": 100.0})
    near = check_greedy(runner, chosen, loose, steps=32)
    assert (near.verdict, near.value) == ("PASS", 0.0), "every margin is small beside such a noise"
    assert " 0 of them at near-ties" not in near.detail
    assert check_greedy(runner, chosen, None, steps=32).verdict == "INCONCLUSIVE"


def test_two_models_agree_greedily_or_not(trained: tuple[Checkpoint, ProbeSet]) -> None:
    opened, chosen = trained
    with open_runner("torch", opened) as a, open_runner("torch", opened) as b:
        assert check_greedy_agreement(a, b, chosen, FLOOR, steps=16).verdict == "PASS"
        wrong = other(opened, rope_theta=1000.0)
        assert check_greedy_agreement(a, wrong, chosen, FLOOR, steps=32).verdict == "FAIL"
        only = "logits"  # the candidate needs no decoder
        assert (
            check_greedy_agreement(a, Wrapped(b, gives=only), chosen, FLOOR, steps=4).verdict
            == "PASS"
        )
        blind = check_greedy_agreement(Wrapped(a, gives=only), b, chosen, FLOOR)
        assert blind.verdict == "INCONCLUSIVE"


def test_margins_are_the_larger_of_both_sides() -> None:
    one = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [5.0, 5.0, 0.0]])
    two = np.array([[2.0, 1.0, 0.0], [2.0, 1.5, 0.0], [5.0, 5.5, 0.0]])
    np.testing.assert_allclose(decoding._margins(one, two), [0, 1, 0.5])
    tie = np.array([[1.0, 1.0]])
    assert decoding._margins(tie, tie[:, ::-1])[0] == 0


class Nan(Wrapped):
    """One logit of the last position is not a number."""

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        for start, stop, tile in self.inner.logit_tiles(rows, positions):
            tile[:, -1, 3] = np.nan
            yield start, stop, tile


def test_a_number_that_is_none_fails_everywhere(good: Checkpoint, probes: ProbeSet) -> None:
    found = by_id(run_checks(Nan(open_runner("torch", good)), probes, FLOOR))
    for i in ("P5/final", "P6/padding", "P7/bos", "P8/decode", "P9/greedy"):
        assert (found[i].verdict, found[i].value) == ("FAIL", None), i
        assert "not a finite number" in found[i].detail
    json.dumps([c.to_json() for c in found.values()], allow_nan=False)
    found = by_id(run_checks(Nan(open_runner("torch", good)), probes, None))
    assert found["P6/padding"].verdict == "FAIL", "without a floor too"


def test_hidden_states_that_are_none_fail_the_mask(good: Checkpoint, probes: ProbeSet) -> None:
    class Bad(Wrapped):
        def replay(self, hidden: Array, tap: Tap | None = None) -> Array:
            return self.inner.replay(hidden, tap) * np.nan

    assert check_mask(Bad(open_runner("torch", good)), probes).verdict == "FAIL"


# ---- what cannot be said ------------------------------------------------------------------------------------------


def test_without_abilities_there_is_a_reason(good: Checkpoint, probes: ProbeSet) -> None:
    runner = Wrapped(open_runner("torch", good), gives="logits")
    found = by_id(run_checks(runner, probes, FLOOR))
    for i, reason in {
        "P5/attention": "does not give taps", "P3/mask": "does not give replay",
        "P8/decode": "does not give decode", "P9/greedy": "does not give decode",
    }.items():  # fmt: skip
        assert found[i].verdict == "INCONCLUSIVE"
        assert reason in found[i].detail
    for i in ("P5/final", "P6/padding", "P7/bos"):
        assert found[i].verdict == "PASS", i


@pytest.mark.parametrize(
    "floor", [None, FakeFloor({"kl_max": None, "kl_mean": None, "rms_logit": None})]
)
def test_without_a_floor_there_is_no_verdict(
    floor: FakeFloor | None, good: Checkpoint, probes: ProbeSet
) -> None:
    with open_runner("torch", good) as runner:
        found = by_id(run_checks(runner, probes, floor))
    for i in ("P6/padding", "P7/bos", "P8/decode"):
        assert found[i].verdict == "INCONCLUSIVE"
        assert "no noise floor" in found[i].detail
        assert found[i].value is not None


def test_probes_that_are_too_short_are_no_evidence(good: Checkpoint, probes: ProbeSet) -> None:
    short = ProbeSet(tuple(p for p in probes if len(p.tokens) <= 4), "ci", 0, [])
    assert short.probes
    with open_runner("torch", good) as runner:
        found = by_id(run_checks(runner, short, FLOOR))
    for i in ("P3/window", "P3/mask", "P8/decode"):
        assert found[i].verdict == "INCONCLUSIVE"
        assert "window of 4" in found[i].detail
    regimes = {r["name"]: r for r in coverage(good.config, short, list(found.values()))["regimes"]}
    assert not regimes["window crossed"]["exercised"]
    assert not regimes["decoding across the window"]["exercised"]
    assert not regimes["full context"]["exercised"]
    assert not regimes["every vocabulary row"]["exercised"]
    assert not regimes["documents"]["exercised"]
    assert not regimes["attention soft-cap"]["exercised"], "nothing was measured"
    with open_runner("torch", good) as runner:
        nothing = run_checks(runner, ProbeSet((), "ci", 0, []), FLOOR)
    assert {c.verdict for c in nothing} == {"INCONCLUSIVE"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_a_fail(value: float) -> None:
    q = Question("X", "x")
    values = np.array([0.0, value])
    for check in (
        q.is_noise(values, FLOOR, "d"), q.answer(True, value, 1.0, "d"), q.is_noise(values, None, "d"),
    ):  # fmt: skip
        assert (check.verdict, check.value) == ("FAIL", None)


@pytest.mark.parametrize(("values", "verdict", "value"), [
    ([0, 0, 0], "PASS", 0.0),
    ([2e-9] + [0] * 99, "FAIL", 2e-9),
    ([9e-10] + [0] * 99, "PASS", 9e-10),
    ([3e-10] * 9, "FAIL", 3e-10),  # below the largest that is allowed, but everywhere
])  # fmt: skip
def test_the_largest_and_the_mean_must_be_noise(
    values: list[float], verdict: str, value: float
) -> None:
    check = Question("X", "x").is_noise(np.array(values, float), FLOOR, "d")
    assert check.verdict == verdict
    assert check.value == pytest.approx(value)
    zero = FakeFloor({"kl_max": 0.0, "kl_mean": 0.0})
    exact = Question("X", "x").is_noise(np.array(values, float), zero, "d")
    assert exact.verdict == ("FAIL" if any(values) else "PASS"), "a floor of nothing allows nothing"


# ---- soft-caps ----------------------------------------------------------------------------------------------------


def test_utilisation_is_what_the_forward_pass_has(good: Checkpoint, probes: ProbeSet) -> None:
    """Against the model without final cap, and scores masked here; queries see no future and no farther than the window."""
    from g2kit.model.torch_gemma import forward

    config = good.config
    weights = {n: torch.from_numpy(np.array(t.read(), np.float32)) for n, t in good.tensors.items()}
    chosen = softcap.affordable(config, list(probes))
    seen, final = np.zeros(4), 0.0
    for p in chosen:
        ids = torch.from_numpy(p.tokens.copy())[None]
        away = torch.arange(len(p.tokens))[:, None] - torch.arange(len(p.tokens))

        def look(layer: int, name: str, x: Any, away: Any = away) -> None:
            if name == "scores":
                mask = (away >= 0) & (away < (config.sliding_window if layer % 2 == 0 else 10**9))
                seen[layer] = max(seen[layer], float(x[..., mask].abs().max()))

        forward(ids, weights, config, tap=look)
        free = forward(ids, weights, config.with_(final_logit_softcapping=1e9))
        final = max(final, float(free.abs().max()))
    with open_runner("torch", good) as runner:
        used = utilisation(runner, list(probes))
    np.testing.assert_allclose(used.layers, seen / 50, rtol=1e-5)
    np.testing.assert_allclose(used.final, final / 30, rtol=1e-4)
    assert used.tokens == sum(len(p.tokens) for p in chosen)
    assert 1 < len(chosen) <= 3


def test_probes_whose_scores_are_too_large_are_left_out(probes: ProbeSet) -> None:
    big = PRESETS["gemma2-27b"].config
    long = build_probes(big, None, "ci")
    assert max(len(p.tokens) for p in long) > 4096
    assert 0 < max(len(p.tokens) for p in softcap.affordable(big, list(long))) <= 512


def quiet() -> Checkpoint:
    """A random model whose scores stay far below the caps."""
    return model(scale=0.02)


def test_unused_caps_are_no_evidence_until_a_derived_pair_uses_them() -> None:
    opened = quiet()
    chosen = build_probes(opened.config, None, "ci")
    with open_runner("torch", opened) as runner:
        used = utilisation(runner, list(chosen))
        checks = run_checks(runner, chosen, FLOOR, used=used)
    found = by_id(checks)
    for i in ("P5/attention", "P5/final"):
        assert found[i].verdict == "INCONCLUSIVE"
        assert "a derived pair" in found[i].detail
    assert "in layers 0, 1, 2, 3" in found["P5/attention"].detail
    regimes = {
        r["name"]: r["exercised"] for r in coverage(opened.config, chosen, checks, used)["regimes"]
    }
    assert not regimes["attention soft-cap"]
    assert not regimes["final soft-cap"]

    stress = stress_for(used)
    with (
        open_runner("torch", derive(opened, stress)) as a,
        open_runner("torch", derive(quiet(), stress)) as b,
    ):
        reached = utilisation(a, list(chosen))
        assert all(1 < u < 4 for u in (*reached.layers, reached.final))  # type: ignore[operator]
        stressed = stressed_check(a, b, list(chosen), FLOOR)
        assert stressed.verdict == "PASS", stressed
        for change in ("attn_logit_softcapping", "final_logit_softcapping"):
            without = other(derive(opened, stress), **{change: 1e6})
            check = stressed_check(a, without, list(chosen), FLOOR)
            assert check.verdict == "FAIL", change
            assert check.value is not None
            assert check.value > 1e-3
    regimes = {
        r["name"]: r for r in coverage(opened.config, chosen, [*checks, stressed], used)["regimes"]
    }
    assert regimes["attention soft-cap"]["exercised"]
    assert "derived pair" in regimes["final soft-cap"]["detail"]

    # what it is for: without the derived pair, a missing attention cap is noise
    with open_runner("torch", opened) as a, other(opened, attn_logit_softcapping=1e6) as b:
        tokens = chosen.group("P3")[-1].tokens
        assert float(np.abs(a.logits(tokens) - b.logits(tokens)).max()) < 1e-6


def test_a_derived_checkpoint_is_scaled_exactly() -> None:
    opened = model()
    stress = softcap.Stress((0, 1, 2, 3), 2)
    made = derive(opened, stress)
    for i in range(4):
        name = canonical.Q.format(i=i)
        np.testing.assert_array_equal(made.tensors[name].read(), opened.tensors[name].read() * 2**i)
        np.testing.assert_array_equal(
            made.tensors[name].read_rows(3, 5), made.tensors[name].read()[3:5]
        )
    norm = made.tensors[canonical.FINAL_NORM].read()
    np.testing.assert_allclose(
        1 + norm, 4 * (1 + opened.tensors[canonical.FINAL_NORM].read()), rtol=1e-6
    )
    assert made.tensors[canonical.EMBED] is opened.tensors[canonical.EMBED]
    narrow = checkpoint(
        opened.config, {n: t.read().astype(BF16) for n, t in opened.tensors.items()}
    )
    wide = checkpoint(opened.config, {n: t.read().astype(F32) for n, t in narrow.tensors.items()})
    for name in (canonical.Q.format(i=3), canonical.FINAL_NORM):
        a, b = (derive(c, stress).tensors[name] for c in (narrow, wide))
        assert a.dtype == b.dtype == a.read().dtype == F32
        np.testing.assert_array_equal(a.read(), b.read(), "whatever the files store it in")
    same = derive(opened, softcap.Stress((0,) * 4, 0))
    for name, tensor in opened.tensors.items():
        assert same.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(same.tensors[name].read(), tensor.read())


def test_the_checks_are_light_to_import() -> None:
    code = "import g2kit.verify.behaviour, sys; print(*{'torch', 'jax', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_runner_of_files_is_not_given_a_view(good: Checkpoint, probes: ProbeSet) -> None:
    """It would run the files as they are, and pass."""
    with open_runner("torch", good) as a:
        b = Wrapped(a)
        b.name = "transformers"  # type: ignore[misc]
        check = stressed_check(a, b, list(probes), FLOOR)
    assert check.verdict == "INCONCLUSIVE"
    assert "reads files" in check.detail


def test_a_derived_pair_must_reach_its_caps() -> None:
    opened = quiet()
    chosen = list(build_probes(opened.config, None, "ci"))
    with open_runner("torch", opened) as a, open_runner("torch", opened) as b:
        check = stressed_check(a, b, chosen, FLOOR)
    assert check.verdict == "INCONCLUSIVE"
    assert "does not reach its caps either" in check.detail


def test_factors_are_bounded() -> None:
    used = Utilisation((0.001, 0.5, 3.0, None), 0.0, 9)
    assert stress_for(used) == softcap.Stress((11, 2, 0, 0), 0)
    assert stress_for(Utilisation((1e-30, float("nan")), float("inf"), 9)) == softcap.Stress(
        (24, 0), 0
    )
    assert softcap._before_cap(30.0, 30.0) < 300, "a logit rounded to its cap"


def test_queries_past_the_window(good: Checkpoint, probes: ProbeSet) -> None:
    config = good.config
    exact = sum(
        sum(1 for q in range(len(p.tokens)) if any(q - k >= 4 for k in range(q + 1)))
        for p in probes
    )
    assert queries_past_window(config, probes) == exact > 0
    assert queries_past_window(small("gemma-2b"), probes) == 0
