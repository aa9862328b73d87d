"""g2verify as people and CI call it: outputs, exit codes, one JSON document whatever happens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

import command_case
import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert.api import convert_checkpoint
from g2kit.convert.cli import g2conv
from g2kit.convert.plan import Options
from g2kit.model.sample import sample_dir
from g2kit.report import validate
from g2kit.terminal import run_cli
from g2kit.verify import options as verify_options
from g2kit.verify import parity
from g2kit.verify.cli import g2verify
from g2kit.verify.profiles import DEFAULT_PROFILE, PROFILES

SAMPLE = str(sample_dir())
run = partial(command_case.run, g2verify)
COMMANDS = ("compare", "weights", "record", "merge", "self-test", "logits", "report")


CONFIG = small("gemma2-2b", layers=4)
WEIGHTS = random_weights(CONFIG, 1)
BROKEN = "model.layers.2.mlp.down_proj.weight"


def write(path: Path, weights: dict[str, Any], framework: str = "safetensors") -> str:
    convert_checkpoint(checkpoint(CONFIG, weights), path, Options(framework, None), check=False)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model, the same as Flax, with one weight changed, and with a NaN."""
    root = tmp_path_factory.mktemp("models")
    changed, nan = WEIGHTS[BROKEN].copy(), WEIGHTS[BROKEN].copy()
    changed[3, 4] *= 8
    nan[3, 4] = np.nan
    return {
        "tiny": write(root / "tiny", WEIGHTS),
        "flax": write(root / "flax", WEIGHTS, "flax"),
        "broken": write(root / "broken", {**WEIGHTS, BROKEN: changed}),
        "nan": write(root / "nan", {**WEIGHTS, BROKEN: nan}),
    }


def test_every_command_has_help(capsys: Any) -> None:
    status, out, _ = run("--help", capsys=capsys)
    assert status == 0
    assert "7 the output exists" in out
    for name in COMMANDS:
        assert name in out
        assert run(name, "--help", capsys=capsys)[0] == 0


def test_weights_of_a_conversion(models: dict[str, str], capsys: Any) -> None:
    status, out, err = run("weights", models["tiny"], models["flax"], capsys=capsys)
    assert (status, err) == (0, "")
    assert "46 of 46 tensors are the same, bit for bit" in out
    assert out.count("g2:sha256:") == 2


