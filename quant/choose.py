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
from .factor import damped
from .mismatch import correction, share
from .scheme import Codes, Scheme

Target = Scheme | str  # a uniform scheme, or the name of a ggml block type
Rounded = Codes | ggml.Blocks
METHODS = ("gptq", "gptq+", "rtn")
_ROWS = 512  # held-out inputs at a time


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of a weight's inputs; shared by the layers of a stage.

    Attributes:
        hessian: second moments ``[in_features, in_features]``.
        held: held-out inputs ``[rows, in_features]``.
        factor: of the Hessian, or None where it has none.
        tokens: that the Hessian was gathered from.
        cross: of :mod:`.mismatch` ``[in_features, in_features]``, or None.
        original: the original model's held-out inputs, or None: errors are then those against ``held``.
    """

    hessian: Tensor
    held: Tensor
    factor: rounding.Factor | None
    tokens: int
    cross: Tensor | None = None
    original: Tensor | None = None

    @property
    def dead(self) -> int:
        """Columns that never saw an input."""
        return int((self.hessian.diagonal() == 0).sum())


def inputs_of(
    hessian: Tensor, held: Tensor, tokens: int, *, factored: bool = True,
    cross: Tensor | None = None, original: Tensor | None = None,
) -> Inputs:  # fmt: skip
    """Factor a Hessian, if anything will use that."""
    f = rounding.factor(hessian) if factored else None
    return Inputs(hessian, held, f, tokens, cross, original)


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
        method: ``rtn`` tries only that, ``gptq`` both, ``gptq+`` also GPTQ of the weight corrected for its inputs' errors
            (:mod:`.mismatch`; needs ``inputs.cross``).

    Returns:
        The choice. Its record has ``method``, ``scheme``, ``held_error`` (method -> error of the output on held-out inputs
        relative to the output; with ``inputs.original`` the original's output), ``error`` (the chosen one's), ``strength`` (share
        of the correction, of gptq+), ``weight_error`` (relative to the weight), ``clipped`` (share
        of weights beyond their group's range), ``damp`` and ``factored_in`` (what the factorization took), ``dead_columns``
        and ``fallbacks`` (sentences).
    """
    began = time.monotonic()
    fallbacks: list[str] = []
    tried: dict[str, Rounded] = {"rtn": _rtn(weight, target, inputs)}
    f = inputs.factor
    strength = None
    if method != "rtn":
        if f is None:
            fallbacks.append(
                "the Hessian could not be factored at any damping, in float64 either: rounded to nearest"
            )
        else:
            if f.damp > rounding.DAMP_LADDER[0] or f.dtype != torch.float32:
                fallbacks.append(f"the Hessian needed {f.damp:.0%} damping in {_name(f.dtype)}")
            tried["gptq"] = _gptq(weight, target, inputs, f, tried["rtn"])
        if method == "gptq+" and f is not None:
            strength, moved = _corrected(weight, inputs, f)
            if strength:
                tried["gptq+"] = _gptq(moved, target, inputs, f, _rtn(moved, target, inputs))
    errors = {n: _error(weight, v.dequantize(), inputs) for n, v in tried.items()}
    # a tie, as without held-out inputs, goes to the method asked for
    best = min(reversed(errors), key=lambda n: errors[n])
    if f is not None and best == "rtn" != method:
        fallbacks.append("rounding to nearest loses less on held-out inputs than GPTQ")
    value = tried[best]
    back = value.dequantize()
    record = {
        "method": best,
        "scheme": str(target),
        "held_error": errors,
        "error": errors[best],
        "weight_error": float((weight - back).norm() / weight.norm().clamp_min(1e-30)),
        "clipped": clipped(weight, value, back),
        "damp": None if f is None else f.damp,
        "factored_in": None if f is None else _name(f.dtype),
        **({} if strength is None else {"strength": strength}),
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


def _corrected(weight: Tensor, inputs: Inputs, f: rounding.Factor) -> tuple[float, Tensor]:
    """The share of a correction that helps on held-out inputs, and the weight with it."""
    if inputs.cross is None or inputs.original is None:
        return 0.0, weight
    with damped(inputs.hessian, f.damp):
        step = correction(weight, inputs.cross, inputs.hessian)
    if step is None:
        return 0.0, weight
    strength = share(weight, step, inputs.held, inputs.original)
    return strength, weight + strength * step


def _error(weight: Tensor, back: Tensor, inputs: Inputs) -> float:
    """Squared error of a rounded weight's outputs relative to those of the weight."""
    wrong = size = 0.0
    for a in range(0, len(inputs.held), _ROWS):
        x = inputs.held[a : a + _ROWS]
        if inputs.original is None:
            y, e = x @ weight.T, x @ (weight - back).T
        else:
            y = inputs.original[a : a + _ROWS] @ weight.T
            e = y - x @ back.T
        size += float(y.square_().sum(dtype=torch.float64))
        wrong += float(e.square_().sum(dtype=torch.float64))
    return wrong / (size or 1.0)


def clipped(weight: Tensor, value: Rounded, back: Tensor) -> float | None:
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
