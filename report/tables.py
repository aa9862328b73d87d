"""Tables: the twin of every plot, and what has no plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Child, Html, tag


@dataclass(frozen=True)
class Column:
    """A column's heading; numbers stand to the right."""

    label: str
    numeric: bool = False
    cls: str | None = None


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number behind it that rows are sorted by (None: last)."""

    shown: Child
    value: float | None


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child | Cell]],
    *,
    caption: str | None = None,
    sortable: bool = False,
    stacked: bool = False,
    id: str | None = None,
    cls: str | None = None,
) -> Html:
    """A table in a place that scrolls when it is too wide.

    Args:
        columns: the first holds the names of the rows.
        rows: cells; :class:`Cell` where sorting needs a number.
        caption: above.
        sortable: headings are buttons that sort.
        stacked: on narrow screens each row becomes a small list.
        id: for :func:`filter_box`.
        cls: further classes.
    """
    head = tag("tr", *(_heading(c, sortable) for c in columns))
    body = (
        tag("tr", *(_cell(c, x, i == 0) for i, (c, x) in enumerate(zip(columns, row, strict=True))))
        for row in rows
    )
    classes = " ".join(filter(None, (cls, "stack" if stacked else None)))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", head),
            tag("tbody", *body),
            id=id,
            cls=classes or None,
        ),
        cls="scroll",
        tabindex=None if stacked else 0,
        role=None if stacked else "region",
        aria_label=None if stacked else caption or columns[0].label,
    )


def _heading(c: Column, sortable: bool) -> Html:
    label: Child = tag("button", c.label, type="button") if sortable else c.label
    return tag("th", label, scope="col", cls=_class(c), aria_sort="none" if sortable else None)


def _cell(c: Column, cell: Child | Cell, first: bool) -> Html:
    value = None
    if isinstance(cell, Cell):
        value = "" if cell.value is None else repr(float(cell.value))
        cell = cell.shown
    if first:
        return tag("th", cell, scope="row", cls=_class(c), data_v=value)
    return tag("td", cell, cls=_class(c), data_label=c.label, data_v=value)


def _class(c: Column) -> str | None:
    return " ".join(filter(None, ("n" if c.numeric else None, c.cls))) or None


def filter_box(id: str, what: str) -> Html:
    """A field that hides the rows of table ``id`` without the text typed into it."""
    return tag("input", type="search", data_filter=id, placeholder=what, aria_label=what)


def facts(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Names and values; None is left out."""
    known = [(name, value) for name, value in pairs if value is not None and value != ""]
    return tag(
        "dl",
        *(x for name, value in known for x in (tag("dt", name), tag("dd", value, cls="break"))),
        cls="facts",
    )
