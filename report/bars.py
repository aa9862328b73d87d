"""Plots without a curve: bars, strips and heat maps, as inline SVG; see plots.py for how they are placed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, join, tag
from .numerals import number
from .plots import svg
from .scales import Axis


@dataclass(frozen=True)
class Share:
    """A row of :func:`shares`: parts of one whole as ``(share, class)``, and what is said behind the bar."""

    label: str
    parts: Sequence[tuple[float, str]]
    note: str
    tip: str


def shares(width: float, rows: Sequence[Share], heading: str, *, alt: str) -> Html:
    """Rows of full bars, each divided into parts."""
    narrow = width < 500
    left, right = (96.0, width) if narrow else (120.0, width - 250)
    pitch = 42.0 if narrow else 26.0
    out = [tag("text", heading, x=0, y=12)]
    for i, row in enumerate(rows):
        y = 28 + i * pitch
        out.append(tag("text", row.label, x=left - 12, y=y + 11, text_anchor="end", cls="strong"))
        x, bars = left, []
        for share, cls in row.parts:
            w = share * (right - left)
            bars.append(
                tag("rect", x=x, y=y, width=max(w, 1.5 if share else 0.0), height=14, cls=cls)
            )
            x += w
        out.append(tag("g", *bars, data_tip=row.tip))
        place = {"x": left, "y": y + 29} if narrow else {"x": right + 14, "y": y + 11}
        out.append(tag("text", row.note, **place))
    return svg(width, 28 + len(rows) * pitch + 4, join(out), alt)


def butterfly(
    width: float, rows: Sequence[tuple[str, float, float]], left: str, right: str, *, alt: str
) -> Html:
    """Rows with a bar to each side of a common zero: negative values to the left, positive to the right."""
    reach = max((abs(v) for _, *pair in rows for v in pair), default=0.0) or 1.0
    middle, half, pitch = width / 2, width / 2 - 96, 27.0
    out = [
        tag("text", left, x=middle - 30, y=12, text_anchor="end"),
        tag("text", right, x=middle + 30, y=12),
    ]
    for i, (label, low, high) in enumerate(rows):
        y = 26 + i * pitch
        out.append(tag("text", label, x=middle, y=y + 12, text_anchor="middle"))
        for value in (low, high):
            w = abs(value) / reach * (half - 26)
            start = middle - 28 - w if value < 0 else middle + 28
            out.append(
                tag(
                    "rect",
                    x=start,
                    y=y,
                    width=max(w, 1.0),
                    height=16,
                    cls="f2" if value < 0 else "f1",
                )
            )
            end, anchor = (start - 6, "end") if value < 0 else (start + w + 6, "start")
            out.append(
                tag("text", number(value, 2), x=end, y=y + 12, text_anchor=anchor, cls="strong")
            )
    return svg(width, 26 + len(rows) * pitch, join(out), alt)


@dataclass(frozen=True)
class Strip:
    """A row of :func:`strips`: a bar from the axis' beginning to each value, and what is said behind."""

    label: str
    values: Sequence[float]
    note: str
    tip: str


def strips(
    width: float, rows: Sequence[Strip], axis: Axis, mark: tuple[float, str] | None, *, alt: str
) -> Html:
    """How far each row reaches along an axis: a tick per value, a bar to the largest."""
    narrow = width < 500
    left, right = (44.0, width - 8) if narrow else (52.0, width - 250)
    pitch, top = (38.0 if narrow else 24.0), 30.0
    bottom = top + len(rows) * pitch
    out = []
    if mark is not None:
        place = axis.at(mark[0], left, right)
        out.append(
            tag(
                "rect",
                x=left,
                y=top - 8,
                width=max(place - left, 0.0),
                height=bottom - top + 8,
                cls="floor",
            )
        )
        out.append(tag("line", x1=place, x2=place, y1=top - 12, y2=bottom, cls="rule"))
        before = place > (left + right) / 2
        spot = {"x": place - 5, "text_anchor": "end"} if before else {"x": place + 5}
        out.append(tag("text", mark[1], y=top - 12, cls="strong", **spot))
    for value, label in axis.marks(5 if narrow else 9):
        place = axis.at(value, left, right)
        out.append(tag("line", x1=place, x2=place, y1=top - 8, y2=bottom, cls="grid"))
        out.append(tag("text", label, x=place, y=bottom + 17, text_anchor="middle"))
    out.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, cls="axis"))
    out.append(tag("text", axis.label, x=right, y=bottom + 33, text_anchor="end"))
    for i, row in enumerate(rows):
        y = top + i * pitch
        out.append(tag("text", row.label, x=left - 10, y=y + 10, text_anchor="end", cls="strong"))
        places = sorted({round(axis.at(v, left, right), 1) for v in row.values})
        bar = tag(
            "rect", x=left, y=y + 4, width=max(places[-1] - left, 1.0), height=4, cls="f1 area"
        )
        ticks = (tag("rect", x=p - 1, y=y, width=2, height=12, cls="f1") for p in places)
        hit = tag("rect", x=left, y=y - 4, width=right - left, height=20, fill="transparent")
        out.append(tag("g", bar, *ticks, hit, data_tip=row.tip))
        spot = {"x": left, "y": y + 26} if narrow else {"x": right + 14, "y": y + 10}
        out.append(tag("text", row.note, **spot))
    return svg(width, bottom + 36, join(out), alt)


