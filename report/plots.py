"""Plots as inline SVG, from plain numbers: lines, bands, marks and bars on axes with ticks.

A plot is drawn twice, wide and narrow, and the style sheet shows the one that fits: text keeps its size on a telephone.
Every plot has a table beside it (:func:`figure`), which is also what a reader without sight gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from .markup import Html, join, tag
from .scales import Axis

WIDE, HALF, NARROW = 904, 432, 358
Point = tuple[float, float | None]
Range = tuple[float, float | None, float | None]


@dataclass(frozen=True)
class Frame:
    """The drawing area of a plot in pixels, and its axes."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis

    def px(self, value: float) -> float:
        """Place of an x value."""
        return self.x.at(value, self.left, self.right)

    def py(self, value: float) -> float:
        """Place of a y value."""
        return self.y.at(value, self.bottom, self.top)


class Layer(Protocol):
    """Something drawn in a frame."""

    def draw(self, f: Frame) -> Html:
        """Markup within the plot's ``<svg>``."""


@dataclass(frozen=True)
class Line:
    """A curve; gaps where y is None; ``dots`` marks each point, ``steps`` holds a value until the next."""

    points: Sequence[Point]
    cls: str
    dots: str | None = None
    steps: bool = False

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        marks = []
        for run in _runs(self.points):
            places = [(f.px(x), f.py(y)) for x, y in run]
            if self.steps:
                places = [p for a, b in pairwise(places) for p in (a, (b[0], a[1]))] + places[-1:]
            marks.append(tag("path", d=_path(places), cls=f"curve {self.cls}"))
            if self.dots:
                marks += [
                    tag(
                        "circle", cx=x, cy=y, r=3.5, cls=f"{self.dots} {self.cls}", stroke_width=1.6
                    )
                    for x, y in places
                ]
        return join(marks)


@dataclass(frozen=True)
class Area:
    """The band between two curves."""

    points: Sequence[Range]
    cls: str

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        known = [
            (x, low, high) for x, low, high in self.points if low is not None and high is not None
        ]
        if not known:
            return Html()
        upper = [(f.px(x), f.py(high)) for x, _, high in known]
        lower = [(f.px(x), f.py(low)) for x, low, _ in reversed(known)]
        return tag("path", d=_path(upper + lower) + "Z", cls=f"area {self.cls}")


@dataclass(frozen=True)
class Below:
    """Everything below a value (along x: left of it), shaded, with a label inside."""

    value: float
    label: str
    axis: str = "y"

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        if self.axis == "x":
            edge = f.px(self.value)
            box = tag(
                "rect",
                x=f.left,
                y=f.top,
                width=max(edge - f.left, 0.0),
                height=f.bottom - f.top,
                cls="floor",
            )
            return join(
                (
                    box,
                    tag("text", self.label, x=f.left + 6, y=f.top + 15, cls="tiny")
                    if edge - f.left > 70
                    else None,
                )
            )
        edge = f.py(self.value)
        box = tag(
            "rect", x=f.left, y=edge, width=f.right - f.left, height=f.bottom - edge, cls="floor"
        )
        inside = f.bottom - edge > 18
        return join(
            (
                box,
                tag(
                    "text",
                    self.label,
                    x=f.right - 6,
                    y=edge + 14 if inside else edge - 4,
                    cls="tiny",
                    text_anchor="end",
                ),
            )
        )


@dataclass(frozen=True)
class Steps:
    """A shaded floor that differs from place to place: ``half`` to both sides of each x."""

    points: Sequence[Point]
    half: float

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        boxes = []
        for x, y in self.points:
            if y is not None:
                a, b, top = f.px(x - self.half), f.px(x + self.half), f.py(y)
                boxes.append(
                    tag("rect", x=a, y=top, width=b - a + 0.5, height=f.bottom - top, cls="floor")
                )
        return join(boxes)


@dataclass(frozen=True)
class Caps:
    """A limit that differs from place to place: ``half`` to both sides of each x."""

    points: Sequence[Point]
    half: float

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        known = (
            (f.px(x - self.half), f.px(x + self.half), f.py(y))
            for x, y in self.points
            if y is not None
        )
        return join(tag("line", x1=a, x2=b, y1=y, y2=y, cls="limit") for a, b, y in known)


@dataclass(frozen=True)
class Upright:
    """A vertical line with a label at the top; ``span`` widens it to a highlighted column."""

    value: float
    label: str
    cls: str = "rule"
    span: float | None = None

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        place = f.px(self.value)
        right = place > (f.left + f.right) / 2
        if self.span is None:
            shape = tag("line", x1=place, x2=place, y1=f.top - 6, y2=f.bottom, cls=self.cls)
            edge = 5.0
        else:
            a, b = f.px(self.value - self.span), f.px(self.value + self.span)
            shape = tag(
                "rect", x=a, y=f.top - 18, width=b - a, height=f.bottom - f.top + 18, cls="mark"
            )
            edge = (b - a) / 2 + 6
        text = tag(
            "text",
            self.label,
            x=place - edge if right else place + edge,
            y=f.top - 5,
            cls="strong",
            text_anchor="end" if right else "start",
        )
        return join((shape, text))


