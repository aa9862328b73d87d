"""Whole comparisons: every lossless pair of formats, lossy ones, damage, shards, recordings; on tiny models and the sample."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import convert, open_checkpoint
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.convert.plan import Options as ConvertOptions
from g2kit.formats.dtypes import BF16, F32
from g2kit.formats.errors import ChecksumError, FormatError, UsageError
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.report import html, markdown, validate
from g2kit.sealed import dumps, sealed
from g2kit.verify import measure
from g2kit.verify.compare import (
    compare,
    compare_weights,
    merge,
    part_of,
    record_model,
    self_test_document,
)
from g2kit.verify.options import Options, engines
from g2kit.verify.shards import dumps_part
from g2kit.verify.show import report as terminal

CONFIG = small("gemma2-2b", layers=4)
WEIGHTS = random_weights(CONFIG, 1)
LOSSLESS = (
    ("flax", "flat"), ("flax", "nested"), ("flax", "stacked"), ("flax", "kauldron"), ("flax", "wrapped"),
    ("torch", "gemma_pytorch"), ("torch", "huggingface-bin"), ("safetensors", "huggingface"),
    ("gguf", "gguf"), ("keras", "keras"),
)  # fmt: skip
Report = dict[str, Any]


def model(changes: dict[str, np.ndarray] | None = None, **config: Any) -> Checkpoint:
    return checkpoint(CONFIG.with_(**config), {**WEIGHTS, **(changes or {})})


def verdicts(report: Report) -> dict[str, str]:
    validate(report)
    return {c["id"]: c["verdict"] for c in report["claims"]}


# ---- the same model


KEPT: dict[str, Any] = {}


@pytest.fixture
def floor_of_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's noise floor is measured once for all its formats."""
    original = measure.measure_floor

    def once(*args: Any, **options: Any) -> Any:
        key = repr(sorted(options.items(), key=str))
        if key not in KEPT:
            KEPT[key] = original(*args, **options)
        return KEPT[key]

    monkeypatch.setattr(measure, "measure_floor", once)


@pytest.mark.parametrize(("framework", "layout"), LOSSLESS)
def test_every_lossless_format_of_the_sample_is_the_same_model(
    framework: str, layout: str, tmp_path: Path, floor_of_sample: None
) -> None:
    with open_checkpoint(sample_dir()) as source:
        convert_checkpoint(source, tmp_path / "x", ConvertOptions(framework, layout))
    report = compare(sample_dir(), tmp_path / "x", profile="smoke")
    assert verdicts(report) == {"W1": "PASS", "C0": "PASS", "L1": "PASS"}, report["summary"]
    prints = {s["fingerprint"] for s in report["identity"].values()}
    assert len(prints) == 1
    assert None not in prints
    assert report["exit_code"] == 0


def test_ci_profile_of_a_tiny_model() -> None:
    report = compare(model(), model())
    assert verdicts(report) == {"W1": "PASS", "C0": "PASS", "L1": "PASS"}
    checks = {c["id"]: c["verdict"] for c in report["coverage"]["checks"]}
    assert {"P3/mask", "P6/padding", "P7/bos", "P8/decode", "P9/agreement"} <= checks.keys()
    assert set(checks.values()) == {"PASS"}, checks
    assert report["metrics"]["overall"]["metrics"]["kl"]["percentiles"]["100"] == 0
    assert [b["layer"] for b in report["blocks"]["layers"]] == [0, 1, 2, 3]


def test_reports_are_the_same_for_the_same_input() -> None:
    one, two = (compare(model(), model(), profile="smoke") for _ in range(2))
    assert dumps(one) == dumps(two)
    assert sealed(json.loads(dumps(one)))["content_id"] == one["content_id"]
    assert sealed(one, {"command": "x"})["content_id"] == one["content_id"]
    assert sealed({**one, "summary": "x"})["content_id"] != one["content_id"]


def test_other_runners_agree() -> None:
    report = compare(model(), model(), profile="smoke", cand_runner="jax")
    assert verdicts(report)["L1"] == "PASS"
    assert report["identity"]["candidate"]["runner"]["name"] == "jax"
    assert report["metrics"]["overall"]["metrics"]["kl"]["percentiles"]["100"] > 0


def test_bfloat16_is_the_weaker_claim() -> None:
    report = compare(model(), model(), profile="smoke", cand_dtype="bfloat16")
    assert verdicts(report) == {"W1": "PASS", "C0": "PASS", "L2": "PASS"}
    assert any("bfloat16" in s for s in report["not_verified"])


