"""Whether both sides would say the same token, by how sure the reference was."""

from __future__ import annotations

from ..bars import Share, shares
from ..numerals import count, number, percent
from ..page import Section
from ..parts import Document, sentences, stack
from ..plots import figure, legend, sample_area
from ..tables import Column, table


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    bins = [b for b in document.get("agreement") or [] if b["positions"]]
    if not bins:
        return None
    rows = [_row(b) for b in bins]
    plot = figure(
        lambda w: shares(
            w, rows, "margin (logits)", alt="Top-1 agreement by margin of the reference"
        ),
        key=legend(("same token", sample_area("f1")), ("another token", sample_area("f2"))),
        table=table(
            [
                Column("Margin (logits)"),
                Column("Positions", True),
                Column("Same", True),
                Column("Share", True),
            ],
            [
                [
                    _label(b),
                    number(b["positions"]),
                    number(b["same"]),
                    percent(b["same"] / b["positions"]),
                ]
                for b in bins
            ],
        ),
    )
    return Section("agreement", "Top-1 agreement", _lede(document, bins), stack(plot))


def _lede(document: Document, bins: list[Document]) -> str:
    flips = sum(b["positions"] - b["same"] for b in bins)
    total = sum(b["positions"] for b in bins)
    if not flips:
        return f"The most likely token is the same at all {count(total, 'position')}."
    overall = (document.get("metrics") or {}).get("overall") or {}
    known = (document.get("metrics") or {}).get("tolerance") is not None
    real = overall.get("real_flips") if known else None
    return sentences(
        f"The most likely token changes at {flips:,} of {count(total, 'position')}.",
        None
        if real is None
        else f"Of these, {real:,} cannot be explained by a near-tie in the reference."
        if real
        else "All are near-ties in the reference: coin tosses, not defects.",
    )


def _label(b: Document) -> str:
    low, high = b["from"], b["to"]
    if high is None:
        return f"{number(low)} +"
    return f"{number(low)} – {number(high)}" if low is not None else f"< {number(high)}"


def _row(b: Document) -> Share:
    same = b["same"] / b["positions"]
    flips = b["positions"] - b["same"]
    note = f"{percent(same)} of {b['positions']:,}" + (
        f", {count(flips, 'change')}" if flips else ""
    )
    return Share(_label(b), [(same, "f1"), (1 - same, "f2")], note, f"margin {_label(b)} | {note}")
