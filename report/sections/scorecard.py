"""Every number a verdict rests on, beside its limit."""

from __future__ import annotations

import math
from typing import Any

from ..bars import span
from ..markup import Html, join, tag
from ..numerals import interval, number
from ..page import Section
from ..parts import Document, badge, css, note, stack
from ..plots import svg
from ..scales import Axis, decades
from ..tables import Column, table

_LEDE = (
    "Limits are multiples of the measured noise floor or budgets that were asked for; the distance to them is drawn on a "
    "logarithmic scale."
)
_LEAST, _MOST = 1e-8, 1e12


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    claims = [c for c in document["claims"] if c["evidence"]]
    if not claims:
        return None
    low, high = _ends([r for c in claims for e in c["evidence"] for r in _ratios(e)])
    columns = [
        Column("Claim"),
        Column("Metric"),
        Column("Value", numeric=True),
        Column("Limit", numeric=True),
        Column("Value over limit"),
    ]
    rows = []
    for claim in claims:
        for i, e in enumerate(claim["evidence"]):
            first = (
                tag("span", tag("b", claim["id"]), badge(claim["verdict"]), cls="named")
                if i == 0
                else Html()
            )
            rows.append(
                [first, _metric(e), _value(e), _limit(e), _bar(e, claim["verdict"], low, high)]
            )
    if any(e["threshold"] is not None for c in claims for e in c["evidence"]):
        rows.append([Html(), Html(), Html(), Html(), _ruler(low, high)])
    lede = _LEDE
    whiskers = any(e.get("interval") for c in claims for e in c["evidence"])
    remark = note("Whiskers: 95 % intervals, whole sequences resampled.") if whiskers else None
    body = stack(table(columns, rows, stacked=True, cls="score"), remark)
    return Section("scorecard", "Scorecard", lede, body)


def _metric(e: Document) -> Html:
    source = tag("div", e["source"], cls="muted") if e.get("source") else None
    return tag("div", e["metric"], source)


def _value(e: Document) -> Html:
    unit = f" {e['unit']}" if e.get("unit") else ""
    bounds = interval(e.get("interval"))
    return tag(
        "div", f"{number(e['value'])}{unit}", tag("div", bounds, cls="muted") if bounds else None
    )


def _limit(e: Document) -> Html | str:
    sign = "≥ " if e.get("better") == "higher" else "≤ "
    return "" if e["threshold"] is None else f"{sign}{number(e['threshold'])}"


def _over(value: float, e: Document) -> float | None:
    """How much of the limit is used: above 1 is beyond it, whichever side is the good one."""
    limit = e["threshold"]
    if e.get("better") == "higher":
        return limit / value if value > 0 else math.inf
    return value / limit if limit > 0 else (0.0 if value <= 0 else math.inf)


def _ratios(e: Document) -> list[float]:
    if e["threshold"] is None or e["value"] is None:
        return []
    return [r for v in (e["value"], *(e.get("interval") or ())) if (r := _over(v, e)) is not None]


def _ends(ratios: list[float]) -> tuple[float, float]:
    positive = [min(max(r, _LEAST), _MOST) for r in ratios if r > 0] or [1.0]
    return 10.0 ** min(-2, math.floor(math.log10(min(positive)))), 10.0 ** max(
        1, math.ceil(math.log10(max(positive)))
    )


def _bar(e: Document, verdict: str, low: float, high: float) -> Html:
    ratios = _ratios(e)
    if not ratios:
        return Html()
    finite = [min(r, high) for r in ratios]
    bar = span(finite[0], sorted(finite[1:]) or None, low, high, css(verdict))
    share = e["value"] / e["threshold"] if e["threshold"] else math.inf
    over = tag("span", f"{number(share)} ×" if math.isfinite(share) else "")
    return tag("div", bar, over, cls="over")


def _ruler(low: float, high: float) -> Html:
    axis = Axis("", low, high, log=True)
    marks: list[Any] = []
    limit = axis.at(1.0, 6.0, 194.0)
    for value, label in decades(low, high, 5):
        place = axis.at(value, 6.0, 194.0)
        if abs(place - limit) > 30:
            marks.append(tag("text", label, x=place, y=12, text_anchor="middle"))
    marks.append(tag("text", "limit", x=limit, y=12, text_anchor="middle", cls="strong"))
    scale = svg(200, 16, join(marks), "scale: value over limit", "span")
    return tag("div", scale, tag("span"), cls="over")
