"""What lets g2quant work on real sizes: memory, shares of moments, devices, and runs that know little of the inputs."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs import small
from torch.overrides import TorchFunctionMode

from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import (
    ConflictError,
    DependencyError,
    G2Error,
    LimitError,
    NotFoundError,
    UsageError,
)
from g2kit.model import torch_gemma as tg
from g2kit.quant import factor as factoring
from g2kit.quant import gptq, grid, quantize, sampling
from g2kit.quant.calibration import Wanted, divide
from g2kit.quant.choose import choose, inputs_of
from g2kit.quant.cli import g2quant
from g2kit.quant.gather import gather_moments, parse_shard
from g2kit.quant.ggml import imatrix
from g2kit.quant.hessian import PANEL, Moments, add_product, mirror
from g2kit.quant.known import samples_for
from g2kit.quant.moments import ExactMoments
from g2kit.quant.own_text import Share
from g2kit.quant.scheme import Scheme
from g2kit.quant.weights import Weights
from g2kit.terminal import run_cli

DATA = Path(__file__).parent / "data" / "hf_sharded"


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 500, (9, 20))


@pytest.fixture(scope="module")
def fixture() -> Iterator[Checkpoint]:
    with open_checkpoint(DATA) as checkpoint:
        yield checkpoint


def moments_of(n: int, rows: int = 0, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 4 * n, n, generator=g) * torch.exp(torch.randn(n, generator=g))
    return x.T @ x / len(x)


def written(path: Path) -> dict[str, bytes]:
    # the manifest names where the calibration came from
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if "manifest" not in p.name}


# ---------------------------------------------------------------- one buffer


@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_the_factor_is_that_of_the_ordered_matrix(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factoring, "_CHUNK", 64)
    h = moments_of(n)
    before = h.clone()
    f = factoring.factor(h, ladder=(0.02,), dtypes=(torch.float64,))
    assert f is not None
    assert torch.equal(h, before)
    assert torch.equal(f.unit.tril(-1), torch.zeros(n, n, dtype=torch.float64))
    assert torch.equal(f.unit.diagonal(), torch.ones(n, dtype=torch.float64))
    wanted = h.double()
    wanted.diagonal().add_(0.02 * float(wanted.diagonal().mean()))
    wanted = wanted[f.order][:, f.order]
    # U D U^T with the D that makes the diagonal right
    d = torch.linalg.solve_triangular(f.unit, wanted, upper=True)
    d = torch.linalg.solve_triangular(f.unit, d.T, upper=True)
    torch.testing.assert_close(d, torch.diag(d.diagonal()), atol=1e-9, rtol=0)
    assert bool((d.diagonal() > 0).all())


def test_what_has_no_factor_is_damped_more_and_then_given_up() -> None:
    h = moments_of(64, rows=8)
    assert factoring.factor(-h, ladder=(0.01,)) is None
    f = factoring.factor(h - 0.015 * h.diagonal().mean() * torch.eye(64))
    assert f is not None
    assert f.damp == 0.02


def _grown(out: Any) -> None:
    from g2kit.machine import peak_rss

    n, peaks = 3072, []
    h = torch.eye(n) + 0.1
    factoring.factor(torch.eye(64))
    peaks.append(peak_rss())
    with factoring.damped(h, 0.01):
        mirror(h)
    peaks.append(peak_rss())
    assert factoring.factor(h) is not None
    peaks.append(peak_rss())
    out.put([b - a for a, b in itertools.pairwise(peaks)])


def test_no_more_copies_of_a_hessian_than_said() -> None:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_grown, args=(out,))
    child.start()
    in_place, factored = out.get(timeout=100)
    child.join()
    # of 36 MiB: what is moved at a time, and LAPACK's own memory, come on top
    assert in_place < 25
    assert factored < 36 + 60


def test_panels_give_the_symmetric_product() -> None:
    x = torch.randn(50, PANEL + 70)
    total = torch.zeros(x.shape[1], x.shape[1])
    for part in x.split(20):
        add_product(total, part)
    assert torch.equal(mirror(total), total.T)
    torch.testing.assert_close(total, x.T @ x, atol=1e-4, rtol=0)


def test_damping_leaves_no_trace() -> None:
    h = moments_of(30)
    before = h.clone()
    with factoring.damped(h, 0.1):
        assert float(h.diagonal().mean()) == pytest.approx(1.1 * float(before.diagonal().mean()))
    assert torch.equal(h, before)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, -1), Scheme(4, 32, False)])
def test_pieces_change_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = torch.randn(24, 64) * 0.02, moments_of(64)
    codes = gptq.rtn(w, scheme, h.diagonal())
    whole = gptq.refit(codes, w @ h, h)
    monkeypatch.setattr(gptq, "_SYSTEMS", 9)
    monkeypatch.setattr(grid, "_ELEMENTS", 1)
    again = gptq.rtn(w, scheme, h.diagonal())
    assert torch.equal(again.codes, codes.codes)
    assert torch.equal(again.scales, codes.scales)
    torch.testing.assert_close(gptq.refit(again, w @ h, h).scales, whole.scales, rtol=0.01, atol=0)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, 32), Scheme(4, 32, False), Scheme(8)])
def test_searched_scales_are_never_worse_than_plain_ones(scheme: Scheme) -> None:
    w, h = torch.randn(16, 256) * torch.exp(torch.randn(16, 256)), torch.exp(torch.randn(256))

    def lost(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        codes = grid.quantize_to(w, scales, zeros, scheme)
        back = gptq.Codes(scheme, codes, scales, zeros).dequantize()
        return ((w - back).square() * h).view(16, -1, scheme.width(256)).sum(-1)

    plain, found = lost(*grid.plain_grid(w, scheme)), lost(*grid.search_grid(w, scheme, h))
    assert float(found.sum()) < (0.97 if scheme.bits < 8 else 1.0) * float(plain.sum())


# ---------------------------------------------------------------- a device


class _Placed(TorchFunctionMode):
    """Refuses tensors that are made without saying where."""

    MAKE = frozenset({torch.empty, torch.zeros, torch.ones, torch.arange, torch.full, torch.eye})

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f in self.MAKE:
            assert (kwargs or {}).get("device") is not None, f"{f.__name__} without a device"
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [Scheme(4, 32), Scheme(4, 32, False), "Q4_0"])
def test_rounding_stays_on_its_device(target: Scheme | str) -> None:
    w, h = torch.randn(8, 64) * 0.02, moments_of(64)
    with _Placed():
        m = Moments(("x",), 64, 1e-6, 16, "cpu")
        x = torch.randn(32, 64)
        m.add(x, x)
        m.hold(x, x)
        choice = choose(w, target, inputs_of(m.hessian(), m.held(), 32))
    assert choice.record["method"] in ("gptq", "rtn")
    del h


def test_a_block_runs_on_its_device(fixture: Checkpoint) -> None:
    weights = Weights(fixture, device="cpu")
    block = weights.block(0)
    with _Placed():
        x = weights.embed(torch.tensor([[2, 5, 9]]))
        room = tg.Room(1, 4, fixture.config, torch.float32, "cpu")
        at = torch.arange(3, device="cpu")[None]
        y, _ = tg.block(x, block, 0, fixture.config, at, cache=room)
    assert y.shape == x.shape


def test_devices_that_are_not_there(tmp_path: Path, ids: np.ndarray) -> None:
    with pytest.raises(UsageError, match="tpu is no device"):
        quantize(DATA, tmp_path / "out", group_size=32, calibration=ids, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DependencyError, match="0 CUDA devices are visible"):
            quantize(DATA, tmp_path / "out", group_size=32, calibration=ids, device="cuda:1")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- text of the model's own


def test_ids_are_drawn_by_their_shares() -> None:
    """Evenly spaced numbers hit every token as often as its share says, but for one at each end."""
    logits = torch.randn(1, 2500, generator=torch.Generator().manual_seed(1)) * 2
    logits[0, [0, 1, 7, 2499]] = -torch.inf
    n = 4000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = sampling._draw(logits.repeat(n, 1), draws, 1.0)
    counts = torch.bincount(found, minlength=2500).double()
    shares = torch.softmax(logits[0].double(), -1)
    assert float((counts - n * shares).abs().max()) <= 1.01
    assert counts[[0, 1, 7, 2499]].sum() == 0
    ends = sampling._draw(logits.repeat(2, 1), torch.tensor([0.0, 1 - 2**-53]).double(), 1.0)
    assert torch.isfinite(logits[0, ends]).all()


def test_the_first_tokens_are_hotter() -> None:
    heats = [sampling._heat(i) for i in range(12)]
    assert heats[0] == sampling.HEAT
    assert heats == sorted(heats, reverse=True)
    assert heats[sampling.HOT :] == [1.0] * (12 - sampling.HOT)


def test_a_cache_with_room_equals_one_that_is_copied() -> None:
    config = small("gemma2-9b")
    g = torch.Generator().manual_seed(2)
    from g2kit.model import canonical

    weights = {
        n: torch.randn(t.shape, generator=g) * 0.3 for n, t in canonical.tensors(config).items()
    }
    x = torch.randn(2, 12, config.hidden_size, generator=g)
    room, cache = tg.Room(2, 12, config, torch.float32), None
    for a, b in ((0, 5), (5, 6), (6, 12)):
        at = torch.arange(a, b).expand(2, -1)
        one, _ = tg.block(x[:, a:b], weights, 0, config, at, cache=room)
        two, cache = tg.block(x[:, a:b], weights, 0, config, at, cache=cache)
        torch.testing.assert_close(one, two)


def test_how_memory_is_shared_while_text_is_written(fixture: Checkpoint) -> None:
    c, wanted = fixture.config, Wanted(100, 64)
    roomy = Share.of(c, "float32", wanted, 1 << 40)
    assert (roomy.at_once, roomy.missing) == (sampling.AT_ONCE, 0)
    tight = Share.of(c, "float32", wanted, 4 * c.num_parameters)
    assert 1 <= tight.at_once < 100
    assert tight.missing == tight.cache > 0
    assert Share.of(c, "float32", wanted, 1).at_once == 1


def test_text_in_bfloat16(fixture: Checkpoint) -> None:
    weights = Weights(fixture, 1 << 30, dtype=torch.bfloat16)
    found = sampling.sample_sequences(weights, 3, 16, seed=1)
    assert all(len(i) == 16 and i[0] == 2 and i.min() >= 0 and i.max() < 512 for i in found)
    # the same where nothing is kept
    again = sampling.sample_sequences(Weights(fixture, dtype=torch.bfloat16), 3, 16, seed=1)
    assert [i.tolist() for i in again] == [i.tolist() for i in found]


def test_large_models_get_fewer_sequences_on_a_processor(fixture: Checkpoint) -> None:
    from g2kit.model.config import preset

    large = preset("gemma2-2b").config
    assert (samples_for(fixture.config), samples_for(large), samples_for(large, "cuda:0")) == (
        128, 32, 128,
    )  # fmt: skip


# ---------------------------------------------------------------- without text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "symmetric": False},
        {"bits": 8, "group_size": -1, "format": "torch-int8"},
        {"format": "gguf-q4_0"},
        {"format": "awq", "symmetric": False},
    ],
)
def test_without_calibration_the_model_is_not_run(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tg, "block", lambda *a, **kw: pytest.fail("the model was run"))
    report = quantize(
        DATA, tmp_path / "out", **({"group_size": 32, "calibration": "none"} | options)
    )
    assert report["method"] == "rtn"
    assert report["quality"]["kl"] is None
    assert 0 < report["linears"]["model.layers.0.mlp.up_proj.weight"]["weight_error"] < 0.3
    json.dumps(report)
    with open_checkpoint(tmp_path / "out") as back:
        assert len(back.quantized) >= 28


def test_an_importance_matrix_out_of_a_run_and_into_another(
    tmp_path: Path, ids: np.ndarray, fixture: Checkpoint
) -> None:
    files = {n: tmp_path / n for n in ("m.gguf", "m.dat")}
    for file in files.values():
        quantize(DATA, tmp_path / f"{file.name}.out", group_size=32, calibration=ids, samples=8,
                 held_out=0.1, method="rtn", sequential=False, imatrix_out=file)  # fmt: skip
    one, two = (imatrix.to_canonical(imatrix.read(f), fixture.config).means for f in files.values())
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_allclose(one[name], two[name], rtol=1e-6)
    rows = [np.concatenate([[2], r]) for r in ids]
    train = divide(rows, "x", fixture.config, Wanted(8, 512, 0.1)).train
    weights = Weights(fixture)
    x = torch.cat([weights.embed(torch.from_numpy(i)) for i in train])
    norm = weights.block(0)["model.layers.0.input_layernorm.weight"]
    seen = tg.rms_norm(x, norm, fixture.config.rms_norm_eps).square().mean(0)
    np.testing.assert_allclose(one[name], seen.numpy(), rtol=1e-4)
    # and it decides scales
    with_, without = (
        quantize(DATA, tmp_path / n, format="gguf-q4_0", **given)["output"]["fingerprint"]
        for n, given in (("a", {"imatrix": files["m.gguf"]}), ("b", {"calibration": "none"}))
    )
    assert with_ != without


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calibration": "none", "method": "gptq"}, "--method gptq cannot be"),
        ({"calibration": "none", "imatrix_out": "m.gguf"}, "--imatrix-out cannot be"),
        ({"calibration": "none", "recover": "scales"}, "--recover cannot be"),
        ({"calibration": "none", "sequential": False}, "--no-sequential cannot be"),
        (
            {"calibration": "none", "samples": 8, "held_out": 0.5},
            "--samples and --held-out cannot apply: --calibration none",
        ),
        ({"imatrix": "x", "seq_len": 16}, "--seq-len cannot apply: --imatrix takes the place"),
        ({"calibration": "none", "imatrix": "x"}, "--imatrix and --calibration exclude each other"),
        ({"imatrix": "x", "moments": ["y"]}, "--moments and --imatrix exclude each other"),
        ({"moments": ["nowhere"]}, "there is no moments.json"),
    ],
)
def test_what_needs_text_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(G2Error) as e:
        quantize(DATA, tmp_path / "out", group_size=32, **options)
    assert says in str(e.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- shares of moments


def gathered(tmp_path: Path, ids: np.ndarray, n: int) -> list[Path]:
    paths = [tmp_path / f"{i}-of-{n}" for i in range(n)]
    for i, path in enumerate(paths):
        gather_moments(DATA, path, shard=f"{i}/{n}", calibration=ids, samples=7, held_out=0.3)
    return paths


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from g2kit.quant import gather

    monkeypatch.setattr(gather, "BATCH_TOKENS", 42)  # two sequences


@pytest.mark.slow
def test_any_number_of_shards_gives_the_same_bytes(
    tmp_path: Path, ids: np.ndarray, small_batches: None
) -> None:
    found = {}
    for n in (1, 5):  # five shards of four batches: one has nothing
        paths = gathered(tmp_path, ids, n)
        dst = tmp_path / f"out-{n}"
        report = quantize(DATA, dst, group_size=32, moments=paths[::-1])
        found[n] = written(dst)
        assert report["calibration"]["tokens"] == 7 * 21
        assert report["quality"]["kl"] > 0
        assert all("gptq" in r["held_error"] for r in report["linears"].values())
    assert found[1] == found[5]


def test_the_sum_of_moments_is_the_mean_of_products() -> None:
    x = torch.randn(90, 40) * torch.exp(torch.randn(40))
    parts = [x[:30], x[30:40], x[40:]]

    def total(order: tuple[int, ...]) -> torch.Tensor:
        m = ExactMoments(("x",), 40, None)
        m.adding = False
        m.add(parts[0], parts[0])
        m.adding = True
        for k in order:
            m.add(parts[k], parts[k])
        assert m.units is not None
        assert m.tokens == 90
        return torch.ldexp(m.panels[0].double(), m.units[:, None] + m.units - 24) / 90

    one = total((0, 1, 2))
    assert torch.equal(one, total((2, 0, 1)))
    want = (x.double().T @ x.double()) / 90
    size = want.diagonal().sqrt()
    assert float(((one - want).abs() / (size[:, None] * size)).max()) < 1e-5


def test_inputs_beyond_their_units_are_refused() -> None:
    m = ExactMoments(("model.layers.3.x",), 8, None)
    m.add(torch.ones(4, 8), torch.ones(4, 8))
    with pytest.raises(LimitError, match="thousands of times larger") as e:
        m.add(torch.full((4, 8), 1e6), torch.ones(4, 8))
    assert e.value.tensor == "model.layers.3.x"


def test_shards_that_do_not_belong_together(
    tmp_path: Path, ids: np.ndarray, small_batches: None
) -> None:
    a, b = gathered(tmp_path, ids, 2)

    def refused(*paths: Path) -> str:
        with pytest.raises(ConflictError) as e:
            quantize(DATA, tmp_path / "out", group_size=32, moments=paths)
        assert not (tmp_path / "out").exists()
        return str(e.value)

    assert "shards [0] are there, of 2" in refused(a)
    assert "shards [0, 0] are there, of 2" in refused(a, a)
    other = tmp_path / "other"
    gather_moments(DATA, other, shard="1/2", calibration=ids[:8], samples=6, held_out=0.3)
    assert "its calibration is not that of" in refused(a, other)
    own, document = (json.loads((path / "moments.json").read_text()) for path in (a, b))
    for path in (a, b):
        told = json.loads((path / "moments.json").read_text())
        told["source_fingerprint"] = "g2:sha256:" + "0" * 64
        (path / "moments.json").write_text(json.dumps(told))
    assert "gathered from other weights" in refused(a, b)
    (b / "moments.json").write_text(json.dumps(document))
    assert "source_fingerprint is not that of" in refused(a, b)
    units = dict(np.load(b / "units.npz"))
    units["0-0"] = units["0-0"] + 1
    np.savez(b / "units.npz", **units)
    (a / "moments.json").write_text(json.dumps(own))
    assert "gave other inputs here" in refused(a, b)
    np.save(a / "calibration.npy", np.arange(len(np.load(a / "calibration.npy"))))
    assert "its sequences were changed" in refused(a, b)


def test_the_moments_command(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    np.save(tmp_path / "ids.npy", ids)
    args = ["moments", str(DATA), str(tmp_path / "m"), "--calibration", str(tmp_path / "ids.npy")]
    assert run_cli(g2quant, [*args, "--shard", "2/2"]) == 2
    assert "--shard is '2/2'" in capsys.readouterr().err
    assert run_cli(g2quant, [*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 8 * 21
    assert run_cli(g2quant, args) == 7
    capsys.readouterr()
    given = [
        str(DATA),
        str(tmp_path / "out"),
        "--group-size",
        "32",
        "--moments",
        str(tmp_path / "m"),
    ]
    assert run_cli(g2quant, given) == 0
    assert "28 x int4 g32 sym" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "m", "out"]


@pytest.mark.parametrize("text", ["", "1", "a/b", "-1/2", "3/3", "0/0", "1/2/3"])
def test_shards_are_counted_from_zero(text: str) -> None:
    with pytest.raises(UsageError, match="--shard is"):
        parse_shard(text)


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, ids: np.ndarray) -> None:
    with pytest.raises(UsageError, match="without calibration"):
        gather_moments(DATA, tmp_path / "m", calibration="none")
    with pytest.raises(NotFoundError):
        gather_moments(tmp_path / "none", tmp_path / "m", calibration=ids)
    assert not list(tmp_path.iterdir())
