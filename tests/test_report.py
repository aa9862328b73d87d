"""The report: nothing in a document becomes markup, the page is whole and says what it should, the schema guards."""

from __future__ import annotations

import ast
import copy
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import pages
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import (
    EVIL,
    Page,
    accepted,
    check_figures,
    check_same_markup,
    check_self_contained,
    check_whole,
    leaves,
    put,
    validators_agree,
)
from report_examples import EXAMPLES, compare_fail, compare_pass, error, self_test, weights

from g2kit import report
from g2kit.formats.errors import FormatError
from g2kit.report import markup, numerals, scales, theme
from g2kit.report.bars import heatmap
from g2kit.report.page import Section, embedded, page
from g2kit.report.sections.position import bins
from g2kit.report.tables import Cell, Column, table

ROOT = Path(__file__).parent.parent
NAMES = sorted(EXAMPLES)


def shape(text: str) -> list[str]:
    return [t for t, _ in Page(text).elements]


# words the program branches on stay as they are
WORDS = {"schema", "kind", "verdict", "content_id", "better", "id", "group", "caught_by"}


def poisoned(document: dict[str, Any]) -> dict[str, Any]:
    return pages.poisoned(document, WORDS)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_valid(name: str) -> None:
    document = EXAMPLES[name]()
    report.validate(document)
    jsonschema.Draft202012Validator(report.schema()).validate(document)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(report.schema())


def small() -> dict[str, Any]:
    """One of everything: every part of the schema is met, quickly."""
    document = EXAMPLES["quantized"]() | {"self_test": self_test()["self_test"]}
    document |= {
        "coverage": EXAMPLES["inconclusive"]()["coverage"]
        | {"checks": document["coverage"]["checks"]}
    }

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(v) for v in value[: 1 if value and isinstance(value[0], dict) else 2]]
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    document = cut(document)
    report.validate(document)
    return document


@pytest.mark.parametrize("turn", [0, 3])
def test_validate_agrees_with_jsonschema(turn: int) -> None:
    validators_agree(small(), turn)


def test_validate_says_where_and_what() -> None:
    document = compare_pass()
    document["claims"][1]["verdict"] = "FINE"
    del document["coverage"]["probes"][0]["tokens"]
    document["metrics"]["overall"]["positions"] = -3
    with pytest.raises(FormatError) as e:
        report.validate(document)
    text = str(e.value)
    assert (
        'report.claims[1].verdict is "FINE", expected one of PASS, FAIL, INCONCLUSIVE, ERROR'
        in text
    )
    assert "report.coverage.probes[0] lacks tokens" in text
    assert "report.metrics.overall.positions is -3, expected at least 0" in text


@pytest.mark.parametrize(
    "other", [None, [], "x", {}, {"schema": "g2kit.report/2"}, {"schema": "\x1b[31m" * 99}]
)
def test_validate_refuses_what_is_no_report(other: Any) -> None:
    with pytest.raises(FormatError, match="no report of a kind this version knows") as e:
        report.validate(other)
    assert "\x1b" not in str(e.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400])
def test_validate_refuses_numbers_no_float_holds(number: float) -> None:
    document = compare_pass()
    document["metrics"]["overall"]["agreement"] = number
    with pytest.raises(FormatError, match="agreement"):
        report.validate(document)


@pytest.mark.parametrize("name", NAMES)
def test_html_is_well_formed_and_deterministic(name: str) -> None:
    text = report.html(EXAMPLES[name]())
    assert text == report.html(EXAMPLES[name]())
    check_whole(text)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_document_becomes_markup(name: str) -> None:
    """Every string of the document carries an attack: the same elements come out, and no attribute nor script more."""
    document = EXAMPLES[name]()
    check_same_markup(report.html(document), report.html(poisoned(document)))


def test_the_injection_test_can_fail() -> None:
    """What it looks for is found where a string is taken for markup."""
    text = report.html(compare_pass()).replace("</main>", f"{EVIL}</main>")
    with pytest.raises(AssertionError):
        assert Page(text).has("img") == 0


def test_the_page_carries_its_document() -> None:
    document = poisoned(compare_fail())
    found = Page(report.html(document))
    assert json.loads(found.scripts[0]) == document
    assert (
        json.loads(report.html(document).split('id="document">')[1].split("</script>")[0])
        == document
    )


