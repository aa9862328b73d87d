"""g2verify where its surroundings are against it: links in the way, full devices, models that a consumer refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import command_case
import numpy as np
import pytest

from g2kit.model.sample import sample_dir
from g2kit.verify.cli import g2verify

SAMPLE = str(sample_dir())
FULL = Path("/dev/full")
run = partial(command_case.run, g2verify)


def test_logits_do_not_write_through_links(tmp_path: Path, capsys: Any) -> None:
    """A link under the temporary name a version before had; its target is somebody's model."""
    np.save(tmp_path / "ids.npy", np.arange(2, 6))
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"weights")
    out = tmp_path / "logits.npy"
    (tmp_path / "logits.npy.partial").symlink_to(precious)
    args = ("--tokens", str(tmp_path / "ids.npy"), "--out", str(out))
    assert run("logits", SAMPLE, *args, capsys=capsys)[0] == 0
    assert precious.read_bytes() == b"weights"
    assert np.load(out).shape == (1, 4, 3072)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_device_is_exit_4(tmp_path: Path, capsys: Any) -> None:
    args = ("--html", str(FULL), "--markdown", str(tmp_path / "r.md"))
    status, _, err = run("weights", SAMPLE, SAMPLE, *args, capsys=capsys)
    assert status == 4, err
    assert "/dev/full" in err
    assert "ERROR" in (tmp_path / "r.md").read_text()


def test_a_model_that_transformers_cannot_run(tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(SAMPLE, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    args = ("--cand-runner", "transformers", "--profile", "smoke")
    status, _, err = run("compare", SAMPLE, str(model), *args, capsys=capsys)
    assert status == 3, err
    assert "cannot run it" in err
