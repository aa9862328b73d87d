"""Which known mistakes a tolerance lets pass: asked where thresholds are wider than usual.

A threshold that follows from the noise floor is far below what any known mistake changes. One that somebody widened
(``--k``) may not be; then the smallest mistakes are made, and those that stay within it are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..convert.open import Checkpoint
from .batches import ProbeLike
from .floor import Floor, K
from .mutants import mutants
from .self_test import FUNCTION, trials

# those that change logits least, on the bundled sample and on random models
SUBTLE = ("norm-epsilon", "gelu-erf", "one-weight", "attention-cap", "value-row", "window-by-one")


def let_pass(
    checkpoint: Checkpoint, probes: Iterable[ProbeLike], floor: Floor, device: str | None = None
) -> dict[str, Any]:
    """Make the smallest known mistakes in a model and hold what they change against thresholds.

    Args:
        checkpoint: the model, opened.
        probes: of the comparison.
        floor: of the comparison, in any compute type; mistakes are run in float32, so that their own effect counts.
        device: of the torch runner.

    Returns:
        ``k``, ``tried`` and ``passed``: titles of the mistakes.
    """
    there = [m.id for m in mutants(checkpoint) if m.id in SUBTLE]
    exact = replace(floor, dtype="float32")
    found = list(trials(checkpoint, probes, exact, device=device, only=there))
    passed = [t.mutant.title for t in found if not set(t.caught_by) & FUNCTION]
    return {"k": floor.k, "tried": [t.mutant.title for t in found], "passed": passed}


def warning(found: Mapping[str, Any] | None) -> str | None:
    """A sentence for the report; None where nothing known passes."""
    if found is None:
        return None
    k, passed, tried = found["k"], found["passed"], found["tried"]
    if tried is None:
        return (
            f"Thresholds of {k:g} x floor instead of {K:g}: which known mistakes they let pass is not known, as no "
            "model runs here."
        )
    if not passed:
        return None
    return (
        f"Thresholds of {k:g} x floor instead of {K:g} let {len(passed)} of {len(tried)} known mistakes pass: "
        f"{'; '.join(passed)}. A PASS says nothing of these."
    )
