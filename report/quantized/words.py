"""What several parts say in the same words."""

from __future__ import annotations

import re
from collections import Counter

from ..numerals import number
from ..parts import Document

SELF, NONE = "self", "none"  # sources of calibration
# of `method` and `recover`: what a reader who does not know the words is told
METHODS = {
    "gptq": "GPTQ (weights rounded one after the other, each making up for the errors before it)",
    "gptq+": "GPTQ towards the unquantized stream",
    "rtn": "rounding to nearest",
}


# the order in which a block uses its matrices; others follow by name
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(document: Document) -> dict[str, Document]:
    """Linear weights block by block; JSON has them by name."""

    def place(name: str) -> tuple[list[int], int, str]:
        numbers = [int(n[:9]) for n in re.findall(r"[0-9]+", name)]
        kind = next((i for i, k in enumerate(_ORDER) if k in name), len(_ORDER))
        return numbers, kind, name

    found = document["linears"]
    return {name: found[name] for name in sorted(found, key=place)}


def schemes(document: Document) -> str:
    """``int4 g128 sym``, or how many of each."""
    targets = document["targets"]
    if len(targets) == 1:
        return str(next(iter(targets)))
    return ", ".join(f"{n} × {name}" for name, n in targets.items())


def title(document: Document) -> str:
    """Of the window."""
    return f"{schemes(document)} · {document['format']}"


def methods(document: Document) -> str:
    """``26 × gptq, 2 × rtn``: what was taken in the end."""
    counts = Counter(x["method"] for x in document["linears"].values())
    return ", ".join(f"{n} × {name}" for name, n in counts.most_common())


def calibrated_on(document: Document) -> str | None:
    """Whose inputs decided; None where no inputs did."""
    c = document["calibration"]
    if c is None or (not c["tokens"] and c["source"] == NONE):
        return None
    if not c["tokens"]:
        return f"the importance matrix {c['source']}"
    source = "text that the model wrote itself" if c["source"] == SELF else c["source"]
    return f"{c['tokens']:,} tokens in {c['sequences']:,} sequences: {source}"


def rms(error: float | None) -> float | None:
    """Percent of a root mean square, from a share of squares."""
    return None if error is None else 100 * error**0.5


def percentage(error: float | None) -> str:
    """An output error as a share of the output."""
    return number(None if error is None else rms(error)) + ("" if error is None else " %")
