"""What can still move in a rounded weight, and a norm's gains, as parameters that gradients reach.

Scales and offsets move by a relative shift, so that one learning rate serves all: ``value = snap(start (1 + t))`` with
``t = 0`` at first and ``snap`` the rounding to what the format stores. Codes move, where they may, by ``round(u)`` with ``u`` at
first what rounding took away. Gradients pass both roundings straight through (arXiv 1308.3432; for codes: arXiv 2004.10568,
2309.05516). The dense weight is made anew for every matrix product, so neither it nor its gradient outlives one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..model import torch_gemma as tg
from . import ggml
from .choose import Rounded
from .scheme import Codes, on_grid

Snap = Callable[[Tensor], Tensor]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUMBER, GAIN, CODE = "number", "gain", "code"
# a number moves by half of itself at most: signs stay, and a zero stays zero
LIMITS = {NUMBER: 0.5, GAIN: 0.5, CODE: 2.49}
_INSIDE = 0.45  # how far a code's start may be from its middle


class Weight(Protocol):
    """A rounded weight taken apart: a sum of stored numbers times whole numbers that codes decide.

    Attributes:
        numbers: float32 ``[out_features, runs]`` each; one serves a run of equally many columns.
        snap: rounds them to what is stored.
        codes: uint8 ``[out_features, in_features]``.
        range: smallest and largest code.
    """

    numbers: list[Tensor]
    snap: Snap
    codes: Tensor
    range: tuple[int, int]

    def coefficients(self, codes: Tensor) -> list[Tensor]:
        """What each number is multiplied with ``[out_features, in_features]``, new tensors."""

    def step(self, numbers: tuple[Tensor, ...]) -> Tensor:
        """What a weight gains with one more code, ``[out_features, runs]``."""

    def rebuilt(self, numbers: list[Tensor], codes: Tensor) -> Rounded:
        """With other numbers and codes."""


class _Uniform:
    def __init__(self, value: Codes) -> None:
        self._value = value
        self.numbers, self.codes = [value.scales], value.codes
        self.snap: Snap = on_grid
        self.range = (0, value.scheme.levels - 1)

    def coefficients(self, codes: Tensor) -> list[Tensor]:
        zeros = self._value.zeros
        if zeros is None:
            return [codes.float() - self._value.scheme.middle]
        grouped = codes.float().view(*zeros.shape, -1) - zeros.float()[..., None]
        return [grouped.view(codes.shape)]

    def step(self, numbers: tuple[Tensor, ...]) -> Tensor:
        return numbers[0]

    def rebuilt(self, numbers: list[Tensor], codes: Tensor) -> Rounded:
        return replace(self._value, scales=numbers[0], codes=codes)


class _Ggml:
    def __init__(self, value: ggml.Blocks) -> None:
        f = self._fields = value.fields()
        self.numbers = [f.d] if f.dmin is None else [f.d, f.dmin]
        self.codes = f.codes
        self.snap: Snap = ggml.to_half
        low = 0 if f.format.table is not None else f.format.low - f.format.first
        self.range = (low, len(f.format.levels) - 1)
        levels = f.format.levels
        self._spacing = float(levels[-1] - levels[0]) / (len(levels) - 1)

    def coefficients(self, codes: Tensor) -> list[Tensor]:
        f = replace(self._fields, codes=codes.to(torch.uint8))
        level = f.level()
        found = [
            (level.clone() if f.sc is None else level * f.sc.float()[..., None]).view(codes.shape)
        ]
        if f.dmin is not None:
            offsets = torch.ones_like(f.dmin) if f.m is None else f.m.float()
            found.append(-offsets.repeat_interleave(codes.shape[1] // offsets.shape[1], 1))
        return found

    def step(self, numbers: tuple[Tensor, ...]) -> Tensor:
        return replace(self._fields, d=numbers[0].detach()).step * self._spacing

    def rebuilt(self, numbers: list[Tensor], codes: Tensor) -> Rounded:
        dmin = numbers[1] if self._fields.dmin is not None else None
        f = replace(self._fields, d=numbers[0], dmin=dmin, codes=codes)
        return ggml.Blocks(f.format, ggml.pack(f))


def placed(value: Rounded, device: str) -> Rounded:
    """A weight on another device."""
    if not isinstance(value, Codes):
        return replace(value, data=value.data.to(device))
    zeros = None if value.zeros is None else value.zeros.to(device)
    return replace(value, codes=value.codes.to(device), scales=value.scales.to(device), zeros=zeros)


def weight_of(value: Rounded) -> Weight:
    """A rounded weight taken apart."""
    return _Uniform(value) if isinstance(value, Codes) else _Ggml(value)


def _moved(w: Weight, u: Tensor | None) -> Tensor:
    """Codes, moved by the nearest whole number."""
    return w.codes if u is None else (w.codes + torch.round(u)).clamp_(*w.range)


def _dense(w: Weight, u: Tensor | None, numbers: tuple[Tensor, ...]) -> Tensor:
    total: Tensor | None = None
    for c, x in zip(w.coefficients(_moved(w, u)), numbers, strict=True):
        term = c.view(*x.shape, -1).mul_(x[..., None]).view(c.shape)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


class _Product(torch.autograd.Function):
    """``x @ weight.T`` whose weight is made when it is needed, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, w: Weight, x: Tensor, u: Tensor | None, *numbers: Tensor) -> Tensor:
        ctx.weight = w
        ctx.save_for_backward(x, u, *numbers)
        return torch.nn.functional.linear(x, _dense(w, u, numbers))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, *numbers = ctx.saved_tensors
        w: Weight = ctx.weight
        dx = grad @ _dense(w, u, tuple(numbers)) if ctx.needs_input_grad[1] else None
        dw = grad.flatten(0, -2).T @ x.flatten(0, -2)
        pulled = [
            c.mul_(dw).view(*n.shape, -1).sum(-1)
            for c, n in zip(w.coefficients(_moved(w, u)), numbers, strict=True)
        ]
        du = None
        if u is not None:
            step = w.step(tuple(numbers))
            du = dw.view(*step.shape, -1).mul_(step[..., None]).view(dw.shape)
        return None, dx, du, *pulled


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
        originals: canonical name -> the weight before rounding, where codes may move too.
    """

    def __init__(
        self, values: Mapping[str, Rounded], gains: Mapping[str, Gain],
        originals: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.values, self.gains = dict(values), dict(gains)
        self._weights = {n: weight_of(v) for n, v in values.items()}
        self._originals = originals

    def begin(self) -> Shifts:
        """Nothing has moved yet."""
        shifts = {
            n: [torch.zeros_like(x) for x in w.numbers] + self._taken(n, w)
            for n, w in self._weights.items()
        }
        return shifts | {n: [torch.zeros_like(g.start)] for n, g in self.gains.items()}

    def _taken(self, name: str, w: Weight) -> list[Tensor]:
        """What rounding took away, in codes."""
        if self._originals is None:
            return []
        step = w.step(tuple(w.numbers))
        lost = self._originals[name] - _dense(w, None, tuple(w.numbers))
        grouped = lost.view(*step.shape, -1) / torch.where(step == 0, 1.0, step)[..., None]
        return [grouped.view(lost.shape).clamp(-_INSIDE, _INSIDE)]

    def kinds(self) -> dict[str, list[str]]:
        """What each shift is of: :data:`NUMBER`, :data:`GAIN` or :data:`CODE`."""
        codes = [] if self._originals is None else [CODE]
        kinds = {n: [NUMBER] * len(w.numbers) + codes for n, w in self._weights.items()}
        return kinds | {n: [GAIN] for n in self.gains}

    def numbers(self, name: str, shifts: Shifts) -> list[Tensor]:
        """What is stored of a tensor under these shifts, but for its codes; differentiable."""
        if name in self.gains:
            gain = self.gains[name]
            return [through(gain.moved(shifts[name][0]), gain.snap)]
        w = self._weights[name]
        return [
            through(x * (1.0 + t), _keeping(x, w.snap))
            for x, t in zip(w.numbers, shifts[name], strict=False)
        ]

    def norms(self, shifts: Shifts) -> dict[str, Tensor]:
        """The gains under these shifts, differentiable."""
        return {n: self.numbers(n, shifts)[0] for n in self.gains}

    def _codes(self, name: str, shifts: Shifts) -> Tensor | None:
        return None if self._originals is None else shifts[name][-1]

    def linear(self, shifts: Shifts) -> tg.Linear:
        """Applies the rounded weights under these shifts, differentiable; others as they are."""

        def run(name: str, x: Tensor, weight: Tensor) -> Tensor:
            if name not in self._weights:
                return tg.plain_linear(name, x, weight)
            y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
                self._weights[name], x, self._codes(name, shifts), *self.numbers(name, shifts)
            )
            return y

        return run

    @torch.no_grad()
    def result(self, shifts: Shifts) -> tuple[dict[str, Rounded], dict[str, Tensor]]:
        """Weights and gains as they are stored under these shifts."""
        values = {}
        for name, w in self._weights.items():
            codes = _moved(w, self._codes(name, shifts)).to(torch.uint8)
            values[name] = w.rebuilt(self.numbers(name, shifts), codes)
        return values, {n: x.clone() for n, x in self.norms(shifts).items()}


def _keeping(start: Tensor, snap: Snap) -> Snap:
    """Unmoved numbers stay what they are to the bit."""
    return lambda x: torch.where(x == start, start, snap(x))


class Adam:
    """Adam (arXiv 1412.6980) over shifts, with state that can be kept and taken up again.

    Args:
        shifts: changed in place.
        kinds: of each, see :meth:`Block.kinds`.
        rates: kind -> learning rate.
    """

    BETAS = (0.9, 0.95)

    def __init__(
        self, shifts: Shifts, kinds: Mapping[str, list[str]], rates: Mapping[str, float]
    ) -> None:
        self.shifts, self._kinds, self._rates = shifts, dict(kinds), dict(rates)
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
                self.shifts[name], gradients[name], self.first[name], self.second[name],
                self._kinds[name], strict=True,
            )  # fmt: skip
            for t, g, m, v, kind in rows:
                m.lerp_(g, 1 - one)
                v.mul_(two).addcmul_(g, g, value=1 - two)
                size = (v / (1 - two**count)).sqrt_().add_(1e-30)
                t.sub_(
                    size.reciprocal_().mul_(m).mul_(self._rates[kind] * factor / (1 - one**count))
                )
                t.clamp_(-LIMITS[kind], LIMITS[kind])


def arrays_of(prefix: str, shifts: Shifts) -> dict[str, np.ndarray]:
    """For a file of arrays."""
    return {
        f"{prefix}|{n}|{i}": t.cpu().numpy() for n, ts in shifts.items() for i, t in enumerate(ts)
    }


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
