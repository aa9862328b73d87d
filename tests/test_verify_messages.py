"""What g2verify says when options do not fit what they are given for, and advice that helps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command_case
import numpy as np
import pytest
from recording_case import LogitsOnly

from g2kit.formats.errors import MissingTensorError
from g2kit.model.sample import sample_dir
from g2kit.verify.cli import g2verify
from g2kit.verify.compare import record_model
from g2kit.verify.recording import compare_recording, open_recording
from g2kit.verify.runners import open_runner
from g2kit.verify.side import Side

pytest.importorskip("torch")
SAMPLE = str(sample_dir())
run = partial(command_case.run, g2verify)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample, recorded as far as the smoke profile goes."""
    out = tmp_path_factory.mktemp("recorded") / "rec"
    record_model(SAMPLE, out, profile="smoke", floor=False)
    return str(out)


@pytest.mark.parametrize(("options", "named"), [
    (("--profile", "ci"), "--profile"),
    (("--seed", "0"), "--seed"),
    (("--text", __file__), "--text"),
    (("--text", __file__, "--seed", "1", "--profile", "full"), "--text and --profile and --seed"),
])  # fmt: skip
@pytest.mark.parametrize("estimate", [(), ("--estimate",)])
def test_a_recording_refuses_other_tokens(
    options: tuple[str, ...],
    named: str,
    estimate: tuple[str, ...],
    recorded: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr("g2kit.verify.measure.hashed", lambda *a: pytest.fail("worked"))
    status, out, err = run("compare", recorded, SAMPLE, *options, *estimate, capsys=capsys)
    assert (status, out) == (2, "")
    assert f"a recording has its own tokens, so {named} cannot apply." in err
    assert f"Fix: leave out {named}, or record again with " in err


def test_defaults_ask_for_no_other_tokens(recorded: str, capsys: Any) -> None:
    status, out, err = run("compare", recorded, SAMPLE, "--estimate", capsys=capsys)
    assert (status, err) == (0, "")
    assert "tokens" in out


@pytest.mark.parametrize("command", ["compare", "weights"])
def test_help_says_which_option_a_side_has_for_itself(command: str, capsys: Any) -> None:
    said = " ".join(run(command, "--help", capsys=capsys)[1].split())
    order = ["--config PRESET|FILE The", "--ref-config PRESET|FILE --config for the reference only.",
             "--cand-config PRESET|FILE --config for the candidate only.", "--fix-config", "--gating"]  # fmt: skip
    places = [said.index(x) for x in order]
    assert places == sorted(places)
    assert "The same" not in said


def logits(ids: Any, root: Path, *options: str, capsys: Any) -> tuple[int, str, str]:
    """Run ``logits`` over ids in a file."""
    np.save(root / "ids.npy", ids)
    args = ("--tokens", str(root / "ids.npy"), "--out", str(root / "x.npy"))
    status, out, err = run("logits", SAMPLE, *args, *options, capsys=capsys)
    return status, out, err


@pytest.mark.parametrize(("ids", "options", "found", "fix"), [
    (np.ones((2, 3)), (), "found float64 [2, 3]", "whole numbers (int32 or int64) of one or two dimensions"),
    (np.ones((1, 2, 3), int), (), "found int64 [1, 2, 3]", "of one or two dimensions with numpy.save"),
    (np.array([2, 3072]), (), "from 2 to 3072, the vocabulary has 3072", "give ids from 0 to 3071"),
    (np.array([2]), ("--runner", "jax", "--mesh", "2x4"), "mesh '2x4'", "data and model, a number of devices"),
    (np.array([2]), ("--runner", "jax", "--mesh", "data=0"), "data=2,model=4", "from 1; one left out has 1"),
])  # fmt: skip
def test_logits_say_what_is_wanted(
    ids: Any, options: tuple[str, ...], found: str, fix: str, tmp_path: Path, capsys: Any
) -> None:
    status, out, err = logits(ids, tmp_path, *options, capsys=capsys)
    assert (status, out) == (3 if ids.ndim == 3 or ids.dtype.kind == "f" else 2, "")
    assert found in err
    assert fix in err.partition("Fix: ")[2]
    assert "--help" not in err
    assert "damaged" not in err


def test_logits_beyond_the_context_are_noted(tmp_path: Path, capsys: Any) -> None:
    note = "note: 513 tokens are more than the model's context of 512: it was not trained for those behind."
    long = np.full(513, 2)
    status, out, err = logits(long, tmp_path, capsys=capsys)
    assert (status, err.strip()) == (0, note)
    status, out, err = logits(long, tmp_path, "--json", capsys=capsys)
    assert (json.loads(out)["notes"], err) == ([note.removeprefix("note: ")], "")
    assert logits(long, tmp_path, "-q", capsys=capsys) == (0, "", "")
    assert logits(long[1:], tmp_path, capsys=capsys)[2] == ""


def test_a_runner_that_keeps_its_embedding_to_itself(
    recorded: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its runner, here in the place of llama.cpp's, shows logits only: the checkpoint has the embedding."""

    def keeping(side: Side, engine: Any) -> LogitsOnly:
        return LogitsOnly(open_runner("torch", side.opened))

    monkeypatch.setattr(Side, "open_runner", keeping)
    assert run("compare", recorded, SAMPLE, capsys=capsys)[0] in (0, 6)
    with LogitsOnly(open_runner("torch", SAMPLE)) as runner, open_recording(recorded) as recording:
        absent = "not carry its embedding, and the llama_cpp runner does not give the candidate's."
        with pytest.raises(MissingTensorError, match=absent) as e:
            compare_recording(recording, runner)
    assert e.value.fix is not None
    assert e.value.fix.startswith("give the recorded checkpoint with --reference-embedding MODEL")