@dataclass(frozen=True)
class Level:
    """A horizontal line (along x: vertical), a limit, with a label."""

    value: float
    label: str
    axis: str = "y"

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        if self.axis == "x":
            return Upright(self.value, self.label, "limit").draw(f)
        place = f.py(self.value)
        return join(
            (
                tag("line", x1=f.left, x2=f.right, y1=place, y2=place, cls="limit"),
                tag(
                    "text",
                    self.label,
                    x=f.right - 6,
                    y=place - 5,
                    cls="strong tiny",
                    text_anchor="end",
                ),
            )
        )


@dataclass(frozen=True)
class Hover:
    """What is said about each x under the pointer; lines of a text are parted by `` | ``."""

    points: Sequence[tuple[float, str]]

    def draw(self, f: Frame) -> Html:
        """See :class:`Layer`."""
        places = [f.px(x) for x, _ in self.points]
        edges = [f.left, *((a + b) / 2 for a, b in pairwise(places)), f.right]
        return join(
            tag(
                "g",
                tag("line", x1=place, x2=place, y1=f.top, y2=f.bottom),
                tag("rect", x=a, y=f.top, width=max(b - a, 0.1), height=f.bottom - f.top),
                cls="hit",
                data_tip=text,
            )
            for place, (a, b), (_, text) in zip(places, pairwise(edges), self.points, strict=True)
        )


def chart(
    width: float,
    height: float,
    x: Axis,
    y: Axis,
    layers: Sequence[Layer],
    *,
    alt: str,
    head: float = 34,
) -> Html:
    """Layers on two axes with grid, ticks and labels.

    Args:
        width: pixels.
        height: pixels.
        x: horizontal axis.
        y: vertical axis.
        layers: drawn in order, the first ones under the grid where they are shaded.
        alt: what it shows, for who cannot see it.
        head: room above the drawing for the label of the y axis and of marks.
    """
    ticks = x.marks(10 if width > 600 else 5)
    deep = 14 if any("|" in label for _, label in ticks) else 0
    f = Frame(58, width - 10, head, height - 44 - deep, x, y)
    under = [
        p for p in layers if isinstance(p, Below | Steps) or (isinstance(p, Upright) and p.span)
    ]
    over = [p for p in layers if p not in under]
    parts = [p.draw(f) for p in under]
    for value, label in y.marks(6):
        place = f.py(value)
        parts.append(tag("line", x1=f.left, x2=f.right, y1=place, y2=place, cls="grid"))
        parts.append(tag("text", label, x=f.left - 8, y=place + 4, text_anchor="end"))
    parts.append(tag("line", x1=f.left, x2=f.right, y1=f.bottom, y2=f.bottom, cls="axis"))
    for value, label in ticks:
        place = f.px(value)
        parts.append(tag("line", x1=place, x2=place, y1=f.bottom, y2=f.bottom + 4, cls="axis"))
        parts += [
            tag("text", part, x=place, y=f.bottom + 18 + 14 * i, text_anchor="middle")
            for i, part in enumerate(label.split("|"))
        ]
    parts.append(tag("text", x.label, x=f.right, y=height - 2, text_anchor="end"))
    parts.append(tag("text", y.label, x=0, y=12))
    parts += [p.draw(f) for p in over]
    return svg(width, height, join(parts), alt)


def svg(width: float, height: float, body: Html, alt: str, cls: str | None = None) -> Html:
    """An ``<svg>`` of its own size that shrinks with its place."""
    return tag(
        "svg", body, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=alt, cls=cls
    )


def figure(
    draw: Callable[[float], Html],
    *,
    wide: float = WIDE,
    key: Html | None = None,
    table: Html | None = None,
) -> Html:
    """A plot at both widths, with its key and its table.

    Args:
        draw: from a width to ``<svg>``.
        wide: pixels of the wide form.
        key: see :func:`legend`.
        table: the numbers, shown on demand.
    """
    forms = (_sized(draw(wide), "wide"), _sized(draw(NARROW), "small"))
    return tag("figure", key, *forms, numbers(table))


def _sized(drawing: Html, cls: str) -> Html:
    return Html(drawing.replace("<svg ", f'<svg class="{cls}" ', 1))


def numbers(table: Html | None, title: str = "Show the numbers") -> Html | None:
    """A table that opens on demand."""
    return None if table is None else tag("details", tag("summary", title), table)


def legend(*entries: tuple[str, Html]) -> Html:
    """Names and samples of what is drawn; see :func:`sample_line`, :func:`sample_area`."""
    return tag(
        "div",
        *(tag("span", tag("svg", sample, aria_hidden="true"), name) for name, sample in entries),
        cls="key",
    )


def sample_line(cls: str, dots: str | None = None) -> Html:
    """A piece of a curve for the legend."""
    dot = tag("circle", cx=11, cy=6, r=3.5, cls=f"{dots} {cls}", stroke_width=1.6) if dots else None
    return join((tag("path", d="M0 6H22", cls=f"curve {cls}"), dot))


def sample_area(cls: str) -> Html:
    """A piece of a band for the legend."""
    return tag("rect", x=0, y=0, width=22, height=12, cls=cls)


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [r for r in runs if r]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
