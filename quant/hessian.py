"""What linear layers see: second moments of their inputs, and some held-out inputs to judge rounded weights by.

Layers that read the same input share one Hessian: q, k and v; gate and up. Where Gemma 2 normalises a layer's output
again (o_proj, down_proj) an error matters relative to that output's size, so every token counts with ``1 / mean(y^2)``:
BOS, whose activations are hundreds of times larger, would else decide everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.errors import NonFiniteError
from ..model import canonical
from ..model.config import GemmaConfig

HELD_ROWS = 4096  # tokens of held-out input that are kept


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
    """

    def __init__(
        self, names: Sequence[str], width: int, epsilon: float | None, held_rows: int = HELD_ROWS
    ) -> None:
        self.names = tuple(names)
        self._epsilon = epsilon
        self._sum = torch.zeros(width, width)
        self._weight = 0.0
        self._tokens = 0
        self._held: list[Tensor] = []
        self._room = held_rows

    @property
    def tokens(self) -> int:
        """Inputs in the Hessian."""
        return self._tokens

    def _rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Inputs as rows, weighted."""
        rows = x.reshape(-1, x.shape[-1])
        if self._epsilon is not None:
            power = y.reshape(-1, y.shape[-1]).square().mean(-1, keepdim=True)
            rows = rows * torch.rsqrt(power + self._epsilon)
        if not bool(torch.isfinite(rows).all()):
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
        rows = self._rows(x, y)
        self._sum.addmm_(rows.T, rows)
        self._tokens += len(rows)

    def hold(self, x: Tensor, y: Tensor) -> None:
        """Keep held-out inputs, weighted alike, up to ``held_rows`` of them."""
        rows = self._rows(x, y)[: self._room]
        self._room -= len(rows)
        if len(rows):
            self._held.append(rows.clone())

    def hessian(self) -> Tensor:
        """``mean(x x^T)`` float32 ``[in_features, in_features]``, symmetric; the sum is given up for it.

        Raises:
            NonFiniteError: it overflowed.
        """
        h = self._sum.div_(max(1, self._tokens))
        self._sum = torch.empty(0, 0)
        if not bool(torch.isfinite(h).all()):
            raise NonFiniteError(
                "the second moments of its input overflow.",
                tensor=self.names[0],
                fix="check the model with `g2verify compare`; nothing was written.",
            )
        return h

    def held(self) -> Tensor:
        """Held-out inputs ``[rows, in_features]``."""
        return torch.cat(self._held) if self._held else torch.empty(0, self._width)

    @property
    def _width(self) -> int:
        return self._sum.shape[0]


class _EnoughError(Exception):
    """The forward pass has gone as far as it is needed."""


class Collector:
    """A linear layer for :func:`g2kit.model.torch_gemma.block` that watches stages go by.

    Args:
        stages: those to watch.
        layer: the block's index.
        config: the model.
        weights: of the block; gives widths.
        held_rows: per stage.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        layer: int,
        config: GemmaConfig,
        weights: dict[str, Tensor],
        held_rows: int = HELD_ROWS,
    ) -> None:
        self.moments: list[Moments] = []
        self._first: dict[str, Moments] = {}
        for stage in stages:
            names = stage.names(layer)
            weigh = stage.normalised and config.has_post_norms
            epsilon = config.rms_norm_eps if weigh else None
            found = Moments(names, weights[names[0]].shape[1], epsilon, held_rows)
            self.moments.append(found)
            self._first[names[0]] = found
        self._last = stages[-1].names(layer)[0]
        self.holding = False

    def __call__(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        """The plain product; notes the input of each stage's first layer."""
        y = torch.nn.functional.linear(x, weight)
        found = self._first.get(name)
        if found is not None:
            (found.hold if self.holding else found.add)(x, y)
            if name == self._last:
                raise _EnoughError
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
            try:
                run(batch)
            except _EnoughError:
                continue
