"""Reports that somebody changed and sealed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g2kit.formats.errors import FormatError, SpaceError
from g2kit.model.sample import sample_dir
from g2kit.sealed import dumps, sealed
from g2kit.terminal import run_cli
from g2kit.verify.cli import g2verify
from g2kit.verify.compare import compare_weights
from g2kit.verify.document import error_document

Document = dict[str, Any]


@pytest.fixture(scope="module")
def text() -> str:
    return dumps(compare_weights(sample_dir(), sample_dir()))


def read(document: Document, directory: Path, capsys: Any) -> tuple[int, str]:
    path = directory / "r.json"
    path.write_text(dumps(sealed(document)))
    status = run_cli(g2verify, ["report", str(path), "-q"])
    return status, capsys.readouterr().err


def failed_claim(d: Document) -> None:
    d["claims"][0]["verdict"] = "FAIL"


def no_claims(d: Document) -> None:
    d["claims"] = []


def other_exit(d: Document) -> None:
    d["exit_code"] = 1


def other_verdict(d: Document) -> None:
    d["verdict"] = "FAIL"


def error_that_passed(d: Document) -> None:
    d |= {"claims": [], "error": {"code": "E_FORMAT", "message": "x"}}


def numbers_that_fail(d: Document) -> None:
    proof = next(e for c in d["claims"] for e in c["evidence"] if e["threshold"] is not None)
    proof["value"] = proof["threshold"] + (-1 if proof["better"] == "higher" else 1)


@pytest.mark.parametrize(
    "change",
    [failed_claim, no_claims, other_exit, other_verdict, error_that_passed, numbers_that_fail],
)
def test_a_report_that_contradicts_itself_is_refused(
    change: Callable[[Document], None], text: str, tmp_path: Path, capsys: Any
) -> None:
    document = json.loads(text)
    change(document)
    status, err = read(document, tmp_path, capsys)
    assert status == 3
    assert "contradicts itself" in err


def test_reports_as_written_are_read(text: str, tmp_path: Path, capsys: Any) -> None:
    assert read(json.loads(text), tmp_path, capsys) == (0, "")
    for error in (FormatError("x"), SpaceError("x")):
        assert read(error_document(error), tmp_path, capsys) == (0, "")
