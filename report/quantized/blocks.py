"""The error behind every block: how what rounding costs adds up."""

from __future__ import annotations

from ..markup import Html
from ..numerals import count, number, percent, seconds
from ..page import Section
from ..parts import Document, stack
from ..plots import Hover, Layer, Line, chart, figure, legend, sample_line
from ..scales import Axis, linear_ticks
from ..tables import Column, table

_PHASES = {
    "gather": "gathering inputs", "round": "rounding", "forward": "running on", "tune": "tuning",
    "all": "in all",
}  # fmt: skip


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    blocks = document["blocks"]
    known = [b for b in blocks if b["error"] is not None]
    if not known:
        return None
    worst = max(known, key=lambda b: float(b["error"]))
    last = known[-1]
    lede = (
        f"How far the hidden states behind a block are from the original model's on held-out text, relative to their size. "
        f"Behind the last block it is {percent(last['error'])}"
    )
    most = f", the most behind block {worst['layer']} ({percent(worst['error'])})."
    return Section(
        "blocks",
        "Error by block",
        lede + (most if worst is not last else "."),
        stack(_plot(blocks, known)),
    )


def _plot(blocks: list[Document], known: list[Document]) -> Html:
    tuned = any(b.get("error_before") is not None for b in blocks)
    top = max(e for b in known for e in (b["error"], b.get("error_before") or 0.0)) * 1.12 or 1.0
    y = Axis(
        "relative error (RMS)",
        0.0,
        top,
        ticks=[(v, percent(v)) for v, _ in linear_ticks(0.0, top, 6)],
    )
    ticks = [(float(b["layer"]), f"{b['layer']}{_kind(b)}") for b in blocks]
    x = Axis("block" + (" (L local, G global attention)" if _kind(blocks[0]) else ""),
             blocks[0]["layer"] - 0.5, blocks[-1]["layer"] + 0.5, ticks=ticks)  # fmt: skip
    before = Line([(b["layer"], b.get("error_before")) for b in blocks], "s0 dash", dots="none")
    drawn: list[Layer] = [
        *([before] if tuned else []),
        Line([(b["layer"], b["error"]) for b in blocks], "s1", dots="f1"),
        Hover([(b["layer"], f"block {b['layer']} | error {percent(b['error'])}") for b in blocks]),
    ]
    return figure(
        lambda w: chart(w, 300, x, y, drawn, alt=f"Error behind {count(len(blocks), 'block')}"),
        key=_key() if tuned else None,
        table=_table(blocks),
    )


def _key() -> Html:
    return legend(
        ("as written", sample_line("s1", "f1")), ("before all blocks were tuned together", sample_line("s0 dash", "none")),
    )  # fmt: skip


def _kind(b: Document) -> str:
    return f"|{b['kind'][:1].upper()}" if b.get("kind") else ""


def _table(blocks: list[Document]) -> Html:
    phases = [
        p for p in _PHASES if any((b.get("seconds") or {}).get(p) is not None for b in blocks)
    ]
    columns = [Column("Block"), Column("Error (RMS)", True)]
    columns += [Column(f"Time {_PHASES[p]}", True) for p in phases]
    rows = [
        [
            number(b["layer"]),
            percent(b["error"]),
            *(seconds((b.get("seconds") or {}).get(p)) for p in phases),
        ]
        for b in blocks
    ]
    return table(columns, rows)
