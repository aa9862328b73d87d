"""Recordings hold what ran, and comparing with one gives what comparing with the model itself gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import checkpoint, random_weights
from recording_case import LogitsOnly, few_probes, make, probe, sample
from safetensors.numpy import load_file

from g2kit.convert import convert, open_checkpoint
from g2kit.convert.api import fingerprint
from g2kit.convert.open import Checkpoint
from g2kit.formats.errors import (
    ChecksumError,
    ConfigError,
    ConflictError,
    FormatError,
    MissingTensorError,
    NonFiniteError,
    UsageError,
)
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.batches import targets
from g2kit.verify.floor import Estimate, Floor, measure_floor
from g2kit.verify.lockstep import LockstepResult, merge_results, run_lockstep
from g2kit.verify.probes import ProbeSet
from g2kit.verify.recording import (
    Recording,
    compare_recording,
    compare_recordings,
    is_recording,
    open_recording,
    record,
)
from g2kit.verify.recording_logits import LogitKeeper
from g2kit.verify.recording_tables import find_table, prove
from g2kit.verify.runners import open_runner
from g2kit.verify.views import changed, edited, shifted_rows

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

MUTANT_LAYER = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample in float32 by both runners, each with its floor."""
    root = tmp_path_factory.mktemp("recordings")
    found = {}
    for name, estimator in (("torch", "float64"), ("jax", "permuted")):
        floor = measure_floor(
            sample(), list(few_probes()), runner=name, names=(estimator,), budget=10_000
        )
        found[name] = make(root / name, name, floor=floor)
    return found


@pytest.fixture
def by_torch(made: dict[str, Path]) -> Iterator[Recording]:
    with open_recording(made["torch"]) as r:
        yield r


@pytest.fixture
def by_jax(made: dict[str, Path]) -> Iterator[Recording]:
    with open_recording(made["jax"]) as r:
        yield r


def largest_kl(result: LockstepResult) -> float:
    return max(float(r.stats.kl.max()) for r in result.records)


def matrix_of(layer: int) -> str:
    return next(n for n in sample().tensors if f".{layer}." in n and "down_proj" in n)


def faulty() -> Checkpoint:
    """One weight of one block doubled."""
    name = matrix_of(MUTANT_LAYER)

    def double(w: np.ndarray) -> np.ndarray:
        i = np.unravel_index(np.argmax(np.abs(w.astype(np.float32))), w.shape)
        w[i] = w[i] + w[i]
        return w

    return changed(sample(), {name: edited(sample().tensors[name], double)})


def other_embedding() -> Checkpoint:
    return changed(sample(), {canonical.EMBED: shifted_rows(sample().tensors[canonical.EMBED])})


# ---------------------------------------------------------------- what is kept


def test_arrays_are_what_the_runner_gives(by_torch: Recording) -> None:
    r, layers = by_torch, by_torch.config.num_hidden_layers
    matrix = schema.signs(r.config.hidden_size)
    sampled = r.rows("sample_at", 0, r.sizes.sampled).tolist()
    assert len(sampled) == 32
    seen = 0
    with open_runner("torch", sample()) as runner:
        for i, p in enumerate(few_probes()):
            assert np.array_equal(r.probes.probes[i].tokens, p.tokens)
            states = runner.hidden_states(p.tokens)
            near = {"rtol": 2e-5, "atol": 2e-5}  # another batch may sum in another order
            np.testing.assert_allclose(r.array("final_hidden", i), runner.final_hidden()[0], **near)
            for point, h in enumerate(states):
                x = h[0].astype(np.float64)
                want = np.linalg.norm(x, axis=1)
                np.testing.assert_allclose(r.array("norm", i)[:, point], want, rtol=1e-5)
                d = r.array("projection", i)[:, point] - x @ matrix.T
                assert np.abs(d).max() <= 2e-5 * want.max() * 16
            logits = np.concatenate([t for _, _, t in runner.logit_tiles()], -1)[0].astype(
                np.float64
            )
            lse = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
            np.testing.assert_allclose(r.array("lse", i), lse, **near)
            top = np.take_along_axis(logits, r.array("topk_id", i).astype(np.int64), 1)
            np.testing.assert_allclose(r.array("topk_logit", i), top, **near)
            assert (r.array("topk_logit", i)[:, -1] >= np.sort(logits, 1)[:, -256] - 2e-5).all()
            goals = targets(p)
            want = np.where(goals >= 0, logits[np.arange(len(goals)), goals], 0.0)
            np.testing.assert_allclose(r.array("next_logit", i), want, **near)
            for k, row in enumerate(sampled):
                if r.place(row)[0] == i:
                    full = r.rows("sample_logits", k, k + 1)[0]
                    np.testing.assert_allclose(full, logits[r.place(row)[1]], **near)
                    seen += 1
    assert seen == 32
    assert r.sizes.layers == layers


