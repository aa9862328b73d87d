"""What quantizing cost on text that decided nothing."""

from __future__ import annotations

from ..markup import Child, Html
from ..numerals import count, interval, number, percent
from ..page import Section
from ..parts import Document, note, sentences, stack
from ..tables import Column, table

_READ = (
    "KL is the divergence of the quantized model's next-token distribution from the original's, in nats, over the whole "
    "vocabulary. Both run in float32 on the same tokens. Intervals are 95 %, whole sequences resampled; with few "
    "sequences they are wide."
)


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    q = document["quality"]
    if q is None or q["kl"] is None:
        return None
    columns = [
        Column("On held-out text"),
        Column("Original", True),
        Column("Quantized", True),
        Column("95 % interval"),
    ]
    body = stack(table(columns, _rows(q), stacked=True), note(_READ), _recovered(document))  # fmt: skip
    over = f"{count(q['positions'], 'position')}"
    if q.get("sequences"):
        over += f" of {count(q['sequences'], 'sequence')}"
    return Section("quality", "Quality", sentences(f"Measured on {over}.", _small(q)), body)


def _rows(q: Document) -> list[list[Child]]:
    p = q.get("kl_percentiles") or {}
    ratio = q.get("perplexity_ratio_interval")
    rows: list[list[Child]] = [
        ["KL, mean (nats)", "0", number(q["kl"]), interval(q.get("kl_interval")) or ""]
    ]
    for k in sorted(p, key=_place):
        rows.append([f"KL, {_named(k)}", "0", number(p[k]), ""])
    if q["top1_agreement"] is not None:
        rows.append([
            "Same most likely token", "", percent(q["top1_agreement"]),
            _shares(q.get("top1_agreement_interval")),
        ])  # fmt: skip
    if q["perplexity"] is not None:
        rows.append(
            ["Perplexity", number(q["perplexity_original"], 4), number(q["perplexity"], 4), ""]
        )
        if q["perplexity_original"]:
            change = q["perplexity"] / q["perplexity_original"]
            rows.append(
                ["Perplexity, quantized over original", "1", number(change, 4), _narrow(ratio)]
            )
    return rows


def _named(percentile: str) -> str:
    names = {"50": "median", "100": "largest"}
    return names.get(percentile, f"{percentile} % of positions are below")


def _place(percentile: str) -> tuple[float, str]:
    """Percentiles in order; what is no number last."""
    plain = percentile.replace(".", "", 1).isascii() and percentile.replace(".", "", 1).isdigit()
    return (float(percentile) if plain else float("inf")), percentile


def _shares(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{percent(bounds[0])}, {percent(bounds[1])}]"


def _narrow(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"[{number(bounds[0], 4)}, {number(bounds[1], 4)}]"


def _small(q: Document) -> str | None:
    """What stands on little is said to."""
    if q.get("sequences") is not None and q["sequences"] < 8:
        return "So few say little of other text: hold out more for figures to rely on."
    return None


def _recovered(document: Document) -> Html | None:
    before = (document.get("recovery") or {}).get("kl_before")
    if not isinstance(before, int | float):
        return None
    return note(f"Before scales and gains were tuned, the mean KL was {number(before)} nats.")
