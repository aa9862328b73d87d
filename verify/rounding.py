"""Linear layers that round otherwise than usual: what another correct implementation's arithmetic might do.

Used to measure noise floors with :class:`.runners.torch_runner.TorchRunner`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import canonical

# compute type -> (type to compute in, its integer view, bits of it that the compute type does not have)
_WIDER = {
    torch.bfloat16: (torch.float32, torch.int32, 16),
    torch.float32: (torch.float64, torch.int64, 29),
}


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``x``, of the wider type, rounded to ``dtype`` up or down at random, right on average (Monte-Carlo arithmetic).

    Numbers below the narrow type's normal range are not rounded well, which matters to nothing here.
    """
    wide, whole, bits = _WIDER[dtype]
    if x.dtype != wide:
        raise TypeError(f"{x.dtype} is not the wider type of {dtype}")
    noise = torch.randint(0, 1 << bits, x.shape, generator=generator, dtype=whole, device=x.device)
    # where adding carries into the next representable number, that is the one above
    there = (x.contiguous().view(whole) + noise) & ~((1 << bits) - 1)
    return torch.where(x.isfinite(), there.view(wide), x).to(dtype)


class StochasticLinear:
    """Matrix products in the next wider type, their results rounded at random; the same for the same seed."""

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self._generator = torch.Generator(device)
        self._generator.manual_seed(seed)

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """See :data:`g2kit.model.torch_gemma.Linear`."""
        wide = _WIDER[x.dtype][0]
        y = torch.nn.functional.linear(x.to(wide), weight.to(wide))
        return stochastic(y, x.dtype, self._generator)


class GeluLinear:
    """Plain products, but the feed-forward's activation is another: ``activation(gate) * up`` goes into the last product."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self._activation = activation
        self._gate: Tensor | None = None
        self._up: Tensor | None = None

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """See :data:`g2kit.model.torch_gemma.Linear`."""
        if _is(name, canonical.DOWN) and self._gate is not None and self._up is not None:
            x = self._activation(self._gate) * self._up
            self._gate = self._up = None
        y = torch.nn.functional.linear(x, weight)
        if _is(name, canonical.GATE):
            self._gate = y
        elif _is(name, canonical.UP):
            self._up = y
        return y


def erf_gelu(x: Tensor) -> Tensor:
    """The exact GELU instead of its tanh approximation: a known mistake of converters."""
    return torch.nn.functional.gelu(x)


def table_gelu(x: Tensor) -> Tensor:
    """GELU as llama.cpp has it on CPU: argument and value pass through a table of float16 where ``|x| < 10``."""
    looked_up = torch.nn.functional.gelu(x.half().to(x.dtype), approximate="tanh").half()
    return torch.where(x.abs() < 10, looked_up.to(x.dtype), x.clamp(min=0))


def _is(name: str, template: str) -> bool:
    return name.endswith(template.rpartition("}")[2])
