"""Block after block: inputs, choices, resuming, and that what is said about the result is true of it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_case import CALIBRATION, DATA, Result, bytes_of, dense, sequences
from torch import Tensor

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import ConflictError, NonFiniteError, ResumeError, SpaceError
from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.quant import choose as choosing
from g2kit.quant import ggml
from g2kit.quant.choose import Target, choose, inputs_of
from g2kit.quant.hessian import STAGES, Collector, Moments
from g2kit.quant.pipeline import Batch, Options, Pipeline, batches
from g2kit.quant.scheme import Scheme
from g2kit.quant.states import States
from g2kit.quant.weights import Weights
from g2kit.quant.work import Work, WorkCodes

FOUR = Scheme(4, 32)


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


def _targets(checkpoint: Checkpoint, target: Target = FOUR) -> dict[str, Target]:
    return dict.fromkeys(canonical.linears(checkpoint.tensors), target)


def _nothing(nbytes: int, name: str) -> None:
    pass


def _run(
    checkpoint: Checkpoint,
    path: Path,
    targets: Mapping[str, Target] | None = None,
    meter: Any = _nothing,
    **options: Any,
) -> Result:
    targets = targets or _targets(checkpoint)
    with Work(path, {"a": "1"}) as work:
        report = Pipeline(
            checkpoint, targets, CALIBRATION, work, Options(batch_tokens=72, **options)
        ).run(meter)
        codes = dict(WorkCodes(work, targets, "g2"))
    return report, codes


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(bytes_of(a[n]) == bytes_of(b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(fixture: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return _run(fixture, tmp_path_factory.getbasetemp() / "whole-work")


# ---------------------------------------------------------------- what is said is true


def test_the_report_is_about_these_codes(fixture: Checkpoint, whole: Result) -> None:
    report, codes = whole
    original = dense(fixture)
    rounded = original | {n: c.dequantize() for n, c in codes.items()}
    total = count = 0.0
    for ids in CALIBRATION.held[1::2]:  # the others chose between methods
        x = torch.from_numpy(ids)[None]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(tg.forward(x, w, fixture.config).double(), -1)
                for w in (original, rounded)
            )
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    assert report["quality"]["kl"] == pytest.approx(total / count, rel=1e-3)
    assert report["quality"]["positions"] == count
    assert report["quality"]["kl_interval"] is None  # three sequences tell none
    assert list(report["linears"]) == list(codes)
    assert [b["layer"] for b in report["blocks"]] == [0, 1, 2, 3]
    assert all(b["error"] > 0 for b in report["blocks"])


def test_held_out_errors_are_those_of_the_codes(fixture: Checkpoint, whole: Result) -> None:
    """The first block's inputs are known without a pipeline: the model's own."""
    report, codes = whole
    original = dense(fixture)
    seen: list[Tensor] = []

    def watch(name: str, x: Tensor, w: Tensor) -> Tensor:
        if name == canonical.K.format(i=0):
            seen.append(x.flatten(0, 1))
        return tg.plain_linear(name, x, w)

    with torch.no_grad():
        for ids in CALIBRATION.held[::2]:
            tg.forward(torch.from_numpy(ids)[None], original, fixture.config, linear=watch)
    name = canonical.K.format(i=0)
    x, w = torch.cat(seen), original[name]
    error = (x @ (w - codes[name].dequantize()).T).square().sum() / (x @ w.T).square().sum()
    assert report["linears"][name]["error"] == pytest.approx(float(error), rel=1e-4)
    record = report["linears"][name]
    assert record["error"] == min(record["held_error"].values())


def test_more_bits_lose_less_and_gptq_less_than_nearest(
    fixture: Checkpoint, whole: Result, tmp_path: Path
) -> None:
    report, _ = _run(fixture, tmp_path / "r", method="rtn")
    # of the same inputs; what is better on them can be worse on others
    first = [
        n for n in report["linears"] if n.startswith("model.layers.0.self_attn.") and "o_p" not in n
    ]
    records = whole[0]["linears"]
    assert all(records[n]["error"] <= report["linears"][n]["error"] for n in first)
    eight, _ = _run(fixture, tmp_path / "8", _targets(fixture, Scheme(8, 32)), method="rtn")
    assert eight["quality"]["kl"] < 0.05 * report["quality"]["kl"]


def test_dense_layers_stay_and_types_mix(fixture: Checkpoint, tmp_path: Path) -> None:
    few: dict[str, Target] = {
        canonical.V.format(i=1): Scheme(8, -1),
        canonical.DOWN.format(i=1): "Q4_0",
        canonical.UP.format(i=3): Scheme(3, 32, symmetric=False),
    }
    report, codes = _run(fixture, tmp_path / "w", few)
    assert list(codes) == list(few)
    assert isinstance(codes[canonical.DOWN.format(i=1)], ggml.Blocks)
    assert codes[canonical.UP.format(i=3)].zeros is not None
    assert [b["error"] > 0 for b in report["blocks"]] == [False, True, True, True]
    assert report["linears"][canonical.DOWN.format(i=1)]["scheme"] == "Q4_0"


def test_states_on_disk_and_one_pass_per_block(
    fixture: Checkpoint, whole: Result, tmp_path: Path
) -> None:
    assert _same(_run(fixture, tmp_path / "a", keep_states=False)[1], whole[1])
    report, codes = _run(fixture, tmp_path / "b", sequential=False)
    first = STAGES[0].names(0)
    assert all(bytes_of(codes[n]) == bytes_of(whole[1][n]) for n in first)
    assert report["quality"]["kl"] < 1.5 * whole[0]["quality"]["kl"]


# ---------------------------------------------------------------- stopping and going on


class _StopError(Exception):
    pass


@pytest.mark.parametrize("at", [3, 15])
def test_a_stopped_run_goes_on_to_the_same_codes(
    fixture: Checkpoint, whole: Result, tmp_path: Path, at: int
) -> None:
    seen: list[str] = []

    def stop(nbytes: int, name: str) -> None:
        seen.append(name)
        if len(seen) == at:
            raise _StopError

    path = tmp_path / "w"
    with pytest.raises(_StopError):
        _run(fixture, path, meter=stop)
    done = (at - 1) // 7
    assert path.exists() == (done > 0)
    again: list[str] = []
    report, codes = _run(fixture, path, meter=lambda n, name: again.append(name))
    assert len(again) == 28 - 7 * done
    assert _same(codes, whole[1])
    assert report["quality"] == whole[0]["quality"]
    timeless = [
        {n: {k: x for k, x in r.items() if k != "seconds"} for n, r in found["linears"].items()}
        for found in (report, whole[0])
    ]
    assert timeless[0] == timeless[1]


def test_other_settings_are_told_apart(fixture: Checkpoint, tmp_path: Path) -> None:
    with Work(tmp_path / "w", {"--method": "gptq", "--seed": "1"}) as work:
        work.finish_layer(0, {}, {"linears": {}, "block": {}})
    with (
        pytest.raises(ResumeError, match="--method was gptq, now rtn") as e,
        Work(tmp_path / "w", {"--method": "rtn", "--seed": "1"}),
    ):
        pass
    assert "--seed" not in str(e.value)
    with Work(tmp_path / "w", {"--method": "rtn", "--seed": "1"}, resume=False) as work:
        assert work.layers == {}
        assert sorted(p.name for p in work.path.iterdir()) == ["journal", "lock"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("x")
    with pytest.raises(ConflictError, match="thesis"), Work(tmp_path / "w", {}):
        pass
    assert (tmp_path / "w" / "thesis.tex").read_text() == "x"


def test_damaged_codes_are_noticed(
    fixture: Checkpoint, whole: Result, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(tmp_path_factory.getbasetemp() / "whole-work", tmp_path / "w")
    file = tmp_path / "w" / "layer-2.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    targets = _targets(fixture)
    with Work(tmp_path / "w", {"a": "1"}) as work:
        codes = WorkCodes(work, targets, "g2")
        with pytest.raises(ConflictError, match="damaged"):
            dict(codes)


def test_calibration_is_settled_once(tmp_path: Path) -> None:
    with Work(tmp_path / "w", {}) as work:
        assert work.calibration() is None
        work.keep_calibration(CALIBRATION)
        work.finish_layer(0, {}, {})
    with Work(tmp_path / "w", {}) as work:
        found = work.calibration()
        assert found is not None
        assert found.sha256 == CALIBRATION.sha256
        assert [len(s) for s in found.held] == [24, 24, 16]


def test_states_of_another_size_are_refused(tmp_path: Path) -> None:
    States(tmp_path / "s", 10, 4, keep=False, create=True).close()
    with pytest.raises(ConflictError, match="160 bytes, expected 176"):
        States(tmp_path / "s", 11, 4, keep=False, create=False)
    for keep in (False, True):
        s = States(tmp_path / "s", 10, 4, keep=keep, create=True)
        s.write(3, torch.arange(8.0).view(2, 4))
        assert s.read(3, 5).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        s.close()
        again = States(tmp_path / "s", 10, 4, keep=not keep, create=False)
        assert again.read(4, 5).tolist() == [[4, 5, 6, 7]]
        again.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_a_full_disk_is_told_from_a_file_system_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*args: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    if code == errno.ENOSPC:
        with pytest.raises(SpaceError, match="160 bytes are needed"):
            States(tmp_path / "s", 10, 4, keep=False, create=True)
        return
    states = States(tmp_path / "s", 10, 4, keep=False, create=True)
    assert states.read(9, 10).tolist() == [[0, 0, 0, 0]]
    states.close()


# ---------------------------------------------------------------- bad numbers


def _broken(tmp_path: Path, name: str, value: float) -> Path:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "broken"
    shutil.copytree(DATA, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[5] = value
            save_file(tensors, file, {"format": "pt"})
    return path


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = canonical.UP.format(i=0)
    with open_checkpoint(_broken(tmp_path, name, float("nan"))) as checkpoint:
        with pytest.raises(NonFiniteError, match="1 of 12288 weights") as e:
            _run(checkpoint, tmp_path / "w")
        assert e.value.tensor == name
    assert not (tmp_path / "w").exists()


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    name = canonical.PRE_FFW_NORM.format(i=0)
    with open_checkpoint(_broken(tmp_path, name, 3e38)) as checkpoint:
        with pytest.raises(NonFiniteError, match=r"second moments|input is NaN|output is NaN") as e:
            _run(checkpoint, tmp_path / "w")
        assert e.value.tensor is not None
        assert e.value.tensor.startswith("model.layers.0.mlp")


# ---------------------------------------------------------------- inputs


def test_moments_are_means_and_weigh_tokens_by_the_output(fixture: Checkpoint) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, 8), torch.randn(6, 8)
    x[0, 0] *= 1000  # as BOS
    y = x @ w.T
    plain = Moments(["a"], 8, None)
    plain.add(x[:1], y[:1])
    plain.add(x[1:], y[1:])
    rows = x.flatten(0, 1)
    torch.testing.assert_close(plain.hessian(), rows.T @ rows / 10)
    weighed = Moments(["a"], 8, 1e-6, held_rows=7)
    weighed.add(x, y)
    weighed.hold(x, y)
    scaled = rows / (y.flatten(0, 1).square().mean(1, keepdim=True) + 1e-6).sqrt()
    held = weighed.held()
    torch.testing.assert_close(weighed.hessian(), scaled.T @ scaled / 10)
    torch.testing.assert_close(held, scaled[:7])
    assert float(held.square().sum(1).max() / held.square().sum(1).min()) < 100


def test_every_stage_sees_its_own_input(fixture: Checkpoint) -> None:
    weights = Weights(fixture).block(1)
    x = torch.randn(2, 9, fixture.config.hidden_size)
    seen: dict[str, Tensor] = {}

    def watch(name: str, inner: Tensor, w: Tensor) -> Tensor:
        seen[name] = inner.flatten(0, 1)
        return tg.plain_linear(name, inner, w)

    positions = torch.arange(9).expand(2, -1)
    tg.block(x, weights, 1, fixture.config, positions, linear=watch)
    collector = Collector(STAGES, 1, fixture.config, weights)
    collector.watch(
        lambda b: tg.block(b, weights, 1, fixture.config, positions[:1], linear=collector),
        [x[:1], x[1:]],
        holding=False,
    )
    for moments, stage in zip(collector.moments, STAGES, strict=True):
        rows = seen[stage.names(1)[0]]
        if stage.normalised:
            y = rows @ weights[stage.names(1)[0]].T
            rows = rows / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
        assert all(torch.equal(seen[n], seen[stage.names(1)[0]]) for n in stage.names(1))
        torch.testing.assert_close(
            moments.hessian(),
            rows.T @ rows / 18,
            rtol=1e-4,
            atol=1e-4 * float(rows.square().mean()),
        )


def test_batches_are_neighbours_of_one_length() -> None:
    assert batches(sequences(0, (8, 8, 8, 5, 5)), 100, 16) == [
        Batch(100, 2, 8), Batch(116, 1, 8), Batch(124, 2, 5),
    ]  # fmt: skip
    assert batches(sequences(0, (40,)), 0, 16) == [Batch(0, 1, 40)]


# ---------------------------------------------------------------- choices


def _case(columns: int = 64, rows: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    mix = torch.randn(columns, columns, generator=g)
    x = torch.randn(rows, columns, generator=g) @ mix
    return torch.randn(32, columns, generator=g), x.T @ x / rows, x[:50]


def test_the_better_on_held_out_inputs_wins() -> None:
    w, h, held = _case()
    record = choose(w, FOUR, inputs_of(h, held, 200)).record
    assert record["method"] == "gptq"
    assert record["held_error"]["gptq"] < record["held_error"]["rtn"]
    assert record["fallbacks"] == []
    # held-out inputs unlike those of the Hessian: white
    record = choose(w, FOUR, inputs_of(h, torch.eye(64), 200)).record
    assert record["method"] == "rtn"
    assert record["fallbacks"] == ["rounding to nearest loses less on held-out inputs than GPTQ"]


def test_what_cannot_be_factored_is_rounded_to_nearest_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w, h, held = _case()
    monkeypatch.setattr(choosing.rounding, "factor", lambda h: None)
    choice = choose(w, FOUR, inputs_of(h, held, 200))
    assert choice.record["method"] == "rtn"
    assert "could not be factored" in choice.record["fallbacks"][0]
    assert choice.record["damp"] is None


def test_stronger_damping_is_said() -> None:
    w, h, held = _case()
    inputs = inputs_of(h, held, 200)
    assert inputs.factor is not None
    stronger = replace(inputs, factor=replace(inputs.factor, damp=0.05))
    assert choose(w, FOUR, stronger).record["fallbacks"] == [
        "the Hessian needed 5% damping in float32"
    ]


def test_dead_columns_and_clipping_are_counted() -> None:
    w, h, held = _case()
    h[3] = h[:, 3] = 0
    record = choose(w, FOUR, inputs_of(h, held, 200), "rtn").record
    assert record["dead_columns"] == 1
    assert 0 < record["clipped"] < 0.2
    assert choose(w, Scheme(8, 32), inputs_of(h, held, 200), "rtn").record["clipped"] < 0.01
    assert choose(w, "Q4_0", inputs_of(h, held, 200), "rtn").record["clipped"] is None


def test_pipeline_leaves_the_weights_alone(fixture: Checkpoint, whole: Result) -> None:
    name = canonical.O.format(i=2)
    back = whole[1][name].dequantize()
    weight = dense(fixture)[name]
    record = whole[0]["linears"][name]
    assert record["weight_error"] == pytest.approx(float((weight - back).norm() / weight.norm()))
