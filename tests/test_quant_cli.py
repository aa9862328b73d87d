"""g2quant, the command and the library call behind it: from a checkpoint to files that open as what was promised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from g2kit.convert.open import open_checkpoint
from g2kit.formats.errors import ConflictError, UsageError
from g2kit.model.sample import sample_dir
from g2kit.quant import quantize
from g2kit.quant.cli import FORMATS, g2quant
from g2kit.quant.plan import FORMATS as PLANNED
from g2kit.quant.show import warnings
from g2kit.terminal import run_cli

DATA = Path(__file__).parent / "data" / "hf_sharded"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    file = tmp_path / "ids.npy"
    np.save(file, rng.integers(3, 500, (8, 20)).astype(np.int32))
    return file


def _small(dst: Path, ids: Path, **options: Any) -> dict[str, Any]:
    given = {"group_size": 32, "calibration": ids, "samples": 6, "method": "rtn"} | options
    return quantize(DATA, dst, **given)


def _files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def test_a_checkpoint_comes_out_and_is_what_the_report_says(tmp_path: Path, ids: Path) -> None:
    report = _small(tmp_path / "out", ids, method="gptq")
    with open_checkpoint(tmp_path / "out") as back:
        assert len(back.quantized) == 28
        assert back.config.num_hidden_layers == 4
    assert report["targets"] == {"int4 g32 sym": 28}
    assert report["bits_per_weight"] == 4.5
    assert report["calibration"]["sequences"] == 6
    assert report["calibration"]["held_out_sequences"] == 1
    assert report["quality"]["kl"] > 0
    assert report["output"]["source_fingerprint"] == report["source"]["fingerprint"]
    assert {x["method"] for x in report["linears"].values()} <= {"gptq", "rtn"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "out"]
    notes = json.loads((tmp_path / "out" / "g2kit.manifest.json").read_text())["notes"]
    assert any(n.startswith("calibration: 6 sequences, 126 tokens, ids.npy, sha256") for n in notes)
    json.dumps(report)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, ids: Path) -> None:
    one = _small(tmp_path / "one", ids, method="gptq")
    two = _small(tmp_path / "two", ids, method="gptq", max_memory=1)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    assert one["quality"] == two["quality"]


def test_gguf_formats_bring_their_types(tmp_path: Path, ids: Path) -> None:
    report = _small(tmp_path / "out.gguf", ids, format="gguf-q8_0")
    assert report["targets"] == {"Q8_0": 28}
    assert report["bits_per_weight"] == 8.5
    with open_checkpoint(tmp_path / "out.gguf") as back:
        assert len(back.quantized) >= 28


@pytest.mark.parametrize("format", ["gptq", "awq", "mlx"])
def test_codes_are_kept_and_exported_without_rounding_again(
    tmp_path: Path, ids: Path, format: str
) -> None:
    _small(tmp_path / "ct", ids, keep_codes=tmp_path / "codes")
    runner = ["export", str(tmp_path / "codes"), str(tmp_path / format), "--source", str(DATA)]
    assert run_cli(g2quant, [*runner, "--format", format, "-q"]) == 0
    with open_checkpoint(tmp_path / "ct") as a, open_checkpoint(tmp_path / format) as b:
        for name in a.quantized:
            assert np.array_equal(a.tensors[name].read(), b.tensors[name].read())
    again = ["export", str(tmp_path / format), str(tmp_path / "back"), "-q"]
    assert run_cli(g2quant, again) == 0
    with open_checkpoint(tmp_path / "ct") as a, open_checkpoint(tmp_path / "back") as b:
        name = a.quantized[5]
        assert np.array_equal(a.tensors[name].read(), b.tensors[name].read())


def test_an_export_that_fails_leaves_the_work_for_the_next_run(
    tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2kit.quant import export

    def broken(*args: Any, **kw: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as m:
        m.setattr(export, "export", broken)
        with pytest.raises(OSError, match="gone"):
            _small(tmp_path / "out", ids)
    assert not (tmp_path / "out").exists()
    report = _small(tmp_path / "out", ids)
    assert report["resumed_blocks"] == 4
    _small(tmp_path / "other", ids)
    assert _files(tmp_path / "out") == _files(tmp_path / "other")


# ---------------------------------------------------------------- refused before work


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "5 bits are not supported"),
        ({"group_size": 128}, "group size 128 does not divide in_features 64"),
        ({"format": "ggml"}, "ggml is not a format g2quant writes"),
        ({"format": "awq", "bits": 3}, "awq"),
        ({"format": "gguf-q4_k_m"}, "rows that do not divide into blocks"),
        ({"method": "magic"}, "'magic' is not a method"),
        ({"samples": 0}, "--samples is 0"),
        ({"calibration": "self", "seq_len": 10**6}, "the model's context"),
        ({"max_memory": 0}, "max_memory"),
        ({"format": "gguf-q8_0", "keep_codes": "x"}, "leave out --keep-codes"),
        ({"calibration": np.arange(3, 9)}, "too few"),
    ],
)
def test_usage_is_judged_before_anything_is_read_or_written(
    tmp_path: Path, ids: Path, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2kit.convert import digest

    monkeypatch.setattr(digest, "digests", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(UsageError) as e:
        _small(tmp_path / "out", ids, **options)
    assert says in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]


def test_destinations_are_judged_first(tmp_path: Path, ids: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConflictError, match="exists"):
        _small(tmp_path / "out", ids)
    with pytest.raises(ConflictError, match="lies inside the input"):
        _small(DATA / "out", ids)


def test_what_is_quantized_is_not_quantized_again_unasked(tmp_path: Path, ids: Path) -> None:
    _small(tmp_path / "one", ids, bits=8)
    with pytest.raises(UsageError, match="28 weights are quantized already"):
        quantize(tmp_path / "one", tmp_path / "two", calibration=ids)
    report = quantize(
        tmp_path / "one", tmp_path / "two", group_size=32, calibration=ids, method="rtn",
        allow_requantize=True,
    )  # fmt: skip
    assert report["targets"] == {"int4 g32 sym": 28}


def test_changed_settings_conflict_with_an_interrupted_run(
    tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def args(*more: str) -> list[str]:
        return [str(DATA), str(tmp_path / "out"), "--group-size", "32", "--samples", "6",
                "--calibration", str(ids), "--method", "rtn", *more]  # fmt: skip

    code = (
        "import sys\nfrom g2kit.quant import pipeline, cli\nfrom g2kit.terminal import run_cli\n"
        "old = pipeline.Pipeline._advance\n"
        "def slow(self, layer, *a):\n"
        "    import time\n"
        "    if layer == 2: print('now', flush=True); time.sleep(60)\n"
        "    old(self, layer, *a)\n"
        "pipeline.Pipeline._advance = slow\n"
        "run_cli(cli.g2quant, sys.argv[1:])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args("-q")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (tmp_path / "out.quantizing" / "layer-1.npz").is_file()
    assert run_cli(g2quant, args("--bits", "3")) == 7
    said = capsys.readouterr().err
    assert "the scheme was int4 g32 sym, now int3 g32 sym" in said
    assert "--no-resume" in said
    assert run_cli(g2quant, args("--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["resumed_blocks"] == 2
    assert not (tmp_path / "out.quantizing").exists()
    _small(tmp_path / "whole", ids)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


# ---------------------------------------------------------------- the command


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path, ids: Path) -> None:
    args = [str(DATA), str(tmp_path / "out"), "--group-size", "64", "--asym", "--dry-run"]
    done = CliRunner().invoke(g2quant, args)
    assert done.exit_code == 0, done.output
    assert "28 x int4 g64 asym" in done.stdout
    assert "4.312 bits per weight" in done.stdout
    found = json.loads(CliRunner().invoke(g2quant, [*args, "--json"]).stdout)
    assert found["dry_run"]
    assert found["resources"]["peak_bytes"] > 1 << 20
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]


def test_output_size_is_foretold(tmp_path: Path, ids: Path) -> None:
    foretold = _small(tmp_path / "out", ids, dry_run=True)["resources"]["output_bytes"]
    written = _small(tmp_path / "out", ids)["output"]["bytes"]
    assert foretold == pytest.approx(written, rel=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.gguf", ["--format", "gguf-q4_0"]),
        ("out", ["--format", "torch-int8", "--bits", "8", "--group-size", "-1"]),
        ("out", ["--format", "awq", "--group-size", "32"]),
    ],
)
def test_weights_are_foretold_to_the_byte(tmp_path: Path, name: str, options: list[str]) -> None:
    args = [str(DATA), str(tmp_path / name), "--calibration", "none", "--json", *options]
    foretold = json.loads(CliRunner().invoke(g2quant, [*args, "--dry-run"]).stdout)
    report = json.loads(CliRunner().invoke(g2quant, args).stdout)
    assert foretold["resources"]["output_bytes"] == report["size"]["weights_after"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("x.gguf", [], "name a directory, or pass a GGUF type such as --format gguf-q4_k_m"),
        ("x.safetensors", [], "compressed-tensors is not written to a .safetensors file"),
        ("x", ["--measure", "block"], "--measure without a size to reach"),
        ("x", ["--measure-tokens", "64"], "--measure-tokens without a size to reach"),
        ("x.bin", ["--format", "gguf-q4_0"], "name a directory, or a file ending in .gguf."),
        (
            "x",
            ["--format", "torch-int8", "--bits", "8", "--group-size", "-1", "--exclude", "*.down*"],
            "torch-int8 has every linear layer quantized; 4 are not",
        ),
        (
            "x.ckpt",
            ["--format", "torch-int8", "--bits", "8", "--group-size", "-1", "--max-shard-size", "1MB"],
            "is one file, but --max-shard-size asks for several",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_before_anything_is_done(
    tmp_path: Path, name: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(DATA), str(tmp_path / name), "--calibration", "none"]
    if "--group-size" not in options:
        options = [*options, *([] if "--format" in options else ["--group-size", "32"])]
    for more in ([], ["--dry-run"]):
        assert run_cli(g2quant, [*given, *options, *more]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_of_codes_without_the_source_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, args = tmp_path / "codes", [str(DATA), str(tmp_path / "out"), "--calibration", "none"]
    assert run_cli(g2quant, [*args, "--group-size", "32", "--keep-codes", str(codes)]) == 0
    assert run_cli(g2quant, ["export", str(codes), str(tmp_path / "x")]) == 2
    assert "pass the checkpoint that was quantized with --source" in capsys.readouterr().err


def test_fallbacks_of_the_same_kind_are_one_line() -> None:
    found = {
        "fallbacks": [*(f"w{i}: nearest" for i in range(5)), "w9: damped"],
        "notes": ["w9: damped", "n"],
    }
    assert warnings(found) == [
        "note: w0, w1, w2 and 2 more: nearest",
        "note: w9: damped",
        "note: n",
    ]


def test_streams_and_exit_codes(
    tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(DATA), str(tmp_path / "out"), "--group-size", "32", "--calibration", str(ids),
            "--method", "rtn"]  # fmt: skip
    assert run_cli(g2quant, args) == 0
    out, err = capsys.readouterr()
    assert "28 x int4 g32 sym" in out
    assert "same first choice" in out
    assert "note: there is no tokenizer beside the weights" in err
    assert run_cli(g2quant, [*args, "--json"]) == 7
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "E_EXISTS"
    assert run_cli(g2quant, [*args, "--overwrite", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run_cli(g2quant, [str(DATA), str(tmp_path / "x"), "--bits", "5"]) == 2
    assert "use one of (8, 4, 3, 2)" in capsys.readouterr().err
    assert run_cli(g2quant, ["--bits", "four"]) == 2
    assert run_cli(g2quant, [str(tmp_path / "none"), str(tmp_path / "x")]) == 3


def test_help_lists_the_commands_and_formats() -> None:
    shown = CliRunner().invoke(g2quant, ["--help"]).output
    assert "quantize" in shown
    assert "export" in shown
    assert "--calibration" in CliRunner().invoke(g2quant, ["quantize", "--help"]).output
    assert FORMATS == PLANNED  # the command does not import them to say what they are


def test_the_command_starts_without_torch() -> None:
    script = "import g2kit.quant.cli, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_the_sample_calibrates_itself(tmp_path: Path) -> None:
    report = quantize(
        sample_dir(),
        tmp_path / "out",
        samples=2,
        seq_len=16,
        held_out=0.5,
        method="rtn",
        sequential=False,
    )
    assert report["calibration"] == report["calibration"] | {
        "source": "self", "sequences": 2, "tokens": 32, "held_out_sequences": 1,
    }  # fmt: skip
    assert 0 < report["quality"]["kl"] < 0.5
    assert report["timing"]["total"] > 0
