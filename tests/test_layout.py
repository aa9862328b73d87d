"""The mapping language and every table: bijective, exhaustive, equal to plain einsum axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from configs import random_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert.layout import Layout, Reorder, Rule, Variant, transposed
from g2kit.convert.layouts import VARIANTS
from g2kit.model import canonical
from g2kit.model.config import GemmaConfig

SMALL = GemmaConfig("gemma2", 4, 48, 96, 4, 2, 16, 128, 16.0, 50.0, 30.0, 8)


def _usable(variant: Variant, config: GemmaConfig) -> bool:
    fused = variant.options.get("fused", False)
    heads_equal = config.num_attention_heads == config.num_key_value_heads
    return (heads_equal or not fused) and (
        config.num_hidden_layers % variant.periods.get(config.family, 1) == 0
    )


@settings(max_examples=12, deadline=None)
@given(random_configs(), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_every_table_is_a_bijection(config: GemmaConfig, padding: int, seed: int) -> None:
    """Placing every canonical tensor fills every foreign element once; reading gives the same bits back."""
    rng = np.random.default_rng(seed)
    for variant in VARIANTS:
        if not _usable(variant, config):
            continue
        layout = Layout(variant, config, config.vocab_size + padding)
        values = {
            n: rng.integers(1, 65536, t.shape, dtype=np.uint16) for n, t in layout.tensors.items()
        }
        files = {n: np.zeros(row.shape, np.uint16) for n, row in layout.rows.items()}
        for name, (row, p) in layout.placements.items():
            box = tuple(slice(a, a + n) for a, n in zip(p.start, p.size, strict=True))
            assert not files[row.name][box].any(), "two tensors claim one element"
            files[row.name][box] = p.reorder.to_foreign(values[name]).reshape(p.size)
        assert all(f.all() for f in files.values()), "an element is claimed by no tensor"
        for name, (row, p) in layout.placements.items():
            back = p.reorder.to_canonical(np.ascontiguousarray(files[row.name][p.index]))
            np.testing.assert_array_equal(back, values[name])


EINSUM = {  # foreign name -> (canonical name, axes of the foreign part, axes of the canonical matrix)
    "transformer/layer_1/attn/q_einsum/w": (canonical.Q, None, "ndh->nhd"),
    "transformer/layer_1/attn/attn_vec_einsum/w": (canonical.O, None, "nhd->dnh"),
    "transformer/layer_1/mlp/linear/w": (canonical.DOWN, None, "fd->df"),
    "transformer/layer_1/mlp/gating_einsum/w": (canonical.UP, 1, "df->fd"),
    "transformer/layer_1/attn/kv_einsum/w": (canonical.V, 1, "kdh->khd"),
}


@pytest.mark.parametrize("name", EINSUM)
def test_flax_tables_agree_with_einsum(name: str) -> None:
    target, part, axes = EINSUM[name]
    variant = next(v for v in VARIANTS if v.name == "flat" and not any(v.options.values()))
    layout = Layout(variant, SMALL)
    row, placement = layout.placements[target.format(i=1)]
    assert row.name == name
    foreign = np.random.default_rng(0).standard_normal(row.shape)
    box = foreign if part is None else foreign[part]
    want = np.einsum(axes, box).reshape(placement.reorder.canonical_shape)
    got = placement.reorder.to_canonical(np.ascontiguousarray(foreign[placement.index]))
    np.testing.assert_array_equal(got, want)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_transposed_equals_numpy(shape: list[int], random: object) -> None:
    x = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    got = transposed(x, tuple(order))
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, x.transpose(order))


def test_tiles_cover_ragged_edges() -> None:
    for shape in itertools.product((1, 127, 129, 300), (255, 257)):
        x = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
        np.testing.assert_array_equal(transposed(x, (1, 0)), x.T)


def test_a_table_that_claims_a_name_twice_is_refused() -> None:
    double = Rule("a", (canonical.EMBED,), "vocab d -> vocab d")
    with pytest.raises(ValueError, match="a is claimed by two rules"):
        Layout(Variant("bad", "x", {"gemma2": (double, double)}), SMALL)


def test_a_table_that_forgets_a_tensor_is_refused() -> None:
    only = Rule("a", (canonical.EMBED,), "vocab d -> vocab d")
    with pytest.raises(ValueError, match="not mapped exactly once"):
        Layout(Variant("bad", "x", {"gemma2": (only,)}), SMALL)


def test_wrong_axes_fail_before_bytes_move() -> None:
    rules = (Rule("a", (canonical.EMBED,), "d vocab -> d vocab"),)
    with pytest.raises(ValueError, match="canonical shape is"):
        Layout(Variant("bad", "x", {"gemma2": rules}), SMALL)


def test_identity_is_recognised() -> None:
    assert Reorder((2, 3), (0, 1), (6,), (2, 3)).is_identity
    assert not Reorder((2, 3), (1, 0), (3, 2), (2, 3)).is_identity
