"""Runners against each other: independent implementations give the same logits and hidden states, or one is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import ARCHITECTURES
from verify_cases import model as random_model

from g2kit.convert import convert, open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.formats.dtypes import BF16
from g2kit.formats.errors import (
    ConfigError,
    DependencyError,
    FileIOError,
    FormatError,
    MissingTensorError,
    ResourceError,
    UsageError,
)
from g2kit.model import canonical
from g2kit.model.config import GemmaConfig
from g2kit.model.sample import heldout_text, sample_dir
from g2kit.verify.runners import ABILITIES, RUNNERS, TAPS, Runner, open_runner, runner_class
from g2kit.verify.runners.base import TILE_ROWS, as_batch

pytest.importorskip("torch")
pytest.importorskip("jax")

ROOT = Path(__file__).parent.parent
EPS = 2.0**-23
# The small models: logits up to the cap of 30, sums of at most a few hundred terms, each block passing on the one
# before; a fault moves logits by 0.1 and more.
ATOL = 30 * EPS * 64
# float64 of the same functions: 2**29 times finer, with the same factor
ATOL64 = 30 * 2.0**-52 * 64
# the sample: sums of up to 512 terms over four layers
SAMPLE_ATOL = 30 * EPS * 512
LENGTH = 17  # more than four windows of the small models
# llama.cpp on CPU takes GELU from a table of float16, so half a float16 ulp of relative error per block
LLAMA_ATOL = 30 * 2.0**-11


model = partial(random_model, layers=3)


def ids(config: GemmaConfig, batch: int = 2, length: int = LENGTH, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def official(opened: Checkpoint, directory: Path) -> Path:
    """The model as a directory written by transformers, random weights replaced by ``opened``'s."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = opened.config
    common: dict[str, Any] = {
        "num_hidden_layers": c.num_hidden_layers, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings,
    }  # fmt: skip
    if c.family == "gemma":
        made = transformers.GemmaForCausalLM(transformers.GemmaConfig(**common))
    else:
        assert c.query_pre_attn_scalar == int(c.query_pre_attn_scalar)
        made = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                **common,
                query_pre_attn_scalar=int(c.query_pre_attn_scalar),
                sliding_window=c.sliding_window,
                attn_logit_softcapping=c.attn_logit_softcapping,
                final_logit_softcapping=c.final_logit_softcapping,
            )
        )
    state = made.state_dict()
    with torch.no_grad():
        for name, tensor in opened.tensors.items():
            state[name].copy_(torch.from_numpy(tensor.read().astype(np.float32)))
    made.save_pretrained(directory)
    return directory


