"""What a self-test will take, and trying some mistakes only."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import command_case
import pytest
from verify_cases import model

from g2kit.model.sample import sample_dir
from g2kit.verify.branch import Change
from g2kit.verify.cli import g2verify
from g2kit.verify.estimate_self_test import _share, _trial_flop, estimate_self_test
from g2kit.verify.mutants import mutants
from g2kit.verify.options import Options
from g2kit.verify.side import open_side

pytest.importorskip("torch")
SAMPLE = str(sample_dir())
run = partial(command_case.run, g2verify)


def test_estimate_as_data_and_in_words(capsys: Any) -> None:
    status, out, _ = run("self-test", SAMPLE, "--estimate", "--json", capsys=capsys)
    found = json.loads(out)
    assert status == 0
    assert found["mutants"] == 22
    assert found["seconds"] > 0
    assert found["flop"] > 0
    status, out, _ = run("self-test", SAMPLE, "--estimate", "--mutants", "one-bit", capsys=capsys)
    assert (status, out.split("\n")[0].split(",")[0]) == (0, "mistakes 1")
    assert "time     about" in out
    status, _, err = run("self-test", SAMPLE, "--estimate", "--mutants", "nothing", capsys=capsys)
    assert status == 2
    assert "'nothing'" in err


def test_fewer_mistakes_take_less() -> None:
    with open_side(sample_dir()) as side:
        every, some = (
            estimate_self_test(side, Options("smoke"), only) for only in ((), ("value-row",))
        )
    assert some["mutants"] == 1
    assert some["flop"] < every["flop"]
    assert some["bytes_read"] < every["bytes_read"]


def test_blocks_that_cannot_differ_are_not_counted() -> None:
    c = model(layers=4)
    found = {m.id: m for m in mutants(c)}
    share = {
        name: _share(found[name], Change.between(c, found[name].checkpoint), c.config)
        for name in ("value-row", "query-scale", "final-norm", "embedding-shifted")
    }
    # from block 2 on; all twice but the first; none; all on other input
    assert share == {"value-row": 0.5, "query-scale": 7 / 4, "final-norm": 0.0, "embedding-shifted": 1.0}  # fmt: skip
    window = c.config.sliding_window
    assert window is not None
    off = Change.between(c, found["window-off"].checkpoint)
    all_of = Change.between(c, found["query-scale"].checkpoint)
    assert _trial_flop(c.config, window + 2, off, 1.0) < _trial_flop(
        c.config, window + 2, all_of, 1.0
    )
