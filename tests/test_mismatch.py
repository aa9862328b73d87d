"""Making up for what earlier rounding did to a layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_case import DATA, sequences
from torch import Tensor

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.model import canonical
from g2kit.quant.calibration import Calibration
from g2kit.quant.choose import Target, choose, inputs_of
from g2kit.quant.mismatch import correction, share
from g2kit.quant.pipeline import Options, Pipeline
from g2kit.quant.scheme import Scheme
from g2kit.quant.work import Work, WorkCodes


def _problem(noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, original inputs, inputs behind rounding."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=g) @ torch.randn(32, 32, generator=g)
    turned = torch.eye(32) + noise * torch.randn(32, 32, generator=g) / 32**0.5
    return (
        torch.randn(8, 32, generator=g),
        x,
        x @ turned + noise * torch.randn(x.shape, generator=g),
    )


def _moments(x: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    return behind.T @ behind / len(x), (x - behind).T @ behind / len(x)


def test_the_correction_is_the_least_squares_solution() -> None:
    w, x, behind = _problem()
    hessian, cross = _moments(x, behind)
    step = correction(w, cross, hessian)
    assert step is not None
    best = torch.linalg.lstsq(behind.double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close((w + step).double(), best, rtol=2e-3, atol=2e-3)
    assert correction(w, cross, -torch.eye(32)) is None


def test_the_share_is_the_best_one() -> None:
    w, x, behind = _problem()
    step = correction(w, *reversed(_moments(x[:1000], behind[:1000])))
    assert step is not None

    def error(s: float) -> float:
        return float((x[1000:] @ w.T - behind[1000:] @ (w + s * step).T).square().sum())

    best = min(np.linspace(0, 1, 101), key=error)
    assert share(w, step, behind[1000:], x[1000:]) == pytest.approx(best, abs=0.006)
    assert share(w, -step, behind[1000:], x[1000:]) == 0.0
    assert share(w, torch.zeros_like(step), behind[1000:], x[1000:]) == 0.0


@pytest.mark.parametrize("target", [Scheme(4, 32), "Q4_0"], ids=str)
def test_it_wins_where_inputs_are_off(target: Target) -> None:
    w, x, behind = _problem()
    hessian, cross = _moments(x[:1000], behind[:1000])
    inputs = inputs_of(hessian, behind[1000:], 1000, cross=cross, original=x[1000:])
    record = choose(w, target, inputs, "gptq+").record
    assert record["method"] == "gptq+"
    assert 0.5 < record["strength"] <= 1
    assert record["error"] < 0.7 * record["held_error"]["gptq"]
    value = choose(w, target, inputs, "gptq+").value.dequantize()
    wanted = x[1000:] @ w.T
    error = (wanted - behind[1000:] @ value.T).square().sum() / wanted.square().sum()
    assert record["error"] == pytest.approx(float(error), rel=1e-4)
    assert "strength" not in choose(w, target, inputs, "gptq").record


def test_without_mismatch_it_is_gptq() -> None:
    w, x, _ = _problem()
    hessian, cross = _moments(x, x)
    inputs = inputs_of(hessian, x, len(x), cross=cross, original=x)
    choice = choose(w, Scheme(4, 32), inputs, "gptq+")
    assert choice.record["strength"] == 0.0
    assert choice.record["method"] == "gptq"


# ---------------------------------------------------------------- in the pipeline


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


def _run(checkpoint: Checkpoint, path: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    targets: dict[str, Target] = dict.fromkeys(canonical.linears(checkpoint.tensors), Scheme(3, 32))
    with Work(path, {"a": "1"}) as work:
        job = Pipeline(
            checkpoint, targets, Calibration("test", sequences(1, (24,) * 12), sequences(2, (24,) * 4)), work,
            Options(method="gptq+", batch_tokens=72, **options),
        )  # fmt: skip
        report = job.run(lambda n, name: None)
        return report, {n: c.codes for n, c in WorkCodes(work, targets, "g2").items()}


def test_every_layer_but_the_first_sees_a_mismatch(fixture: Checkpoint, tmp_path: Path) -> None:
    report, codes = _run(fixture, tmp_path / "a")
    records = report["linears"]
    for name in (canonical.Q, canonical.K, canonical.V):
        assert records[name.format(i=0)]["strength"] == 0.0  # the model's own embedding
    assert any(r["strength"] > 0.1 for r in records.values())
    assert all(r["error"] == min(r["held_error"].values()) for r in records.values())
    assert report["quality"]["positions"] == 2 * 24
    # one pass per block, states on disk: the same inputs for the first stage
    once = _run(fixture, tmp_path / "b", sequential=False, keep_states=False)[1]
    assert torch.equal(once[canonical.Q.format(i=0)], codes[canonical.Q.format(i=0)])