@given(st.text())
def test_embedded_json_cannot_leave_its_script(text: str) -> None:
    out = embedded({"x": text})
    assert out.isascii()
    assert not set("<>&") & set(out)
    assert json.loads(out) == {"x": text}


def test_nan_is_refused_in_the_page() -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.html(compare_pass() | {"environment": {"x": float("nan")}})


@pytest.mark.parametrize("name", NAMES)
def test_the_page_loads_nothing_and_allows_little(name: str) -> None:
    check_self_contained(report.html(EXAMPLES[name]()))


def test_every_plot_has_its_numbers() -> None:
    check_figures(report.html(compare_fail()), 7)


def test_the_answer_stands_on_top() -> None:
    text = "\n".join(Page(report.html(compare_fail())).texts)
    order = (
        "The models part in block 2, from position 64 on", "Weights are the same bits", "Not verified", "The fingerprints differ",
        "Limits are multiples", "How far the probes reach", "The largest divergence", "Block 2 attends beyond its sliding window",
    )  # fmt: skip
    places = [text.index(t) for t in order]
    assert places == sorted(places)
    assert "window 64" in text
    assert "first to diverge" in text


def test_sections_without_data_are_named() -> None:
    texts = "".join(Page(report.html(weights())).texts)
    assert "No data in this report for: Self-test, Coverage, Divergence by position" in texts
    ids = {a.get("id") for _, a in Page(report.html(weights())).elements}
    assert "tensors" in ids
    assert "position" not in ids


def test_a_sparse_document_still_makes_every_form() -> None:
    """Optional parts absent, lists empty: no form may fail where the schema does not."""
    document = error() | {
        "identity": {"reference": None, "candidate": None},
        "differences": [],
        "settings": {},
        "environment": {},
        "run": None,
    }
    report.validate(document)
    assert "ERROR" in report.html(document)
    assert "ERROR" in report.markdown(document)
    assert "ERROR" in report.model_card(document)
    assert ET.fromstring(report.junit(document)).get("errors") == "1"


def test_null_parts_are_tolerated() -> None:
    """Whatever the schema lets be null is null, one after the other, and every form is made."""
    document, tried = small(), 0
    for path in leaves(document):
        if not path:
            continue
        changed = copy.deepcopy(document)
        put(changed, path, None)
        if accepted(changed):
            tried += 1
            for form in (report.html, report.markdown, report.junit, report.model_card):
                assert form(changed)
    assert tried > 80


@pytest.mark.parametrize("name", NAMES)
def test_junit_parses_and_is_red_where_the_verdict_is(name: str) -> None:
    document = EXAMPLES[name]()
    root = ET.fromstring(report.junit(poisoned(document)))
    cases = list(root.iter("testcase"))
    assert int(str(root.get("tests"))) == len(cases) > 0
    red = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    assert int(str(root.get("failures"))) + int(str(root.get("errors"))) == len(red)
    assert bool(red) == (document["verdict"] != "PASS")


def test_junit_names_claims_checks_and_faults() -> None:
    root = ET.fromstring(report.junit(compare_fail()))
    failed = {c.get("name") for c in root.iter("testcase") if c.find("failure") is not None}
    assert failed == {
        "W1 Weights are the same bits",
        "C0 Configuration and tokenizer are the same",
        "L1 Same function in float32",
    }
    open_claim = next(e for e in root.iter("error"))
    assert open_claim.get("type") == "INCONCLUSIVE"
    assert "To settle it: A candidate that passes L1." in str(open_claim.get("message"))
    document = self_test()
    document["self_test"]["mutants"][3]["caught_by"] = []
    missed = [
        c.get("name")
        for c in ET.fromstring(report.junit(document)).iter("testcase")
        if c.find("failure") is not None
    ]
    assert missed == ["no-attn-cap Attention soft-cap missing"]


@pytest.mark.parametrize("name", NAMES)
def test_markdown_is_short(name: str) -> None:
    document = EXAMPLES[name]()
    text = report.markdown(document)
    assert len(text.splitlines()) <= 40
    assert document["verdict"] in text.splitlines()[0]
    assert document["content_id"] in text


