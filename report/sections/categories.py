"""The same figures by kind of text and by stretch of the sequence: averages hide what only some readers meet."""

from __future__ import annotations

from ..markup import Html, tag
from ..numerals import number, percent
from ..page import Section
from ..parts import Document, evaluated, more, sentences, stack
from ..tables import Cell, Column, table

_COLUMNS = (
    Column(""),
    Column("Sequences", True),
    Column("Positions", True),
    Column("KL, mean", True),
    Column("KL, 99 %", True),
    Column("KL, max", True),
    Column("Tokens that differ", True),
    Column("Same top-1", True),
    Column("Perplexity", True),
)


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    metrics = document.get("metrics")
    if not metrics or not metrics["categories"]:
        return None
    parts: list[Html | None] = [_groups(metrics["categories"], "Kind of text")]
    if len(metrics["ranges"]) > 1:
        parts += [tag("h3", "By stretch of the sequence"), _groups(metrics["ranges"], "Range")]
    if len(metrics["documents"]) > 1:
        parts.append(
            more(
                f"By sequence ({len(metrics['documents'])})",
                _groups(metrics["documents"], "Sequence"),
            )
        )
    overall = metrics["overall"]
    of = f"Figures are of {evaluated(overall)}." if overall["non_finite"] else None
    lede = sentences(_lede(metrics["categories"]) or None, of)
    return Section("categories", "By category", lede, stack(*parts))


def _lede(groups: list[Document]) -> str:
    known = [(g["metrics"]["kl"]["mean"], g["name"]) for g in groups if g["metrics"]]
    if len(known) < 2 or not max(known)[0]:
        return ""
    return (
        f"The largest mean divergence is in “{max(known)[1]}”, the smallest in “{min(known)[1]}”."
    )


def _groups(groups: list[Document], name: str) -> Html:
    columns = [Column(name), *_COLUMNS[1:]]
    return table(columns, [_row(g) for g in groups], sortable=True, stacked=True)


def _row(g: Document) -> list[str | Cell]:
    kl, tv = g["metrics"].get("kl"), g["metrics"].get("tv")
    p = kl["percentiles"] if kl else {}
    return [
        g["name"].replace("-", "–") if g["name"].replace("-", "").isdigit() else g["name"],
        _cell(g["documents"]),
        _cell(g["positions"]),
        _cell(kl and kl["mean"]),
        _cell(p.get("99")),
        _cell(p.get("100")),
        Cell(percent(tv and tv["mean"]), tv and tv["mean"]),
        Cell(percent(g["agreement"]), g["agreement"]),
        Cell(_perplexity(g), g["perplexity_cand"]),
    ]


def _cell(x: float | None) -> Cell:
    return Cell(number(x), x)


def _perplexity(g: Document) -> str:
    ref, cand = g["perplexity_ref"], g["perplexity_cand"]
    same = number(ref, 4) == number(cand, 4)
    return number(ref, 4) if same else f"{number(ref, 4)} → {number(cand, 4)}"
