"""One weight rounded in every way asked for; the one with the least error on held-out inputs is kept.

Nothing falls back silently: the record says what was tried, what each lost, and why something was not tried.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ggml
from . import gptq as rounding
from .scheme import Codes, Scheme

Target = Scheme | str  # a uniform scheme, or the name of a ggml block type
Rounded = Codes | ggml.Blocks
METHODS = ("gptq", "rtn")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of a weight's inputs; shared by the layers of a stage.

    Attributes:
        hessian: second moments ``[in_features, in_features]``.
        held: held-out inputs ``[rows, in_features]``.
        factor: of the Hessian, or None where it has none.
        tokens: that the Hessian was gathered from.
    """

    hessian: Tensor
    held: Tensor
    factor: rounding.Factor | None
    tokens: int

    @property
    def dead(self) -> int:
        """Columns that never saw an input."""
        return int((self.hessian.diagonal() == 0).sum())


def inputs_of(hessian: Tensor, held: Tensor, tokens: int, *, factored: bool = True) -> Inputs:
    """Factor a Hessian, if anything will use that."""
    return Inputs(hessian, held, rounding.factor(hessian) if factored else None, tokens)


@dataclass(frozen=True, eq=False)
class Choice:
    """A rounded weight and how it came about.

    Attributes:
        value: the weight.
        record: JSON values, see :func:`choose`.
        seconds: spent.
    """

    value: Rounded
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def choose(weight: Tensor, target: Target, inputs: Inputs, method: str = "gptq") -> Choice:
    """Round a weight.

    Args:
        weight: float32 ``[out_features, in_features]``.
        target: what to.
        inputs: of this weight.
        method: ``gptq`` tries both, ``rtn`` only that.

    Returns:
        The choice. Its record has ``method``, ``scheme``, ``held_error`` (method -> error of the output on held-out inputs
        relative to the output), ``error`` (the chosen one's), ``weight_error`` (relative to the weight), ``clipped`` (share
        of weights beyond their group's range), ``damp`` and ``factored_in`` (what the factorization took), ``dead_columns``
        and ``fallbacks`` (sentences).
    """
    began = time.monotonic()
    fallbacks: list[str] = []
    tried: dict[str, Rounded] = {"rtn": _rtn(weight, target, inputs)}
    f = inputs.factor
    if method == "gptq":
        if f is None:
            fallbacks.append(
                "the Hessian could not be factored at any damping, in float64 either: rounded to nearest"
            )
        else:
            if f.damp > rounding.DAMP_LADDER[0] or f.dtype != torch.float32:
                fallbacks.append(f"the Hessian needed {f.damp:.0%} damping in {_name(f.dtype)}")
            tried["gptq"] = _gptq(weight, target, inputs, f, tried["rtn"])
    output = inputs.held @ weight.T
    size = float(output.double().square().sum()) or 1.0
    errors = {n: _error(weight, v, inputs.held) / size for n, v in tried.items()}
    # a tie, as without held-out inputs, goes to the method asked for
    best = min(reversed(errors), key=lambda n: errors[n])
    if method == "gptq" and f is not None and best != "gptq":
        fallbacks.append("rounding to nearest loses less on held-out inputs than GPTQ")
    value = tried[best]
    back = value.dequantize()
    record = {
        "method": best,
        "scheme": str(target),
        "held_error": errors,
        "error": errors[best],
        "weight_error": float((weight - back).norm() / weight.norm().clamp_min(1e-30)),
        "clipped": _clipped(weight, value, back),
        "damp": None if f is None else f.damp,
        "factored_in": None if f is None else _name(f.dtype),
        "dead_columns": inputs.dead,
        "fallbacks": fallbacks,
    }
    return Choice(value, record, time.monotonic() - began)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rtn(weight: Tensor, target: Target, inputs: Inputs) -> Rounded:
    diagonal = inputs.hessian.diagonal()
    if isinstance(target, str):
        return ggml.encode(weight, target, importance=diagonal)
    return rounding.rtn(weight, target, diagonal if bool((diagonal > 0).any()) else None)


def _gptq(
    weight: Tensor, target: Target, inputs: Inputs, f: rounding.Factor, nearest: Rounded
) -> Rounded:
    if isinstance(target, str):
        return ggml.encode(weight, target, hessian=inputs.hessian, factor=f)
    assert isinstance(nearest, Codes)
    grid = (nearest.scales, nearest.zeros)  # the search is half of the work
    return rounding.gptq(weight, inputs.hessian, target, f, grid=grid)


def _error(weight: Tensor, value: Rounded, held: Tensor) -> float:
    """Squared error of the outputs."""
    return float((held @ (weight - value.dequantize()).T).double().square().sum())


def _clipped(weight: Tensor, value: Rounded, back: Tensor) -> float | None:
    """Share of weights further from their value than half a step, at an end of the range; None for block types."""
    if not isinstance(value, Codes):
        return None
    out, groups = value.scales.shape
    ends = (value.codes == 0) | (value.codes == value.scheme.levels - 1)
    step = value.scales.abs().view(out, groups, 1)
    far = (weight - back).abs().view(out, groups, -1) > 0.5 * step
    return float((ends & far.view(weight.shape)).float().mean())


def summary(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every fallback with the weight's name, in order."""
    return [f"{n}: {text}" for n, r in records.items() for text in r.get("fallbacks", ())]