# ---- not the same model


def damaged(name: str, at: tuple[int, ...]) -> dict[str, np.ndarray]:
    w = WEIGHTS[name].copy()
    w[at] *= 8
    return {name: w}


@pytest.mark.parametrize(
    ("template", "layer"), [(canonical.DOWN, 2), (canonical.V, 1), (canonical.Q, 3)]
)
def test_a_corrupted_tensor_fails_with_its_block(template: str, layer: int) -> None:
    name = template.format(i=layer)
    report = compare(model(), model(damaged(name, (3, 1))), profile="smoke")
    found = verdicts(report)
    assert (found["W1"], found["L1"], report["exit_code"]) == ("FAIL", "FAIL", 1)
    assert report["blocks"]["first_divergent"]["layer"] == layer
    assert f"block {layer}" in next(c["sentence"] for c in report["claims"] if c["id"] == "L1")
    assert any(name.split(".")[-2] in h["text"] for h in report["blocks"]["hypotheses"])
    row = next(r for r in report["ledger"] if r["name"] == name)
    assert (row["verdict"], row["different"]) == ("FAIL", 1)
    assert name in report["summary"]


@pytest.mark.parametrize("changes", [
    {"sliding_window": 5}, {"attn_logit_softcapping": None}, {"rope_theta": 20000.0}, {"final_logit_softcapping": 20.0},
])  # fmt: skip
def test_another_hyperparameter_fails_and_is_named(changes: dict[str, Any]) -> None:
    report = compare(model(), model(**changes), profile="smoke")
    assert verdicts(report) == {"W1": "PASS", "C0": "FAIL", "L1": "FAIL"}
    assert [d["field"] for d in report["differences"]] == list(changes)


def test_other_generation_settings_fail_but_compute_the_same() -> None:
    report = compare(model(), model(eos_token_id=(1, 7)), profile="smoke")
    assert verdicts(report) == {"W1": "PASS", "C0": "FAIL", "L1": "PASS"}


def test_another_vocabulary_is_an_error_with_the_field() -> None:
    other = small("gemma2-2b", layers=4, vocab=70)
    report = compare(model(), checkpoint(other, random_weights(other, 1)))
    assert verdicts(report) == {"C0": "ERROR"}
    assert (report["verdict"], report["exit_code"]) == ("ERROR", 3)
    assert report["differences"] == [
        {"field": "vocab_size", "reference": 64, "candidate": 70, "kind": "size"}
    ]
    assert "vocab_size is 64 / 70" in report["summary"]
    assert (
        compare_weights(model(), checkpoint(other, random_weights(other, 1)))["verdict"] == "ERROR"
    )


