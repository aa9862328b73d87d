"""Sensitivities against a plain computation of what they mean; estimates against measurements; resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import ConflictError, FormatError, ResumeError, UsageError
from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.quant import quantize
from g2kit.quant.choose import choose, inputs_of
from g2kit.quant.cli import g2quant
from g2kit.quant.hessian import STAGES, Collector
from g2kit.quant.measure import read_sensitivity, sensitivity
from g2kit.quant.scheme import Scheme
from g2kit.quant.sensitivity import Sensitivity
from g2kit.quant.weights import Weights

DATA = Path(__file__).parent / "data" / "hf_sharded"
CHOICES = ("3g32", "4g32", "8g32")
NAMES = ["int3 g32 sym", "int4 g32 sym", "int8 g32 sym"]


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 500, (8, 20))


def _measured(ids: np.ndarray, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"choices": CHOICES, "samples": 6, "method": "rtn", "calibration": ids}
    return sensitivity(DATA, **(given | options))


@pytest.fixture(scope="module")
def every(ids: np.ndarray) -> dict[str, Any]:
    return _measured(ids, measure="every", held_out=0.3)


def test_a_kl_is_that_of_the_model_with_one_weight_rounded(
    fixture: Checkpoint, ids: np.ndarray, every: dict[str, Any]
) -> None:
    """One weight in the middle of the model, computed without streams."""
    name, layer, config = canonical.DOWN.format(i=2), 2, fixture.config
    weights = {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in fixture.tensors.items()}
    rows = np.concatenate([np.full((8, 1), 2), ids], 1)
    apart = {(2 * j + 1) * 8 // 4 for j in range(2)}
    train, held = (
        torch.from_numpy(rows[[i for i in range(8) if (i in apart) == kept]])
        for kept in (False, True)
    )
    states = Weights(fixture).embed(train)
    positions = torch.arange(21).expand(len(train), -1)
    collector = Collector(STAGES, layer, config, weights)
    for i in range(layer):
        states, _ = tg.block(states, weights, i, config, positions)
    collector.watch(
        lambda x: tg.block(x, weights, layer, config, positions, linear=collector),
        [states],
        holding=False,
    )
    (moments,) = [m for m in collector.moments if name in m.names]
    inputs = inputs_of(moments.hessian(), torch.empty(0, 192), 1, factored=False)
    value = choose(weights[name], Scheme(4, 32), inputs, "rtn").value.dequantize()
    with torch.no_grad():
        p, q = (
            torch.log_softmax(tg.forward(held, w, config).double(), -1)
            for w in (weights, weights | {name: value})
        )
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    found = every["linears"][name]["choices"]["int4 g32 sym"]
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["measured"]
    assert every["tokens"] == 42


def test_what_a_document_says(every: dict[str, Any], fixture: Checkpoint) -> None:
    assert every["choices"] == NAMES
    assert every["anchor"] == "int4 g32 sym"
    assert list(every["linears"]) == canonical.linears(fixture.tensors)
    assert every["matrix"]["columns"][3] == "o_proj"
    assert np.array(every["matrix"]["kl"]).shape == (4, 7)
    entry = every["linears"][canonical.O.format(i=1)]
    assert every["matrix"]["kl"][1][3] == entry["choices"]["int4 g32 sym"]["kl"]
    assert entry["weights"] == 64 * 128
    for e in every["linears"].values():
        kls = [e["choices"][c]["kl"] for c in NAMES]
        assert kls == sorted(kls, reverse=True)
        assert kls[-1] > 0
    json.dumps(every)


def test_scaling_by_the_error_comes_near_measuring(ids: np.ndarray, every: dict[str, Any]) -> None:
    """Where one choice is measured, the others follow, near enough for an allocation."""
    found = _measured(ids, held_out=0.3)
    ratios = []
    for name, entry in found["linears"].items():
        for choice, e in entry["choices"].items():
            wanted = every["linears"][name]["choices"][choice]["kl"]
            assert e["measured"] == (choice == found["anchor"])
            if e["measured"]:
                assert e["kl"] == wanted
            else:
                ratios.append(e["kl"] / wanted)
    logs = np.log(ratios)
    assert len(logs) == 56
    assert abs(np.median(logs)) < np.log(1.3)
    assert np.std(logs) < np.log(2)


def test_blocks_are_shared_out(ids: np.ndarray, every: dict[str, Any]) -> None:
    found = _measured(ids, measure="block", held_out=0.3)
    names, anchor = list(found["linears"]), found["anchor"]
    one, two = (
        np.array([d["linears"][n]["choices"][anchor]["kl"] for n in names]) for d in (found, every)
    )
    assert not any(e["choices"][anchor]["measured"] for e in found["linears"].values())
    assert np.corrcoef(np.log(one), np.log(two))[0, 1] > 0.8
    assert 0.5 < one.sum() / two.sum() < 2


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(
    ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _measured(ids, held_out=0.3, work=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    count = 0
    for method, least in (("_layer", 3), ("_kl", 9)):
        plain = getattr(Sensitivity, method)

        def failing(self: Any, *args: Any, plain: Any = plain, least: int = least) -> Any:
            nonlocal count
            count += 1
            if count == least:
                raise KeyboardInterrupt
            return plain(self, *args)

        count = 0
        with monkeypatch.context() as m:
            m.setattr(Sensitivity, method, failing)
            with pytest.raises(KeyboardInterrupt):
                _measured(ids, held_out=0.3, work=tmp_path / "b")
        assert (tmp_path / "b" / "journal").is_file()
    with pytest.raises(ResumeError, match="--method was rtn, now gptq"):
        _measured(ids, held_out=0.3, work=tmp_path / "b", method="gptq")
    again = _measured(ids, held_out=0.3, work=tmp_path / "b")
    assert again["linears"] == whole["linears"]


def test_a_kept_document_decides_an_allocation(
    ids: np.ndarray, every: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(every))
    options: dict[str, Any] = {
        "calibration": ids, "samples": 6, "method": "rtn", "target_bpw": 4.6, "sensitivity": file,
        "choices": CHOICES, "dry_run": True,
    }  # fmt: skip
    report = quantize(DATA, tmp_path / "out", **options)
    assert report["allocation"]["measure"] == "every"
    assert report["allocation"]["bits_per_weight"] <= 4.6
    with pytest.raises(ConflictError, match="not measured: int2 g32 sym; measured: "):
        quantize(DATA, tmp_path / "out", **(options | {"choices": ("2g32", "4g32")}))
    other = every | {"source": {"fingerprint": "g2:sha256:" + "0" * 64}}
    file.write_text(json.dumps(other))
    with pytest.raises(ConflictError, match="measured on other weights"):
        quantize(DATA, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "text",
    ["{}", '{"schema": "g2kit.sensitivity/1", "linears": {"a": {"choices": {"b": {"kl": -1}}}}}',
     '{"schema": "g2kit.sensitivity/1", "linears": {"a": 3}}', '{"schema": "g2kit.sensitivity/1"}'],
)  # fmt: skip
def test_files_that_are_no_sensitivities(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError):
        read_sensitivity(tmp_path / "x.json")


def test_ways_there_are_not(ids: np.ndarray) -> None:
    with pytest.raises(UsageError, match="some is no way to measure"):
        _measured(ids, measure="some")
    with pytest.raises(UsageError, match="0 tokens"):
        _measured(ids, tokens=0)


def test_the_command_shows_a_table_and_writes_a_file(ids: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids)
    args = ["sensitivity", str(DATA), "--calibration", str(tmp_path / "ids.npy"), "--samples", "6",
            "--method", "rtn", "--choices", ",".join(CHOICES), "--measure", "block",
            "--output", str(tmp_path / "s.json")]  # fmt: skip
    shown = CliRunner().invoke(g2quant, args)
    assert shown.exit_code == 0, shown.output
    assert "layer" in shown.stdout
    assert "KL x 1000" in shown.stdout
    assert read_sensitivity(tmp_path / "s.json")["measure"] == "block"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "s.json"]
