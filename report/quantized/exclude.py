"""What to leave unquantized to gain most, and what that costs."""

from __future__ import annotations

from ..bars import share_bar
from ..markup import tag
from ..numerals import count, nbytes, number, percent
from ..page import Section
from ..parts import Document, command, more, note, stack
from ..tables import Cell, Column, table

_SHOWN = 8
_BY = {
    "kl": ("KL gained (nats)", "Ranked by the KL that the weight alone costs, per byte."),
    "output error": (
        "Output error",
        "Ranked by the error of the weight's own output on held-out inputs, which goes away. How much of that the model's "
        "answers would gain is not known from it: `g2quant sensitivity` measures that.",
    ),
}


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    found = document["exclude"]
    if not found or not found["rows"]:
        return None
    rows, (head, how) = found["rows"], _BY[found["by"]]
    first = rows[0]
    lede = f"Leaving {first['name']} as it is would add {nbytes(first['bytes'])}. {how}"
    columns = [
        Column("Weight", cls="nowrap"),
        Column(head, True),
        Column(""),
        Column("Adds", True),
        Column("Gain per MiB", True),
    ]
    most = max(r["gain"] for r in rows) or 1.0

    def cells(part: list[Document]) -> list[list[str | Cell]]:
        return [
            [
                r["name"],
                Cell(_gain(r["gain"], found["by"]), r["gain"]),
                Cell(tag("span", share_bar(r["gain"] / most, "f1"), cls="gain"), r["gain"]),
                Cell(nbytes(r["bytes"]), float(r["bytes"])),
                Cell(number(_rate(r, found["by"])), _rate(r, found["by"])),
            ]
            for r in part
        ]

    first_rows, rest = (
        table(columns, cells(part), sortable=True, stacked=True)
        for part in (rows[:_SHOWN], rows[_SHOWN:])
    )
    left = len(rows) - _SHOWN
    shown = " ".join(f"--exclude {r['name']}" for r in rows[:3])
    body = stack(
        first_rows,
        command({"command": shown}),
        more(f"The other {count(left, 'weight')}", rest) if left > 0 else None,
        note("Gains of several weights do not simply add up."),
    )
    return Section("exclude", "What to exclude", lede, body)


def _gain(gain: float, by: str) -> str:
    return percent(gain) if by == "output error" else number(gain)


def _rate(r: Document, by: str) -> float | None:
    """KL, or percent, per MiB."""
    unit = 1.0 if by == "kl" else 100.0
    return unit * r["gain"] / (r["bytes"] / (1 << 20)) if r["bytes"] else None
