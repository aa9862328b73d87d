"""The sections of a verification report, in order: the answer on top, the evidence below.

Each is a function from the document to a :class:`~..page.Section`, or None where the document has no data for it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..page import Section
from ..parts import Document
from . import (
    agreement,
    blocks,
    categories,
    coverage,
    distribution,
    environment,
    identity,
    ledger,
    position,
    scorecard,
    self_test,
    worst,
)

Builder = Callable[[Document], Section | None]

ORDER: tuple[tuple[str, Builder], ...] = (
    ("Identity", identity.section),
    ("Scorecard", scorecard.section),
    ("Self-test", self_test.section),
    ("Coverage", coverage.section),
    ("Divergence by position", position.section),
    ("Error by block", blocks.section),
    ("Distribution", distribution.section),
    ("Top-1 agreement", agreement.section),
    ("Worst tokens", worst.section),
    ("By category", categories.section),
    ("Tensors", ledger.section),
)


def sections(document: Document) -> list[Section]:
    """What there is data for, and the environment, which names what there is none for."""
    built = [(title, build(document)) for title, build in ORDER]
    absent = [title for title, s in built if s is None]
    return [*(s for _, s in built if s is not None), environment.section(document, absent)]
