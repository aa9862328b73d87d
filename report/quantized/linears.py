"""Every linear weight: how it was rounded, and what that cost."""

from __future__ import annotations

from ..markup import Child, clip, tag
from ..numerals import count, nbytes, number, percent, seconds
from ..page import Section
from ..parts import Document, filled, stack
from ..tables import Cell, Column, filter_box, table
from .words import linears, methods, percentage, rms

_CAPTION = (
    "Output error: root mean square on held-out inputs, relative to the output; “if nearest” is what rounding to nearest "
    "would have cost. Clipped: weights beyond their group's range."
)
_COLUMNS = (
    Column("Weight", cls="nowrap"),
    Column("Scheme", cls="nowrap"),
    Column("Method"),
    Column("Output error", True),
    Column("If nearest", True),
    Column("Weight error", True),
    Column("Clipped", True),
    Column("Damping", True),
    Column("Dead inputs", True),
    Column("Size", True),
    Column("Time", True),
    Column("Fell back"),
)


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    found = linears(document)
    if not found:
        return None
    one = len({x["scheme"] for x in found.values()}) == 1
    rows = [_row(name, x, one) for name, x in found.items()]
    used = filled(_COLUMNS, rows)
    fell = sum(1 for x in found.values() if x.get("fallbacks"))
    lede = f"{count(len(found), 'weight')}: {methods(document)}. " + (
        f"{count(fell, 'weight')} fell back to something else than asked for; the last column says why."
        if fell
        else "Nothing fell back."
    )
    body = stack(
        tag("div", filter_box("linears-table", "Filter weights"), cls="tools"),
        table(
            [_COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows],
            sortable=True, id="linears-table", caption=_CAPTION if any(x["error"] is not None for x in found.values()) else None,
        ),
    )  # fmt: skip
    return Section("linears", "Linear weights", lede, body)


def _row(name: str, x: Document, one: bool) -> list[Child | Cell]:
    nearest = (x.get("held_error") or {}).get("rtn")
    weight, damp, dead = x["weight_error"], x.get("damp"), x.get("dead_columns")
    return [
        name.removeprefix("model.").removesuffix(".weight"),
        "" if one else x["scheme"],
        x["method"],
        _cell(percentage(x["error"]), rms(x["error"])),
        _cell(percentage(nearest), rms(nearest)) if x["method"] != "rtn" else "",
        _cell(percent(weight), weight),
        _cell(percent(x.get("clipped")), x.get("clipped")),
        _cell(percent(damp, 0) if damp is not None else "", damp),
        _cell(number(dead) if dead else "", dead),
        _cell(nbytes(x["bytes"]), float(x["bytes"])),
        _cell(seconds(x.get("seconds")) if x.get("seconds") is not None else "", x.get("seconds")),
        clip("; ".join(x.get("fallbacks") or ()), 300),
    ]


def _cell(shown: str, value: float | None) -> Cell:
    return Cell(shown, value)
