"""What linear layers see: second moments of their inputs, and some held-out inputs to judge rounded weights by.

Layers that read the same input share one Hessian: q, k and v; gate and up. Where Gemma 2 normalises a layer's output
again (o_proj, down_proj) an error matters relative to that output's size, so every token counts with ``1 / mean(y^2)``:
BOS, whose activations are hundreds of times larger, would else decide everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model.config import GemmaConfig

HELD_ROWS = 4096  # tokens of held-out input that are kept
PANEL = 512  # columns of a Hessian at a time


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that share their input, in the order they run.

    Attributes:
        templates: their names, with ``{i}`` for the layer.
        normalised: Gemma 2 normalises their output.
    """

    templates: tuple[str, ...]
    normalised: bool = False

    def names(self, layer: int) -> tuple[str, ...]:
        """Canonical names in a block."""
        return tuple(t.format(i=layer) for t in self.templates)


STAGES = (
    Stage((canonical.Q, canonical.K, canonical.V)),
    Stage((canonical.O,), normalised=True),
    Stage((canonical.GATE, canonical.UP)),
    Stage((canonical.DOWN,), normalised=True),
)


class Moments:
    """Inputs of one stage.

    Args:
        names: its layers, for messages.
        width: in_features.
        epsilon: of the norm behind the stage, whose tokens are then weighted; None for none.
        held_rows: most held-out inputs to keep.
        device: where sums lie.

    Attributes:
        squares: float64 ``[in_features]``, sum of squared inputs without any weights, as importance matrices have it.
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        epsilon: float | None,
        held_rows: int = HELD_ROWS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = tuple(names)
        self._epsilon = epsilon
        self._sum = torch.zeros(width, width, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._given: Tensor | None = None
        self._tokens = 0
        self._held: list[Tensor] = []
        self._room = held_rows

    @property
    def tokens(self) -> int:
        """Inputs in the Hessian."""
        return self._tokens

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Inputs as rows, weighted by the first layer's outputs y."""
        rows = x.reshape(-1, x.shape[-1])
        if self._epsilon is not None:
            power = y.reshape(-1, y.shape[-1]).square().mean(-1, keepdim=True)
            rows = rows * torch.rsqrt(power + self._epsilon)
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(rows)):
            raise NonFiniteError(
                "its input is NaN or infinite on calibration text.",
                tensor=self.names[0],
                fix="the model itself overflows there: check it with `g2verify compare`; nothing was written.",
            )
        return rows

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take inputs ``[…, in_features]`` and the first layer's outputs on them.

        Raises:
            NonFiniteError: names the layer.
        """
        rows = self.rows(x, y)
        self.squares += x.reshape(rows.shape).square().sum(0, dtype=torch.float64)
        add_product(self._sum, rows)
        self._tokens += len(rows)

    def mean_squares(self) -> Tensor:
        """float32 ``[in_features]``."""
        return (self.squares / max(1, self._tokens)).float()

    def take(self, hessian: Tensor, tokens: int) -> None:
        """A Hessian from elsewhere, of so many tokens, instead of inputs."""
        self._given, self._tokens = hessian.to(self._sum.device), tokens

    def hold(self, x: Tensor, y: Tensor) -> int:
        """Keep held-out inputs, weighted alike, up to ``held_rows`` of them; says how many of these."""
        rows = self.rows(x, y)[: self._room]
        self._room -= len(rows)
        if len(rows):
            self._held.append(rows.clone())
        return len(rows)

    def hessian(self) -> Tensor:
        """``mean(x x^T)`` float32 ``[in_features, in_features]``, symmetric; the sum is given up for it.

        Raises:
            NonFiniteError: it overflowed.
        """
        h = self._given
        if h is None:
            h = mirror(self._sum.div_(max(1, self._tokens)))
        self._sum = self._sum[:0, :0].clone()
        # inputs are finite, so no other element is larger than the largest of the diagonal
        if not bool(torch.isfinite(h.diagonal()).all()):
            raise NonFiniteError(
                "the second moments of its input overflow.",
                tensor=self.names[0],
                fix="check the model with `g2verify compare`; nothing was written.",
            )
        return h

    def held(self) -> Tensor:
        """Held-out inputs ``[rows, in_features]``."""
        if self._held:
            return torch.cat(self._held)
        return torch.empty(0, self._sum.shape[0], device=self._sum.device)


def add_product(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to ``total`` ``[n, n]``, no more than is on and above its diagonal blocks."""
    for a in range(0, len(total), PANEL):
        total[a : a + PANEL, a:].addmm_(rows[:, a : a + PANEL].t(), rows[:, a:])