@pytest.mark.parametrize(("name", "where"), [
    (canonical.GATE.format(i=1), "block 1"), (canonical.EMBED, "the embedding"),
    (canonical.FINAL_NORM, "the final norm"),
])  # fmt: skip
def test_nan_fails_with_its_first_position(name: str, where: str) -> None:
    w = WEIGHTS[name].copy()
    w.reshape(-1)[w.size // 2] = np.nan
    report = compare(model(), model({name: w}), profile="smoke")
    found = {c["id"]: c for c in report["claims"]}
    assert (found["W1"]["verdict"], found["L1"]["verdict"]) == ("FAIL", "FAIL")
    assert f"candidate's output of {where}, position" in found["L1"]["sentence"]
    assert report["ledger"][[r["name"] for r in report["ledger"]].index(name)]["nonfinite"] == 1
    json.dumps(report, allow_nan=False)


def test_nan_in_the_reference_too() -> None:
    w = {canonical.UP.format(i=0): np.full_like(WEIGHTS[canonical.UP.format(i=0)], np.nan)}
    report = compare(model(w), model(w))
    assert report["verdict"] == "FAIL"
    assert "both sides' output of block 0" in next(
        c["sentence"] for c in report["claims"] if c["id"] == "L1"
    )


def test_a_probe_set_that_does_not_cross_the_window_is_inconclusive() -> None:
    wide = {"sliding_window": 60}
    report = compare(model(**wide), model(**wide), profile="smoke", tokens=np.array([2, 5, 6]))
    crossed = next(r for r in report["coverage"]["regimes"] if r["name"] == "window crossed")
    if not crossed["exercised"]:
        assert verdicts(report)["L1"] == "INCONCLUSIVE"
        assert report["exit_code"] == 6


# ---- lossy candidates


def test_narrowed_weights_are_judged_by_a_budget() -> None:
    wide = {n: w.astype(F32) + np.float32(1e-5) for n, w in WEIGHTS.items()}
    narrow = {n: w.astype(BF16) for n, w in wide.items()}
    ref, cand = checkpoint(CONFIG, wide), checkpoint(CONFIG, narrow)
    report = compare(ref, cand, profile="ci", budget=10.0)
    assert verdicts(report) == {"W2": "PASS", "C0": "PASS", "Q1": "PASS"}, report["summary"]
    report = compare(checkpoint(CONFIG, wide), checkpoint(CONFIG, narrow), budget=1e-12)
    assert (verdicts(report)["Q1"], report["exit_code"]) == ("FAIL", 1)
    assert report["settings"]["budget"] == 1e-12


def test_the_sample_in_float16(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "x", to="safetensors", dtype="f16")
    report = compare_weights(sample_dir(), tmp_path / "x")
    assert verdicts(report) == {"W1": "PASS", "W2": "PASS", "C0": "PASS"}
    assert sum(r["different"] for r in report["ledger"]) > 0


# ---- shards


def parts(count: int, directory: Path, ref: Checkpoint, cand: Checkpoint) -> list[Path]:
    paths = []
    for i in range(count):
        one, two = engines()
        options = Options("smoke", one, two, batch_tokens=128, shard=(i, count))
        path = directory / f"{count}-{i}.json"
        path.write_text(dumps_part(part_of(ref, cand, options)))
        paths.append(path)
    return paths


def test_merged_reports_are_the_same_bytes_for_any_number_of_shards(tmp_path: Path) -> None:
    cand = damaged(canonical.DOWN.format(i=2), (3, 1))
    made = {n: parts(n, tmp_path, model(), model(cand)) for n in (1, 2, 3)}
    texts = [dumps(merge(made[n])) for n in made]
    assert texts[0] == texts[1] == texts[2]
    assert dumps(merge(reversed(made[3]))) == texts[0]
    report = json.loads(texts[0])
    assert verdicts(report)["L1"] == "FAIL"
    assert report["blocks"]["first_divergent"]["layer"] == 2
    assert report["run"] is None
    assert report["settings"]["shard"] is None
    with pytest.raises(UsageError, match=r"shard 2 of 3 is missing"):
        merge([made[3][0], made[3][2]])
    with pytest.raises(UsageError, match=r"shards 1, 3 of 3 are missing"):
        merge([made[3][1]])
    with pytest.raises(UsageError, match=r"shard 2 of 2 is missing and shard 1 is there twice\."):
        merge([made[2][0], made[2][0]])
    with pytest.raises(UsageError, match=r"different numbers: of 2, 3\."):
        merge([made[2][0], made[3][1]])
    made[2] = [path.rename(path.with_suffix(".old")) for path in made[2]]
    other = parts(2, tmp_path, model(), model(sliding_window=5))
    with pytest.raises(UsageError, match="different comparisons"):
        merge([made[2][0], other[1]])


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"schema": "g2kit.part/9"}'])
def test_what_is_no_part_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(FormatError):
        merge([tmp_path / "p"])


@pytest.mark.parametrize(
    "field", ["lockstep", "ledger", "probes", "shard", "settings", "identity", "floor"]
)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_damaged_part_is_refused(field: str, resealed: bool, part: Path) -> None:
    whole = json.loads(part.read_text())
    for value in ({"x": 1}, "x", [3]):
        damaged = {**whole, field: value}
        part.write_text(dumps_part(damaged) if resealed else json.dumps(damaged))
        with pytest.raises(FormatError if resealed else ChecksumError):
            merge([part])
    part.write_text(json.dumps(whole)[:-2])
    with pytest.raises(FormatError):
        merge([part])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts(1, tmp_path_factory.mktemp("part"), model(), model())[0]


@pytest.fixture
def part(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path))


# ---- recordings


def test_a_recording_stands_for_its_model(tmp_path: Path) -> None:
    record_model(model(), tmp_path / "rec", profile="smoke")
    report = compare(tmp_path / "rec", model(), cand_runner="jax")
    assert verdicts(report) == {"W1": "PASS", "C0": "PASS", "X1": "PASS"}, report["summary"]
    assert report["identity"]["reference"]["kind"] == "recording"
    assert report["settings"]["profile"] == "smoke"
    name = canonical.DOWN.format(i=2)
    report = compare(tmp_path / "rec", model(damaged(name, (3, 1))))
    found = verdicts(report)
    assert (found["W1"], found["X1"]) == ("FAIL", "FAIL")
    assert report["blocks"]["first_divergent"]["layer"] == 2
    for other in ({"tokens": np.array([2, 3])}, {"profile": "smoke"}, {"seed": 0}):
        with pytest.raises(UsageError, match=f"its own tokens, so --{min(other)} cannot"):
            compare(tmp_path / "rec", model(), **other)  # type: ignore[arg-type]


