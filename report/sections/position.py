"""Divergence along the sequence: faults of window, rotary embedding and cache show here first."""

from __future__ import annotations

import math
from statistics import median

from ..markup import Html
from ..numerals import count, number
from ..page import Section
from ..parts import Document, note, sentences, stack
from ..plots import (
    Area,
    Below,
    Hover,
    Layer,
    Level,
    Line,
    Upright,
    chart,
    figure,
    legend,
    sample_area,
    sample_line,
)
from ..scales import Axis
from ..tables import Cell, Column, table

_COLUMNS = 260
_NAMES = {"median": "median", "p99": "99th percentile", "max": "maximum"}


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    series = document.get("series") or {}
    points = series.get("kl_by_position") or []
    if not points:
        return None
    window = series.get("window")
    if not any(p["max"] for p in points):
        text = f"The divergence is exactly zero at all {count(len(points), 'position')}: both sides give the same logits."
        return Section("position", "Divergence by position", text, Html())
    binned = bins(points, window)
    body = stack(
        _plot(binned, series, (document.get("floor") or {}).get("k")), _remark(points, binned)
    )
    return Section(
        "position", "Divergence by position", _lede(points, window, series.get("floor_kl")), body
    )


def bins(points: list[Document], window: int | None) -> list[Document]:
    """At most about 260 columns: medians of medians, largest p99 and max; none spans the window's edge."""
    size = math.ceil(len(points) / _COLUMNS)
    if size == 1:
        return points
    edge = math.inf if window is None else window
    parts: list[list[Document]] = []
    for p in points:
        new = (
            not parts
            or len(parts[-1]) == size
            or (parts[-1][-1]["position"] < edge <= p["position"])
        )
        parts[len(parts) - (0 if new else 1) :] = [[p]] if new else [[*parts[-1], p]]
    return [
        {
            "position": part[0]["position"],
            "median": median(p["median"] for p in part),
            "p99": max(p["p99"] for p in part),
            "max": max(p["max"] for p in part),
            "count": sum(p["count"] for p in part),
        }
        for part in parts
    ]


def _lede(points: list[Document], window: int | None, floor: float | None) -> str:
    worst = max(points, key=lambda p: p["max"])
    apart = points[-1]["position"] - points[0]["position"] + 1 > len(points)
    where, what = ("near", "stretches") if apart else ("at", "positions")
    top = f"The largest divergence, {number(worst['max'])} nats, is {where} position {worst['position']:,}."
    above = None
    if floor:
        n = sum(1 for p in points if p["median"] > floor)
        above = f"The median lies above the noise floor in {n:,} of {len(points):,} {what}."
    step = None
    if window:
        near = [p["median"] for p in points if p["position"] < window]
        far = [p["median"] for p in points if p["position"] >= window]
        if near and far and median(near) > 0:
            ratio = number(median(far) / median(near), 2)
            step = f"Beyond the window the typical value is {ratio} times that before it."
    return sentences(top, above, step)


def _plot(points: list[Document], series: Document, k: float | None) -> Html:
    floor, window = series.get("floor_kl"), series.get("window")
    y = Axis.logarithmic(
        "KL (nats)",
        [
            *(p[m] for p in points for m in ("median", "p99", "max")),
            floor,
            k and floor and k * floor,
        ],
    )
    first, last = points[0]["position"], points[-1]["position"]
    x = Axis("position in the sequence", float(first), float(max(last, first + 1)))
    layers: list[Layer] = [Below(floor, "noise floor")] if floor else []
    layers += [
        Area([(p["position"], p["median"], p["p99"]) for p in points], "f1"),
        Line([(p["position"], p["max"]) for p in points], "s0 thin"),
        Line([(p["position"], p["median"]) for p in points], "s1"),
    ]
    if floor and k:
        layers.append(Level(k * floor, f"limit: {number(k)} × floor"))
    if window and first < window <= last:
        layers.append(Upright(window, f"window {window:,}"))
    layers.append(Hover([(p["position"], _tip(p)) for p in points]))
    rows = [
        [
            Cell(number(p["position"]), p["position"]),
            *(Cell(number(p[m]), p[m]) for m in ("median", "p99", "max", "count")),
        ]
        for p in points
    ]
    heads = ("Position", "Median", "99th percentile", "Maximum", "Tokens")
    return figure(
        lambda w: chart(
            w,
            360 if w > 600 else 300,
            x,
            y,
            layers,
            alt="KL by position: median, 99th percentile, maximum",
        ),
        key=legend(
            ("median", sample_line("s1")),
            ("median to 99th percentile", sample_area("f1 area")),
            ("maximum", sample_line("s0 thin")),
        ),
        table=table([Column(h, True) for h in heads], rows, sortable=True),
    )


def _tip(p: Document) -> str:
    figures = (f"{name} {number(p[m])}" for m, name in _NAMES.items())
    return " | ".join((f"position {p['position']:,}", *figures, count(p["count"], "token")))


def _remark(points: list[Document], binned: list[Document]) -> Html | None:
    if len(points) == len(binned):
        return None
    return note(
        f"{len(points):,} positions are drawn as {len(binned):,} columns: the median of medians, the largest 99th percentile "
        "and maximum of each."
    )
