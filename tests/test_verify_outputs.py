"""What g2verify writes and where: nothing that a checkpoint or recording consists of, standard output, links, leftovers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import command_case
import numpy as np
import pytest

from g2kit.formats.lock import Lock
from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.cli import g2verify

SAMPLE = str(sample_dir())
EXE = str(Path(sys.executable).with_name("g2verify"))
run = partial(command_case.run, g2verify)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.arange(2, 6))
    return tmp_path / "ids.npy"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "model.safetensors", "g2kit.manifest.json"]
)
def test_no_report_replaces_a_file_of_a_checkpoint_named_by_its_weights(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "m"))
    (model / "g2kit.manifest.json").touch()
    before = (model / name).read_bytes()
    weights = next(model.glob("*.safetensors"))
    target = weights if name == "model.safetensors" else model / name
    status, _, err = run("weights", str(weights), SAMPLE, "--html", str(target), capsys=capsys)
    assert status == 5
    assert "an input of this command" in err or "belongs to a checkpoint" in err
    assert (model / name).read_bytes() == before


@pytest.mark.parametrize("name", [schema.ARRAYS, "recording.json"])
def test_no_report_replaces_a_file_of_a_recording(
    name: str, recording: Path, tmp_path: Path, capsys: Any
) -> None:
    own = Path(shutil.copytree(recording, tmp_path / "r"))
    before = (own / name).read_bytes()
    args = (str(own / "recording.json"), SAMPLE, "--report", str(own / name))
    assert run("compare", *args, capsys=capsys)[0] == 5
    assert (own / name).read_bytes() == before


def test_a_report_replaces_an_older_one_beside_a_file(tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "m"))
    weights = next(model.glob("*.safetensors"))
    (model / "report.json").write_text("old")
    args = ("weights", str(weights), SAMPLE, "--report", str(model / "report.json"))
    assert run(*args, capsys=capsys)[0] == 0
    assert json.loads((model / "report.json").read_text())["verdict"] == "PASS"


@pytest.mark.parametrize("option", ["--report", "--html", "--junit", "--markdown"])
def test_standard_output_is_no_place_for_a_file(option: str, tmp_path: Path) -> None:
    printed = tmp_path / "printed"
    with printed.open("w") as out:
        done = subprocess.run(
            [EXE, "weights", SAMPLE, SAMPLE, option, "/proc/self/fd/1"],
            stdout=out, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"{option} is standard output" in done.stderr
    assert printed.read_text() == ""


def test_nothing_is_written_to_dev_null_and_that_is_fine(capsys: Any) -> None:
    done = subprocess.run(
        [EXE, "weights", SAMPLE, SAMPLE, "--report", "/dev/null"],
        stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0


def test_links_are_followed(tmp_path: Path, ids: Path, capsys: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    report, logits = tmp_path / "r.json", tmp_path / "l.npy"
    report.symlink_to(disk / "r.json")
    logits.symlink_to(disk / "l.npy")
    assert run("weights", SAMPLE, SAMPLE, "--report", str(report), capsys=capsys)[0] == 0
    assert run("logits", SAMPLE, "--tokens", str(ids), "--out", str(logits), capsys=capsys)[0] == 0
    assert report.is_symlink()
    assert logits.is_symlink()
    assert json.loads((disk / "r.json").read_text())["verdict"] == "PASS"
    assert np.load(disk / "l.npy").shape == (1, 4, 3072)


def test_a_killed_run_leaves_nothing_for_good(tmp_path: Path, ids: Path, capsys: Any) -> None:
    left = tmp_path / ".l.npy.partial"
    left.mkdir()
    for name in ("data", "lock"):
        (left / name).write_bytes(bytes(100))
    args = ("logits", SAMPLE, "--tokens", str(ids), "--out", str(tmp_path / "l.npy"))
    assert run(*args, capsys=capsys)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "l.npy"]


def test_two_runs_do_not_write_the_same_logits(tmp_path: Path, ids: Path, capsys: Any) -> None:
    other = Lock(tmp_path / ".l.npy.partial" / "lock")
    args = ("logits", SAMPLE, "--tokens", str(ids), "--out", str(tmp_path / "l.npy"))
    status, _, err = run(*args, capsys=capsys)
    assert status == 7
    assert "is writing this output" in err
    assert other.path.exists()
    other.release()


@pytest.mark.parametrize("option", ["--reference-embedding", "--candidate-embedding"])
def test_an_embedding_is_for_a_recording(
    option: str, recording: Path, tmp_path: Path, capsys: Any
) -> None:
    args = ("compare", SAMPLE, SAMPLE, "--profile", "smoke", option)
    status, _, err = run(*args, SAMPLE, capsys=capsys)
    assert status == 2
    assert "is for a recording" in err
    missing = ("--reference-embedding", str(tmp_path / "none"))
    status, _, err = run("compare", str(recording), SAMPLE, *missing, capsys=capsys)
    assert status == 3
    assert "name a checkpoint with the recorded embedding" in err


@pytest.mark.parametrize("command", [("compare", SAMPLE, SAMPLE), ("self-test", SAMPLE)])
def test_an_estimate_makes_no_file(command: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    made = tmp_path / "r.html"
    status, _, err = run(*command, "--estimate", "--html", str(made), capsys=capsys)
    assert status == 2
    assert "there is nothing for --html" in err
    assert not made.exists()


def test_a_path_that_is_no_unicode(tmp_path: Path) -> None:
    model = os.fsencode(tmp_path) + b"/bad\xff\xfename"
    shutil.copytree(SAMPLE, os.fsdecode(model))
    report = str(tmp_path / "r.json")
    quick = ["--profile", "smoke"]
    for args in (
        ["weights", model, SAMPLE, "--report", report],
        ["report", report],
        ["record", model, model + b".rec", *quick, "--no-floor"],
    ):
        done = subprocess.run([EXE, *args], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads(Path(os.fsdecode(model + b".rec")).joinpath("recording.json").read_text())
    assert "udcff" in found["run"]["command"]


@pytest.mark.parametrize("key", ["device", "version"])
def test_a_recording_whose_runner_is_no_text(
    key: str, recording: Path, tmp_path: Path, capsys: Any
) -> None:
    own = Path(shutil.copytree(recording, tmp_path / "r"))
    document = json.loads((own / "recording.json").read_text())
    document["runner"][key] = 5
    (own / "recording.json").write_bytes(schema.dumps(document))
    status, _, err = run("weights", str(own), SAMPLE, capsys=capsys)
    assert status == 3
    assert f"runner.{key} must be" in err


def test_a_padding_id_beyond_the_vocabulary_is_no_obstacle(tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 99_999}))
    status, out, err = run(
        "compare", SAMPLE, str(model), "--profile", "smoke", "--json", capsys=capsys
    )
    assert status == 0, err
    assert json.loads(out)["verdict"] == "PASS"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_an_empty_file_is_named(name: str, tmp_path: Path, capsys: Any) -> None:
    from g2kit.convert import convert

    model = tmp_path / "m"
    convert(SAMPLE, model, to="safetensors")  # a manifest, which keeps the configuration
    (model / name).write_bytes(b"")
    status, out, _ = run("weights", SAMPLE, str(model), capsys=capsys)
    assert status == 0
    assert f"{name} is empty" in " ".join(out.split())


def test_a_report_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    for path, said in ((tmp_path / "none.json", "no such file"), (tmp_path, "this is no file")):
        status, _, err = run("report", str(path), capsys=capsys)
        assert status == 3
        assert said in err
        assert "name the JSON document" in err
