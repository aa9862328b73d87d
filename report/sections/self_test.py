"""Which known faults the verifier catches in this setting: what a PASS is worth."""

from __future__ import annotations

from ..markup import Child, Html, clip, tag
from ..numerals import count, number
from ..page import Section
from ..parts import Document, call, note, stack
from ..tables import Column, table

_DOTS = {
    "FAIL": ("yes", "caught"),
    "PASS": ("no", "missed"),
    "INCONCLUSIVE": ("half", "inconclusive"),
}


def section(document: Document) -> Section | None:
    """See :data:`..sections.ORDER`."""
    test = document.get("self_test")
    if not test:
        return None
    mutants = test["mutants"]
    placed = [m for m in mutants if m["right_place"] is not None]
    right = sum(1 for m in placed if m["right_place"])
    faults = f"{test['caught']} of {count(test['of'], 'injected fault')} caught"
    lede = f"{faults}; {right} of {len(placed)} traced to the right place."
    claims = sorted({c for m in mutants for c in m["claims"]}, key=_claim_order)
    columns = [
        Column("Fault"),
        Column("Id"),
        *(Column(c, cls="c") for c in claims),
        Column("KL, max", True),
        Column("KL, mean", True),
        Column("Place"),
        Column("Hypothesis"),
    ]
    rows = [
        [
            m["title"],
            tag("code", m["id"]),
            *(_dot(m["claims"].get(c), m["title"], c) for c in claims),
            number(m["kl_max"], 2),
            number(m["kl_mean"], 2),
            _place(m, test.get("layers")),
            m["hypothesis"],
        ]
        for m in mutants
    ]
    missed = [m["title"] for m in mutants if not m["caught_by"]]
    body = stack(
        table(
            columns,
            rows,
            cls="kill",
            caption="Each row is a copy of the model with one known fault; a dot says which claims failed because of it. "
            "g2verify self-test --mutants takes the ids.",
        ),
        note(_key()),
        call("Not caught", "; ".join(missed)) if missed else None,
    )
    return Section("self-test", "Self-test", lede, body)


def _claim_order(claim: str) -> tuple[int, str]:
    return "WCLQX".find(claim[:1]), claim


def _dot(verdict: str | None, title: str, claim: str) -> Html:
    if verdict is None:
        return tag("span", "·", cls="muted")
    shape, word = _DOTS.get(verdict, ("no", verdict))
    return tag(
        "span",
        cls=f"dot {shape}",
        role="img",
        aria_label=f"{claim}: {word}",
        title=f"{title}: {claim} {word}",
    )


def _key() -> Html:
    parts: list[Child] = []
    for shape, word in _DOTS.values():
        parts += [tag("span", cls=f"dot {shape}"), f" {word}  "]
    return tag("span", *parts)


def _place(m: Document, layers: int | None) -> str:
    expected = clip(", ".join(_layer(x, layers) for x in m["expected_layers"] or ()), 24)
    if m["found_layer"] is None:
        return f"not found, expected {expected}" if expected else "–"
    found = _layer(m["found_layer"], layers)
    if m["right_place"] is None:
        return found
    return f"{found} ✓" if m["right_place"] else f"{found}, expected {expected or 'none'}"


def _layer(at: int, layers: int | None) -> str:
    """A block's number, or what stands before and behind the blocks."""
    names = {-1: "embedding"}
    if layers is not None:
        names |= {layers: "final norm", layers + 1: "head"}
    return names.get(at, str(at))
