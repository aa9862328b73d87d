"""Every tensor: the same bits, or how far apart."""

from __future__ import annotations

from ..markup import Child, Html, tag
from ..matrices import grid
from ..numerals import count, number, percent
from ..page import Section
from ..parts import Document, badge, filled, stack
from ..tables import Cell, Column, filter_box, table

_COLUMNS = (
    Column("Tensor", cls="nowrap"),
    Column("Shape", cls="nowrap"),
    Column("Reference"),
    Column("Candidate"),
    Column("Verdict"),
    Column("Different", True),
    Column("SQNR (dB)", True),
    Column("Relative error", True),
    Column("Error in steps", True),
    Column("Limit", True),
    Column("Hash"),
    Column("Note", cls="remark"),
)


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    ledger = document.get("ledger") or []
    if not ledger:
        return None
    body = stack(_heat(ledger), _open(ledger))
    return Section("tensors", "Tensors", _lede(ledger), body)


def _lede(ledger: list[Document]) -> str:
    same = sum(1 for t in ledger if t["different"] == 0)
    if same == len(ledger):
        return f"All {count(len(ledger), 'tensor')} are equal, bit for bit."
    failed = [t["name"] for t in ledger if t["verdict"] not in ("PASS", None)]
    head = f"{same} of {count(len(ledger), 'tensor')} are equal, bit for bit; {len(failed)} did not pass."
    return head if not failed or len(failed) > 3 else f"{head[:-1]}: {', '.join(failed)}."


def _open(ledger: list[Document]) -> Html:
    """The table; only rows with something to say when there are many."""
    striking = [t for t in ledger if t["verdict"] not in ("PASS", None)]
    whole = _table(ledger, "ledger")
    tools = tag("div", filter_box("ledger", "Filter tensors"), cls="tools")
    if not striking or len(striking) == len(ledger):
        return tag(
            "details",
            tag("summary", f"All {count(len(ledger), 'tensor')}"),
            tools,
            whole,
            open=len(ledger) <= 12,
        )
    return stack(
        _table(striking, "striking"),
        tag("details", tag("summary", f"All {count(len(ledger), 'tensor')}"), tools, whole),
    )


def _table(ledger: list[Document], id: str) -> Html:
    """Columns without any value are left out."""
    rows = [_row(t) for t in ledger]
    used = filled(_COLUMNS, rows)
    return table(
        [_COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows], sortable=True, id=id
    )


def _row(t: Document) -> list[Child | Cell]:
    total = (t["equal"] or 0) + (t["different"] or 0)
    different = number(t["different"])
    if t["different"] and total:
        different += f" ({percent(t['different'] / total)})"
    shape = t["shape"]
    return [
        t["name"],
        Cell(" × ".join(str(n) for n in shape) if shape else "", _size(shape)),
        t["reference_dtype"],
        t["candidate_dtype"],
        badge(t["verdict"]) if t["verdict"] else "",
        Cell(different, t["different"]),
        _number(t["sqnr_db"]),
        _number(t["relative_error"]),
        _number(t["max_steps"]),
        _number(t["bound"]),
        _hash(t["hash"]),
        t["note"],
    ]


def _size(shape: list[int] | None) -> float | None:
    size = 1.0
    for n in shape or ():
        size *= n
    return size if shape else None


def _number(x: float | None) -> Cell:
    return Cell(number(x), x)


def _hash(text: str | None) -> Child:
    return tag("code", text.rpartition(":")[2][:12], title=text) if text else ""


def _heat(ledger: list[Document]) -> Html | None:
    """Blocks x matrices, where a signal-to-noise ratio is known: darker is worse."""
    found = grid({t["name"]: t["sqnr_db"] for t in ledger})
    if found is None:
        return None
    plot = found.plot("dB", alt="Error by block and matrix", reverse=True)
    span = f"{number(min(found.known))} dB (strong) to {number(max(found.known))} dB (faint)"
    caption = tag("figcaption", f"Signal over rounding error by block and matrix, {span}.")
    return stack(tag("h3", "Where the rounding error is"), caption, plot)
