"""What fell back, what to know, and where it was made."""

from __future__ import annotations

from ..markup import tag
from ..page import Section
from ..parts import Document, bullets, stack
from ..parts import environment as machine

_MOST = 60


def section(document: Document) -> Section | None:
    """See :data:`.html.ORDER`."""
    fallbacks = document["fallbacks"]
    told = {*fallbacks, *document["warnings"]}
    notes = [n for n in document["notes"] if n not in told]
    groups = (("Warnings", document["warnings"]), ("Fell back", fallbacks), ("Notes", notes))
    parts = [
        stack(tag("h3", name), bullets(_some(texts)))
        for name, texts in groups
        if texts
    ]  # fmt: skip
    if not parts:
        return None
    return Section("remarks", "Warnings and notes", "", stack(*parts))


def _some(texts: list[str]) -> list[str]:
    rest = len(texts) - _MOST
    return texts if rest <= 0 else [*texts[:_MOST], f"and {rest} more, in the JSON document"]


def environment(document: Document, absent: list[str]) -> Section:
    """Always there.

    Args:
        document: the report.
        absent: titles of sections that have no data.
    """
    missing = f"No data in this report for: {', '.join(absent)}." if absent else None
    body = stack(
        machine(document["environment"]),
        tag("p", missing, cls="note") if missing else None,
    )
    return Section("environment", "Environment", "", body)