def mirror(total: Tensor) -> Tensor:
    """Make what :func:`add_product` filled symmetric, in place."""
    for a in range(0, len(total), PANEL):
        b = min(a + PANEL, len(total))
        block = total[a:b, a:b]
        block.copy_(block.triu() + block.triu(1).t())
        total[b:, a:b] = total[a:b, b:].t()
    return total


class EnoughError(Exception):
    """The forward pass has gone as far as it is needed."""


class Companion(Protocol):
    """Runs beside and is told what is seen: :class:`.mismatch.Beside`."""

    def follow(self, batches: Iterator[Tensor]) -> None:
        """Its own batches from here on."""

    def next(self) -> None:
        """A batch begins."""

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """A stage's input, and its first layer's output."""

    def hold(self, name: str, x: Tensor, y: Tensor, count: int) -> None:
        """Held out, the first ``count`` of them kept."""

    def cross(self, name: str, tokens: int) -> Tensor:
        """What :meth:`add` summed up of a stage, ``[in_features, in_features]``."""

    def held(self, name: str) -> Tensor:
        """What :meth:`hold` kept ``[rows, in_features]``."""


class Collector:
    """A linear layer for :func:`g2kit.model.torch_gemma.block` that watches stages go by.

    Args:
        stages: those to watch.
        layer: the block's index.
        config: the model.
        weights: of the block; gives widths.
        held_rows: per stage.
        kind: of moments.
        stop: go no further than the last stage's input; else the block is run to its end.

    Attributes:
        moments: of each stage.
        holding: inputs are held out now.
        beside: told what goes by, or None.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        layer: int,
        config: GemmaConfig,
        weights: dict[str, Tensor],
        held_rows: int = HELD_ROWS,
        *,
        kind: type[Moments] = Moments,
        stop: bool = True,
    ) -> None:
        self.moments: list[Moments] = []
        self._first: dict[str, Moments] = {}
        for stage in stages:
            names = stage.names(layer)
            weigh = stage.normalised and config.has_post_norms
            epsilon = config.rms_norm_eps if weigh else None
            first = weights[names[0]]
            found = kind(names, first.shape[1], epsilon, held_rows, first.device)
            self.moments.append(found)
            self._first[names[0]] = found
        self._last = stages[-1].names(layer)[0] if stop else None
        self.holding = False
        self.beside: Companion | None = None

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """The plain product; notes the input of each stage's first layer."""
        y = torch.nn.functional.linear(x, weight)
        found = self._first.get(name)
        if found is not None:
            if self.holding:
                count = found.hold(x, y)
                if self.beside is not None:
                    self.beside.hold(name, x, y, count)
            else:
                found.add(x, y)
                if self.beside is not None:
                    self.beside.add(name, x, y)
            if name == self._last:
                raise EnoughError
        return y

    def watch(
        self, run: Callable[[Tensor], object], batches: Iterable[Tensor], *, holding: bool
    ) -> None:
        """Run batches as far as the last stage.

        Args:
            run: the block with this collector as its linear layer.
            batches: its inputs.
            holding: keep them as held-out inputs instead of adding them up.
        """
        self.holding = holding
        for batch in batches:
            if self.beside is not None:
                self.beside.next()
            try:
                run(batch)
            except EnoughError:
                continue