def test_the_document_says_what_ran(by_torch: Recording) -> None:
    d, described = by_torch.document, by_torch.describe()
    assert d["schema"] == "g2kit.recording/2"
    assert by_torch.fingerprint == fingerprint(sample_dir())
    assert (described["kind"], described["runner"]["name"]) == ("recording", "torch")
    assert described["config"]["vocab_size"] == by_torch.config.vocab_size
    assert by_torch.config == sample().config
    assert d["environment"]["tf32"] is False
    assert d["probes"]["skipped"] == few_probes().skipped
    assert by_torch.probes.sha256 == few_probes().sha256
    assert [p.category for p in by_torch.probes] == [p.category for p in few_probes()]
    assert isinstance(by_torch.floor, Floor)
    assert is_recording(by_torch.path)
    assert is_recording(by_torch.path / "recording.json")
    assert not is_recording(sample_dir())
    by_torch.require_weights(fingerprint(sample_dir()))
    with pytest.raises(
        ChecksumError, match=r"weights g2:sha256:\w+, these are g2:sha256:other.*lossless"
    ):
        by_torch.require_weights("g2:sha256:other")


def test_same_run_same_bytes_but_for_the_run(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", command="one"), make(tmp_path / "b", command="two")
    assert (a / schema.ARRAYS).read_bytes() == (b / schema.ARRAYS).read_bytes()
    one, two = (json.loads((p / schema.DOCUMENT).read_text()) for p in (a, b))
    assert one.pop("run") != two.pop("run")
    assert one.pop("self_sha256") != two.pop("self_sha256")
    assert one == two
    assert sorted(p.name for p in a.iterdir()) == [
        "arrays.safetensors", "recording.json", "tokenizer.model",
    ]  # fmt: skip


def test_the_official_reader_reads_the_arrays(by_torch: Recording) -> None:
    arrays = load_file(by_torch.path / schema.ARRAYS)
    assert {n: a.shape for n, a in arrays.items()} == {
        s.name: s.shape for s in schema.slots(by_torch.sizes)
    }
    assert np.array_equal(arrays["tokens"], np.concatenate([p.tokens for p in few_probes()]))


def test_batches_do_not_change_places(by_torch: Recording, tmp_path: Path) -> None:
    one_by_one = make(tmp_path / "a", batch_tokens=1)
    with open_recording(one_by_one) as other:
        assert other.id != by_torch.id  # the setting is part of what was done
        for i in range(len(few_probes())):
            np.testing.assert_allclose(
                other.array("final_hidden", i),
                by_torch.array("final_hidden", i),
                rtol=1e-4,
                atol=1e-4,
            )


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize(("there", "here"), [("torch", "jax"), ("jax", "torch")])
def test_runners_verify_against_each_other(made: dict[str, Path], there: str, here: str) -> None:
    with (
        open_recording(made[there]) as r,
        open_recording(made[here]) as own,
        open_runner(here, sample()) as runner,
    ):
        found = compare_recording(r, runner)
        assert r.floor is not None
        assert own.floor is not None
        floor = r.floor.plus(own.floor)
        assert found.head == "hidden"
        assert [x.document for x in found.records] == sorted(p.id for p in few_probes())
        assert 0 < largest_kl(found) <= floor.threshold("kl_max")
        assert [e.kind for e in found.errors] == [
            "embedding", "local", "global", "local", "global", "final",
        ]  # fmt: skip
        for e in found.errors:
            assert e.isolated is None
            assert e.reached is not None
            assert e.reached <= floor.threshold("hidden", e.layer)
        with open_runner(here, faulty()) as wrong:
            bad = compare_recording(r, wrong)
        assert largest_kl(bad) > 100 * floor.threshold("kl_max")
        over = [e.layer for e in bad.blocks if e.reached > floor.threshold("hidden", e.layer)]
        assert over[0] == MUTANT_LAYER


def test_the_threshold_across_machines_adds_roots() -> None:
    def floor(kl: float, rms: float) -> Floor:
        return Floor("float32", (Estimate("x", "float32", 1, 1, kl, kl, rms, (rms,), (rms,)),))

    both = floor(4e-12, 1e-6).plus(floor(9e-12, 2e-6))
    assert both.threshold("kl_max") == pytest.approx(10 * 25e-12)
    assert both.threshold("rms_logit") == pytest.approx(10**0.5 * 3e-6)


def test_same_runner_is_zero(by_torch: Recording) -> None:
    with open_runner("torch", sample()) as runner:
        found = compare_recording(by_torch, runner)
    assert largest_kl(found) == 0
    assert all(e.reached == 0 for e in found.errors)


def test_as_lockstep_finds(by_torch: Recording) -> None:
    """Against the model itself: the same logits, and blocks' errors as 16 projections can tell them."""
    with open_runner("torch", sample()) as ref, open_runner("jax", faulty()) as cand:
        real = run_lockstep(ref, cand, list(few_probes()), isolated=False)
        found = compare_recording(by_torch, cand)
    for a, b in zip(real.records, found.records, strict=True):
        assert a.document == b.document
        np.testing.assert_allclose(b.stats.kl, a.stats.kl, rtol=1e-4, atol=1e-14)
        assert np.array_equal(b.stats.target, a.stats.target)
    for e, f in zip(real.errors, found.errors, strict=True):
        assert (e.layer, e.kind, e.positions) == (f.layer, f.kind, f.positions)
        if e.accumulated_mean:
            assert 0.8 < f.accumulated_mean / e.accumulated_mean < 1.25
            assert 0.5 < f.reached / e.reached < 2
    assert real.final.accumulated_mean == pytest.approx(found.final.accumulated_mean, rel=1e-6)


def test_shards_make_the_whole(by_jax: Recording) -> None:
    with open_runner("torch", sample()) as runner:
        whole = compare_recording(by_jax, runner, batch_tokens=80)
        parts = [
            compare_recording(by_jax, runner, batch_tokens=80, shard=(i, 3)) for i in (2, 0, 1)
        ]
    assert all(len(p.records) < len(whole.records) for p in parts)
    assert merge_results(parts).to_json() == whole.to_json()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_compute_types(by_torch: Recording, tmp_path: Path, dtype: str) -> None:
    with open_recording(make(tmp_path / dtype, dtype=dtype)) as r:
        with open_runner("jax", sample(), dtype=dtype) as runner:
            same = largest_kl(compare_recording(r, runner))
        with open_runner("torch", sample()) as runner:
            other = compare_recording(r, runner)
        assert compare_recordings(r, by_torch, reference_embedding=sample()).head == "hidden"
    limits = {"bfloat16": (0.1, 0.1), "float64": (1e-25, 1e-10)}[dtype]
    assert 0 < same < limits[0]
    assert 0 < largest_kl(other) < limits[1]


def test_transformers_gives_states_and_its_own_logits(by_torch: Recording) -> None:
    pytest.importorskip("transformers")
    with open_runner("transformers", sample_dir()) as runner:
        with pytest.raises(MissingTensorError, match="the transformers runner does not give"):
            compare_recording(by_torch, runner)
        found = compare_recording(
            by_torch, runner, candidate_checkpoint=sample_dir(), scratch=3072 * 16 * 40
        )
    assert found.head == "tiles"
    assert 0 < largest_kl(found) < 1e-9
    assert 0 < found.final.reached < 1e-4


def test_a_nan_in_the_candidate_is_found(by_torch: Recording) -> None:
    name = matrix_of(1)

    def spoil(w: np.ndarray) -> np.ndarray:
        w[0, 0] = np.nan
        return w

    broken = changed(sample(), {name: edited(sample().tensors[name], spoil)})
    with open_runner("torch", broken) as runner:
        found = compare_recording(by_torch, runner)
    assert len(found.non_finite) == len(few_probes())
    assert {(n.layer, n.side) for n in found.non_finite} == {(1, "candidate")}
    assert all(not r.stats.finite_cand.any() and r.stats.finite_ref.all() for r in found.records)


# ---------------------------------------------------------------- the embedding


def test_embedding_from_wherever_it_is(by_torch: Recording, made: Any, tmp_path: Path) -> None:
    wide = tmp_path / "f32"
    convert(sample_dir(), wide, to="safetensors", dtype="f32")
    with open_runner("torch", other_embedding()) as cand:
        with pytest.raises(
            MissingTensorError, match=r"the candidate has another.*--reference-embedding"
        ):
            compare_recording(by_torch, cand)
        kl = [largest_kl(compare_recording(by_torch, cand, reference_embedding=wide))]
        with pytest.raises(ChecksumError, match="not the one the recording was made with"):
            compare_recording(by_torch, cand, reference_embedding=other_embedding())
        with open_recording(make(tmp_path / "carried", with_embedding=True)) as carried:
            assert carried.embedding is not None
            kl.append(largest_kl(compare_recording(carried, cand)))
    assert kl[0] > 1e-3
    assert kl[0] == kl[1]


def test_the_head_is_proven(
    by_torch: Recording, by_jax: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another engine's product is within rounding; one with factors of 10 bits, as TF32 takes them, is not."""
    product = torch.mm

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    with find_table(by_jax, sample()) as table:
        assert prove(by_torch, table).share < 0.5
        assert 0 < prove(by_jax, table).share < 0.5
        monkeypatch.setattr(torch, "mm", lambda a, b: product(narrow(a), narrow(b)))
        with pytest.raises(
            FormatError,
            match=r"the logit of token \d+ at position \d+ of probe P\d.* rounding explains.*TF32",
        ):
            prove(by_jax, table)


def test_every_position_is_proven(by_torch: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that the sampled rows do not reach are held against their log-sum-exp."""
    real = Recording.rows
    sampled = set(by_torch.rows("sample_at", 0, 32).tolist())
    victim = next(i for i in range(100, 400) if i not in sampled)

    def rows(self: Recording, name: str, start: int, stop: int) -> np.ndarray:
        found = real(self, name, start, stop)
        if name == "final_hidden" and start <= victim < stop:
            found = found.copy()
            found[victim - start, :8] += 0.01
        return found

    monkeypatch.setattr(Recording, "rows", rows)
    with (
        open_runner("torch", sample()) as runner,
        pytest.raises(FormatError, match="the log-sum-exp at position"),
    ):
        compare_recording(by_torch, runner)


# ---------------------------------------------------------------- two recordings


def test_two_recordings_without_a_model(by_torch: Recording, by_jax: Recording) -> None:
    found = compare_recordings(by_torch, by_jax, reference_embedding=sample())
    with open_runner("jax", sample()) as runner:
        live = compare_recording(by_torch, runner)
    assert found.to_json()["records"] == live.to_json()["records"]
    for a, b in zip(found.errors, live.errors, strict=True):
        assert a.reached == pytest.approx(b.reached, rel=0.3)
    back = compare_recordings(by_torch, by_jax, candidate_embedding=sample_dir())
    assert back.to_json() == found.to_json()
    with pytest.raises(
        MissingTensorError, match=r"carry its embedding, and the other recording does not either\."
    ):
        compare_recordings(by_torch, by_jax)
    parts = [
        compare_recordings(
            by_torch, by_jax, reference_embedding=sample(), shard=(i, 2), batch_tokens=80
        )
        for i in (0, 1)
    ]
    assert len(merge_results(parts).records) == len(few_probes())


def test_recordings_of_different_embeddings(by_torch: Recording, tmp_path: Path) -> None:
    with open_runner("torch", other_embedding()) as runner:
        record(runner, few_probes(), tmp_path / "b", checkpoint=other_embedding())
    with open_recording(tmp_path / "b") as b:
        with pytest.raises(
            MissingTensorError,
            match=r"the other recording is of another\..*--candidate-embedding MODEL",
        ):
            compare_recordings(by_torch, b, reference_embedding=sample())
        found = compare_recordings(
            by_torch, b, reference_embedding=sample(), candidate_embedding=other_embedding()
        )
        assert largest_kl(found) > 1e-3
        assert found.embedding.reached > 0.1
        with pytest.raises(ChecksumError, match="weights"):
            b.require_weights(by_torch.fingerprint)


def test_recordings_of_other_probes(by_torch: Recording, tmp_path: Path) -> None:
    others = ProbeSet((*few_probes().probes[:-1], probe("P9/x", [2, 5, 6])), "smoke", 0, [])
    with open_runner("torch", sample()) as runner:
        record(runner, others, tmp_path / "b", checkpoint=sample())
    with (
        open_recording(tmp_path / "b") as b,
        pytest.raises(FormatError, match=r"2 probes differ: .*P9/x.*same --profile"),
    ):
        compare_recordings(by_torch, b, reference_embedding=sample())


# ---------------------------------------------------------------- logits only


def test_lower_bounds_are_below_and_near(by_torch: Recording, tmp_path: Path) -> None:
    """A recording of largest logits sees most of a fault and never more than there is."""
    with LogitsOnly(open_runner("torch", sample())) as runner:
        record(runner, few_probes(), tmp_path / "top", checkpoint=sample())
    with open_recording(tmp_path / "top") as top, open_runner("torch", faulty()) as cand:
        assert (top.kind, top.sizes.top) == ("top-k", 256)
        exact = compare_recording(by_torch, cand)
        bound = compare_recording(top, cand)
        same = compare_recordings(top, by_torch)
    assert (bound.head, bound.errors, exact.head) == ("top-k", [], "hidden")
    for a, b in zip(exact.records, bound.records, strict=True):
        # logits as the engine rounded them, and as the difference of hidden states gives them
        for metric, noise in (("kl", 1e-9), ("reverse_kl", 1e-9), ("tv", 3e-6), ("max_diff", 1e-5)):
            one, two = getattr(a.stats, metric), getattr(b.stats, metric)
            assert (two <= one * (1 + 1e-3) + noise).all(), metric
        for name in ("top1_ref", "top1_cand", "target"):
            assert np.array_equal(getattr(a.stats, name), getattr(b.stats, name))
        for name in ("margin", "lse_ref", "lse_cand", "logp_ref", "logp_cand", "overlap10"):
            one, two = getattr(a.stats, name), getattr(b.stats, name)
            np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4, err_msg=name)
    total = [sum(float(r.stats.kl.sum()) for r in x.records) for x in (bound, exact)]
    assert 0.5 < total[0] / total[1] <= 1
    assert same.head == "top-k"
    assert largest_kl(same) < 1e-9


def test_a_candidate_that_gives_only_logits(by_torch: Recording) -> None:
    with LogitsOnly(open_runner("jax", faulty())) as runner:
        found = compare_recording(by_torch, runner, candidate_checkpoint=sample())
    with open_runner("jax", faulty()) as runner:
        whole = compare_recording(by_torch, runner)
    assert (found.head, found.errors) == ("tiles", [])
    for a, b in zip(found.records, whole.records, strict=True):
        np.testing.assert_allclose(a.stats.kl, b.stats.kl, rtol=1e-2, atol=1e-9)


def test_lower_bound_of_two_full_recordings(by_torch: Recording, by_jax: Recording) -> None:
    found = compare_recordings(by_torch, by_jax, lower_bound_only=True)
    assert found.head == "top-k"
    assert len(found.errors) == 6
    assert 0 < largest_kl(found) < 1e-9


@pytest.mark.llama
def test_llama_cpp_is_recorded_and_compared(by_torch: Recording, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    convert(sample_dir(), tmp_path / "gguf", to="gguf", dtype="f32")
    with (
        open_checkpoint(tmp_path / "gguf") as opened,
        open_runner("llama_cpp", tmp_path / "gguf") as runner,
    ):
        record(runner, few_probes(), tmp_path / "rec", checkpoint=opened)
        here = compare_recording(by_torch, runner, candidate_checkpoint=opened)
    with open_recording(tmp_path / "rec") as r, open_runner("torch", sample()) as runner:
        there = compare_recording(r, runner)
        assert r.fingerprint != ""
    assert (here.head, there.head) == ("tiles", "top-k")
    assert 0 < largest_kl(there) < 1e-4
    assert 0 < largest_kl(here) < 1e-4


@st.composite
def logit_arrays(draw: st.DrawFn) -> np.ndarray:
    positions, vocab = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    values = st.sampled_from([-3.5, -0.0, 0.0, 1.0, 1.0000001, 30.0, -30.0, 1e-40])
    flat = draw(st.lists(values, min_size=positions * vocab, max_size=positions * vocab))
    return np.array(flat, np.float32).reshape(positions, vocab)


@given(logit_arrays(), st.integers(1, 12), st.integers(1, 40), st.randoms())
@settings(max_examples=60)
def test_kept_logits(logits: np.ndarray, k: int, step: int, rng: Any) -> None:
    """Against sorting everything: descending, equal logits by ascending id, whatever the tiles."""
    n, vocab = logits.shape
    k = min(k, vocab)
    goals = np.array([rng.randrange(-1, vocab) for _ in range(n)])
    wanted = np.array([[rng.randrange(vocab) for _ in range(3)] for _ in range(n)])
    keeper = LogitKeeper(n, vocab, k, np.array([n - 1]), goals, logits.dtype, wanted)
    for a in range(0, vocab, step):
        keeper.add(a, min(a + step, vocab), logits[:, a : a + step])
    found = keeper.finish()
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(found.ids, order)
    assert np.array_equal(found.logits, np.take_along_axis(logits, order, 1))
    assert np.array_equal(found.rows, logits[-1:])
    assert np.array_equal(found.wanted, np.take_along_axis(logits, wanted, 1))
    assert np.array_equal(found.next_logit, np.where(goals < 0, 0, logits[np.arange(n), goals]))
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(
        found.lse, np.log(np.exp(wide - 30).sum(1)) + 30, rtol=1e-12, atol=1e-12
    )
    assert found.finite.all()


def test_memory_does_not_hold_positions_times_vocabulary() -> None:
    """192 MB of logits pass through in a fraction of that."""
    code = """
import numpy as np, torch
from g2kit.machine import peak_rss
from g2kit.verify.recording_logits import LogitKeeper
n, vocab, step = 512, 98304, 2048
keeper = LogitKeeper(n, vocab, 256, np.array([1]), np.full(n, -1), np.dtype("float32"))
base = np.random.default_rng(0).standard_normal((n, step), np.float32)
keeper.add(0, step, base)
before = peak_rss()
for a in range(step, vocab, step):
    base[:, a % 7] += 0.25
    keeper.add(a, a + step, base)
keeper.finish()
print(peak_rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 48  # MiB


def test_importing_loads_no_framework() -> None:
    code = "import g2kit.verify.recording, sys; print(*{'torch', 'jax', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---------------------------------------------------------------- refusals


def test_another_model_is_named(by_torch: Recording) -> None:
    config = small("gemma2-2b")
    with (
        open_runner("torch", checkpoint(config, random_weights(config, 0))) as runner,
        pytest.raises(
            ConfigError,
            match=r"vocab_size is 3072 in the recording and 64 in the candidate; num_hidden_layers is 4 .* 2"
            r".*; hidden_size is",
        ),
    ):
        compare_recording(by_torch, runner)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_runner("torch", sample()) as runner:
        for probes, match in (
            ((), "no probes"),
            ((probe("P0/x", []),), "one without tokens"),
            ((probe("P0/x", [2, 3072]),), "token id 3072 .* vocabulary of 3072"),
        ):
            with pytest.raises(UsageError, match=match):
                record(runner, ProbeSet(probes, "smoke", 0, []), out, checkpoint=sample())
        with pytest.raises(ConflictError, match="lies inside the input"):
            record(runner, few_probes(), sample_dir() / "rec", checkpoint=sample())
        with LogitsOnly(runner) as hidden, pytest.raises(UsageError, match="no hidden states"):
            record(hidden, few_probes(), out, checkpoint=sample(), with_embedding=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_breaks_is_no_reference(tmp_path: Path) -> None:
    name = matrix_of(2)

    def spoil(w: np.ndarray) -> np.ndarray:
        w[0, 0] = np.inf
        return w

    broken = changed(sample(), {name: edited(sample().tensors[name], spoil)})
    for wrap, match in (
        (lambda r: r, r"block 2 has a NaN or infinity at position 0 of probe P0/"),
        (LogitsOnly, r"the logits' row has a NaN or infinity at position 0 of probe P0/"),
    ):
        with (
            wrap(open_runner("torch", broken)) as runner,
            pytest.raises(NonFiniteError, match=match),
        ):
            record(runner, few_probes(), tmp_path / "out", checkpoint=broken)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_recording_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make(tmp_path / "a", command="one")
    with pytest.raises(ConflictError, match="exists"):
        make(tmp_path / "a")
    make(tmp_path / "a", command="two", overwrite=True)
    with open_recording(tmp_path / "a") as r:
        assert r.document["run"]["command"] == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
