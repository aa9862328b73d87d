"""Points with whiskers and names, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..markup import Html, join, tag
from ..plots import Frame

_CHARACTER = 6.4  # pixels, about


@dataclass(frozen=True)
class Mark:
    """A point.

    Attributes:
        x, y: place.
        low, high: ends of the whisker.
        name: written beside it.
        cls: colour.
        tip: what is said under the pointer.
    """

    x: float
    y: float
    low: float | None
    high: float | None
    name: str
    cls: str
    tip: str


@dataclass(frozen=True)
class Marks:
    """Points of a plot; a name that would run into another one or out of the plot stands elsewhere or is left out."""

    points: Sequence[Mark]

    def draw(self, f: Frame) -> Html:
        """See :class:`..plots.Layer`."""
        out, taken = (
            [],
            [(f.px(m.x) - 6, f.py(m.y) - 6, f.px(m.x) + 6, f.py(m.y) + 6) for m in self.points],
        )
        for m in self.points:
            x, y = f.px(m.x), f.py(m.y)
            parts = [tag("circle", cx=x, cy=y, r=5, cls=f"{m.cls} filled")]
            if m.low is not None and m.high is not None:
                ends = f.py(m.low), f.py(m.high)
                stroke = f"s{m.cls.removeprefix('f')}"
                parts.insert(
                    0, tag("line", x1=x, x2=x, y1=ends[0], y2=ends[1], cls=stroke, stroke_width=1.6)
                )
            out.append(
                tag(
                    "g", *parts, tag("circle", cx=x, cy=y, r=14, fill="transparent"), data_tip=m.tip
                )
            )
            label = _label(m.name, x, y, f, taken)
            if label is not None:
                out.append(label)
        return join(out)


def _label(
    name: str, x: float, y: float, f: Frame, taken: list[tuple[float, float, float, float]]
) -> Html | None:
    width = _CHARACTER * len(name)
    places = ((x + 10, y + 4, "start"), (x - 10, y + 4, "end"), (x + 8, y - 9, "start"), (x - 8, y - 9, "end"),
              (x + 8, y + 17, "start"), (x - 8, y + 17, "end"))  # fmt: skip
    for left, base, anchor in places:
        start = left if anchor == "start" else left - width
        box = (start, base - 11, start + width, base + 3)
        inside = box[0] >= f.left and box[2] <= f.right + 4
        if inside and not any(_meet(box, other) for other in taken):
            taken.append(box)
            return tag("text", name, x=left, y=base, text_anchor=anchor, cls="strong")
    return None


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def best(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which points ``(size, loss)`` no other one beats: neither larger nor worse, and not the same."""
    return {
        i
        for i, (size, loss) in enumerate(points)
        if not any(s <= size and k <= loss and (s, k) != (size, loss) for s, k in points)
    }


def unit_of(nbytes: float) -> tuple[str, int]:
    """The binary unit in which a size is a number from 1 on, and its bytes."""
    for name, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return name, 1 << power
    return "bytes", 1