def test_markdown_stays_short_and_plain_whatever_it_is_given() -> None:
    document = poisoned(compare_fail())
    document["claims"] *= 20
    document["not_verified"] = ["a\nb | c @someone www.x.y https://x.y ![i](u)\r\n# heading"] * 50
    document["differences"] *= 100
    text = report.markdown(document)
    lines = text.splitlines()
    assert len(lines) <= 40
    assert document["content_id"] in lines[-1]
    assert "and 69 more" in text
    prose = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)[<\[]", prose)
    assert "@someone" not in text
    assert not re.search(r"(?<!\\)`", prose)
    assert not [line for line in lines if line.startswith("# ")]


def test_model_card_has_section_and_metadata() -> None:
    text = report.model_card(compare_pass())
    assert text.startswith("## Conversion & verification\n")
    assert "- **L1** Same function in float32: PASS." in text
    assert "type: kl\\_max" not in text
    assert "type: kl_max" in text
    assert report.model_card(weights()).count("model-index") == 0


def test_visible() -> None:
    assert markup.visible("a\u202eb\x00\ud800\n\t") == "a‹U+202E›b‹U+0000›‹U+D800›⏎⇥"
    assert markup.visible("\u0301x") == "◌\u0301x"
    assert markup.visible("日本 é 👍\u00a0") == "日本 é 👍\u00a0"
    assert markup.visible("👩\u200d💻") == "👩‹U+200D›💻"


@given(st.text(), st.text())
def test_tags_escape_what_they_are_given(inside: str, attribute: str) -> None:
    out = markup.tag("p", inside, markup.tag("b", attribute, title=attribute))
    out.encode("utf-8")
    found = Page(out)
    assert [t for t, _ in found.elements] == ["p", "b"]
    assert found.elements[1][1]["title"] == markup.visible(attribute)
    assert "".join(found.texts) == markup.visible(inside) + markup.visible(attribute)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (-2, "−2"),
        (1.0, "1"),
        (12.345, "12.3"),
        (99999.6, "100,000"),
        (0.00123, "0.00123"),
        (1.2345e-12, "1.23×10⁻¹²"),
        (-4e9, "−4.00×10⁹"),
        (float("inf"), "inf"),
        (10**30, "1.00×10³⁰"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert numerals.number(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(1.0, "100 %"), (0.999999, "> 99.99 %"), (0.0, "0 %"), (1e-9, "< 0.01 %"), (0.5, "50 %"), (0.98765, "98.77 %"), (None, "–")],
)  # fmt: skip
def test_what_is_not_all_is_never_100(share: float | None, shown: str) -> None:
    assert numerals.percent(share) == shown


@given(st.floats(1e-300, 1e300), st.floats(1e-300, 1e300))
def test_logarithmic_axes_hold_their_values(a: float, b: float) -> None:
    axis = scales.Axis.logarithmic("x", [a, b, 0.0, None])
    low, high = sorted((axis.at(a, 400, 0), axis.at(b, 400, 0)))
    assert 0 <= low <= high <= 400
    assert (a < b) <= (axis.at(a, 400, 0) >= axis.at(b, 400, 0))
    assert axis.at(0.0, 400, 0) == 400, "zero has its own place"
    assert axis.at(min(a, b), 400, 0) <= 400 - scales.LANE
    assert 2 <= len(axis.marks(6)) <= 9


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_linear_ticks_are_inside(low: float, span: float, most: int) -> None:
    ticks = scales.linear_ticks(low, low + span, most)
    assert all(low - span * 1e-6 <= v <= low + span * (1 + 1e-6) for v, _ in ticks)
    assert len(ticks) <= 2 * most + 2


def test_bins_do_not_cross_the_window() -> None:
    points = [
        {"position": p, "median": 1.0, "p99": 2.0, "max": float(p), "count": 1} for p in range(8192)
    ]
    binned = bins(points, 4099)
    assert len(binned) <= 262
    starts = [b["position"] for b in binned]
    assert 4099 in starts
    assert sum(b["count"] for b in binned) == 8192
    assert max(b["max"] for b in binned) == 8191.0
    assert bins(points[:100], 64) == points[:100]


def test_tables_carry_what_they_are_sorted_by() -> None:
    out = table(
        [Column("a"), Column("b", True)],
        [["x", Cell("1.0×10⁻³", 1e-3)], ["y", Cell("–", None)]],
        sortable=True,
    )
    cells = [a for t, a in Page(out).elements if t == "td"]
    assert [c["data-v"] for c in cells] == ["0.001", ""]
    assert [a["aria-sort"] for t, a in Page(out).elements if t == "th" and "aria-sort" in a] == [
        "none",
        "none",
    ]


def test_heat_map_marks_the_worst() -> None:
    out = heatmap(
        900, ["0", "1"], ["q", "k"], [[10.0, 20.0], [30.0, None]], "dB", alt="x", reverse=True
    )
    tips = {str(a["data-tip"]): str(a["class"]) for t, a in Page(out).elements if "data-tip" in a}
    assert tips == {"q, 0: 10 dB": "q5", "k, 0: 20 dB": "q2", "q, 1: 30 dB": "q0"}


def test_pages_serve_other_reports() -> None:
    section = Section("a", "A & B", "", markup.tag("p", "<x>"))
    found = Page(
        page(
            title="T",
            product="g2quant",
            hero=markup.tag("h1", "H"),
            sections=[section],
            footer="F",
            data={"a": 1},
        )
    )
    assert "A & B" in found.texts
    assert "g2quant" in found.texts


def contrast(one: str, two: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", [0, 1])
def test_colours_can_be_read(side: int) -> None:
    """WCAG 2.2: 4.5 for text, 3 for the marks of plots."""
    colour = {name: pair[side] for name, pair in theme.TOKENS.items()}
    for name in ("text", "muted", "accent", "pass", "fail", "inconclusive", "error"):
        assert contrast(colour[name], colour["bg"]) >= 4.5, name
    for name in ("text", "muted"):
        assert contrast(colour[name], colour["raised"]) >= 4.5, name
        assert contrast(colour["text"], colour["mark"]) >= 4.5
    for name in ("pass", "fail", "inconclusive", "error"):
        assert contrast(colour[name], colour[f"{name}-bg"]) >= 4.5, name
    for name in ("c1", "c2", "c3", "faint"):
        assert contrast(colour[name], colour["bg"]) >= 3, name
    assert contrast(colour["on-q3"], colour["q3"]) >= 4.5


def test_report_is_a_leaf() -> None:
    """It may say that input is malformed; it knows neither models nor verdict rules."""
    for path in (ROOT / "report").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                parts = set(name.split("."))
                assert not parts & {
                    "model",
                    "convert",
                    "quant",
                    "verify",
                    "g2kit",
                    "torch",
                    "numpy",
                }, path
                assert "formats" not in parts or name == "formats.errors", path


def test_markdown_sorts_flips_only_by_a_measured_floor() -> None:
    document = copy.deepcopy(compare_fail())
    o = document["metrics"]["overall"]
    assert "real flip" in report.markdown(document)
    document["metrics"]["tolerance"] = None
    assert "real flip" not in report.markdown(document)
    assert "near-tie" not in report.html(document)
    o["non_finite"] = 17
    assert f"over {o['scored']:,} tokens" in report.markdown(document)


def test_the_self_test_names_places_outside_the_blocks() -> None:
    document = copy.deepcopy(self_test())
    test = document["self_test"] | {"layers": 4}
    document["self_test"] = test
    for m, at in zip(test["mutants"], (-1, 3, 4, 5), strict=False):
        m |= {"found_layer": at, "expected_layers": [at], "right_place": True}
    report.validate(document)
    shown = report.html(document)
    for text in ("embedding ✓", "3 ✓", "final norm ✓", "head ✓"):
        assert f">{text}</td>" in shown


def test_the_self_test_shows_the_id_of_each_mistake() -> None:
    shown = report.html(self_test())
    assert "--mutants takes the ids" in shown
    for m in self_test()["self_test"]["mutants"]:
        assert f'data-label="Id"><code>{m["id"]}</code></td>' in shown


def test_equal_models_have_no_worst_tokens() -> None:
    document = copy.deepcopy(compare_pass())
    assert document["worst"]
    assert "no token diverges" not in report.html(document)
    for w in document["worst"]:
        w["kl"] = 0.0
    assert "There are none: no token diverges." in report.html(document)


def test_identity_explains_two_files_of_one_tokenizer() -> None:
    document = copy.deepcopy(compare_pass())
    side = document["identity"]["candidate"]
    side |= {"format": "gguf", "layout": "gguf"}
    side["tokenizer"] = {**side["tokenizer"], "sha256": "sha256:" + "0" * 64}
    shown = report.html(document)
    assert "gguf · gguf" not in shown
    assert "The tokenizer files differ, the tokenizers do not" in shown
    document["differences"] = [
        {"field": "tokenizer.pieces[7]", "reference": "a", "candidate": "b", "kind": "size"}
    ]
    assert "the tokenizers do not" not in report.html(document)
