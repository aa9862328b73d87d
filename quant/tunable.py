"""What can still move when codes are fixed: a weight's scales and offsets and a norm's gains, as parameters gradients reach.

A parameter is a relative shift of a stored number, so that one learning rate serves all: ``value = snap(start (1 + t))``
with ``t = 0`` at first and ``snap`` the rounding to what the format stores. Gradients pass the rounding straight through
(arXiv 1308.3432). A weight is linear in its parameters, ``sum_i coefficient_i * value_i`` with integers that never change,
so neither the dense weight nor its gradient outlives one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import torch_gemma as tg
from . import ggml
from .choose import Rounded
from .scheme import Codes, on_grid

Snap = Callable[[Tensor], Tensor]
LIMIT = 0.5  # a number moves by half of itself at most: signs stay, and a zero stays zero
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Part:
    """One set of stored numbers of a weight.

    Attributes:
        start: float32 ``[out_features, runs]``; each serves a run of equally many columns.
        coefficient: gives the integers they are multiplied with, float32 ``[out_features, in_features]``.
        snap: rounds to what is stored.
    """

    start: Tensor
    coefficient: Callable[[], Tensor]
    snap: Snap


def _integers(codes: Codes) -> Tensor:
    out, groups = codes.scales.shape
    grouped = codes.codes.view(out, groups, -1).float()
    zeros = codes.scheme.middle if codes.zeros is None else codes.zeros.float()[..., None]
    return (grouped - zeros).view(out, -1)


def _levels(f: ggml.Fields) -> Tensor:
    level = f.level()
    return (level if f.sc is None else level * f.sc.float()[..., None]).view(f.codes.shape)


def _offsets(f: ggml.Fields) -> Tensor:
    if f.m is None:
        return -torch.ones(f.codes.shape)
    return -f.m.float().repeat_interleave(f.format.sub, 1)


def parts_of(value: Rounded) -> list[Part]:
    """The stored numbers of a rounded weight; together they give exactly its ``dequantize()``."""
    if isinstance(value, Codes):
        return [Part(value.scales, lambda: _integers(value), on_grid)]
    fields = value.fields()
    parts = [Part(fields.d, lambda: _levels(fields), ggml.to_half)]
    if fields.dmin is not None:
        parts.append(Part(fields.dmin, lambda: _offsets(fields), ggml.to_half))
    return parts


def rebuilt(value: Rounded, numbers: list[Tensor]) -> Rounded:
    """The same codes with other stored numbers, one tensor per part."""
    if isinstance(value, Codes):
        return replace(value, scales=numbers[0])
    fields = value.fields()
    dmin = numbers[1] if fields.dmin is not None else None
    return ggml.Blocks(value.format, ggml.pack(replace(fields, d=numbers[0], dmin=dmin)))


def _dense(parts: list[Part], numbers: tuple[Tensor, ...]) -> Tensor:
    total: Tensor | None = None
    for part, x in zip(parts, numbers, strict=True):
        c = part.coefficient()
        out = c.shape[0]
        term = c.view(*x.shape, -1).mul_(x[..., None]).view(out, -1)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


class _Product(torch.autograd.Function):
    """``x @ weight.T`` whose weight is made from its parts when it is needed, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, parts: list[Part], x: Tensor, *numbers: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.save_for_backward(x, *numbers)
        return torch.nn.functional.linear(x, _dense(parts, numbers))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *numbers = ctx.saved_tensors
        dx = grad @ _dense(ctx.parts, tuple(numbers)) if ctx.needs_input_grad[1] else None
        dw = grad.flatten(0, -2).T @ x.flatten(0, -2)
        pulled = [
            p.coefficient().mul_(dw).view(*n.shape, -1).sum(-1)
            for p, n in zip(ctx.parts, numbers, strict=True)
        ]
        return None, dx, *pulled


class Gain:
    """A norm's gains.

    Args:
        start: weights ``[width]``; the norm multiplies with one more.
        dtype: the source's, as its name; gains are rounded to it.
    """

    def __init__(self, start: Tensor, dtype: str) -> None:
        self.start = start
        self._dtype = _DTYPES.get(dtype)
        size = (1.0 + start).abs()
        self.unit = size.clamp_min(float(size.mean()) or 1.0)

    def snap(self, x: Tensor) -> Tensor:
        """Rounded to the source's dtype."""
        return x if self._dtype is None else x.to(self._dtype).float()

    def moved(self, t: Tensor) -> Tensor:
        """Weights for a shift, not yet rounded."""
        return self.start + self.unit * t


def through(x: Tensor, snap: Snap) -> Tensor:
    """``snap(x)`` with the gradient of x."""
    return x + (snap(x.detach()) - x.detach())


