"""How divergences are spread over tokens, and whether changes of probability lean to one side."""

from __future__ import annotations

from ..bars import butterfly
from ..markup import Html, tag
from ..numerals import number, percent
from ..page import Section
from ..parts import Document, note, stack
from ..plots import HALF, WIDE, Below, Hover, Layer, Level, Line, chart, figure
from ..scales import Axis
from ..tables import Column, table

_MIRROR = (
    "Change of the next token's probability, candidate minus reference, at the lowest and highest 1 %, 5 %, … of "
    "tokens. Even sides are noise, a longer left side is damage."
)


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    series = document.get("series") or {}
    ecdf, dp = series.get("kl_ecdf") or [], series.get("dp_percentiles") or []
    if not any(x for x, _ in ecdf):
        ecdf = []
    if not any(v for _, v in dp):
        dp = []
    floor = document.get("floor") or {}
    parts = [
        _ecdf(ecdf, series.get("floor_kl"), floor.get("k"), WIDE if not dp else HALF)
        if ecdf
        else None,
        _mirror(dp) if dp else None,
    ]
    known = [p for p in parts if p is not None]
    if not known:
        return None
    body = tag("div", *known, cls="two") if len(known) > 1 else stack(*known)
    return Section("distribution", "Distribution", _lede(document), body)


def _lede(document: Document) -> str:
    spread = ((document.get("metrics") or {}).get("overall") or {}).get("metrics", {}).get("kl")
    if not spread:
        return ""
    p = spread["percentiles"]
    half, most, mean = number(p["50"]), number(p["99"]), number(spread["mean"])
    return f"Half of all tokens diverge by less than {half} nats, 99 % by less than {most}; the mean is {mean}."


def _ecdf(points: list[list[float]], floor: float | None, k: float | None, wide: int) -> Html:
    x = Axis.logarithmic("KL (nats)", [*(v for v, _ in points), floor])
    y = Axis(
        "share of tokens below",
        0.0,
        1.0,
        ticks=[(0.0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %")],
    )
    layers: list[Layer] = [Below(floor, "noise floor", "x")] if floor else []
    layers.append(Line([(v, s) for v, s in points], "s1", steps=True))
    if floor and k and k * floor <= x.high:
        layers.append(Level(k * floor, "limit", "x"))
    layers.append(
        Hover([(v, f"{percent(s)} of tokens | below {number(v)} nats") for v, s in points])
    )
    plot = figure(
        lambda w: chart(w, 300, x, y, layers, alt="Cumulative distribution of KL"),
        wide=wide,
        table=table(
            [Column("KL (nats)", True), Column("Share of tokens", True)],
            [[number(v), percent(s)] for v, s in points],
        ),
    )
    return tag("div", tag("h3", "How large?"), plot)


def _mirror(points: list[list[float]]) -> Html:
    values = dict((float(p), v) for p, v in points)
    pairs = [
        (f"{p:g} %", values[p], values[100 - p])
        for p in sorted(values)
        if 0 < p < 50 and 100 - p in values
    ]
    rows = [[f"{p:g} %", number(v)] for p, v in points]
    plot = figure(
        lambda w: butterfly(
            w, pairs, "← lowest", "highest →", alt="Percentiles of the change in probability"
        ),
        wide=HALF,
        table=table([Column("Percentile", True), Column("Change of probability", True)], rows),
    )
    remark = note(_MIRROR)
    return tag("div", tag("h3", "Better or worse?"), plot, remark)