def test_a_recording_without_a_floor_decides_nothing(tmp_path: Path) -> None:
    record_model(model(), tmp_path / "rec", profile="smoke", floor=False)
    report = compare(tmp_path / "rec", model())
    assert verdicts(report)["X1"] == "INCONCLUSIVE"
    (claim,) = (c for c in report["claims"] if c["id"] == "X1")
    assert claim["sentence"] == "There is no noise floor to judge by."
    assert "record again without --no-floor" in claim["missing"][0]


def test_a_recording_holds_no_weights(tmp_path: Path) -> None:
    record_model(model(), tmp_path / "rec", profile="smoke", floor=False)
    with pytest.raises(UsageError, match="recording"):
        compare(model(), tmp_path / "rec")


def test_scores_that_a_runner_hides_are_measured_by_torch(tmp_path: Path) -> None:
    """Nor need the recording carry the embedding, which that runner hides too: the checkpoint has it."""
    record_model(sample_dir(), tmp_path / "rec", profile="smoke")
    report = compare(tmp_path / "rec", sample_dir(), cand_runner="transformers")
    assert verdicts(report)["X1"] == "PASS", report["summary"]
    assert min(s["utilisation"] for s in report["coverage"]["softcap"]) > 0.1


# ---- self-test and options


def test_self_test_document() -> None:
    report = self_test_document(sample_dir(), only=["one-weight", "window-off"], profile="smoke")
    assert verdicts(report) == {"S1": "PASS"}
    assert (report["self_test"]["caught"], report["self_test"]["of"]) == (2, 2)
    assert {m["found_layer"] for m in report["self_test"]["mutants"]}


@pytest.mark.parametrize("options", [
    {"runner": "tensorflow"}, {"dtype": "float16"}, {"mesh": "data=1"}, {"profile": "huge"},
    {"cand_runner": "llama_cpp", "cand_dtype": "bfloat16"},
])  # fmt: skip
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        compare(model(), model(), **options)


# ---- figures


def test_an_overflow_is_traced_to_the_damaged_tensor() -> None:
    report = overflowing()
    name = canonical.UP.format(i=2)
    said = report["blocks"]["hypotheses"]
    assert [h["text"].split(":")[0] for h in said] == [f"{name} is damaged"]
    assert "in the reference, 9.96921e+37 in the candidate" in said[0]["text"]
    document, position, _ = report["metrics"]["first_non_finite"]
    sentence = next(c["sentence"] for c in report["claims"] if c["id"] == "L1")
    assert "output of block 2, position" in sentence
    assert sentence.endswith(f"; in the logits at position {position} of {document} too.")


def test_flips_beyond_the_noise_are_counted() -> None:
    gate, up = canonical.GATE.format(i=2), canonical.UP.format(i=2)
    exchanged = {gate: WEIGHTS[up], up: WEIGHTS[gate]}
    report = compare(model(), model(exchanged), profile="smoke")
    metrics = report["metrics"]
    assert metrics["tolerance"] == pytest.approx(
        6 * math.sqrt(report["floor"]["k"]) * report["floor"]["rms_logit"]
    )
    assert metrics["overall"]["real_flips"] > 0
    assert "real flip" in markdown(report)
    same = compare(model(), model(), profile="smoke", cand_runner="jax")
    assert same["metrics"]["overall"]["real_flips"] == 0


def overflowing() -> Report:
    """A finite weight so large that most positions overflow."""
    name = canonical.UP.format(i=2)
    w = WEIGHTS[name].copy()
    w[0, 0] = 1e38
    return compare(model(), model({name: w}), profile="smoke")


def test_figures_say_what_they_leave_out() -> None:
    report = overflowing()
    o = report["metrics"]["overall"]
    assert 0 < o["non_finite"] < o["positions"]
    good = o["positions"] - o["non_finite"]
    said = f"{good} finite positions; {o['non_finite']:,} left out: not finite"
    assert f"({said}; " in markdown(report)
    assert html(report).count(said) == 2, "in a tile and above the table of categories"
    assert f"figures leave out {o['non_finite']} positions: not finite" in terminal(report)
    assert "not finite" not in markdown(compare(model(), model(), profile="smoke"))
