"""The knapsack against brute force, budgets that are never exceeded, and files that open with what was allocated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import UsageError
from g2kit.model import canonical
from g2kit.quant import export_config, quantize
from g2kit.quant.budget import OVERRIDES, Budget, allocate, choices_for
from g2kit.quant.choose import Target
from g2kit.quant.ggml import block_format
from g2kit.quant.ggml.types import FORMATS
from g2kit.quant.knapsack import Item, solve
from g2kit.quant.pipeline import Pipeline
from g2kit.quant.rows import scheme_of
from g2kit.quant.scheme import Scheme
from g2kit.quant.sensitivity import Sensitivity

DATA = Path(__file__).parent / "data" / "hf_sharded"


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


# ---------------------------------------------------------------- knapsack

_option = st.tuples(st.integers(0, 40), st.floats(0, 10, allow_subnormal=False))
_items = st.lists(st.lists(_option, min_size=1, max_size=4), min_size=1, max_size=6)


def _brute(items: list[Item], budget: int) -> float | None:
    best = None
    for picks in itertools.product(*(range(len(i.sizes)) for i in items)):
        size = sum(i.sizes[k] for i, k in zip(items, picks, strict=True))
        loss = sum(i.losses[k] for i, k in zip(items, picks, strict=True))
        if size <= budget and (best is None or loss < best):
            best = loss
    return best


@given(_items, st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_the_optimum_is_found(drawn: list[list[tuple[int, float]]], budget: int) -> None:
    items = [Item([s for s, _ in o], [x for _, x in o]) for o in drawn]
    picks, best = solve(items, budget), _brute(items, budget)
    if picks is None or best is None:
        assert picks is None
        assert best is None
        return
    assert sum(i.sizes[k] for i, k in zip(items, picks, strict=True)) <= budget
    found = sum(i.losses[k] for i, k in zip(items, picks, strict=True))
    assert found == pytest.approx(best, rel=1e-9, abs=1e-300)


def test_hundreds_of_items_are_solved_and_better_than_any_single_option() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([2.125, 3.125, 3.5, 4.125, 4.5, 8.125])
    items = []
    for weights, kl in zip(rng.integers(1, 9, 104), rng.lognormal(0, 1.5, 104), strict=True):
        bits = (sizes * int(weights) * 1000).astype(int)
        items.append(Item(bits.tolist(), (kl * 4.0**-sizes).tolist()))
    for k in (1, 3):
        budget = sum(i.sizes[k] for i in items)
        picks = solve(items, budget)
        assert picks is not None
        assert sum(i.sizes[j] for i, j in zip(items, picks, strict=True)) <= budget
        mixed = sum(i.losses[j] for i, j in zip(items, picks, strict=True))
        assert mixed < 0.9 * sum(i.losses[k] for i in items)


# ---------------------------------------------------------------- budgets


def _losses(checkpoint: Checkpoint, choices: tuple[Target, ...], seed: int = 0) -> dict[str, Any]:
    """Made-up sensitivities: each further choice costs a quarter."""
    rng = np.random.default_rng(seed)
    return {
        "linears": {
            n: {"choices": {str(c): {"kl": float(kl * 0.25**k)} for k, c in enumerate(choices)}}
            for n, kl in zip(
                canonical.linears(checkpoint.tensors), rng.lognormal(0, 2, 99), strict=False
            )
        }
    }


@pytest.mark.parametrize("format", list(OVERRIDES))
def test_files_are_never_larger_than_asked_for(
    fixture: Checkpoint, format: str, tmp_path: Path
) -> None:
    choices = choices_for(format, fixture, None, symmetric=True)
    losses, dst = _losses(fixture, choices), tmp_path / "out"
    ends = allocate(losses, fixture, dst, format, Budget(nbytes=1 << 40), choices)
    assert ends.nbytes == ends.largest
    last = np.inf
    for nbytes in np.linspace(ends.smallest, ends.largest, 7).astype(int):
        found = allocate(losses, fixture, dst, format, Budget(nbytes=int(nbytes)), choices)
        assert found.nbytes <= nbytes
        assert nbytes - found.nbytes < 8192  # the largest matrix gains no more from one choice
        assert found.kl <= last
        last = found.kl
    with pytest.raises(UsageError, match=rf"from {ends.smallest:.0f} to {ends.largest:.0f} bytes"):
        allocate(losses, fixture, dst, format, Budget(nbytes=int(ends.smallest) - 1), choices)


def test_bits_per_weight_are_never_more_than_asked_for(fixture: Checkpoint, tmp_path: Path) -> None:
    choices = choices_for("compressed-tensors", fixture, None, symmetric=True)
    losses = _losses(fixture, choices)
    for bits in ("2.25", "3.17", "4.5", "8.5"):
        budget = Budget.of(None, bits)
        assert budget is not None
        found = allocate(losses, fixture, tmp_path / "o", "compressed-tensors", budget, choices)
        assert Fraction(found.bits) <= Fraction(bits)
        weights = {n: fixture.tensors[n].shape for n in found.targets}
        stored = sum(
            t.bits_per_weight(weights[n][1]) * weights[n][0] * weights[n][1]
            for n, t in found.targets.items()
            if isinstance(t, Scheme)
        )
        assert found.bits == pytest.approx(stored / sum(a * b for a, b in weights.values()))
    with pytest.raises(
        UsageError, match=r"2\.2 bits per weight cannot be reached.*from 2\.25 to 8\.5"
    ):
        allocate(
            losses, fixture, tmp_path / "o", "compressed-tensors", Budget(bits=Fraction("2.2")), choices
        )  # fmt: skip


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_matrices_that_servers_merge_get_one_scheme(
    fixture: Checkpoint, format: str, tmp_path: Path
) -> None:
    choices = choices_for(format, fixture, None, symmetric=True)
    budget = Budget(bits=Fraction(4))
    found = allocate(_losses(fixture, choices), fixture, tmp_path / "o", format, budget, choices)
    assert len(set(found.targets.values())) > 1
    for i in range(fixture.config.num_hidden_layers):
        for merged in ((canonical.Q, canonical.K, canonical.V), (canonical.GATE, canonical.UP)):
            assert len({found.targets[t.format(i=i)] for t in merged}) == 1


def test_gptq_says_it_of_the_merged_matrix_too() -> None:
    four, eight = Scheme(4, 32), Scheme(8, 32)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
    schemes = {n: eight if ".1." in n else four for n in [*names, "model.layers.0.mlp.down_proj"]}
    dynamic = export_config.gptq(schemes, [])["quantization_config"]["dynamic"]
    assert dynamic[r"+:^model\.layers\.1\.self_attn\.qkv_proj$"]["bits"] == 8
    assert not any("0" in k and "qkv" in k for k in dynamic)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("format", ["awq", "int-quantized", "torch-int8", "gguf-q4_k_m"])
def test_formats_with_one_scheme_for_all_are_refused(fixture: Checkpoint, format: str) -> None:
    with pytest.raises(UsageError) as e:
        choices_for(format, fixture, None, symmetric=True)
    assert "compressed-tensors or gptq or mlx or gguf" in str(e.value.fix)


@pytest.mark.parametrize(
    ("format", "wanted", "said"),
    [
        ("compressed-tensors", ["4g32"], "1 to choose from"),
        ("compressed-tensors", ["4g32", "5g32"], "5g32 is no scheme"),
        ("compressed-tensors", ["4g32", "4g128"], "group size 128 does not divide"),
        ("mlx", ["4g32", "8row"], "mlx cannot hold"),
        ("gguf", ["Q4_0", "Q9"], "'Q9' is no block type"),
        ("gguf", ["Q4_0", "Q4_K"], "Q4_K has blocks of 256"),
    ],
)
def test_choices_that_cannot_be(
    fixture: Checkpoint, format: str, wanted: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        choices_for(format, fixture, wanted, symmetric=True)


@pytest.mark.parametrize(
    ("size", "bits", "said"),
    [("1GB", 3.5, "both given"), (None, "much", "no number"), (None, 0, "no number")],
)
def test_budgets_that_are_none(size: Any, bits: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Budget.of(size, bits)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 500, (8, 20))


@pytest.mark.parametrize("format", list(OVERRIDES))
def test_files_open_with_what_was_allocated(format: str, ids: np.ndarray, tmp_path: Path) -> None:
    dst = tmp_path / ("out.gguf" if format == "gguf" else "out")
    choices = ("Q4_0", "Q8_0") if format == "gguf" else ("3g32", "8g32")
    report = quantize(
        DATA,
        dst,
        format=format,
        target_bpw=5.5,
        calibration=ids,
        samples=6,
        method="rtn",
        measure="block",
        choices=choices,
    )
    said = report["allocation"]["targets"]
    assert len(set(said.values())) > 1
    assert report["bits_per_weight"] <= 5.5
    with open_checkpoint(dst) as back:
        for name, target in said.items():
            tensor = back.tensors[name]
            if target in FORMATS:
                assert tensor.source.stored == block_format(target).name
            else:
                assert str(scheme_of(tensor, symmetric=True)) == target
    assert not list(tmp_path.glob("*ing"))


def test_a_size_in_bytes_is_what_the_file_has(ids: np.ndarray, tmp_path: Path) -> None:
    dst = tmp_path / "out.gguf"
    common: dict[str, Any] = {
        "format": "gguf",
        "calibration": ids,
        "samples": 6,
        "method": "rtn",
        "measure": "block",
        "choices": ("Q4_0", "Q8_0"),
    }
    plan = quantize(DATA, dst, target_size="200kB", dry_run=True, **common)
    assert not any(tmp_path.iterdir())
    quantize(DATA, dst, target_size="200kB", **common)
    assert dst.stat().st_size == plan["allocation"]["weights_bytes"] <= 200_000
    assert dst.stat().st_size > 0.95 * 200_000


def test_a_run_stopped_behind_its_measurement_goes_on(
    ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "out"
    options: dict[str, Any] = {
        "calibration": ids, "samples": 6, "method": "rtn", "measure": "block", "target_bpw": 5.5,
        "choices": ("3g32", "8g32"),
    }  # fmt: skip
    quantize(DATA, tmp_path / "whole", **options)

    def stop(self: Any, *args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Pipeline, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(DATA, dst, **options)
    assert (tmp_path / "out.measuring" / "journal").is_file()
    with monkeypatch.context() as m:
        m.setattr(Sensitivity, "_layer", stop)  # nothing is measured again
        quantize(DATA, dst, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "whole"))
    assert one == two
