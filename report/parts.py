"""Small pieces that several sections share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .markup import Child, Html, join, tag
from .numerals import NOTHING, count, seconds
from .tables import Cell, Column, facts

Document = dict[str, Any]
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "−0123456789")

_CIRCLE = '<circle cx="12" cy="12" r="10"/>'
# shapes differ, so that a verdict is read without its colour
_GLYPHS = {
    "PASS": Html(f'{_CIRCLE}<path d="M7.5 12.5l3 3 6-6.5"/>'),
    "FAIL": Html(f'{_CIRCLE}<path d="M8.5 8.5l7 7m0-7l-7 7"/>'),
    "INCONCLUSIVE": Html(
        f'{_CIRCLE}<path d="M9.3 9.4a2.8 2.8 0 1 1 4 2.6c-.9.4-1.3 1-1.3 1.9M12 17v.1"/>'
    ),
    "ERROR": Html('<path d="M12 3l10 18H2z"/><path d="M12 10v5m0 3v.1"/>'),
}


def evaluated(group: Document) -> str:
    """The positions that a group's figures are of: those that are not finite are in none of them."""
    left = group["non_finite"]
    if not left:
        return count(group["positions"], "position")
    finite = count(group["positions"] - left, "finite position")
    return f"{finite}; {left:,} left out: not finite"


def glyph(verdict: str) -> Html:
    """The verdict's shape."""
    return tag(
        "svg",
        _GLYPHS.get(verdict, Html(_CIRCLE)),
        cls="glyph",
        viewBox="0 0 24 24",
        aria_hidden="true",
    )


def css(verdict: str) -> str:
    """The verdict's class."""
    return verdict.lower() if verdict in _GLYPHS else "muted"


def badge(verdict: str) -> Html:
    """A verdict as a small label."""
    return tag("span", glyph(verdict), verdict, cls=f"badge {css(verdict)}")


def raised(text: str) -> Html:
    """A number with its exponent as ``<sup>``: in large type the raised digits of fonts do not sit together."""
    head, times, exponent = text.partition("×10")
    return join((head, times, tag("sup", exponent.translate(_LOWERED)) if times else None))


def bullets(texts: Sequence[Child]) -> Html:
    """A plain list."""
    return tag("ul", *(tag("li", t) for t in texts), cls="plain")


def call(headline: Child, text: Child) -> Html:
    """A remark that stands out."""
    return tag("div", tag("b", headline), tag("span", text), cls="call")


def more(title: str, body: Html) -> Html:
    """What is shown on demand."""
    return tag("details", tag("summary", title), body)


def note(text: Child) -> Html:
    """A remark under a plot or table."""
    return tag("p", text, cls="note")


def sentences(*parts: str | None) -> str:
    """What is known, as one paragraph."""
    return " ".join(p for p in parts if p)


def stack(*parts: Html | None) -> Html:
    """Pieces one below the other."""
    return join(parts)


def command(run: Document | None) -> Html | None:
    """The line to repeat a run with, and a button that copies it."""
    if not run or not run.get("command"):
        return None
    line = run["command"]
    return tag(
        "div",
        tag("code", line),
        tag("button", "Copy", type="button", data_copy=line),
        cls="command",
    )


def cost(run: Document) -> str:
    """What a run took: time, processor time, memory."""
    time, cpu, peak = (run.get(k) for k in ("seconds", "cpu_seconds", "peak_rss_mib"))
    return sentences(
        None if time is None else seconds(time),
        None if cpu is None else f"({seconds(cpu)} of processor)",
        None if peak is None else f"and {peak:,.0f} MiB at most",
    )


def shown(value: object) -> str | None:
    """A value of the environment or the settings."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else str(value)


def environment(found: Document) -> Html:
    """Machine and versions."""
    return facts([(k.replace("_", " "), shown(v)) for k, v in sorted(found.items())])


def tile(name: str, value: str, unit: str | None = None) -> Html:
    """A figure that most readers want, large."""
    small = tag("small", f" {unit}") if unit else None
    return tag("div", tag("dt", name), tag("dd", raised(value), small))


def filled(columns: Sequence[Column], rows: Sequence[Sequence[Child | Cell]]) -> list[int]:
    """Which columns have a value in any row."""

    def known(cell: Child | Cell) -> bool:
        return (cell.shown if isinstance(cell, Cell) else cell) not in (None, "", NOTHING)

    return [i for i in range(len(columns)) if any(known(row[i]) for row in rows)]
