"""Whether a report that was read agrees with itself: claims with their numbers, verdict and exit code with the claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats.errors import FormatError, printable
from .claims import ERROR, EXITS, PASS, Claim, overall


def check_verdict(document: Mapping[str, Any], where: Path) -> None:
    """Refuse a report whose verdict is not that of its claims and numbers; a seal can be made again by anyone.

    Args:
        document: a valid ``g2kit.report/1``.
        where: its file.

    Raises:
        FormatError: verdict or exit code do not follow from the claims, or a claim not from its numbers.
    """
    for claim in document["claims"]:
        for e in claim["evidence"]:
            if claim["verdict"] == PASS and _is_beyond(e):
                raise FormatError(
                    f"the report contradicts itself: {claim['id']} is a PASS with {printable(e['metric'])} "
                    f"{e['value']:.3g} beyond {e['threshold']:.3g}.",
                    where=where, fix="run the comparison again.",
                )  # fmt: skip
    claims = [Claim(c["id"], c["title"], c["verdict"], c["sentence"]) for c in document["claims"]]
    found = document["verdict"], document["exit_code"]
    if not claims and document.get(
        "error"
    ):  # what could not be compared: the error's own exit code
        judged = {EXITS[v] for v in EXITS if v != ERROR}
        good, expected = found[0] == ERROR and found[1] not in judged, f"{ERROR} of an error"
    else:
        verdict = overall(claims)
        good = found == (verdict, EXITS[verdict])
        expected = f"{verdict} with {EXITS[verdict]}"
    if not good:
        raise FormatError(
            f"the report contradicts itself: verdict {found[0]} with exit code {found[1]}, its "
            f"{len(claims)} claims give {expected}.",
            where=where,
            fix="run the comparison again.",
        )


def _is_beyond(evidence: Mapping[str, Any]) -> bool:
    value, threshold = evidence["value"], evidence["threshold"]
    if value is None or threshold is None:
        return False
    beyond = value < threshold if evidence.get("better") == "higher" else value > threshold
    return bool(beyond)
