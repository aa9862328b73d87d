"""How large it was, how large it is, and what of that."""

from __future__ import annotations

from ..bars import Share, shares
from ..numerals import nbytes, number, percent
from ..page import Section
from ..parts import Document, sentences
from ..plots import figure, legend, sample_area
from ..tables import Column, table


def section(document: Document) -> Section:
    """See :data:`.html.ORDER`."""
    s = document["size"]
    rest_before = max(0, s["weights_before"] - s["linears_before"])
    whole_after = s.get("weights_after") or s["files_after"]
    rest_after = max(0, whole_after - s["linears_after"])
    sides = [
        ("Original", s["linears_before"], rest_before),
        ("Quantized", s["linears_after"], rest_after),
    ]
    most = max(1, *(a + b for _, a, b in sides))
    rows = [
        Share(
            name,
            [(linear / most, "f1"), (rest / most, "f0")],
            f"{nbytes(linear + rest)}: {nbytes(linear)} and {nbytes(rest)}",
            f"{name} | linear weights {nbytes(linear)} | everything else {nbytes(rest)}",
        )
        for name, linear, rest in sides
    ]
    cells = [
        [name, nbytes(linear), nbytes(rest), nbytes(linear + rest)] for name, linear, rest in sides
    ]
    columns = [Column("")] + [
        Column(c, True) for c in ("Linear weights", "Everything else", "Together")
    ]
    body = figure(
        lambda w: shares(w, rows, "bytes of weights", alt="Size before and after"),
        key=legend(
            ("linear weights", sample_area("f1")),
            ("everything else: embedding, norms, headers", sample_area("f0")),
        ),
        table=table(columns, cells),
    )
    return Section("size", "Size", _lede(document, rest_after / max(1, whole_after)), body)


def _lede(document: Document, rest: float) -> str:
    s = document["size"]
    per = s.get("bits_per_parameter")
    return sentences(
        f"{number(document['bits_per_weight'], 4)} bits per linear weight",
        f"are {number(per, 4)} bits per parameter of the whole model." if per else "were stored.",
        f"{percent(rest, 0)} of what is left is not linear weights." if rest > 0.5 else None,
        f"With tokenizer and configuration {nbytes(s['files_after'])} were written.",
    )
