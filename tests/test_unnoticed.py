"""Thresholds that somebody widened: the known mistakes they let pass are named in the report and on the terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verify_cases import sample, sample_floor, sample_probes

from g2kit.model.sample import sample_dir
from g2kit.verify import show
from g2kit.verify.compare import compare
from g2kit.verify.mutants import mutants
from g2kit.verify.unnoticed import SUBTLE, let_pass, warning

pytest.importorskip("torch")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", np.c_[np.full(6, 2), rng.integers(3, 3000, (6, 79))])
    return tmp_path / "ids.npy"


def test_at_the_usual_factor_none_passes() -> None:
    found = let_pass(sample(), sample_probes(), sample_floor())
    assert (found["k"], found["passed"]) == (10.0, [])
    assert len(found["tried"]) == len(SUBTLE)
    assert warning(found) is None
    assert warning(None) is None


@pytest.mark.slow
def test_the_wider_the_more_pass() -> None:
    titles = {m.id: m.title for m in mutants(sample())}
    passed = [
        let_pass(sample(), sample_probes(), replace(sample_floor(), k=k))["passed"]
        for k in (1e4, 1e7, 1e30)
    ]
    assert set(passed[0]) <= set(passed[1]) <= set(passed[2])
    assert titles["norm-epsilon"] in passed[1]
    assert sorted(passed[2]) == sorted(titles[i] for i in SUBTLE)


@pytest.mark.parametrize(
    ("k", "said"), [pytest.param(10.0, False, marks=pytest.mark.slow), (1e6, True)]
)
def test_report_and_terminal_say_so(k: float, said: bool, ids: Path) -> None:
    document = compare(sample_dir(), sample_dir(), tokens=ids, profile="smoke", k=k)
    head = "Thresholds of 1e+06 x floor instead of 10 let"
    assert any(text.startswith(head) for text in document["not_verified"]) == said
    shown = " ".join(show.report(document).split())
    assert ("norm epsilon 1e-05 instead of 1e-06" in shown) == said


def test_two_recordings_cannot_tell() -> None:
    said: Any = warning({"k": 100.0, "tried": None, "passed": []})
    assert said.startswith(
        "Thresholds of 100 x floor instead of 10: which known mistakes they let pass is not known"
    )
