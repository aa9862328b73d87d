"""The benchmark's peers are what they claim to be: GPTQ as in the paper, run block after block."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2kit.convert.open import open_checkpoint
from g2kit.model import canonical
from g2kit.model import torch_gemma as tg
from g2kit.quant.gptq import factor, ldlq
from g2kit.quant.grid import plain_grid
from g2kit.quant.scheme import Scheme

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "hf_sharded"


@pytest.fixture(scope="module")
def textbook() -> Any:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import textbook_gptq
    finally:
        sys.path.pop(0)
    return textbook_gptq


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32)])
def test_it_rounds_as_ldlq_does_on_the_same_grid(
    textbook: Any, bits: int, group: int, symmetric: bool
) -> None:
    torch.manual_seed(bits)
    w = torch.randn(24, 192)
    x = torch.randn(600, 192) @ torch.randn(192, 192) * torch.rand(192).square()
    h = (x.T @ x / len(x)).double()
    scheme = Scheme(bits, group, symmetric)
    scales, zeros = plain_grid(w, scheme)
    f = factor(h, ladder=(0.01,))
    assert f is not None
    assert f.dtype == torch.float32
    ours = ldlq(w, scales, zeros, scheme, f).dequantize()
    theirs = textbook.gptq(w, h, bits, group, symmetric)
    # float32 against float64: a column near the middle of two codes may go either way, and then others too
    assert float((ours == theirs).float().mean()) > 0.97

    def loss(q: torch.Tensor) -> float:
        e = (w - q).double()
        return float(((e @ h) * e).sum())

    assert loss(ours) == pytest.approx(loss(theirs), rel=0.02)
    assert loss(theirs) < 0.8 * loss(textbook.rtn(w, bits, group, symmetric))


def test_a_model_is_rounded_on_what_rounded_blocks_give(textbook: Any) -> None:
    with open_checkpoint(DATA) as checkpoint:
        config = checkpoint.config
        weights = {
            n: torch.from_numpy(t.read().astype(np.float32)) for n, t in checkpoint.tensors.items()
        }
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 500, (12, 20)))
    seen: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}

    for propagate, moments in seen.items():

        def rounder(n: str, w: torch.Tensor, h: torch.Tensor, m: Any = moments) -> torch.Tensor:
            m[n] = h
            return textbook.gptq(w, h, 3, 32)

        out = textbook.quantize(weights, config, ids, rounder, propagate=propagate)
        assert set(moments) == set(canonical.linears(weights))
        assert all((out[n] != weights[n]).any() for n in moments)
        assert all(out[n] is weights[n] for n in weights.keys() - moments.keys())
    first, last = canonical.Q.format(i=0), canonical.Q.format(i=3)
    assert torch.equal(seen[True][first], seen[False][first])
    assert not torch.allclose(seen[True][last], seen[False][last])
    plain = textbook.quantize(weights, config, ids, lambda n, w, h: w)
    with torch.no_grad():
        assert torch.equal(tg.forward(ids, plain, config), tg.forward(ids, weights, config))