@dataclass(frozen=True)
class Pillar:
    """A bar of :func:`pillars`."""

    label: str
    value: float
    cls: str
    tip: str


def pillars(
    width: float, rows: Sequence[Pillar], axis: Axis, limit: float | None, *, alt: str
) -> Html:
    """Upright bars on a linear axis, with a horizontal limit."""
    left, right, top, bottom, height = 44.0, width - 4, 26.0, 170.0, 204.0
    out = [tag("text", axis.label, x=0, y=12)]
    for value, label in axis.marks(4):
        y = axis.at(value, bottom, top)
        out.append(tag("line", x1=left, x2=right, y1=y, y2=y, cls="grid"))
        out.append(tag("text", label, x=left - 8, y=y + 4, text_anchor="end"))
    slot = (right - left) / max(len(rows), 1)
    every = math.ceil(30 / slot)
    for i, row in enumerate(rows):
        x, y = left + (i + 0.5) * slot, axis.at(row.value, bottom, top)
        w = min(slot * 0.62, 34.0)
        out.append(
            tag(
                "rect",
                x=x - w / 2,
                y=y,
                width=w,
                height=max(bottom - y, 1.0),
                cls=row.cls,
                data_tip=row.tip,
            )
        )
        if i % every == 0:
            out += [
                tag("text", t, x=x, y=bottom + 16 + 14 * k, text_anchor="middle")
                for k, t in enumerate(row.label.split("|"))
            ]
    if limit is not None:
        y = axis.at(limit, bottom, top)
        out.append(tag("line", x1=left, x2=right, y1=y, y2=y, cls="limit"))
    out.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, cls="axis"))
    return svg(width, height, join(out), alt)


def heatmap(
    width: float,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    unit: str,
    *,
    alt: str,
    reverse: bool = False,
) -> Html:
    """A grid of cells, stronger for larger values (``reverse``: for smaller ones); None stays empty."""
    known = [v for row in values for v in row if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    slot = (width - 34) / max(len(columns), 1)
    roomy = slot > 7.5 * max(map(len, columns), default=0)
    if columns and not roomy:  # the last name, turned, reaches beyond its column
        slot = (width - 34 - max(0.0, 4.6 * len(columns[-1]) - slot / 2)) / len(columns)
    left, top, pitch = 34.0, 26.0 if roomy else 74.0, 24.0
    out = []
    for j, name in enumerate(columns):
        x = left + (j + 0.5) * slot
        turned = None if roomy else f"rotate(-38 {x:.1f} {top - 8:.1f})"
        anchor = "middle" if roomy else None
        out.append(
            tag("text", name, x=x, y=top - 8, transform=turned, text_anchor=anchor, cls="tiny")
        )
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + i * pitch
        out.append(
            tag("text", name, x=left - 8, y=y + pitch / 2 + 4, text_anchor="end", cls="tiny")
        )
        for j, value in enumerate(row):
            if value is None:
                continue
            level = min(int(6 * (value - low) / (high - low)), 5) if high > low else 2
            level = 5 - level if reverse else level
            tip = f"{columns[j]}, {name}: {number(value)} {unit}"
            box = tag(
                "rect",
                x=left + j * slot,
                y=y,
                width=slot - 2,
                height=pitch - 2,
                cls=f"q{level}",
                data_tip=tip,
            )
            out.append(box)
            if slot > 34:
                cls = ("strong", "strong", "strong", "on3", "on", "on")[level]
                x = left + (j + 0.5) * slot - 1
                text = tag(
                    "text",
                    number(value),
                    x=x,
                    y=y + 15,
                    text_anchor="middle",
                    pointer_events="none",
                    cls=f"{cls} tiny",
                )
                out.append(text)
    return svg(width, top + len(rows) * pitch, join(out), alt)


def span(value: float, bounds: Sequence[float] | None, low: float, high: float, cls: str) -> Html:
    """A value with its interval on a logarithmic axis around its limit, 1.

    Args:
        value: over its limit; 0 stands at the left end.
        bounds: interval, over the limit.
        low: left end of the axis.
        high: right end.
        cls: of the dot.
    """
    axis, a, b = Axis("", low, high, log=True), 6.0, 194.0
    limit, dot = axis.at(1.0, a, b), axis.at(value, a, b)
    out = [
        tag("rect", x=0, y=9, width=limit, height=4, cls="track"),
        tag("rect", x=limit, y=9, width=200 - limit, height=4, cls="track"),
        tag("line", x1=limit, x2=limit, y1=2, y2=20, stroke_width=1.6, cls="limit-mark"),
    ]
    if bounds is not None:
        left, right = (axis.at(v, a, b) for v in bounds)
        out.append(tag("line", x1=left, x2=right, y1=11, y2=11, stroke_width=2, cls=cls))
    out.append(tag("circle", cx=dot, cy=11, r=5, cls=f"{cls} filled"))
    return svg(200, 22, join(out), f"{number(value)} of the limit", "span")


def share_bar(share: float, cls: str) -> Html:
    """A small bar within text, 0 to 1 of its place."""
    bar = tag("rect", x=0, y=0, width=max(100 * share, 0.5), height=8, cls=cls)
    track = tag("rect", x=0, y=0, width=100, height=8, cls="track")
    return tag(
        "svg", track, bar, viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true"
    )
