"""g2verify where its surroundings are against it: links in the way, full devices, models that a consumer refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import command_case
import numpy as np
import pytest

from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.cli import g2verify

SAMPLE = str(sample_dir())
FULL = Path("/dev/full")
run = partial(command_case.run, g2verify)


def test_logits_do_not_write_through_links(tmp_path: Path, capsys: Any) -> None:
    """A link under the temporary name; its target is somebody's model."""
    np.save(tmp_path / "ids.npy", np.arange(2, 6))
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"weights")
    link = tmp_path / ".logits.npy.partial"
    link.symlink_to(precious)
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "logits.npy"))
    status, _, err = run("logits", SAMPLE, *args, capsys=capsys)
    assert status == 4
    assert ".logits.npy.partial/lock: cannot take the lock" in err
    assert precious.read_bytes() == b"weights"
    assert link.is_symlink()


def test_logits_do_not_replace_a_pipe_or_device(tmp_path: Path, capsys: Any) -> None:
    np.save(tmp_path / "ids.npy", np.arange(2, 6))
    out = tmp_path / "pipe"
    os.mkfifo(out)
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(out))
    status, _, err = run("logits", SAMPLE, *args, capsys=capsys)
    assert status == 2
    assert "this is none" in err
    assert stat.S_ISFIFO(out.stat().st_mode)


@pytest.mark.parametrize("option", ["--text", "--config", "--cand-config"])
def test_no_report_replaces_what_an_option_names(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("g2kit.verify.compare.part_of", lambda *a, **k: pytest.fail("ran"))
    file = tmp_path / "mine"
    file.write_text("mine")
    status, _, err = run(
        "compare", SAMPLE, SAMPLE, option, str(file), "--report", str(file), capsys=capsys
    )
    assert status == 5
    assert "is an input of this command" in err
    assert file.read_text() == "mine"


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_device_is_exit_4(tmp_path: Path, capsys: Any) -> None:
    args = ("--html", str(FULL), "--markdown", str(tmp_path / "r.md"))
    status, _, err = run("weights", SAMPLE, SAMPLE, *args, capsys=capsys)
    assert status == 4, err
    assert "/dev/full" in err
    assert "ERROR" in (tmp_path / "r.md").read_text()


def test_a_disk_that_fills_up_keeps_no_half_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("g2kit.outputs.os.fsync", full)
    page = tmp_path / "r.html"
    page.write_text("old")
    status, _, err = run("weights", SAMPLE, SAMPLE, "--html", str(page), capsys=capsys)
    assert status == 4
    assert "No space left" in err
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert page.read_text() == "old"


def test_transformers_is_not_asked_to_load_another_layout(tmp_path: Path, capsys: Any) -> None:
    from g2kit.convert import convert

    convert(SAMPLE, tmp_path / "flax", to="flax")
    args = ("--cand-runner", "transformers", "--profile", "smoke")
    status, _, err = run("compare", SAMPLE, str(tmp_path / "flax"), *args, capsys=capsys)
    assert status == 3
    assert "transformers reads Hugging Face's layout, this is flat" in err
    assert "--to safetensors" in err


def test_a_model_that_transformers_cannot_run(tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    args = ("--cand-runner", "transformers", "--profile", "smoke")
    status, _, err = run("compare", SAMPLE, str(model), *args, capsys=capsys)
    assert status == 3, err
    assert "cannot run it" in err


@pytest.mark.parametrize(("key", "value"), [("why", None), ("group", []), ("why", 1.5)])
def test_a_recording_whose_notes_are_no_texts(
    key: str, value: Any, recording: Path, tmp_path: Path, capsys: Any
) -> None:
    """With right hashes."""
    forged = Path(shutil.copytree(recording, tmp_path / "r"))
    document = json.loads((forged / schema.DOCUMENT).read_text())
    document["probes"]["skipped"][0][key] = value
    document["id"] = schema.content_id(document)
    document["self_sha256"] = schema.self_sha256(document)
    (forged / schema.DOCUMENT).write_text(json.dumps(document))
    status, _, err = run("compare", str(forged), SAMPLE, capsys=capsys)
    assert status == 3, err
    assert f"probes.skipped[].{key} must be of type str" in err


def test_a_recording_is_no_candidate_of_weights(recording: Path, capsys: Any) -> None:
    status, _, err = run("weights", SAMPLE, str(recording), capsys=capsys)
    assert status == 2
    assert "holds no weights" in err
