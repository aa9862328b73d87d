"""g2conv as a person meets it: exit codes, one-line errors, stdout and stderr, help, dry runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import command_case
import numpy as np
import pytest
from command_case import Output, save, tree
from configs import small
from memory import random_weights

from g2kit.convert.cli import g2conv
from g2kit.model import canonical
from g2kit.model.config_formats import to_huggingface
from g2kit.model.sample import sample_dir


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    return partial(command_case.run, g2conv, capsys=capsys)


# ---- what works


def test_convert_prints_a_report_and_a_manifest_that_checks(run, tmp_path: Path) -> None:
    status, out, err = run("sample", tmp_path / "flax", "--to", "flax")
    assert status == 0
    assert "equal: the same weights, bit for bit" in out
    assert err == "", "quiet when stderr is no terminal"
    status, out, _ = run("flax-to-safetensors", tmp_path / "flax", tmp_path / "hf", "--json")
    report = json.loads(out)
    assert report["source"]["fingerprint"] == report["output"]["fingerprint"]
    assert report["checked_tensors"] == 46
    status, out, _ = run("check", tmp_path / "hf")
    assert (status, report["output"]["fingerprint"] in out) == (0, True)


def test_fingerprint_is_one_line(run, tmp_path: Path) -> None:
    status, out, _ = run("fingerprint", sample_dir())
    assert status == 0
    assert out.split()[0].startswith("g2:sha256:")
    assert len(out.splitlines()) == 1


def test_inspect_tells_where_every_value_comes_from(run) -> None:
    status, out, _ = run("inspect", sample_dir(), "--tensors")
    assert status == 0
    for text in (
        "sliding_window",
        "from config.json key",
        "model.layers.3.mlp.up_proj.weight",
        "tokenizer.model",
    ):
        assert text in out
    report = json.loads(run("inspect", sample_dir(), "--json")[1])
    assert report["config"]["sliding_window"] == 64
    assert set(report["origin"]) == set(report["config"])
    assert len(report["tensors"]) == 46


def test_dry_run_writes_nothing(run, tmp_path: Path) -> None:
    status, out, _ = run("safetensors-to-gguf", sample_dir(), tmp_path / "m.gguf", "--dry-run")
    assert status == 0
    assert "nothing was written" in out
    assert "plus_one" in out
    assert list(tmp_path.iterdir()) == []
    report = json.loads(
        run("safetensors-to-gguf", sample_dir(), tmp_path / "m.gguf", "--dry-run", "--json")[1]
    )
    status, _, _ = run("safetensors-to-gguf", sample_dir(), tmp_path / "m.gguf")
    assert report["output"]["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_a_dry_run_refuses_what_the_run_would(run, tmp_path: Path) -> None:
    save(tmp_path / "dst")
    status, _, err = run("safetensors-to-torch", sample_dir(), tmp_path / "dst", "--dry-run")
    assert (status, "error[E_EXISTS]" in err) == (7, True)


@pytest.mark.parametrize("name", ["m.gguf", "m.ckpt", "m.safetensors", "m.bin"])
def test_a_destination_with_a_suffix_is_one_file(name: str, run, tmp_path: Path) -> None:
    to = {".gguf": "gguf", ".ckpt": "torch", ".safetensors": "safetensors", ".bin": "torch"}
    layout = ["--layout", "huggingface-bin"] if name == "m.bin" else []
    status, _, err = run(
        "convert", sample_dir(), tmp_path / name, "--to", to[Path(name).suffix], *layout
    )
    assert status == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.g2kit.manifest.json"]
    config = [] if name == "m.gguf" else ["--config", sample_dir() / "config.json"]
    assert run("check", tmp_path / name, *config)[0] == 0


def test_sharding_and_back(run, tmp_path: Path) -> None:
    assert (
        run("safetensors-to-safetensors", sample_dir(), tmp_path / "s", "--max-shard-size", "1MB")[
            0
        ]
        == 0
    )
    shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
    assert len(shards) > 5
    assert all(f.stat().st_size < 1.6e6 for f in shards), "only the embedding is larger"
    assert run("safetensors-to-torch", tmp_path / "s", tmp_path / "t")[0] == 0
    prints = {
        run("fingerprint", p)[1].split()[0] for p in (sample_dir(), tmp_path / "s", tmp_path / "t")
    }
    assert len(prints) == 1


def test_help_reads_without_knowing_the_project(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for text in (
        "A-to-B SRC DST",
        "inspect",
        "fingerprint",
        "check",
        "sample",
        "Exit codes",
        "flax-to-safetensors",
    ):
        assert text in out
    status, out, _ = run("flax-to-gguf", "--help")
    assert status == 0
    assert "--fold-query-scale" in out


def test_completion_is_offered() -> None:
    exe = Path(sys.executable).with_name("g2conv")
    env = {**os.environ, "_G2CONV_COMPLETE": "bash_source"}
    done = subprocess.run([exe], env=env, capture_output=True, text=True, check=False)
    assert "_G2CONV_COMPLETE" in done.stdout


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    exe = Path(sys.executable).with_name("g2conv")
    done = subprocess.run(
        f"{exe} inspect {sample_dir()} --tensors | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


# ---- what does not


def _gemma3(root: Path) -> Path:
    from safetensors.numpy import save_file

    root.mkdir()
    save_file(
        {"model.layers.0.self_attn.q_norm.weight": np.zeros(4, np.float32)},
        root / "model.safetensors",
    )
    return root


def _nothing(root: Path) -> Path:
    root.mkdir()
    return root


def _wrong_config(root: Path) -> Path:
    save(root)
    config = json.loads((root / "config.json").read_text())
    config["hidden_size"] = 26
    (root / "config.json").write_text(json.dumps(config))
    return root


def _half(root: Path) -> Path:
    save(root)
    f = root / "model.safetensors"
    f.write_bytes(f.read_bytes()[:-1000])
    return root


def _no_config(root: Path) -> Path:
    save(root)
    (root / "config.json").unlink()
    (root / "g2kit.manifest.json").unlink()  # it knows the configuration too
    return root


def _untied(root: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    save(root)
    tensors = load_file(root / "model.safetensors")
    tensors["lm_head.weight"] = tensors[canonical.EMBED] * np.array(
        2, tensors[canonical.EMBED].dtype
    )
    save_file(tensors, root / "model.safetensors")
    return root


def _padded(root: Path) -> Path:
    config = small("gemma2-2b")
    weights = random_weights(config, 2, rows=70)
    weights[canonical.EMBED_PADDING][2, 3] = 1
    save(root, weights, config, to="flax")
    return root


def _missing(root: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    save(root)
    tensors = load_file(root / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, root / "model.safetensors")
    return root


def _scaled_query(root: Path) -> Path:
    config = small("gemma2-2b").with_(query_pre_attn_scalar=12.0)
    return save(root, random_weights(config, 1), config)


BAD = {  # case -> (make the input, arguments after SRC DST, exit code, E_CODE, words the message has)
    "no such path": (lambda p: p, [], 3, "E_NOT_FOUND", ["no such file or directory"]),
    "an empty directory": (_nothing, [], 3, "E_FORMAT", []),
    "another model": (_gemma3, [], 3, "E_FORMAT", ["q_norm", "Gemma 3"]),
    "a truncated file": (_half, [], 3, "E_TRUNCATED", ["model.safetensors", "missing"]),
    "no configuration": (_no_config, [], 3, "E_CONFIG", ["--config", "sliding_window", "num_hidden_layers 2"]),
    "a wrong configuration": (_wrong_config, [], 3, "E_SHAPE", ["expected", "24", "26"]),
    "the wrong preset": (save, ["--config", "gemma2-9b"], 3, "E_CONFIG", ["2 layers", "42 layers"]),
    "no such preset": (save, ["--config", "gemma9"], 3, "E_CONFIG", ["gemma2-27b-it"]),
    "an untied head": (_untied, [], 3, "E_LOSSY", ["lm_head", "untied"]),
    "padding that is not zero": (_padded, [], 3, "E_LOSSY", ["70 rows", "6 more", "--drop-padding"]),
    "missing tensors": (_missing, [], 3, "E_MISSING_TENSOR", ["2 tensors are missing", "model.norm.weight", "1.mlp.up_proj"]),
    "a layout of another framework": (save, ["--layout", "flat"], 2, "E_USAGE", ["--layout flat", "huggingface"]),
    "a size that is none": (save, ["--max-shard-size", "many"], 2, "E_USAGE", ["many"]),
    "an unknown option": (save, ["--fast"], 2, "E_USAGE", ["--fast", "--help"]),
    "a missing tokenizer": (save, ["--tokenizer", "/nonexistent"], 3, "E_NOT_FOUND", ["/nonexistent"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(case: str, run, tmp_path: Path) -> None:
    make, options, want, code, words = BAD[case]
    src = make(tmp_path / "src")
    before = tree(src) if src.exists() else {}
    status, out, err = run("convert", src, tmp_path / "dst", "--to", "safetensors", *options)
    assert (status, out) == (want, "")
    assert err.startswith(f"error[{code}]: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert (tree(src) if src.exists() else {}) == before
    assert sorted(p.name for p in tmp_path.iterdir()) in (["src"], [])


def test_gguf_of_a_scale_llama_cpp_cannot_express(run, tmp_path: Path) -> None:
    src = _scaled_query(tmp_path / "src")
    status, _, err = run("safetensors-to-gguf", src, tmp_path / "g")
    assert status == 3
    assert "error[E_LOSSY]" in err
    assert "12^-1/2" in err
    assert "--fold-query-scale" in err
    status, out, _ = run("safetensors-to-gguf", src, tmp_path / "g", "--fold-query-scale", "--json")
    assert status == 0
    changed = {s["step"]: s["changed"] for s in json.loads(out)["lossy"]}
    assert changed["llama_query_scale"] > 0


def test_gguf_of_a_scale_that_folds_exactly(run, tmp_path: Path) -> None:
    """Four times the scalar halves the scale: a power of two, so nothing rounds, and the file says what it was."""
    raw = json.loads((sample_dir() / "config.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(raw | {"query_pre_attn_scalar": 512}))
    gguf, options = tmp_path / "m.gguf", ("--config", tmp_path / "c.json")
    report = json.loads(run("safetensors-to-gguf", sample_dir(), gguf, *options, "--json")[1])
    assert {s["step"]: s["changed"] for s in report["lossy"]}["llama_query_scale"] == 0
    assert report["source"]["fingerprint"] == report["output"]["fingerprint"]
    seen = json.loads(run("inspect", gguf, "--json")[1])
    assert seen["config"]["query_pre_attn_scalar"] == 512
    assert seen["origin"]["query_pre_attn_scalar"] == "GGUF key g2kit.query_pre_attn_scalar"
    back = json.loads(run("gguf-to-safetensors", gguf, tmp_path / "b", "--json")[1])
    assert back["output"]["fingerprint"] == report["source"]["fingerprint"]


def test_the_source_must_be_what_the_command_says(run, tmp_path: Path) -> None:
    status, _, err = run("flax-to-gguf", sample_dir(), tmp_path / "o")
    assert status == 2
    assert "the source is safetensors" in err
    assert "safetensors-to-" in err


def test_an_unknown_framework_is_named(run, tmp_path: Path) -> None:
    status, _, err = run("flax-to-onnx", sample_dir(), tmp_path / "o")
    assert status == 2
    assert "'onnx' is not a framework" in err


def test_nothing_is_overwritten_without_being_told(run, tmp_path: Path) -> None:
    save(tmp_path / "dst")
    before = tree(tmp_path / "dst")
    status, _, err = run("safetensors-to-torch", sample_dir(), tmp_path / "dst")
    assert status == 7
    assert "error[E_EXISTS]" in err
    assert "--overwrite" in err
    assert tree(tmp_path / "dst") == before
    assert run("safetensors-to-torch", sample_dir(), tmp_path / "dst", "--overwrite")[0] == 0
    assert (tmp_path / "dst" / "model.ckpt").exists()


def test_source_and_destination_must_be_apart(run, tmp_path: Path) -> None:
    src = save(tmp_path / "src")
    before = tree(src)
    for dst in (src, src / "inside", tmp_path):
        status, _, err = run("convert", src, dst, "--to", "safetensors", "--overwrite")
        assert status == 7, err
        assert err.startswith("error[E_EXISTS]: ")
        assert "the input" in err
    assert tree(src) == before


def test_dropped_padding_is_recorded(run, tmp_path: Path) -> None:
    src = _padded(tmp_path / "src")
    status, out, _ = run("flax-to-safetensors", src, tmp_path / "o", "--drop-padding", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["embedding"]["dropped_rows"] == 6
    assert {s["step"] for s in report["lossy"]} == {"drop_padding"}
    assert report["source"]["fingerprint"] != report["output"]["fingerprint"]


def test_zero_padding_comes_back(run, tmp_path: Path) -> None:
    """Flax with padding -> safetensors -> Flax is byte-identical where the arrays are."""
    config = small("gemma2-2b")
    save(tmp_path / "a", random_weights(config, 3, rows=80), config, to="flax")
    assert run("flax-to-safetensors", tmp_path / "a", tmp_path / "b")[0] == 0
    assert run("safetensors-to-flax", tmp_path / "b", tmp_path / "c")[0] == 0
    weights = [{k: v for k, v in tree(tmp_path / n / "transformer").items()} for n in ("a", "c")]
    assert weights[0] == weights[1]
    prints = {run("fingerprint", tmp_path / n)[1].split()[0] for n in "abc"}
    assert len(prints) == 1


def test_a_changed_file_fails_the_check(run, tmp_path: Path) -> None:
    save(tmp_path / "o")
    f = tmp_path / "o" / "model.safetensors"
    data = bytearray(f.read_bytes())
    data[-5] ^= 1
    f.write_bytes(data)
    status, _, err = run("check", tmp_path / "o")
    assert status == 3
    assert "error[E_CHECKSUM]" in err
    assert "model.safetensors" in err


def test_nan_is_carried_over_and_named(run, tmp_path: Path) -> None:
    config = small("gemma2-2b")
    weights = random_weights(config, 4)
    weights[canonical.FINAL_NORM][3] = np.nan
    src = save(tmp_path / "src", weights, config)
    status, _, err = run("safetensors-to-torch", src, tmp_path / "o")
    assert status == 0
    assert "model.norm.weight: 1 element is NaN or infinite" in err


def test_overflow_into_f16_is_refused(run, tmp_path: Path) -> None:
    config = small("gemma2-2b")
    weights = random_weights(config, 5)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    src = save(tmp_path / "src", weights, config)
    status, _, err = run("safetensors-to-torch", src, tmp_path / "o", "--dtype", "f16")
    assert status == 3
    assert "error[E_NONFINITE]" in err
    assert "up_proj" in err
    assert not (tmp_path / "o").exists()


def test_known_config_mistakes_are_named_and_fixed(run, tmp_path: Path) -> None:
    from g2kit.model.config import preset

    config = to_huggingface(preset("gemma2-9b").config) | {"query_pre_attn_scalar": 224}
    (tmp_path / "c.json").write_text(json.dumps(config))
    src = save(tmp_path / "src")
    status = run("inspect", src, "--config", tmp_path / "c.json")[0]
    assert status == 3, "2 layers are no 9B"
    from g2kit.convert.open import config_option
    from g2kit.model.config_formats import fix

    reading = config_option(tmp_path / "c.json")
    assert any("224" in str(w) and "256" in str(w) for w in reading.warnings)
    assert fix(reading).config.query_pre_attn_scalar == 256


def test_internal_errors_are_called_bugs(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr("g2kit.convert.api.inspect", broken)
    status, _, err = run("inspect", tmp_path)
    assert status == 70
    assert err.startswith("error[E_INTERNAL]: ValueError: boom")
    assert "Traceback" not in err
    assert "Traceback" in run("inspect", tmp_path, "--debug")[2]


# ---- kills


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing_and_continues(
    stop: signal.Signals, run, tmp_path: Path
) -> None:
    config = small("gemma2-2b", layers=12, d=256, f=1024, vocab=4096)
    src = save(tmp_path / "src", random_weights(config, 6), config)
    want = tmp_path / "want"
    assert run("safetensors-to-flax", src, want)[0] == 0
    exe = Path(sys.executable).with_name("g2conv")
    child = subprocess.Popen(
        [exe, "safetensors-to-flax", src, tmp_path / "dst"], stderr=subprocess.PIPE, text=True
    )
    while child.poll() is None and not (tmp_path / "dst.partial").exists():
        time.sleep(0.001)
    child.send_signal(stop)
    _, err = child.communicate()
    if child.returncode != 0:  # it may have been quicker than the signal
        assert child.returncode == 128 + stop
        assert err.strip().startswith("stopped: ")
        assert not (tmp_path / "dst").exists()
        assert run("safetensors-to-flax", src, tmp_path / "dst")[0] == 0
    assert tree(tmp_path / "dst") == tree(want)


def test_quiet_prints_nothing(run, tmp_path: Path) -> None:
    assert run("safetensors-to-torch", sample_dir(), tmp_path / "o", "--quiet") == (0, "", "")


def test_unfinished_output_is_no_checkpoint(run, tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    save(tmp_path / "x.partial" / "data")
    (tmp_path / "x.partial" / "journal").touch()
    status, _, err = run("fingerprint", tmp_path / "x.partial" / "data")
    assert (status, "unfinished output of an interrupted g2conv" in err) == (3, True)


def test_a_doubted_query_scale_is_not_folded(run, tmp_path: Path) -> None:
    from test_open import make_hollow

    from g2kit.model.config import preset

    make_hollow(tmp_path / "x", preset("gemma2-9b").config, "safetensors")
    config = to_huggingface(preset("gemma2-9b").config) | {"query_pre_attn_scalar": 224}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    status, _, err = run("safetensors-to-gguf", tmp_path / "x", tmp_path / "o", "--dry-run")
    assert status == 3
    assert "error[E_CONFIG]" in err
    assert "256" in err
    assert "--fix-config" in err


def test_a_terminal_sees_progress(tmp_path: Path) -> None:
    """On a pseudo-terminal, whatever size it claims to have; stdout stays clean."""
    import pty

    exe = Path(sys.executable).with_name("g2conv")
    control, terminal = pty.openpty()
    child = subprocess.Popen(
        [exe, "fingerprint", sample_dir()], stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    out, _ = child.communicate()
    os.close(terminal)
    seen = os.read(control, 1 << 16).decode()
    os.close(control)
    assert "hashing" in seen
    assert out.startswith("g2:sha256:")
