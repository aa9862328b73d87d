"""The rounding loop against GPTQ as its paper writes it: the same codes, whatever the sizes, the scheme and the order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from g2kit.quant.columns import BLOCK, ldlq_columns
from g2kit.quant.factor import Factor, factor
from g2kit.quant.gptq import UniformGrid
from g2kit.quant.grid import plain_grid, quantize_to, search_grid
from g2kit.quant.scheme import Scheme


def moments(n: int, g: torch.Generator, rank: int) -> Tensor:
    """Second moments of correlated inputs of different sizes, float64 ``[n, n]``; positive definite."""
    x = torch.randn(rank, n, generator=g, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=g, dtype=torch.float64)
    x *= 0.05 + torch.rand(n, generator=g, dtype=torch.float64) ** 4
    h = x.T @ x / rank
    return h + 1e-3 * h.diagonal().mean() * torch.eye(n, dtype=torch.float64)


def textbook(
    weight: Tensor, h: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, order: Tensor
) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with blocks of one column: the inverse's Cholesky factor, errors pushed forward."""
    n, width = weight.shape[1], scheme.width(weight.shape[1])
    left = weight[:, order].clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for k in range(n):
        column = int(order[k])
        s, z = (x[:, column // width].double() for x in (scales, zeros))
        q = torch.round(left[:, k] / s + z).clamp(0, scheme.levels - 1)
        codes[:, column] = q.to(torch.uint8)
        error = (left[:, k] - (q - z) * s) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
    return codes


def both(
    seed: int, rows: int, scheme: Scheme, groups: int, act_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the textbook, of the loop, and of plain rounding."""
    g = torch.Generator().manual_seed(seed)
    n = groups * (37 if scheme.group_size == -1 else scheme.group_size)
    weight = torch.randn(rows, n, generator=g)
    weight[:, :: max(1, n // 5)] *= 5  # outliers, so that some are clipped
    h = moments(n, g, 2 * n)
    scales, zeros = plain_grid(weight, scheme)
    scales = scales * 0.8
    f = factor(h, act_order=act_order, ladder=(0.0,), dtypes=(torch.float64,))
    assert f is not None
    grid = UniformGrid(n, scales, zeros, scheme, torch.float64)
    middle = torch.full_like(scales, scheme.middle) if zeros is None else zeros
    found = ldlq_columns(weight.double(), grid, f)
    want = textbook(weight.double(), h, scales, middle, scheme, f.order)
    return want, found, quantize_to(weight, scales, zeros, scheme)


schemes = st.builds(
    Scheme, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, -1]), st.booleans()
)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), scheme=schemes, groups=st.integers(1, 9),
    act_order=st.booleans(),
)  # fmt: skip
def test_codes_are_the_textbooks(
    seed: int, rows: int, scheme: Scheme, groups: int, act_order: bool
) -> None:
    want, found, _ = both(seed, rows, scheme, groups, act_order)
    assert torch.equal(found, want)


def test_several_blocks_and_what_they_correct() -> None:
    want, found, nearest = both(7, 16, Scheme(3, 64), 7, True)
    assert want.shape[1] > 3 * BLOCK
    assert torch.equal(found, want)
    # or else nothing was tested
    assert float((want != nearest).float().mean()) > 0.2


@pytest.mark.parametrize("broken", ["order", "unit", "transposed"])
def test_a_wrong_factor_gives_other_codes(broken: str) -> None:
    """The comparison above notices what it is there for."""
    g = torch.Generator().manual_seed(3)
    weight, h, scheme = torch.randn(8, 160, generator=g), moments(160, g, 320), Scheme(4, 32)
    scales, _ = plain_grid(weight, scheme)
    f = factor(h, ladder=(0.0,), dtypes=(torch.float64,))
    assert f is not None
    wrong: dict[str, Factor] = {
        "order": replace(f, order=f.order.flip(0)),
        "unit": replace(f, unit=torch.eye(160, dtype=torch.float64)),
        "transposed": replace(f, unit=f.unit.t().contiguous()),
    }
    grid = UniformGrid(160, scales, None, scheme, torch.float64)
    want = textbook(weight.double(), h, scales, torch.full_like(scales, 8), scheme, f.order)
    assert not torch.equal(ldlq_columns(weight.double(), grid, wrong[broken]), want)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4, 8]), low=st.floats(-2, 1), high=st.floats(0, 2),
    weighted=st.booleans(),
)  # fmt: skip
def test_zeros_fit_every_format(
    seed: int, bits: int, low: float, high: float, weighted: bool
) -> None:
    """From 1 on, for GPTQ; and no weight of a group on one side of zero is clipped for that on the plain grid."""
    g = torch.Generator().manual_seed(seed)
    weight = low + (high - low) * torch.rand(5, 64, generator=g)
    scheme = Scheme(bits, 32, False)
    scales, zeros = plain_grid(weight, scheme)
    assert zeros is not None
    assert 1 <= int(zeros.min()) <= int(zeros.max()) < scheme.levels
    codes = quantize_to(weight, scales, zeros, scheme).view(5, 2, 32).float()
    back = (codes - zeros.float()[..., None]) * scales[..., None]
    w = weight.view(5, 2, 32)
    # a step, and what rounding the scale to bfloat16 does to the largest
    assert bool(((back - w).abs() <= 1.02 * scales[..., None] + w.abs() / 128).all())
    importance = torch.rand(64, generator=g) if weighted else None
    _, zeros = search_grid(weight, scheme, importance)
    assert zeros is not None
    assert 1 <= int(zeros.min()) <= int(zeros.max()) < scheme.levels
