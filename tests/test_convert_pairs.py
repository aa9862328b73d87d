"""Every pair of layouts, over random models: the same weights come out, bit for bit, or the loss is counted."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import ARCHITECTURES, random_configs, small
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import checkpoint, random_weights

from g2kit.convert import convert, fingerprint, open_checkpoint
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.plan import Options
from g2kit.formats.dtypes import BF16, F16, F32
from g2kit.model import canonical
from g2kit.model.config import GemmaConfig

# framework, layout, gating orientation
LOSSLESS = (
    ("flax", "flat", "df"), ("flax", "flat", "fd"), ("flax", "nested", None), ("flax", "stacked", "fd"),
    ("flax", "kauldron", None), ("flax", "wrapped", None), ("torch", "gemma_pytorch", None),
    ("torch", "huggingface-bin", None), ("safetensors", "huggingface", None), ("gguf", "gguf", None),
    ("keras", "keras", None),
)  # fmt: skip
MAXTEXT = (("maxtext", "scanned", None), ("maxtext", "unscanned", None))
Target = tuple[str, str, str | None]


@pytest.fixture
def tmp() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def fits(target: Target, config: GemmaConfig) -> bool:
    """Whether the layout suits the model: stacked layers come in pairs, GGUF and Keras have rules of their own."""
    framework, layout, _ = target
    pairs = config.family == "gemma2" and (layout == "stacked" or framework == "maxtext")
    if pairs and config.num_hidden_layers % 2:
        return False
    if framework == "gguf":
        return config.query_pre_attn_scalar == config.head_dim  # else refused: tested elsewhere
    return True


def write(source: Any, dst: Path, target: Target, **options: Any) -> dict[str, Any]:
    framework, layout, gating = target
    return convert_checkpoint(source, dst, Options(framework, layout, gating=gating, **options))


def round_trip(config: GemmaConfig, seed: int, first: Target, second: Target, root: Path) -> None:
    """Memory -> first -> second -> first: fingerprints equal all the way, and the weights are those we put in."""
    weights = random_weights(config, seed)
    # both orientations fit where d == f: say which one it is, as a user must
    df = {"gating": None}
    if config.hidden_size == config.intermediate_size:
        df = {"gating": "fd"}
        first, second = (
            (f, layout, "fd") if f == "flax" else (f, layout, g) for f, layout, g in (first, second)
        )
    made = write(checkpoint(config, weights), root / "a", first)
    want = made["source"]["fingerprint"]
    assert made["output"]["fingerprint"] == want
    there = convert(
        root / "a",
        root / "b",
        to=second[0],
        layout=second[1],
        config=config,
        gating=second[2] or df["gating"],
    )
    assert there["source"]["fingerprint"] == there["output"]["fingerprint"] == want
    back = convert(
        root / "b",
        root / "c",
        to=first[0],
        layout=first[1],
        config=config,
        gating=first[2] or df["gating"],
    )
    assert back["output"]["fingerprint"] == want
    with open_checkpoint(root / "c", config=config, gating=df["gating"]) as c:
        for name, value in weights.items():
            got = c.tensors[name].read()
            np.testing.assert_array_equal(got.view(np.uint16), value.view(np.uint16), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    random_configs(), st.sampled_from(LOSSLESS), st.sampled_from(LOSSLESS), st.integers(0, 2**31)
)
def test_random_models_and_pairs(
    config: GemmaConfig, first: Target, second: Target, seed: int
) -> None:
    if not (fits(first, config) and fits(second, config)):
        config = small("gemma2-2b", layers=2)
    with tempfile.TemporaryDirectory() as root:
        round_trip(config, seed, first, second, Path(root))


def _tour(n: int) -> list[int]:
    """A walk that takes every ordered pair of n things once (an Eulerian circuit of the complete digraph)."""
    edges = {a: [b for b in range(n) if b != a] for a in range(n)}
    stack, walk = [0], []
    while stack:
        if edges[stack[-1]]:
            stack.append(edges[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def test_the_tour_takes_every_pair() -> None:
    walk = _tour(5)
    assert sorted(itertools.pairwise(walk)) == sorted(itertools.permutations(range(5), 2))


@pytest.mark.parametrize(
    "arch",
    [
        "gemma2-2b",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a != "gemma2-2b"),
    ],
)
def test_every_ordered_pair(arch: str, tmp: Path) -> None:
    """One walk through all ordered pairs of lossless layouts; the fingerprint never changes."""
    config = small(arch, d=8, f=12, vocab=32)
    targets = [t for t in LOSSLESS if fits(t, config)]
    walk = _tour(len(targets))
    made = write(checkpoint(config, random_weights(config, 11)), tmp / "0", targets[walk[0]])
    for step, k in enumerate(walk[1:], 1):
        framework, layout, gating = targets[k]
        report = convert(
            tmp / f"{step - 1}",
            tmp / f"{step}",
            to=framework,
            layout=layout,
            config=config,
            gating=gating,
        )
        assert report["output"]["fingerprint"] == made["source"]["fingerprint"], targets[k]
        shutil.rmtree(tmp / f"{step - 1}")


@settings(max_examples=12, deadline=None)
@given(random_configs(), st.sampled_from(MAXTEXT), st.integers(0, 2**31))
def test_maxtext_counts_exactly_what_changes(
    config: GemmaConfig, target: Target, seed: int
) -> None:
    if not fits(target, config):
        config = config.with_(num_hidden_layers=2)
    weights = random_weights(config, seed)
    with tempfile.TemporaryDirectory() as root:
        report = write(checkpoint(config, weights), Path(root) / "m", target)
        with open_checkpoint(Path(root) / "m", config=config) as back:
            differ = {
                n: int(np.count_nonzero(t.read().view(np.uint16) != weights[n].view(np.uint16)))
                for n, t in back.tensors.items()
            }
    counted = sum(step["changed"] for step in report["lossy"])
    assert counted == sum(differ.values())
    assert {s["step"] for s in report["lossy"]} >= {"plus_one"}


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
def test_dtype_changes_are_counted(to: str, tmp: Path) -> None:
    config = small("gemma2-9b")
    weights = random_weights(config, 3, F32)
    wanted = {"f16": F16, "bf16": BF16, "f32": F32}[to]
    report = write(
        checkpoint(config, weights), tmp / "o", ("safetensors", "huggingface", None), dtype=to
    )
    changed = sum(
        int(np.count_nonzero(w.astype(wanted).astype(F32) != w)) for w in weights.values()
    )
    assert sum(s["changed"] for s in report["lossy"]) == changed
    assert (changed == 0) == (to == "f32")
    same = report["source"]["fingerprint"] == report["output"]["fingerprint"]
    assert same == (to == "f32")


def test_gguf_norms_in_f32_are_counted(tmp: Path) -> None:
    config = small("gemma2-2b")
    weights = random_weights(config, 4, F32)
    report = write(checkpoint(config, weights), tmp / "o", ("gguf", "gguf", None))
    with open_checkpoint(tmp / "o", config=config) as back:
        differ = sum(
            int(np.count_nonzero(t.read().view(np.uint32) != weights[n].view(np.uint32)))
            for n, t in back.tensors.items()
        )
    assert sum(s["changed"] for s in report["lossy"]) == differ > 0


def test_tensors_of_several_dtypes_stay_as_they_are(tmp: Path) -> None:
    """Fine-tunes keep norms in float32 beside bfloat16 matrices."""
    config = small("gemma2-2b")
    weights = random_weights(config, 5)
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = weights[name].astype(F32) + np.float32(1e-4)
    first = write(checkpoint(config, weights), tmp / "a", ("flax", "nested", None))
    again = convert(tmp / "a", tmp / "b", to="torch")
    assert again["output"]["fingerprint"] == first["source"]["fingerprint"]
    with open_checkpoint(tmp / "b", config=config) as c:
        assert c.tensors[canonical.FINAL_NORM].dtype == F32
        assert c.tensors[canonical.EMBED].dtype == BF16


@pytest.mark.parametrize("target", LOSSLESS)
def test_the_same_conversion_gives_the_same_bytes(target: Target, tmp: Path) -> None:
    """Byte for byte, whatever the destination is called; Orbax, HDF5 and zip included."""
    config = small("gemma2-2b")
    weights = random_weights(config, 6)
    for name in ("one", "two"):
        write(checkpoint(config, weights), tmp / name, target)
    files = [
        {f.relative_to(tmp / n): f.read_bytes() for f in (tmp / n).rglob("*") if f.is_file()}
        for n in ("one", "two")
    ]
    assert files[0] == files[1]
    assert fingerprint(tmp / "one", config=config) == fingerprint(tmp / "two", config=config)


@pytest.mark.parametrize("norms", ["bf16-exact", "not exact", "some"])
@pytest.mark.parametrize("target", [("gguf", "gguf", None), MAXTEXT[0]])
@pytest.mark.parametrize("to", ["keep", "bf16", "f16", "f32"])
def test_wide_norms_beside_narrow_matrices(norms: str, target: Target, to: str, tmp: Path) -> None:
    """Upcast models and fine-tunes: the reader narrows a stored norm only where that loses nothing."""
    config = small("gemma2-2b")
    weights = random_weights(config, 9)
    for k, name in enumerate(n for n in weights if n.endswith("norm.weight")):
        exact = norms == "bf16-exact" or (norms == "some" and k % 2)
        weights[name] = weights[name].astype(F32) + np.float32(0 if exact else 1e-5)
    report = write(checkpoint(config, weights), tmp / "o", target, dtype=to)
    assert report["checked_tensors"] == len(weights)
    assert fingerprint(tmp / "o", config=config) == report["output"]["fingerprint"]


def test_rounding_while_reading_is_counted(tmp: Path) -> None:
    """The official MaxText file's queries were scaled in bfloat16: dividing the scale out rounds some again."""
    data = Path(__file__).parent / "data"
    config = data / "hf_sharded" / "config.json"
    report = convert(
        data / "maxtext_scan", tmp / "u", to="maxtext", layout="unscanned", config=config
    )
    counted = {s["step"]: s["changed"] for s in report["lossy"] if s["step"].startswith("reading")}
    with open_checkpoint(data / "maxtext_scan", config=config) as c:
        for t in c.tensors.values():
            t.read()
        assert counted == {"reading query_scale": sum(t.rounded for t in c.tensors.values())}
    assert counted["reading query_scale"] > 0
