"""Scales and gains tuned with codes frozen: gradients, grids, what never gets worse, and runs that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_case import CALIBRATION, DATA, Result, bytes_of, dense, sequences
from torch import Tensor

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import ConflictError, NonFiniteError, UsageError
from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.quant import gptq, quantize
from g2kit.quant.choose import Rounded, Target
from g2kit.quant.distill import divergence
from g2kit.quant.ggml import FORMATS, Blocks, encode
from g2kit.quant.pipeline import Options, Pipeline
from g2kit.quant.recover import Fit, Tuning, batch_of, tune_block, watched
from g2kit.quant.scheme import Codes, Scheme, on_grid
from g2kit.quant.tunable import Block, Gain, Shifts
from g2kit.quant.work import Work, WorkCodes

SHORT = {
    "blockwise": Tuning(steps=6, every=3, gain_rate=3e-3, tokens=48),
    "end_to_end": Tuning(steps=8, every=2, patience=9, gain_rate=3e-3, tokens=48),
}
TARGETS: tuple[Target, ...] = (
    Scheme(4, 32), Scheme(3, 64, symmetric=False), Scheme(2, -1), *FORMATS,
)  # fmt: skip


def _rounded(target: Target, seed: int = 0) -> tuple[Tensor, Rounded]:
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 0.05
    return w, encode(w, target) if isinstance(target, str) else gptq.rtn(w, target)


def _codes(value: Rounded) -> Tensor:
    return value.codes if isinstance(value, Codes) else value.fields().codes


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_unmoved_parameters_are_the_weight_and_gradients_reach_them(target: Target) -> None:
    _, value = _rounded(target)
    block = Block({"w": value}, {})
    again, _ = block.result(block.begin())
    assert torch.equal(again["w"].dequantize(), value.dequantize())
    x = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves: Shifts = {"w": [t.requires_grad_() for t in block.begin()["w"]]}
    y = block.linear(leaves)("w", x, torch.empty(0))
    dense = value.dequantize().requires_grad_()
    expected = torch.nn.functional.linear(x, dense)
    torch.testing.assert_close(y, expected)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (dx,) = torch.autograd.grad((expected * probe).sum(), x, retain_graph=True)
    (dw,) = torch.autograd.grad((expected * probe).sum(), dense)
    (y * probe).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dx)
    # scaling every number by 1 + t scales the weight, so the directional derivatives agree
    total = sum(float(t.grad.sum()) for t in leaves["w"] if t.grad is not None)
    assert total == pytest.approx(float((dw * dense.detach()).sum()), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_moved_parameters_are_storable_and_codes_are_the_same(target: Target) -> None:
    _, value = _rounded(target)
    block = Block({"w": value}, {})
    shifts = block.begin()
    for t in shifts["w"]:
        t.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(3))
    moved = block.result(shifts)[0]["w"]
    assert torch.equal(_codes(moved), _codes(value))
    assert not torch.equal(moved.dequantize(), value.dequantize())
    if isinstance(moved, Codes):
        assert torch.equal(on_grid(moved.scales), moved.scales)
    else:
        assert isinstance(moved, Blocks)
        assert torch.equal(
            Blocks(moved.format, moved.data.clone()).dequantize(), moved.dequantize()
        )
    numbers = block.numbers("w", shifts)
    y = block.linear(shifts)("w", torch.eye(512), torch.empty(0))
    assert torch.equal(y.T, moved.dequantize())
    assert all(bool(torch.isfinite(n).all()) for n in numbers)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_codes_that_may_move_begin_where_they_are_and_stay_in_range(target: Target) -> None:
    w, value = _rounded(target)
    block = Block({"w": value}, {}, {"w": w})
    shifts = block.begin()
    assert torch.equal(block.result(shifts)[0]["w"].dequantize(), value.dequantize())
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    leaves: Shifts = {"w": [t.clone().requires_grad_() for t in shifts["w"]]}
    block.linear(leaves)("w", x, torch.empty(0)).sum().backward()
    slope = leaves["w"][-1].grad
    assert slope is not None
    # one code more in a column: the outputs' sum grows by the step times the column's inputs
    table = isinstance(target, str) and FORMATS[target].table is not None
    if not table:
        more = {"w": [*shifts["w"][:-1], torch.round(shifts["w"][-1])]}
        more["w"][-1][2, 7] += -1.0 if _codes(value)[2, 7] > 1 else 1.0
        moved = block.result(more)[0]["w"].dequantize() - value.dequantize()
        sign = float(more["w"][-1][2, 7])
        assert float((x @ moved.T).sum()) == pytest.approx(sign * float(slope[2, 7]), rel=1e-2)
    far = {"w": [*shifts["w"][:-1], torch.full_like(shifts["w"][-1], 1e3)]}
    back = _codes(block.result(far)[0]["w"])
    assert bool((back == back.max()).all())
    assert int(back.max()) >= int(_codes(value).max())


def test_gains_keep_their_dtype() -> None:
    start = torch.tensor([0.5, -1.0, 3.0, -0.25])
    gain = Gain(start, "bfloat16")
    block = Block({}, {"n": gain})
    assert torch.equal(block.result(block.begin())[1]["n"], start)
    moved = block.result({"n": [torch.full((4,), 0.013)]})[1]["n"]
    assert torch.equal(moved, moved.bfloat16().float())
    assert bool((moved > start).all())  # also where the norm multiplied with nothing


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("cap", [None, 30.0])
def test_divergence_and_its_gradient(cap: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(37, 8, generator=g)
    a, b = (3 * torch.randn(5, 8, generator=g) for _ in range(2))
    b = (a + 0.3 * b).requires_grad_()

    def pieces() -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, 37, 10):
            yield start, min(start + 10, 37), table[start : start + 10]

    p, q = (
        torch.log_softmax(tg.soft_cap((x.double() @ table.double().T), cap), -1) for x in (a, b)
    )
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    total, grad = divergence(a, b.detach(), pieces, cap, gradient=True)
    assert total == pytest.approx(float(expected.detach()), rel=1e-4)
    assert grad is not None
    assert b.grad is not None
    torch.testing.assert_close(grad, b.grad, rtol=1e-3, atol=1e-4)
    assert divergence(a, a, pieces, cap, gradient=False) == (0.0, None)


def test_every_pass_takes_every_batch_once() -> None:
    for again in range(3):
        assert sorted(batch_of(again * 5 + i + 1, 5, 7) for i in range(5)) == list(range(5))
    assert watched(3) == set()
    assert watched(8) == {4}
    assert len(watched(64)) == 8


def _tuned(rate: float) -> tuple[dict[str, Any], Shifts, Block]:
    w, value = _rounded(Scheme(2, 32))
    assert isinstance(value, Codes)
    block = Block({"w": value.with_scales(1.2 * value.scales)}, {})
    x = torch.randn(6, 4, 8, 512, generator=torch.Generator().manual_seed(5))

    def run(inputs: Tensor, shifts: Shifts) -> Tensor:
        return block.linear(shifts)("w", inputs, w)

    shifts, told = tune_block(
        block, run, lambda i: (x[i], x[i] @ w.T), [0, 1, 2, 3], [4, 5],
        Tuning(steps=40, every=4, patience=2, scale_rate=rate),
    )  # fmt: skip
    return told, shifts, block


def test_tuning_gains_and_never_loses_by_what_it_watches() -> None:
    told, shifts, _ = _tuned(2e-2)
    assert told["after"] < 0.98 * told["before"]
    assert told["kept_step"] > 0
    assert any(bool(t.any()) for t in shifts["w"])
    told, shifts, block = _tuned(0.4)  # so fast that it only does harm
    assert told["after"] <= told["before"]
    if told["kept_step"] == 0:
        assert block.result(shifts)[0]["w"].dequantize().equal(block.values["w"].dequantize())
    assert told["steps"] < 40


def test_codes_move_to_where_inputs_want_them() -> None:
    w, value = _rounded(Scheme(2, 32))
    block = Block({"w": value}, {}, {"w": w})
    g = torch.Generator().manual_seed(5)
    x = torch.randn(6, 4, 32, 16, generator=g) @ torch.randn(16, 512, generator=g)

    def run(inputs: Tensor, shifts: Shifts) -> Tensor:
        return block.linear(shifts)("w", inputs, w)

    shifts, told = tune_block(
        block, run, lambda i: (x[i], x[i] @ w.T), [0, 1, 2, 3], [4, 5],
        Tuning(steps=60, every=10, code_rate=2e-2),
    )  # fmt: skip
    assert told["after"] < 0.6 * told["before"]
    assert (_codes(block.result(shifts)[0]["w"]) != _codes(value)).float().mean() > 0.05


def test_a_loss_that_is_not_finite_is_named() -> None:
    fit = Fit.begin({"w": [torch.zeros(2)]}, {"w": ["number"]}, Tuning(steps=1, every=1))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3"):
        fit.look(float("nan"), "model.layers.3")


# ---------------------------------------------------------------- in the pipeline


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


def _targets(checkpoint: Checkpoint) -> dict[str, Target]:
    targets: dict[str, Target] = dict.fromkeys(canonical.linears(checkpoint.tensors), Scheme(3, 32))
    return targets | {canonical.UP.format(i=1): "Q4_0", canonical.V.format(i=0): "Q4_1"}


class _StopError(Exception):
    pass


def _run(checkpoint: Checkpoint, path: Path, stop: int | None = None, **options: Any) -> Result:
    targets, calls = _targets(checkpoint), 0

    def meter(nbytes: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise _StopError

    chosen = {"recover": "scales", "batch_tokens": 72, **SHORT, **options}
    with Work(path, {"a": "1"}) as work:
        report = Pipeline(checkpoint, targets, CALIBRATION, work, Options(**chosen)).run(meter)
        return report, dict(WorkCodes(work, targets, "g2", 4))


@pytest.fixture(scope="module")
def whole(fixture: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return _run(fixture, tmp_path_factory.getbasetemp() / "recovered-work")


def _kl(checkpoint: Checkpoint, codes: dict[str, Any]) -> float:
    original = dense(checkpoint)
    new = {n: x if isinstance(x, Tensor) else x.dequantize() for n, x in codes.items()}
    total = count = 0.0
    for ids in CALIBRATION.held[1::2]:  # the others chose between methods
        x = torch.from_numpy(ids)[None]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(tg.forward(x, w, checkpoint.config).double(), -1)
                for w in (original, original | new)
            )
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    return total / count


def test_the_report_is_about_what_is_written(fixture: Checkpoint, whole: Result) -> None:
    report, codes = whole
    assert report["quality"]["kl"] == pytest.approx(_kl(fixture, codes), rel=1e-3)
    floats = {n: x for n, x in codes.items() if isinstance(x, Tensor)}
    assert set(report["recovery"]["changed"]) <= floats.keys()
    assert len(floats) == 17
    assert all(torch.equal(x, x.bfloat16().float()) for x in floats.values())
    end = report["recovery"]["end_to_end"]
    assert end["after"] <= end["before"]
    for b in report["blocks"]:
        assert b["tuned"]["after"] <= b["tuned"]["before"]
        assert b["error"] > 0


def test_codes_are_those_that_were_chosen(
    fixture: Checkpoint, whole: Result, tmp_path: Path
) -> None:
    plain = _run(fixture, tmp_path / "w", recover="none")
    assert "recovery" not in plain[0]
    for name in (n for n in plain[1] if ".layers.0." in n):  # later ones see other inputs
        assert torch.equal(_codes(plain[1][name]), _codes(whole[1][name]))
    assert not any(isinstance(x, Tensor) for x in plain[1].values())


@pytest.mark.slow
def test_a_run_that_moves_codes(fixture: Checkpoint, tmp_path: Path) -> None:
    report, codes = _run(fixture, tmp_path / "w", recover="codes")
    assert report["quality"]["kl"] == pytest.approx(_kl(fixture, codes), rel=1e-3)
    assert all(b["tuned"]["after"] <= b["tuned"]["before"] for b in report["blocks"])


# 28 weights, then a call per step of the end-to-end stage
@pytest.mark.parametrize(
    "at",
    [pytest.param(10, marks=pytest.mark.slow), 31, pytest.param(35, marks=pytest.mark.slow)],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    fixture: Checkpoint, whole: Result, tmp_path: Path, at: int
) -> None:
    with pytest.raises(_StopError):
        _run(fixture, tmp_path / "w", at)
    report, codes = _run(fixture, tmp_path / "w")
    assert codes.keys() == whole[1].keys()
    assert all(bytes_of(codes[n]) == bytes_of(whole[1][n]) for n in codes)
    assert report["quality"] == whole[0]["quality"]
    assert report["recovery"] == whole[0]["recovery"]


@pytest.mark.slow
def test_on_disk_and_without_kept_blocks_it_is_the_same(
    fixture: Checkpoint, whole: Result, tmp_path: Path
) -> None:
    _, codes = _run(fixture, tmp_path / "w", keep_states=False, memory=0)
    assert all(bytes_of(codes[n]) == bytes_of(whole[1][n]) for n in codes)
    assert not {"spill.bin", "held.bin"} & {p.name for p in (tmp_path / "w").iterdir()}


@pytest.mark.slow
def test_a_damaged_state_is_noticed(fixture: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(_StopError):
        _run(fixture, tmp_path / "w", 33)
    with np.load(tmp_path / "w" / "tuning.npz") as kept:
        arrays = {k: kept[k] for k in kept.files if not k.startswith("now|model.norm")}
    np.savez(tmp_path / "w" / "tuning.npz", **arrays)
    with pytest.raises(ConflictError, match="damaged"):
        _run(fixture, tmp_path / "w")


@pytest.mark.parametrize(
    "format", ["compressed-tensors", pytest.param("gguf-q4_0", marks=pytest.mark.slow)]
)
def test_the_command_writes_what_was_tuned(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("g2kit.quant.api.Options", _short_options)
    dst = tmp_path / ("m.gguf" if "gguf" in format else "m")
    ids = np.stack(sequences(1, (16,) * 20))
    report = quantize(
        DATA, dst, 4, group_size=32, format=format, recover="scales", calibration=ids, samples=12,
        seq_len=16, held_out=0.25,
    )  # fmt: skip
    assert report["recover"] == "scales"
    assert any("were tuned" in note for note in report["output"]["notes"])
    with open_checkpoint(DATA) as before, open_checkpoint(dst) as after:
        norms = [n for n, t in before.tensors.items() if len(t.shape) == 1]
        moved = []
        for name in norms:
            a, b = (c.tensors[name].read().astype(np.float32) for c in (before, after))
            assert np.allclose(a, b, atol=0.2)
            moved += [name] if np.abs(a - b).max() > 0 else []
        assert moved
        assert sorted(moved) == report["recovery"]["changed"]
    with pytest.raises(UsageError, match="everything"):
        quantize(DATA, tmp_path / "n", recover="everything")


def _short_options(*args: Any, **options: Any) -> Options:
    return replace(Options(*args, **options), **SHORT)
