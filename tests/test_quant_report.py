"""The quantization report: schema, page, plot of several runs, model card; what the command writes and refuses."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pages
import pytest
from pages import (
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
from quant_examples import EXAMPLES, mixed, run, sensitive, uncalibrated

from g2kit import report
from g2kit.convert.open import open_checkpoint
from g2kit.formats.errors import FormatError, UsageError
from g2kit.model import canonical
from g2kit.quant import quantize
from g2kit.quant.cli import g2quant
from g2kit.quant.document import check_seal, with_sensitivity
from g2kit.report import QUANT
from g2kit.report.quantized import card, comparison, html, names_of
from g2kit.report.quantized.consumers import CONSUMERS
from g2kit.report.quantized.frontier import best, unit_of
from g2kit.terminal import run_cli

DATA = Path(__file__).parent / "data" / "hf_sharded"
NAMES = sorted(EXAMPLES)
# words the program branches on
WORDS = {"schema", "kind", "content_id", "by", "method", "scheme", "format"}


def text_of(page: str) -> str:
    return " ".join(Page(page).texts)


# ---------------------------------------------------------------- schema


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_valid(name: str) -> None:
    document = EXAMPLES[name]()
    report.validate(document, QUANT)
    jsonschema.Draft202012Validator(report.schema(QUANT)).validate(document)
    check_seal(document, Path("x"))


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(report.schema(QUANT))


def small() -> dict[str, Any]:
    """One of everything, quickly."""
    document = sensitive() | {k: mixed()[k] for k in ("recovery", "warnings", "blocks")}
    first = "model.layers.0.mlp.down_proj.weight"
    other = "model.layers.1.self_attn.q_proj.weight"
    for part in (document, document["sensitivity"]):
        part["linears"] = {n: part["linears"][n] for n in (first, other)}
    document["blocks"] = document["blocks"][:2]
    document["exclude"] = {"by": "kl", "rows": document["exclude"]["rows"][:2]}
    return document


@pytest.mark.parametrize("turn", [0, 3])
def test_validate_agrees_with_jsonschema(turn: int) -> None:
    validators_agree(small(), turn, QUANT)


def test_a_parity_report_is_none() -> None:
    with pytest.raises(FormatError, match=r"expected “g2kit.quant-report/1”"):
        report.validate({"schema": "g2kit.report/1"}, QUANT)


# ---------------------------------------------------------------- page


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_alone(name: str) -> None:
    document = EXAMPLES[name]()
    page = html(document)
    assert page == html(document)
    check_whole(page)
    check_self_contained(page)
    assert json.loads(Page(page).scripts[0]) == document


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_document_becomes_markup(name: str) -> None:
    document = EXAMPLES[name]()
    dirty = pages.poisoned(document, WORDS)
    check_same_markup(html(document), html(dirty))
    two = [[document, run()], [dirty, pages.poisoned(run(), WORDS)]]
    check_same_markup(*map(comparison, two))
    shown = re.sub(r"`[^`\n]*`", "", card(dirty))
    assert not re.search(r"<img|</script", shown)


def test_null_parts_are_tolerated() -> None:
    """Whatever the schema lets be null is null, one after the other, and every form is made."""
    document, tried = small(), 0
    for path in leaves(document):
        changed = copy.deepcopy(document)
        if path:
            put(changed, path, None)
        if path and accepted(changed, QUANT):
            tried += 1
            assert html(changed)
            assert card(changed)
            assert comparison([changed, document])
    assert tried > 40


def test_every_plot_has_its_numbers() -> None:
    check_figures(html(sensitive()), 4)
    check_figures(comparison([run(), mixed()]), 2)


def test_the_page_says_what_it_should() -> None:
    shown = text_of(html(run()))
    for part in (
        "4.125 bits per weight", "int4 g128 sym in compressed-tensors", "0.0096", "94.4 %", "11.81 → 11.97",
        "GPTQ (weights rounded one after the other", "32,768 tokens in 64 sequences: text that the model wrote itself",
        "[0.00845, 0.0106]", "Behind the last block it is 5.9 %, the most behind block 2 (6.1 %)",
        "Sensitivities were not measured", "Ranked by the error of the weight's own output",
        "model.layers.3.mlp.down_proj.weight", "rounding to nearest loses less on held-out inputs than GPTQ",
        "g2quant models/sample models/sample-w4",
    ):  # fmt: skip
        assert part in shown, part


def test_what_was_not_measured_reads_well() -> None:
    shown = text_of(html(uncalibrated()))
    assert "What that costs was not measured: no text was held out." in shown
    assert "nothing: weights were rounded without inputs" in shown
    assert "Nothing fell back." in shown
    absent = (
        "No data in this report for: Quality, Error by block, Where the error is, What to exclude"
    )
    assert absent in shown
    assert "None" not in shown
    assert "nan" not in shown.lower()
    assert "Not measured: no text was held out." in card(uncalibrated())
    assert "the importance matrix imatrix.gguf" in text_of(html(EXAMPLES["from-matrix"]()))


def test_types_tuning_and_warnings_are_told() -> None:
    shown = text_of(html(mixed()))
    assert "24 × Q4_K, 4 × Q6_K" in shown
    assert "Before scales and gains were tuned, the mean KL was 0.0061 nats." in shown
    assert "before all blocks were tuned together" in shown
    assert "query_pre_attn_scalar is 224" in shown
    assert "2 blocks were done by an interrupted run" in shown
    shown = text_of(html(EXAMPLES["allocated"]()))
    assert "to 3.5 MiB; KL 0.0051 nats predicted" in shown
    assert "24 × int4 g128 sym, 4 × int8 g128 sym" in shown


# ---------------------------------------------------------------- what to exclude


def test_weights_are_ranked_by_what_is_known() -> None:
    by_error = run()["exclude"]
    assert by_error["by"] == "output error"
    gains = [r["gain"] for r in by_error["rows"]]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 28
    by_kl = sensitive()["exclude"]
    assert by_kl["by"] == "kl"
    rates = [r["gain"] / r["bytes"] for r in by_kl["rows"]]
    assert rates == sorted(rates, reverse=True)
    assert "Ranked by the KL that the weight alone costs, per byte." in text_of(html(sensitive()))
    assert uncalibrated()["exclude"] is None


def test_leaving_a_weight_adds_what_it_saved() -> None:
    row = next(r for r in run()["exclude"]["rows"] if "down_proj" in r["name"])
    assert row["bytes"] == 256 * 768 * 2 - round(256 * 768 * 4.125 / 8)


def test_what_is_excluded_stays_as_it_is(tmp_path: Path, ids: Path) -> None:
    options: dict[str, Any] = {"group_size": 32, "calibration": ids, "samples": 2, "method": "rtn"}
    patterns = ["*.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    document = quantize(DATA, tmp_path / "out", exclude=patterns, **options)
    assert document["targets"] == {"int4 g32 sym": 23}
    assert document["size"]["weights_after"] == (tmp_path / "out/model.safetensors").stat().st_size
    with open_checkpoint(tmp_path / "out") as back, open_checkpoint(DATA) as source:
        names = [n for n in canonical.linears(source.tensors) if n not in back.quantized]
        assert len(names) == 5
        for name in names:
            assert np.array_equal(back.tensors[name].read(), source.tensors[name].read())
    with pytest.raises(UsageError, match=r"no linear weight is called \*.x"):
        quantize(DATA, tmp_path / "no", exclude=["*.x"], **options)
    with pytest.raises(UsageError, match="every linear weight is excluded"):
        quantize(DATA, tmp_path / "no", exclude=["*"], **options)
    with pytest.raises(UsageError, match="target size"):
        quantize(DATA, tmp_path / "no", exclude=patterns, target_bpw=6, calibration=ids)


def test_sensitivities_come_later() -> None:
    joined = with_sensitivity(run(), sensitive()["sensitivity"])
    assert joined["exclude"] == sensitive()["exclude"]
    assert joined["content_id"] == sensitive()["content_id"]
    other = {"linears": {"model.layers.0.x.weight": {"choices": {}}}}
    assert with_sensitivity(run(), other)["exclude"] == run()["exclude"]


# ---------------------------------------------------------------- several runs


def test_the_frontier() -> None:
    assert best([(1, 5), (2, 3), (3, 4), (4, 1), (4, 1), (5, 1)]) == {0, 1, 3, 4}
    assert best([]) == set()
    assert unit_of(3 << 30) == ("GiB", 1 << 30)
    assert unit_of(5000) == ("KiB", 1024)


def test_several_runs_are_one_plot() -> None:
    three = run("int3 g128 sym", bits=3.125, kl=0.05)
    worse = run("int3 g32 asym", "awq", 4.2, 0.06, 7)
    page = comparison([run(), three, worse])
    check_whole(page)
    check_self_contained(page)
    shown = text_of(page)
    for part in (
        "3 quantizations", "1 of 3 is beaten by another that is neither larger nor worse",
        "compressed-tensors int4 g128 sym", "compressed-tensors int3 g128 sym", "awq int3 g32 asym", "0.05",
    ):  # fmt: skip
        assert part in shown, part
    assert "not of the same thing" not in shown


def test_runs_that_cannot_be_held_against_each_other_are_named() -> None:
    other = run(kl=0.02)
    other["source"]["fingerprint"] = "g2:sha256:ff"
    other["calibration"] |= {"sha256": "d" * 64}
    shown = text_of(comparison([run(), other]))
    assert "made from different weights" in shown
    assert "not measured on the same held-out text" in shown
    shown = text_of(comparison([run(), uncalibrated()]))
    assert "fewer than two" in shown
    assert "its divergence was not measured" in shown


def test_names_tell_runs_apart() -> None:
    tuned = run() | {"recover": "scales"}
    assert names_of([run(), tuned]) == ["int4 g128 sym gptq", "int4 g128 sym gptq tuned scales"]
    assert len(set(names_of([run(), run()]))) == 2  # the same run twice is still two columns
    assert names_of([run(), mixed()]) == ["compressed-tensors int4 g128 sym", "gguf-q4_k_m"]


# ---------------------------------------------------------------- model card


def test_the_card_has_all_parts() -> None:
    text = card(run())
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Quantization", "## Quality", "## How to load it"]
    assert "mean KL 0.0096 nats, 95 % interval" in text
    assert 'AutoModelForCausalLM.from_pretrained("./sample-w4"' in text
    assert "vLLM (not tested by g2kit)" in text
    front = text.split("```yaml\n")[1].split("```")[0]
    assert front.startswith(
        'base_model: "sample"\nbase_model_relation: quantized\nlibrary_name: transformers\n'
    )
    assert "type: kl_mean\n          value: 0.0096" in front
    assert text.count("```") % 2 == 0


def test_every_format_has_a_consumer() -> None:
    from g2kit.quant.cli import FORMATS

    for name in FORMATS:
        document = run() | {"format": name}
        assert any(name.startswith(c.formats) for c in CONSUMERS), name
        assert "## How to load it" in card(document)
    assert "llama-cli -m ./sample-q4.gguf" in card(mixed())


def test_a_strange_path_is_no_command() -> None:
    document = run()
    document["output"]["path"] = "x/$(rm -rf ~)`\n"
    assert "rm -rf" not in card(document).split("## How to load it")[1].split("```yaml")[0]


# ---------------------------------------------------------------- from a run


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(3, 500, (8, 20)).astype(np.int32))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ids: Path) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("made")
    found = quantize(DATA, root / "out", group_size=32, calibration=ids, samples=6)
    return root, found


def test_a_run_gives_a_valid_document(made: tuple[Path, dict[str, Any]]) -> None:
    root, document = made
    report.validate(document, QUANT)
    jsonschema.Draft202012Validator(report.schema(QUANT)).validate(document)
    check_seal(document, root)
    size, records = document["size"], document["linears"].values()
    assert size["linears_after"] == sum(x["bytes"] for x in records)
    assert size["linears_after"] * 8 / sum(x["shape"][0] * x["shape"][1] for x in records) == 4.5
    assert size["weights_after"] == (root / "out" / "model.safetensors").stat().st_size
    assert size["files_after"] > size["weights_after"]
    assert all(x["seconds"] > 0 and x["clipped"] is not None for x in records)
    assert [b["kind"] for b in document["blocks"]] == ["local", "global"] * 2
    assert document["exclude"]["rows"][0]["gain"] == max(x["error"] for x in records) ** 0.5
    assert document["environment"]["torch"]
    assert not [n for n in document["notes"] if n.startswith(("calibration:", "method:"))]
    check_whole(html(document))
    assert "- mean KL " in card(document)


def test_the_id_is_of_what_was_found(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, ids: Path
) -> None:
    root, document = made
    passing = copy.deepcopy(document) | {"run": None, "timing": {}, "resumed_blocks": 3}
    for x in passing["linears"].values():
        x["seconds"] = 99.0
    check_seal(passing, root)
    changed = copy.deepcopy(document)
    changed["quality"]["kl"] /= 2
    with pytest.raises(FormatError, match="content_id does not fit"):
        check_seal(changed, root)


def test_the_command_writes_what_was_asked_for(
    tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        str(DATA),
        str(tmp_path / "out"),
        "--group-size",
        "32",
        "--calibration",
        str(ids),
        "--method",
        "rtn",
    ]
    files = {n: tmp_path / f"r.{n}" for n in ("report", "html", "card")}
    given = [x for n, f in files.items() for x in (f"--{n}", str(f))]
    assert run_cli(g2quant, [*args, *given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    document = json.loads(files["report"].read_text())
    assert printed == document
    report.validate(document, QUANT)
    assert document["run"]["command"].split()[0] == "g2quant"
    assert files["html"].read_text() == html(document)
    assert files["card"].read_text() == card(document)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.card", "r.html", "r.report"]

    again = tmp_path / "again.html"
    assert run_cli(g2quant, ["report", str(files["report"]), "--html", str(again)]) == 0
    assert "same first choice" in capsys.readouterr().out
    assert again.read_text() == html(document)


@pytest.mark.parametrize(
    ("extra", "code", "says"),
    [
        (["--html", "{dst}/x.html"], 5, "lies in an input of this command"),
        (["--card", "{src}/README.md"], 5, "lies in an input of this command"),
        (["--html", "{root}/none/x.html"], 4, "make the directory"),
        (["--html", "{root}/x", "--report", "{root}/x"], 2, "name the same file"),
        (["--html", "{root}/x", "--dry-run"], 2, "--dry-run makes no report"),
    ],
)
def test_places_are_judged_before_the_work(
    tmp_path: Path, ids: Path, extra: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    dst = tmp_path / "out"
    extra = [x.format(dst=dst, src=DATA, root=tmp_path) for x in extra]
    args = [str(DATA), str(dst), "--group-size", "32", "--calibration", str(ids), *extra]
    assert run_cli(g2quant, args) == code
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reports_are_read_with_care(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*args: str) -> str:
        assert run_cli(g2quant, ["report", *args]) in (2, 3, 5)
        return capsys.readouterr().err

    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run()))
    bad.write_text("{")
    assert "name the JSON document that --report or --json wrote" in refused(str(bad))
    bad.write_text(json.dumps(run() | {"linears": []}))
    assert "report.linears is a list, expected object" in refused(str(bad))
    changed = run()
    changed["quality"]["kl"] = 0.0001
    bad.write_text(json.dumps(changed))
    assert "changed after it was written" in refused(str(bad))
    bad.write_text(json.dumps({"linears": {"x": {}}}))
    assert "sensitivity.linears.x lacks choices" in refused(str(good), "--sensitivity", str(bad))
    page = str(tmp_path / "x")
    assert "--card is about one report, 2 are given" in refused(
        str(good), str(good), "--card", page
    )
    assert "--html is an input of this command" in refused(str(good), "--html", str(good))
    assert json.loads(good.read_text()) == run()


def test_several_reports_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for i, document in enumerate((run(), mixed(), uncalibrated())):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(document))
    page = tmp_path / "all.html"
    assert run_cli(g2quant, ["report", *map(str, files), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "gguf-q4_k_m" in out
    assert "KL 0.0096 (0.008448 to 0.01056)" in out
    assert "KL unknown" in out
    assert page.read_text() == comparison([run(), mixed(), uncalibrated()])
    measured = tmp_path / "s.json"
    measured.write_text(json.dumps(sensitive()["sensitivity"]))
    assert (
        run_cli(g2quant, ["report", str(files[0]), "--sensitivity", str(measured), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == sensitive()