def test_every_output_of_a_comparison(models: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    files = {n: tmp_path / f"out.{n}" for n in ("report", "html", "junit", "markdown")}
    options = [x for n, p in files.items() for x in (f"--{n}", str(p))]
    status, out, err = run(
        "compare",
        models["tiny"],
        models["flax"],
        "--profile",
        "smoke",
        "--json",
        *options,
        capsys=capsys,
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    validate(document)
    assert json.loads(files["report"].read_text()) == document
    assert document["run"]["command"].startswith("g2verify")
    assert document["run"]["seconds"] > 0
    assert "<html" in files["html"].read_text()
    assert "PASS" in files["markdown"].read_text()
    cases = ET.parse(files["junit"]).getroot().iter("testcase")
    assert any("L1" in (c.get("name") or "") for c in cases)
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    again = tmp_path / "again.html"
    status, _, _ = run("report", str(files["report"]), "--html", str(again), "-q", capsys=capsys)
    assert status == 0
    assert again.read_text() == files["html"].read_text()


def test_a_broken_weight_exits_1(models: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    status, out, _ = run("weights", models["tiny"], models["broken"], capsys=capsys)
    assert status == 1
    assert f"{BROKEN} (first difference at [3, 4]: " in " ".join(out.split())
    report = tmp_path / "r.json"
    args = (
        "compare",
        models["tiny"],
        models["broken"],
        "--profile",
        "smoke",
        "-q",
        "--report",
        str(report),
    )
    status, out, err = run(*args, capsys=capsys)
    assert (status, out, err) == (1, "", "")
    document = json.loads(report.read_text())
    assert document["blocks"]["first_divergent"]["layer"] == 2
    assert document["blocks"]["first_divergent"]["tap"] == "mlp_out"
    assert "down_proj" in document["blocks"]["hypotheses"][0]["text"]


@pytest.mark.parametrize(("args", "status", "words"), [
    (("compare", SAMPLE, "/nowhere"), 3, "no such file"),
    (("weights", SAMPLE, __file__), 3, "test_verify_cli.py"),
    (("compare", SAMPLE, SAMPLE, "--budget", "-1"), 2, "budget"),
    (("compare", SAMPLE, SAMPLE, "--k", "0.1"), 2, "below the noise floor"),
    (("compare", SAMPLE, SAMPLE, "--mesh", "data=2"), 2, "jax runner"),
    (("compare", SAMPLE, SAMPLE, "--text", "/nowhere.txt"), 3, "/nowhere.txt"),
    (("compare", SAMPLE, SAMPLE, "--cand-runner", "llama_cpp", "--cand-dtype", "bfloat16"), 2, "bfloat16"),
    (("merge", "/nowhere.json"), 3, "/nowhere.json"),
])  # fmt: skip
def test_errors_are_a_document_too(
    args: tuple[str, ...], status: int, words: str, capsys: Any
) -> None:
    found, out, err = run(*args, "--json", capsys=capsys)
    assert found == status, err
    document = json.loads(out)
    validate(document)
    assert (document["verdict"], document["exit_code"]) == ("ERROR", status)
    assert words in document["summary"]
    error = document["error"]
    assert set(error) == {"code", "message", "file", "tensor", "found", "expected", "fix"}
    assert error["code"] in err
    assert words in f"{error['file']} {error['message']}"
    assert err.startswith("error[E_")
    assert "Traceback" not in err
    found, out, err = run(*args, capsys=capsys)
    assert (found, out) == (status, "")
    assert words in err


def test_an_error_is_written_where_a_report_was_asked_for(tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / n for n in ("r.json", "r.html", "r.xml")]
    args = ("--report", str(files[0]), "--html", str(files[1]), "--junit", str(files[2]))
    status, _, err = run("compare", SAMPLE, "/nowhere", *args, capsys=capsys)
    assert status == 3
    assert "no such file" in err
    assert json.loads(files[0].read_text())["verdict"] == "ERROR"
    assert "ERROR" in files[1].read_text()
    assert files[2].read_text().startswith("<?xml")


@pytest.mark.parametrize(("option", "path", "words"), [
    ("--html", "/nowhere/x.html", "nothing can be written here"),
    ("--report", ".", "directory"),
    ("--junit", f"{SAMPLE}/r.xml", "lies in an input of this command"),
    ("--markdown", f"{SAMPLE}/config.json", "lies in an input of this command"),
])  # fmt: skip
def test_outputs_are_checked_before_any_work(
    option: str, path: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("g2kit.verify.compare.part_of", lambda *a, **k: pytest.fail("ran"))
    status, out, err = run("compare", SAMPLE, SAMPLE, option, path, capsys=capsys)
    assert status in (2, 4, 5)
    assert out == ""
    assert words in err


def test_two_outputs_in_one_file(tmp_path: Path, capsys: Any) -> None:
    same = str(tmp_path / "x")
    status, _, err = run("weights", SAMPLE, SAMPLE, "--html", same, "--junit", same, capsys=capsys)
    assert status == 2
    assert "name the same file" in err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    old = tmp_path / "r.json"
    old.write_text("old")
    monkeypatch.setattr("g2kit.verify.compare.part_of", _interrupted)
    assert run("weights", SAMPLE, SAMPLE, "--report", str(old), capsys=capsys)[0] == 130
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert old.read_text() == "old"


def _interrupted(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_estimate_runs_nothing(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("g2kit.verify.compare.part_of", lambda *a, **k: pytest.fail("ran"))
    status, out, _ = run(
        "compare", models["tiny"], models["flax"], "--estimate", "--json", capsys=capsys
    )
    found = json.loads(out)
    assert status == 0
    assert found["tokens"] > 1000
    # twice through the layers on the candidate's side, once on the reference's
    assert found["flop"] > 3 * 2 * CONFIG.num_parameters * found["tokens"] / 2
    assert 200 << 20 < found["memory_bytes"] < 2 << 30
    assert found["gflop_per_second"] > 0
    status, out, _ = run("compare", models["tiny"], models["flax"], "--estimate", capsys=capsys)
    assert "GFLOP" in out


@pytest.mark.slow
def test_the_estimate_covers_what_a_run_needs() -> None:
    code = "from g2kit.entry import g2verify; g2verify()"

    def said(*options: str) -> Any:
        command = [sys.executable, "-c", code, "compare", SAMPLE, SAMPLE, "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    estimated = said("--profile", "smoke", "--estimate")["memory_bytes"] / (1 << 20)
    needed = said("--profile", "smoke")["run"]["peak_rss_mib"]
    assert needed < 1.1 * estimated
    assert estimated < 1.6 * needed


def test_what_smoke_leaves_out_is_one_plain_line(models: dict[str, str], capsys: Any) -> None:
    args = ("compare", models["tiny"], models["flax"], "--profile", "smoke", "--json")
    said = json.loads(run(*args, capsys=capsys)[1])["not_verified"]
    (line,) = [s for s in said if "profile" in s]
    assert line.startswith("By design, the smoke profile runs only a part or nothing of: ")
    assert "lengths around the sliding window (P3)" in line
    assert not any("left out" in s or "lengths [" in s for s in said)
    assert all(f"P{i}" in run("compare", "--help", capsys=capsys)[1] for i in range(11))


def test_only_shards_speak_of_parts(capsys: Any) -> None:
    for command in ("compare", "weights", "merge", "self-test"):
        out = " ".join(run(command, "--help", capsys=capsys)[1].split())
        assert ("(with --shard: the part)" in out) == (command == "compare")


def test_gating_of_a_flax_checkpoint_whose_sizes_do_not_tell(tmp_path: Path, capsys: Any) -> None:
    config = small("gemma2-2b", layers=2, f=CONFIG.hidden_size)
    weights = random_weights(config, 1)
    for framework in ("safetensors", "flax"):
        out = tmp_path / framework
        made = checkpoint(config, weights)
        convert_checkpoint(made, out, Options(framework, None), check=False)
        for manifest in out.glob("*manifest.json"):
            manifest.unlink()
    args = ("weights", str(tmp_path / "safetensors"), str(tmp_path / "flax"))
    args += ("--cand-config", str(tmp_path / "safetensors" / "config.json"))
    assert run(*args, capsys=capsys)[0] == 3
    found = {g: run(*args, "--gating", g, capsys=capsys)[0] for g in ("df", "fd")}
    assert sorted(found.values()) == [0, 1]


def test_shards_and_merge(models: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    parts = [str(tmp_path / f"part{i}.json") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        args = (
            "compare",
            models["tiny"],
            models["flax"],
            "--profile",
            "smoke",
            "--shard",
            f"{i}/2",
            "--report",
            part,
        )
        status, out, _ = run(*args, capsys=capsys)
        assert status == 0
        assert f"part {i} of 2" in out
    status, out, _ = run("merge", *parts, "--json", capsys=capsys)
    assert status == 0
    assert json.loads(out)["verdict"] == "PASS"
    status, _, err = run("merge", parts[0], capsys=capsys)
    assert status == 2
    assert "shard 2 of 2 is missing" in err


@pytest.mark.parametrize(("args", "words"), [
    (("--shard", "3/2", "--report", "x"), "not of the form"),
    (("--shard", "3/2"), "not of the form"),
    (("--shard", "0/2", "--report", "x"), "not of the form"),
    (("--shard", "1/2"), "needs a place"),
    (("--shard", "1/2", "--html", "x"), "whole reports"),
])  # fmt: skip
def test_wrong_shards(
    args: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("compare", SAMPLE, SAMPLE, *args, capsys=capsys)
    assert status == 2
    assert words in err


def test_record_and_compare(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rec = str(tmp_path / "rec")
    status, out, _ = run("record", models["tiny"], rec, "--profile", "smoke", capsys=capsys)
    assert status == 0
    assert "tokens in" in out
    status, out, _ = run("compare", rec, models["flax"], capsys=capsys)
    assert status == 0, out
    assert "X1" in out
    monkeypatch.setattr("g2kit.verify.compare.probes_of", lambda *a: pytest.fail("ran"))
    monkeypatch.chdir(tmp_path)
    status, _, err = run("record", models["tiny"], "rec", "--profile", "smoke", capsys=capsys)
    assert status == 7
    assert err.startswith("error[E_EXISTS]: rec: the destination directory exists.")
    monkeypatch.undo()
    document = tmp_path / "rec" / "recording.json"
    document.write_text(document.read_text().replace('"smoke"', '"full"'))
    status, _, err = run("compare", rec, models["flax"], capsys=capsys)
    assert status == 3
    assert "E_CHECKSUM" in err


def test_self_test(tmp_path: Path, capsys: Any) -> None:
    args = ("self-test", SAMPLE, "--profile", "smoke", "--only", "one-bit,attention-cap")
    status, out, _ = run(*args, capsys=capsys)
    assert status == 0
    assert "2 of 2 known mistakes were noticed" in out
    assert re.search(r"^PASS +attention-cap  attention soft-cap missing  +caught by C0", out, re.M)
    assert re.search(
        r"^PASS +one-bit +layer 2: an exponent bit .* flipped  caught by W1", out, re.M
    )
    assert run("self-test", SAMPLE, "--only", "nothing", capsys=capsys)[0] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(dtype: str, tmp_path: Path, capsys: Any) -> None:
    from g2kit.verify.runners import open_runner

    ids = np.arange(2, 42).reshape(2, 20)
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "logits.npy"
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(out), "--dtype", dtype)
    status, said, _ = run("logits", SAMPLE, *args, capsys=capsys)
    assert status == 0
    assert "float32 [2, 20, 3072]" in said
    found = np.load(out)
    with open_runner("torch", SAMPLE, dtype=dtype) as runner:
        assert np.array_equal(found, runner.logits(ids))
    assert found.dtype == np.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "logits.npy"]


@pytest.mark.parametrize(("ids", "status", "words"), [
    (np.array([[1.5]]), 3, "whole numbers"), (np.zeros((1, 0), int), 3, "whole numbers"),
    (np.array([3072]), 2, "vocabulary"), (np.array([-1]), 2, "vocabulary"),
    (np.array([{}], dtype=object), 3, "token ids"),
])  # fmt: skip
def test_ids_that_do_not_fit(
    ids: Any, status: int, words: str, tmp_path: Path, capsys: Any
) -> None:
    np.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "x.npy"))
    found, _, err = run("logits", SAMPLE, *args, capsys=capsys)
    assert found == status, err
    assert words in err
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]


def test_logits_of_a_broken_model_fail(tmp_path: Path, models: dict[str, str], capsys: Any) -> None:
    np.save(tmp_path / "ids.npy", np.array([2, 3]))
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "x.npy"))
    status, _, err = run("logits", models["nan"], *args, capsys=capsys)
    assert status == 1
    assert "first in sequence 0, position 0, token 0" in err


def test_a_report_of_another_kind_is_named(tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "r.xml"
    other.write_text("<testsuites/>")
    status, _, err = run("report", str(other), capsys=capsys)
    assert status == 3
    assert "not a report: not JSON" in err
    assert "Fix: name the JSON document that --report or --json wrote." in err


def test_a_changed_report_is_refused(models: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    report = tmp_path / "r.json"
    run("weights", models["tiny"], models["flax"], "-q", "--report", str(report), capsys=capsys)
    report.write_text(report.read_text().replace("46 of 46", "47 of 47"))
    status, _, err = run("report", str(report), capsys=capsys)
    assert status == 3
    assert "changed after it was written" in err


def test_conversion_with_parity(
    tmp_path: Path, models: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["convert", models["flax"], str(tmp_path / "x"), "--to", "gguf", "--check", "parity"]
    status = run_cli(g2conv, [*args, "--json"])
    out = json.loads(capsys.readouterr().out)
    assert status == 0
    assert out["checked_tensors"] == 46
    validate(out["parity"])
    assert {c["id"]: c["verdict"] for c in out["parity"]["claims"]}["L1"] == "PASS"
    monkeypatch.setattr(parity, "compare", lambda a, b, **o: {**out["parity"], "exit_code": 1})
    assert run_cli(g2conv, [*args, "--overwrite"]) == 1
    assert "L1" in capsys.readouterr().out


def test_parity_profile_is_ci() -> None:
    from inspect import signature

    assert signature(parity.compare).parameters["profile"].default is None
    assert verify_options.Options().describe()["profile"] == DEFAULT_PROFILE == "ci"
    assert tuple(PROFILES) == ("smoke", "ci", "full")
