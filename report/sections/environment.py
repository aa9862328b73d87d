"""Where the noise floor comes from, what the figures were computed with, and what they do not say."""

from __future__ import annotations

from ..markup import Html, tag
from ..numerals import number
from ..page import Section
from ..parts import Document, bullets, environment, stack
from ..tables import Column, table

_CAVEATS = (
    "Divergence is KL(reference ‖ candidate) in nats over the whole vocabulary, computed term by term without cancellation.",
    "Total variation is the share of sampled tokens that must differ between the two sides.",
    "Intervals resample whole sequences (documents where there are any), not tokens; maxima have no interval, the worst "
    "tokens are shown instead.",
    "A limit of 10 × the floor in KL is about 3.2 × in logits: KL grows with the square of the error.",
    "Agreement on these probes says nothing of inputs unlike them.",
)


def section(document: Document, absent: list[str]) -> Section:
    """Always there.

    Args:
        document: the report.
        absent: titles of sections that have no data.
    """
    missing = f"No data in this report for: {', '.join(absent)}." if absent else None
    compared = bool(document.get("metrics"))
    body = stack(
        _floor(document.get("floor")),
        tag("h3", "Machine and versions"),
        environment(document["environment"]),
        tag("h3", "How to read the figures") if compared else None,
        bullets(_CAVEATS) if compared else None,
        tag("p", missing, cls="note") if missing else None,
    )
    return Section("environment", "Environment and caveats", "", body)


def _floor(floor: Document | None) -> Html | None:
    if not floor:
        return None
    columns = [
        Column("Noise floor by"),
        Column("Computed in"),
        Column("KL, max", True),
        Column("KL, mean", True),
        Column("Logits, RMS", True),
        Column("Tokens", True),
    ]
    rows = [
        [
            e["name"],
            e["dtype"],
            number(e["kl_max"]),
            number(e["kl_mean"]),
            number(e["rms_logit"]),
            number(e["tokens"]),
        ]
        for e in floor["estimators"]
    ]
    rows.append(
        [
            "Used: the largest",
            "",
            number(floor["kl_max"]),
            number(floor["kl_mean"]),
            number(floor["rms_logit"]),
            "",
        ]
    )
    return stack(tag("h3", "Noise floor"), table(columns, rows, stacked=True))