Shifts = dict[str, list[Tensor]]  # name -> t of each part


class Block:
    """Everything of one block that can move.

    Args:
        values: canonical name -> rounded weight.
        gains: canonical name -> norm.
    """

    def __init__(self, values: Mapping[str, Rounded], gains: Mapping[str, Gain]) -> None:
        self.values, self.gains = dict(values), dict(gains)
        self._parts = {n: parts_of(v) for n, v in values.items()}

    def zeros(self) -> Shifts:
        """No shift of anything."""
        shifts = {n: [torch.zeros_like(p.start) for p in ps] for n, ps in self._parts.items()}
        return shifts | {n: [torch.zeros_like(g.start)] for n, g in self.gains.items()}

    def numbers(self, name: str, shifts: Shifts) -> list[Tensor]:
        """What is stored of a tensor under these shifts, differentiable."""
        if name in self.gains:
            gain = self.gains[name]
            return [through(gain.moved(shifts[name][0]), gain.snap)]
        pairs = zip(self._parts[name], shifts[name], strict=True)
        return [through(p.start * (1.0 + t), _keeping(p)) for p, t in pairs]

    def norms(self, shifts: Shifts) -> dict[str, Tensor]:
        """The gains under these shifts, differentiable."""
        return {n: self.numbers(n, shifts)[0] for n in self.gains}

    def linear(self, shifts: Shifts) -> tg.Linear:
        """Applies the rounded weights under these shifts, differentiable; others as they are."""

        def run(name: str, x: Tensor, weight: Tensor) -> Tensor:
            if name not in self._parts:
                return tg.plain_linear(name, x, weight)
            y: Tensor = _Product.apply(self._parts[name], x, *self.numbers(name, shifts))  # type: ignore[no-untyped-call]
            return y

        return run

    @torch.no_grad()
    def result(self, shifts: Shifts) -> tuple[dict[str, Rounded], dict[str, Tensor]]:
        """Weights and gains as they are stored under these shifts."""
        values = {n: rebuilt(v, self.numbers(n, shifts)) for n, v in self.values.items()}
        return values, {n: x.clone() for n, x in self.norms(shifts).items()}


def _keeping(part: Part) -> Snap:
    """Unmoved numbers stay what they are to the bit."""

    def snap(x: Tensor) -> Tensor:
        return torch.where(x == part.start, part.start, part.snap(x))

    return snap


class Adam:
    """Adam (arXiv 1412.6980) over shifts, with state that can be kept and taken up again.

    Args:
        shifts: changed in place.
        rates: name -> learning rate.
        state: as :meth:`arrays` gave it.
    """

    BETAS = (0.9, 0.95)

    def __init__(self, shifts: Shifts, rates: Mapping[str, float]) -> None:
        self.shifts, self.rates = shifts, dict(rates)
        self.first = {n: [torch.zeros_like(t) for t in ts] for n, ts in shifts.items()}
        self.second = {n: [torch.zeros_like(t) for t in ts] for n, ts in shifts.items()}

    @torch.no_grad()
    def step(self, names: list[str], gradients: Shifts, count: int, factor: float) -> None:
        """Move some tensors' shifts.

        Args:
            names: whose.
            gradients: of each.
            count: steps so far, this one included.
            factor: of the learning rates.
        """
        one, two = self.BETAS
        for name in names:
            rows = zip(
                self.shifts[name], gradients[name], self.first[name], self.second[name], strict=True
            )
            for t, g, m, v in rows:
                m.lerp_(g, 1 - one)
                v.mul_(two).addcmul_(g, g, value=1 - two)
                size = (v / (1 - two**count)).sqrt_().add_(1e-30)
                t.sub_(self.rates[name] * factor * (m / (1 - one**count)) / size)
                t.clamp_(-LIMIT, LIMIT)


def arrays_of(prefix: str, shifts: Shifts) -> dict[str, np.ndarray]:
    """For a file of arrays."""
    return {f"{prefix}|{n}|{i}": t.numpy() for n, ts in shifts.items() for i, t in enumerate(ts)}


def fill(shifts: Shifts, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Take up what :func:`arrays_of` kept.

    Raises:
        KeyError, ValueError: something is missing or of another shape.
    """
    for name, ts in shifts.items():
        for i, t in enumerate(ts):
            t.copy_(torch.from_numpy(arrays[f"{prefix}|{name}|{i}"]).view_as(t))


def copied(shifts: Shifts) -> Shifts:
    """Shifts of their own."""
    return {n: [t.clone() for t in ts] for n, ts in shifts.items()}
