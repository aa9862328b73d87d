"""Strings of a document, which anybody may have written, in Markdown, in a model card and on a terminal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from report_examples import compare_fail, compare_pass, self_test

from g2kit import report
from g2kit.report.markdown import code, plain
from g2kit.verify import show

POISON = "<img src=x onerror=alert(1)> & `x` | \u202egnp.exe \x1b[31m"
KEPT = {"schema", "kind", "verdict", "content_id", "better", "group"}


def poisoned(x: Any, key: str = "") -> Any:
    """Every string but those a schema or a program reads."""
    if isinstance(x, dict):
        return {k: poisoned(v, k) for k, v in x.items()}
    if isinstance(x, list):
        return [poisoned(v, key) for v in x]
    return f"{POISON}{x}" if isinstance(x, str) and key not in KEPT else x


@pytest.mark.parametrize("make", [compare_pass, compare_fail, self_test])
def test_nothing_raw_reaches_markdown(make: Any) -> None:
    document = poisoned(copy.deepcopy(make()))
    for text in (report.markdown(document), report.model_card(document)):
        assert "onerror" in text
        assert not set("\u202e\x1b") & set(text)
        assert "<img" not in text
        assert "(1)>" not in text
        assert "`x" not in text
        for line in text.splitlines():
            if line.startswith("|"):
                assert line.count("|") == 4, "a string made a cell of its own"


def test_entities() -> None:
    assert plain("<b> & `c` | d") == "&#60;b&#62; &#38; &#96;c&#96; &#124; d"
    assert code("a`b|<c>") == "`aˋb¦‹c›`"


@pytest.mark.parametrize("make", [compare_pass, compare_fail, self_test])
def test_nothing_raw_reaches_the_terminal(make: Any) -> None:
    document = poisoned(copy.deepcopy(make()))
    for text in (show.report(document), show.claims(document)):
        assert "\\u202e" in text
        assert "\u202e" not in text
        assert "\x1b[31mx" not in text
        assert "\\x1b[31m" in text