def gap(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


def logits(
    name: str, source: Checkpoint | Path, tokens: Any, padding: Any = None, **options: Any
) -> np.ndarray:
    with open_runner(name, source, **options) as runner:
        return runner.logits(tokens, padding)


# ---- the same logits as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_torch_and_jax_equal_transformers(arch: str, tmp_path: Path) -> None:
    """Batches, right and left padding, more than three windows, all five architectures."""
    opened = model(arch)
    tokens = ids(opened.config, 3)
    padding = np.ones(tokens.shape, bool)
    padding[1, 13:] = padding[2, :3] = False
    want = logits("transformers", official(opened, tmp_path), tokens, padding)
    for name in ("torch", "jax"):
        got = logits(name, opened, tokens, padding)
        assert got.dtype == np.float32
        assert np.isfinite(got).all()
        assert gap(got[padding], want[padding]) < ATOL, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_torch_and_jax_equal_transformers_other_sizes(arch: str, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    n = ARCHITECTURES[arch][1]
    sizes = {
        "d": n * int(rng.integers(2, 6)),
        "f": int(rng.integers(3, 40)),
        "head_dim": 2 * int(rng.integers(1, 9)),
    }
    opened = model(arch, seed, layers=4, vocab=int(rng.integers(8, 80)), **sizes)
    tokens = ids(opened.config, 2, int(rng.integers(13, 40)), seed)
    want = logits("transformers", official(opened, tmp_path), tokens)
    for name in ("torch", "jax"):
        assert gap(logits(name, opened, tokens), want) < ATOL, name


@pytest.mark.parametrize(
    "arch",
    ["gemma2-27b", *(pytest.param(a, marks=pytest.mark.slow) for a in ("gemma-2b", "gemma-7b"))],
)
def test_in_float64_torch_and_jax_are_the_same_function(arch: str) -> None:
    """Nothing of a difference that float32 could hide."""
    opened = model(arch)
    tokens = ids(opened.config)
    a, b = (logits(n, opened, tokens, dtype="float64") for n in ("torch", "jax"))
    assert a.dtype == b.dtype == np.float64
    assert gap(a, b) < ATOL64
    assert gap(logits("jax", opened, tokens), b) > ATOL64, "float32 would fail this test"


def test_float64_stays_inside_the_runner_that_asked_for_it() -> None:
    import jax
    import jax.numpy as jnp

    opened = model("gemma2-2b")
    with open_runner("jax", opened, dtype="float64") as r64, open_runner("jax", opened) as r32:
        assert r64.start([1, 2]).dtype == np.float64  # type: ignore[union-attr]
        assert r32.start([1, 2]).dtype == np.float32  # type: ignore[union-attr]
        for _, _, tile in (r64.finish(), r64.logit_tiles(16))[1]:
            assert tile.dtype == np.float64
            assert jnp.ones(1, float).dtype == jnp.float32
        assert r64.layer == 3
    assert not jax.config.jax_enable_x64


def test_bfloat16_is_near_and_is_not_float32() -> None:
    opened = model("gemma2-2b", dtype=BF16)
    tokens = ids(opened.config)
    want = logits("torch", opened, tokens, dtype="float64")
    for name in ("torch", "jax"):
        got = logits(name, opened, tokens, dtype="bfloat16")
        # 8 bits of mantissa instead of 24
        assert 100 * ATOL < gap(got, want) < ATOL * 2**16, name


# ---- block by block -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gemma2-2b", pytest.param("gemma-2b", marks=pytest.mark.slow)])
def test_blocks_and_taps_of_torch_and_jax_agree(arch: str) -> None:
    opened = model(arch)
    config, tokens = opened.config, ids(opened.config)
    with open_runner("torch", opened) as a, open_runner("jax", opened) as b:
        x, y = a.start(tokens), b.start(tokens)
        assert x is not None
        assert y is not None
        np.testing.assert_allclose(x, y, rtol=EPS)
        for layer in range(config.num_hidden_layers):
            seen: list[dict[str, np.ndarray]] = [{}, {}]
            x, y = (r.advance(s.__setitem__) for r, s in zip((a, b), seen, strict=True))
            assert list(seen[0]) == list(seen[1]) == list(TAPS)
            heads = (len(tokens), config.num_attention_heads, LENGTH, LENGTH)
            for name in TAPS:
                u, v = seen[0][name], seen[1][name]
                assert u.shape == v.shape == (heads if name == "scores" else u.shape)
                if name == "scores":  # what lies in the future means nothing
                    u, v = np.tril(u), np.tril(v)
                assert gap(u, v) <= 64 * EPS * np.abs(u).max(), (layer, name)
            np.testing.assert_array_equal(seen[0]["out"], x)
            np.testing.assert_array_equal(seen[1]["out"], y)
            # the block that just ran, on the other's hidden states, leaves the runner where it is
            z = a.replay(y)
            assert z.shape == x.shape
            assert a.layer == layer + 1
        assert gap(a.final_hidden(), b.final_hidden()) < 64 * EPS * np.abs(a.final_hidden()).max()


def test_replay_runs_the_last_block_on_other_hidden_states() -> None:
    """Isolated error: fed the hidden states another runner had, a runner gives what that runner gives next."""
    opened = model("gemma2-2b")
    tokens, other = ids(opened.config), ids(opened.config, seed=9)
    for name in ("torch", "jax"):
        with open_runner(name, opened) as a, open_runner(name, opened) as b:
            a.start(tokens)
            b.start(other)
            for _ in range(3):
                before = b.batch and (b.hidden_states(other)[a.layer])
                a.advance()
                want = b.hidden_states(other)[a.layer]
                np.testing.assert_allclose(
                    a.replay(before), want, atol=64 * EPS * np.abs(want).max()
                )  # type: ignore[arg-type]
            assert gap(a.final_hidden(), b.final_hidden()) > 0.1, "replay did not change the state"


def test_transformers_blocks_are_the_blocks_outputs(tmp_path: Path) -> None:
    """Not its `hidden_states`, whose last entry has been through the final norm."""
    opened = model("gemma2-2b")
    tokens = ids(opened.config)
    with (
        open_runner("transformers", official(opened, tmp_path)) as t,
        open_runner("jax", opened) as j,
    ):
        for a, b in zip(t.hidden_states(tokens), j.hidden_states(tokens), strict=True):
            assert gap(a, b) <= 64 * EPS * np.abs(b).max()
        assert gap(t.final_hidden(), j.final_hidden()) <= 64 * EPS * np.abs(j.final_hidden()).max()


def test_one_block_is_in_memory_and_the_embedding_is_read_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = model("gemma2-2b", layers=4, vocab=3 * TILE_ROWS, d=4, f=6, head_dim=2)
    whole: list[str] = []
    for name, tensor in opened.tensors.items():
        read = tensor.read
        monkeypatch.setattr(tensor, "read", lambda n=name, r=read: (whole.append(n), r())[1])
    for name in ("torch", "jax"):
        whole.clear()
        with open_runner(name, opened) as r:
            r.start([1, 2, 3])
            assert canonical.EMBED not in whole
            for layer in range(4):
                whole.clear()
                r.advance()
                assert sorted(whole) == sorted(canonical.layer_names(opened.config, layer))
                held: Any = r
                assert held._loaded[0] == layer
                assert not held._kept
            widths = [stop - start for start, stop, _ in r.logit_tiles()]
            assert widths == [TILE_ROWS] * 3
            assert canonical.EMBED not in whole


@pytest.mark.parametrize(
    ("rows", "start", "stop"), [(1, 0, 17), (13, 5, 9), (64, 16, 17), (99, 8, 8)]
)
def test_tiles_are_the_logits(rows: int, start: int, stop: int) -> None:
    opened = model("gemma2-2b")
    with open_runner("torch", opened) as r:
        want = r.logits(ids(opened.config))[:, start:stop]
        tiles = list(r.logit_tiles(rows, slice(start, stop)))
    assert [t[0] for t in tiles] == list(range(0, 64, rows))
    np.testing.assert_allclose(np.concatenate([t[2] for t in tiles], -1), want, atol=ATOL)


def test_queries_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences never hold all attention scores at once; padding on both sides must survive the pieces."""
    from g2kit.verify.runners import jax_runner, torch_runner

    opened = model("gemma2-2b")
    tokens = ids(opened.config, 3, 50)
    padding = np.ones(tokens.shape, bool)
    padding[1, 20:] = padding[2, :18] = padding[2, 45:] = False
    left = np.ones(tokens.shape, bool)  # the only padding of a decoder's prompt
    left[1, :20] = left[2, :3] = False
    want, decoded = (logits("torch", opened, tokens, mask) for mask in (padding, left))
    monkeypatch.setattr(torch_runner, "SCORE_BYTES", 1)  # 16 queries
    monkeypatch.setattr(jax_runner, "QUERIES", 7)
    for name in ("torch", "jax"):
        got = logits(name, opened, tokens, padding)
        assert gap(got[padding], want[padding]) < ATOL
        with open_runner(name, opened) as r:
            decoder = r.decoder(3, 50)
            steps = [decoder.step(tokens[:, :40], left[:, :40]), decoder.step(tokens[:, 40:])]
        assert gap(np.concatenate(steps, 1)[left], decoded[left]) < ATOL


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_resident_is_the_same(name: str) -> None:
    opened = model("gemma2-2b")
    tokens = ids(opened.config)
    a, b = (logits(name, opened, tokens, resident=r) for r in (False, True))
    assert gap(a, b) < ATOL


# ---- padding and decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_padding_and_batch_mates_change_nothing(name: str) -> None:
    opened = model("gemma2-2b")
    one = ids(opened.config, 1, 13)
    tokens = ids(opened.config, 4, 20)
    padding = np.zeros(tokens.shape, bool)
    for row, start in enumerate((0, 7, 3)):  # behind, in front, both
        tokens[row, start : start + 13] = one
        padding[row, start : start + 13] = True
    padding[3] = True
    want, got = logits(name, opened, one), logits(name, opened, tokens, padding)
    for row, start in enumerate((0, 7, 3)):
        assert gap(got[row, start : start + 13], want[0]) < ATOL


@pytest.mark.parametrize(("name", "arch"), [
    ("torch", "gemma-2b"), ("torch", "gemma2-9b"), ("jax", "gemma2-9b"), ("transformers", "gemma2-9b"),
    pytest.param("jax", "gemma-2b", marks=pytest.mark.slow),
])  # fmt: skip
def test_decoding_step_by_step_equals_prefill(name: str, arch: str, tmp_path: Path) -> None:
    """A left-padded batch of prompts, then single tokens past three windows."""
    opened = model(arch)
    source = official(opened, tmp_path) if name == "transformers" else opened
    tokens = ids(opened.config, 2, 16)
    padding = np.ones(tokens.shape, bool)
    padding[1, :2] = False
    with open_runner(name, source) as r:
        want = r.logits(tokens, padding)
        decoder = r.decoder(2, 16)
        steps = [decoder.step(tokens[:, :5], padding[:, :5])]
        steps += [decoder.step(tokens[:, t : t + 1]) for t in range(5, 16)]
        assert gap(np.concatenate(steps, 1)[padding], want[padding]) < ATOL
        few = r.decoder(2, 16).step(tokens[:, :5], padding[:, :5], last=2)
        assert few.shape[1] == 2
        assert gap(few, want[:, 3:5]) < ATOL
        with pytest.raises(UsageError, match="room for 16 positions, this step needs 17"):
            decoder.step(tokens[:, :1])
        with pytest.raises(UsageError, match="in front of the prompt only"):
            r.decoder(1).step([1, 2, 3], [True, True, False])
        with pytest.raises(UsageError, match="batch of 3, the step has 1"):
            r.decoder(3).step([1])


# ---- a device mesh ------------------------------------------------------------------------------------------------

MESH = """
import sys; sys.path.insert(0, {tests!r})
import jax, numpy as np
from configs import small
from memory import checkpoint, random_weights
from g2kit.verify.runners import open_runner
assert len(jax.devices()) == 8
for arch, mesh, decode in {cases!r}:
    opened = checkpoint(c := small(arch), {{n: w.astype("f4") * np.float32(.3) for n, w in random_weights(c, 1).items()}})
    tokens = np.random.default_rng(2).integers(0, 64, (4, 13))
    padding = np.ones(tokens.shape, bool); padding[1, 9:] = padding[2, :3] = False
    with open_runner("jax", opened) as one, open_runner("jax", opened, mesh=mesh) as many:
        a, b = one.logits(tokens, padding), many.logits(tokens, padding)
        worst = np.abs(a - b)[padding].max()
        d = many.decoder(2, 13) if decode else None
        for t in range(13 if decode else 0):
            worst = max(worst, np.abs(d.step(tokens[2:, t:t+1])[:, 0] - one.logits(tokens[2:])[:, t]).max())
        w = many._kept[0]
        parts = {{n.split(".")[-2][0]: len(set(map(str, x.sharding.devices_indices_map(x.shape).values())))
                 for n, x in w.items() if x.ndim > 1}}
        rows = many._table.addressable_shards[0].data.shape[0]
        batch = many._x.sharding.shard_shape(many._x.shape)[0]
    print(arch, mesh, worst, parts["q"], parts["k"], parts["g"], parts["d"], rows, batch, sep=";")
"""


def _mesh(cases: list[tuple[str, str, bool]]) -> list[list[str]]:
    code = MESH.format(tests=str(ROOT / "tests"), cases=cases)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split(";") for line in done.stdout.splitlines()]


def test_a_mesh_equals_one_device_and_is_divided() -> None:
    """2 key/value heads on 4 devices: every device has both; everything else is divided."""
    (row,) = _mesh([("gemma2-2b", "data=2,model=4", False)])
    assert float(row[2]) < ATOL
    q, k, gate, down, rows, batch = map(int, row[3:])
    assert (q, k, gate, down) == (4, 1, 4, 4)
    assert (rows, batch) == (64 // 4, 4 // 2)


@pytest.mark.slow
def test_every_mesh_equals_one_device() -> None:
    """Axes that do not divide the heads or the batch too; prefill and decoding."""
    meshes = ("data=2,model=4", "data=8", "model=8", "data=4,model=2", "data=1,model=3")
    for row in _mesh([(a, m, True) for a in sorted(ARCHITECTURES) for m in meshes]):
        assert float(row[2]) < ATOL, row


def test_mesh_errors() -> None:
    for text in ("", "data=2,model", "model=0", "rows=2", "data=2;model=4"):
        with pytest.raises(UsageError, match="not of the form data=2,model=4"):
            open_runner("jax", sample_dir(), mesh=text)
    with pytest.raises(
        ResourceError, match=r"needs 4096 devices, JAX has .*Fix: use a smaller mesh"
    ):
        open_runner("jax", sample_dir(), mesh="data=4096")


# ---- the guards can fail ------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[GemmaConfig], GemmaConfig]] = {
    "window off by one": lambda c: c.with_(sliding_window=5),
    "no window": lambda c: c.with_(sliding_window=1000),
    "query scale": lambda c: c.with_(query_pre_attn_scalar=c.query_pre_attn_scalar * 1.02),
    "no attention cap": lambda c: c.with_(attn_logit_softcapping=None),
    "final cap": lambda c: c.with_(final_logit_softcapping=31.0),
    "RoPE base": lambda c: c.with_(rope_theta=20000.0),
    "norm epsilon": lambda c: c.with_(rms_norm_eps=1e-2),
}


SLOW = {("jax", f) for f in FAULTS if f not in ("window off by one", "query scale")}


@pytest.mark.parametrize(("name", "fault"), [
    pytest.param(n, f, marks=[pytest.mark.slow] if (n, f) in SLOW else [])
    for n in ("torch", "jax") for f in FAULTS
])  # fmt: skip
def test_a_wrong_setting_in_one_runner_is_seen(name: str, fault: str) -> None:
    opened = model("gemma2-2b")
    tokens = ids(opened.config)
    want = logits({"torch": "jax", "jax": "torch"}[name], opened, tokens)
    got = logits(name, opened, tokens, config=FAULTS[fault](opened.config))
    assert gap(got, want) > 10 * ATOL
    if "window" in fault:
        assert gap(got[:, :4], want[:, :4]) < ATOL, "inside the window there is nothing to see"


def test_a_wrong_weight_is_seen_at_its_block() -> None:
    good, bad = model("gemma2-2b"), model("gemma2-2b")
    source: Any = bad.tensors[canonical.DOWN.format(i=1)].source
    source.array = source.array.copy()
    source.array[0, 0] *= 1.1
    tokens = ids(good.config)
    with open_runner("torch", good) as a, open_runner("jax", bad) as b:
        errors = [
            gap(x, y) / np.abs(x).max()
            for x, y in zip(a.hidden_states(tokens), b.hidden_states(tokens), strict=True)
        ]
    assert max(errors[:2]) < 64 * EPS < min(errors[2:])


# ---- the bundled sample, every runner -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_ids() -> np.ndarray:
    """200 tokens of English, more than three windows of the sample."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(sample_dir() / "tokenizer.model"))
    return np.array([[sp.bos_id(), *sp.encode(heldout_text())][:200]])


def test_the_sample_agrees_pairwise(text_ids: np.ndarray) -> None:
    found = {n: logits(n, sample_dir(), text_ids) for n in ("torch", "jax", "transformers")}
    for a in found.values():
        assert max(gap(a, b) for b in found.values()) < SAMPLE_ATOL


@pytest.mark.parametrize(
    "to",
    [
        "flax",
        "gguf",
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("maxtext", "torch", "keras")),
    ],
)
def test_other_formats_run_the_same(to: str, text_ids: np.ndarray, tmp_path: Path) -> None:
    """Read by rows or in blocks, whatever the container: the same logits, bit for bit where the format is lossless."""
    convert(sample_dir(), tmp_path / "out", to=to)
    want = logits("jax", sample_dir(), text_ids)
    got = logits("jax", tmp_path / "out", text_ids)
    if to == "maxtext":  # stores scaled bfloat16
        assert gap(got, want) < 1
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.llama
def test_llama_cpp_agrees(text_ids: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    convert(sample_dir(), tmp_path / "gguf", to="gguf", dtype="f32")
    tokens = np.concatenate((text_ids, text_ids[:, ::-1]))
    padding = np.ones(tokens.shape, bool)
    padding[0, 150:] = padding[1, :20] = False
    want = logits("torch", sample_dir(), tokens, padding)
    with open_runner("llama_cpp", tmp_path / "gguf") as r:
        got = r.logits(tokens, padding)
        assert gap(got[padding], want[padding]) < LLAMA_ATOL
        assert not got[~padding].any()
        decoder = r.decoder(1, 200)
        steps = [decoder.step(text_ids[:, :190])]
        steps += [decoder.step(text_ids[:, t : t + 1]) for t in range(190, 200)]
        whole = logits("jax", sample_dir(), text_ids)
        assert gap(np.concatenate(steps, 1), whole) < LLAMA_ATOL
        with pytest.raises(
            UsageError, match="llama_cpp runner does not give blocks; it gives logits, decode"
        ):
            r.hidden_states([1])
    with open_checkpoint(sample_dir()) as c:
        wrong = logits("torch", c, text_ids, config=c.config.with_(sliding_window=63))
    assert gap(wrong, whole) > 10 * LLAMA_ATOL
    with pytest.raises(FormatError, match=r"llama.cpp reads GGUF, this is safetensors.*--to gguf"):
        open_runner("llama_cpp", sample_dir())


# ---- the registry and bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "jax", "transformers"])
def test_the_table_says_what_the_classes_say(name: str) -> None:
    info, cls = RUNNERS[name], runner_class(name)
    assert cls.name == name
    assert set(info.gives) == cls.gives <= set(ABILITIES)
    assert info.dtypes == cls.dtypes


@pytest.mark.llama
def test_the_table_says_what_the_llama_class_says() -> None:
    cls = runner_class("llama_cpp")
    assert (set(RUNNERS["llama_cpp"].gives), RUNNERS["llama_cpp"].dtypes) == (cls.gives, cls.dtypes)


@pytest.mark.parametrize(("name", "package"), [
    ("torch", "torch"), ("jax", "jax"), ("transformers", "transformers"), ("llama_cpp", "llama_cpp"),
])  # fmt: skip
def test_a_missing_package_is_one_line_that_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [
        m for m in sys.modules if m.startswith("g2kit.verify.runners.") and m.endswith("_runner")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError) as e:
        open_runner(name, sample_dir())
    text = str(e.value)
    assert "\n" not in text
    assert f"the {name} runner needs {RUNNERS[name].package}" in text
    assert text.endswith(f"Fix: {RUNNERS[name].install}")


def test_importing_the_runners_imports_no_framework() -> None:
    code = "import g2kit.verify.runners, sys; print(*{'torch', 'jax', 'transformers', 'llama_cpp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_jax_runner_shares_no_forward_pass_with_torch() -> None:
    """An oracle must not contain what it tests."""
    code = (
        "import g2kit.verify.runners.jax_runner, sys; "
        "print(*[m for m in sys.modules if m.split('.')[0] == 'torch' or m.endswith('torch_gemma')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_wrong_names_and_options() -> None:
    for options, message in {
        ("keras",): "no runner is called 'keras'.* torch, jax, transformers, llama_cpp",
        ("transformers", "float64"): "does not compute in float64.*float32 or bfloat16",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_runner(options[0], sample_dir(), dtype=options[1] if options[1:] else None)
    with pytest.raises(UsageError, match="torch runner has no option 'mesh'"):
        open_runner("torch", sample_dir(), mesh="data=2")
    with pytest.raises(UsageError, match="takes no config"):
        open_runner("transformers", sample_dir(), config="gemma2-2b")
    with pytest.raises(UsageError, match="none of cpu, cuda"):
        open_runner("torch", sample_dir(), device="abacus")
    with pytest.raises(ResourceError, match=r"'cuda:999' is not there.*use cpu"):
        open_runner("torch", sample_dir(), device="cuda:999")
    with pytest.raises(ResourceError, match="no device of platform 'abacus'"):
        open_runner("jax", sample_dir(), device="abacus")


def test_a_config_of_other_sizes_is_refused() -> None:
    opened = model("gemma2-2b")
    with pytest.raises(
        ConfigError, match=r"other tensors than the opened checkpoint; model\.embed_tokens"
    ):
        open_runner("torch", opened, config=opened.config.with_(vocab_size=65))


@pytest.mark.parametrize(("tokens", "padding", "message"), [
    ([1, 64], None, "token id 64 at sequence 0, position 1 is outside the vocabulary of 64"),
    ([[1, 2], [3, -1]], None, "token id -1 at sequence 1, position 1"),
    ([1.5], None, "must be whole numbers of shape"),
    ([], None, "must be whole numbers of shape"),
    ([[[1]]], None, r"found int64 \(1, 1, 1\)"),
    ([1, 2], [1, 1], "padding must be bool of shape"),
    ([1, 2], [True], "padding must be bool of shape"),
    ([1, 2, 3], [True, False, True], "sequence 0 has no real token, or padding between"),
    ([[1, 2], [1, 2]], [[True, True], [False, False]], "sequence 1 has no real token"),
])  # fmt: skip
def test_bad_ids_are_named(tokens: Any, padding: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_batch(tokens, padding, 64)


def test_calls_out_of_order_say_so() -> None:
    opened = model("gemma2-2b")
    for name in ("torch", "jax"):
        with open_runner(name, opened) as r:
            _out_of_order(r)


def _out_of_order(r: Runner) -> None:
    with pytest.raises(UsageError, match="call start"):
        r.advance()
    r.start([1, 2])
    with pytest.raises(UsageError, match="no block has run"):
        r.replay(np.zeros((1, 2, 24)))
    with pytest.raises(UsageError, match="0 of 3 blocks have run"):
        r.final_hidden()
    r.finish()
    with pytest.raises(UsageError, match="all 3 blocks have run"):
        r.advance()


def test_what_transformers_cannot_load_is_an_error(tmp_path: Path) -> None:
    opened = model("gemma2-2b")
    good = official(opened, tmp_path / "good")
    with pytest.raises(FileIOError, match=r"directory with config.json.*g2conv convert"):
        open_runner("transformers", good / "model.safetensors")
    from safetensors.numpy import load_file, save_file

    from g2kit.verify.runners import transformers_runner

    weights = load_file(good / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, good / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"layers\.1\.mlp\.up_proj.*random numbers"):
        transformers_runner._load(good, transformers_runner.torch.float32)
    (good / "model.safetensors").write_bytes(b"no")
    with pytest.raises(FormatError, match="cannot load it"):
        transformers_runner._load(good, transformers_runner.torch.float32)


def test_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from g2kit.formats.errors import ExtraTensorError

    good = official(model("gemma2-2b"), tmp_path / "good")
    weights = load_file(good / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    save_file(weights, good / "model.safetensors", {"format": "pt"})
    open_runner("torch", good).close()
    weights["lm_head.weight"][63, 1] += 1
    save_file(weights, good / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExtraTensorError, match="output head differs from the embedding"):
        open_runner("torch", good)
