"""What g2verify says when options do not fit what they are given for, and advice that helps."""

from __future__ import annotations

from functools import partial
from typing import Any

import command_case
import pytest

from g2kit.model.sample import sample_dir
from g2kit.verify.cli import g2verify
from g2kit.verify.compare import record_model

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
