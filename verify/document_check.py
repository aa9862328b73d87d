"""Whether a report that was read agrees with itself: its verdict and exit code follow from its claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats.errors import FormatError
from .claims import ERROR, EXITS, Claim, overall


def check_verdict(document: Mapping[str, Any], where: Path) -> None:
    """Refuse a report whose verdict is not that of its claims; a seal can be made again by anyone.

    Args:
        document: a valid ``g2kit.report/1``.
        where: its file.

    Raises:
        FormatError: verdict or exit code do not follow from the claims.
    """
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
