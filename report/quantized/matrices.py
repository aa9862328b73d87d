"""Which matrices of which blocks lose most: heat maps."""

from __future__ import annotations

from ..markup import Html, tag
from ..matrices import grid
from ..numerals import number
from ..page import Section
from ..parts import Document, stack
from .words import linears, rms


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    parts = [
        _map(
            "Output error",
            {n: rms(x["error"]) for n, x in linears(document).items()},
            "%",
            "Error of the output on held-out inputs, root mean square, in percent of the output: {} (faint) to {} (strong).",
        ),
        _map(
            "Sensitivity",
            {n: None if v is None else 1000 * v for n, v in sensitivities(document).items()},
            "thousandths of a nat",
            "KL of the whole model when this weight alone is rounded, in thousandths of a nat: {} (faint) to {} (strong).",
        ),
    ]
    known = [p for p in parts if p is not None]
    if not known:
        return None
    lede = "The output error is of one matrix alone; what it does to the model's answers is its sensitivity."
    if parts[1] is None:
        lede += " Sensitivities were not measured."
    return Section("matrices", "Where the error is", lede, stack(*known))


def sensitivities(document: Document) -> dict[str, float | None]:
    """KL of each weight rounded alone as it was, where that was measured."""
    found = (document.get("sensitivity") or {}).get("linears") or {}
    return {
        name: (found.get(name, {}).get("choices", {}).get(x["scheme"]) or {}).get("kl")
        for name, x in linears(document).items()
    }


def _map(title: str, values: dict[str, float | None], unit: str, says: str) -> Html | None:
    found = grid(values)
    if found is None:
        return None
    low, high = (number(f(found.known)) for f in (min, max))
    caption = tag("figcaption", says.format(low, high))
    return stack(tag("h3", title), caption, found.plot(unit, alt=f"{title} by block and matrix"))
