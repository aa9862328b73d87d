"""Values of tensors as a grid of blocks and matrices, for a heat map."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .bars import heatmap
from .markup import Html
from .numerals import number
from .plots import figure
from .tables import Column, table


@dataclass(frozen=True)
class Grid:
    """Values by block and matrix.

    Attributes:
        blocks: numbers, ascending.
        matrices: short names, in the order in which tensors came.
        values: a row per block, None where there is no such tensor.
    """

    blocks: list[int]
    matrices: list[str]
    values: list[list[float | None]]

    @property
    def known(self) -> list[float]:
        """All values there are."""
        return [v for row in self.values for v in row if v is not None]

    def plot(self, unit: str, *, alt: str, reverse: bool = False) -> Html:
        """The heat map, with its numbers.

        Args:
            unit: of the values.
            alt: what it shows.
            reverse: small values are the strong ones.
        """
        rows = [str(b) for b in self.blocks]
        cells = [
            [name, *map(number, values)] for name, values in zip(rows, self.values, strict=True)
        ]
        return figure(
            lambda w: heatmap(w, rows, self.matrices, self.values, unit, alt=alt, reverse=reverse),
            table=table([Column("Block"), *(Column(m, True) for m in self.matrices)], cells),
        )


def grid(values: Mapping[str, float | None]) -> Grid | None:
    """The values of tensors that belong to a block (a number is part of their name); None for fewer than two."""
    known = [
        (m, v)
        for name, v in values.items()
        if v is not None and (m := re.search(r"\.(\d+)\.(.+)", name))
    ]
    if len(known) < 2:
        return None
    at = {(int(m[1]), m[2]): v for m, v in known}
    blocks = sorted({b for b, _ in at})
    kinds = list(dict.fromkeys(m[2] for m, _ in known))
    short = [k.removesuffix(".weight").rpartition(".")[2] for k in kinds]
    return Grid(blocks, short, [[at.get((b, k)) for k in kinds] for b in blocks])
