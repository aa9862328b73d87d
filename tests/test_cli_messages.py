"""What g2conv says when something is wrong: as JSON, in words, with advice that helps; and what inspect knows anyway."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import command_case
import numpy as np
import pytest
from command_case import Output, save, stopped_after
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert.api import convert_checkpoint
from g2kit.convert.cli import g2conv
from g2kit.convert.plan import Options
from g2kit.formats import errors
from g2kit.formats.errors import ConfigError, G2Error, ShapeError
from g2kit.model import canonical
from g2kit.model.config_formats import to_huggingface
from g2kit.model.sample import sample_dir
from g2kit.terminal import dump_json, run_cli

EXE = Path(sys.executable).with_name("g2conv")
KEYS = {"code", "message", "file", "tensor", "found", "expected", "fix"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    return partial(command_case.run, g2conv, capsys=capsys)


def strict(text: str) -> Any:
    """Parse JSON, refusing what Python takes and JSON is not."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def edit_config(root: Path, **values: Any) -> Path:
    """A small model whose config.json says something else."""
    save(root)
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return root


# ---- --json


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("inspect", "nowhere"), 3, "E_NOT_FOUND"),
        (("fingerprint", "nowhere"), 3, "E_NOT_FOUND"),
        (("check", "nowhere"), 3, None),
        (("flax-to-gguf", "nowhere", "out"), 3, "E_NOT_FOUND"),
        (("convert", "a", "b"), 2, "E_USAGE"),
        (("sample",), 2, "E_USAGE"),
        (("inspect", "--fast"), 2, "E_USAGE"),
        (("--fast",), 2, "E_USAGE"),
    ],
)
def test_a_failure_is_one_json_document(
    args: tuple[str, ...], status: int, code: str | None, run, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*args, "--json")
    report = strict(out)
    assert found == report["exit_code"] == status
    assert set(report) == {"error", "exit_code"}
    assert set(report["error"]) == KEYS
    assert code in (None, report["error"]["code"])
    assert report["error"]["fix"]
    assert err.startswith(f"error[{report['error']['code']}]: ")
    assert len(err.splitlines()) == 1
    assert run(*args)[1] == "", "without --json stdout stays empty"


def test_json_tells_found_and_expected(run, tmp_path: Path) -> None:
    src = edit_config(tmp_path / "src", hidden_size=26)
    error = strict(run("inspect", src, "--json")[1])["error"]
    assert error["code"] == "E_SHAPE"
    assert error["found"]["model.norm.weight"] == [24]
    assert error["expected"]["model.norm.weight"] == [26]
    assert error["file"] == str(src)


def test_a_bug_is_json_too(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr("g2kit.convert.api.inspect", broken)
    status, out, _ = run("inspect", tmp_path, "--json")
    assert (status, strict(out)["error"]["code"], strict(out)["exit_code"]) == (
        70,
        "E_INTERNAL",
        70,
    )


def test_an_argument_called_json_is_not_the_option(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("inspect", "--", "--json")
    assert (status, out) == (3, "")
    assert "--json: no such file" in err


def test_json_has_no_nan() -> None:
    text = dump_json({"a": [float("nan"), (float("inf"), -np.inf)], "b": "é\udc80", "c": None})
    assert strict(text) == {"a": ["nan", ["inf", "-inf"]], "b": "é\udc80", "c": None}
    text.encode("ascii")


def test_the_exit_code_of_a_command_reaches_the_shell() -> None:
    @click.command("ends")
    @click.pass_context
    def ends(ctx: click.Context) -> None:
        ctx.exit(6)

    group = click.Group("g", {"ends": ends})
    assert run_cli(group, ["ends"]) == 6


def test_errors_survive_pickling() -> None:
    e = ShapeError("a.", where="f", tensor="t", fix="b.", found=[1], expected=[2])
    e.add_note("x")
    back = pickle.loads(pickle.dumps(e))
    assert type(back) is ShapeError
    assert back.as_dict() == e.as_dict()


def test_every_error_class_has_advice_at_hand(run, monkeypatch, tmp_path: Path) -> None:
    """Without advice of its own, an error about the input still says what to do."""
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, G2Error)]
    assert len(kinds) > 15
    for kind in (k for k in kinds if k.exit_code == 3 and k is not errors.NotFoundError):
        if kind.code in ("E_EXTRA_TENSOR", "E_NONFINITE", "E_LOSSY"):
            continue  # what to do depends on the case, which always says it

        def broken(*args: object, kind: type[G2Error] = kind, **options: object) -> None:
            raise kind("it is bad.")

        monkeypatch.setattr("g2kit.convert.api.inspect", broken)
        assert "Fix: " in run("inspect", tmp_path)[2], kind


def test_signal_handlers_are_given_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    run_cli(g2conv, ["--version"])
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == before


# ---- usage


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("Missing command", "g2conv [OPTIONS] COMMAND")),
        (("convert", "a", "b"), ("--to", "flax", "keras", "g2conv convert --help")),
        (("convert",), ("SRC", "g2conv convert [OPTIONS] SRC DST")),
        (("convert", "a", "b", "--to", "onnx"), ("onnx", "maxtext")),
    ],
)
def test_usage_errors_are_one_line(args: tuple[str, ...], words: tuple[str, ...], run) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("to", "name", "words"),
    [
        ("safetensors", "out.gguf", ("`--to gguf`", ".safetensors for a single file")),
        ("flax", "out.ckpt", ("`--to torch`", "without .ckpt", "belongs to a file of torch")),
        ("gguf", "out.safetensors", ("`--to safetensors`",)),
        ("torch", "model.weights.h5", ("`--to keras`", ".ckpt or .pt")),
        ("keras", "m.keras", ("a directory", "is no suffix g2kit knows")),
        ("gguf", "M.GGUF", ("ending in .gguf",)),
    ],
)
def test_the_suffix_of_another_format_is_refused(
    to: str, name: str, words: tuple[str, ...], run, tmp_path: Path
) -> None:
    for more in ((), ("--dry-run",)):
        status, _, err = run("convert", sample_dir(), tmp_path / name, "--to", to, *more)
        assert status == 2
        assert err.startswith("error[E_USAGE]: ")
        for word in (name, *words):
            assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\udcff.gguf", "a\n.gguf"])
def test_a_file_that_could_not_be_opened_again_is_refused(name: str, run, tmp_path: Path) -> None:
    status, _, err = run("convert", sample_dir(), tmp_path / name, "--to", "gguf")
    assert status == 2
    assert "is not UTF-8 text, or has control characters. Fix: choose a plain name." in err
    assert list(tmp_path.iterdir()) == []


def test_a_dot_in_a_directory_name_is_no_suffix(run, tmp_path: Path) -> None:
    assert run("convert", sample_dir(), tmp_path / "gemma-2.5", "--to", "torch", "-q")[0] == 0
    assert (tmp_path / "gemma-2.5" / "model.ckpt").is_file()


@pytest.mark.parametrize(
    ("to", "layout", "want"),
    [
        ("maxtext", "scanned", "convert to another framework"),
        ("flax", "stacked", "one of flat, nested, kauldron, wrapped."),
    ],
)
def test_an_odd_number_of_layers_names_the_layouts_that_hold_it(
    to: str, layout: str, want: str, run, tmp_path: Path
) -> None:
    src = save(tmp_path / "src", config=small("gemma2-2b", layers=3))
    status, _, err = run("convert", src, tmp_path / "o", "--to", to, "--layout", layout)
    assert (status, want in err) == (2, True), err
    for name in want.removeprefix("one of ").rstrip(".").split(", ") if "one of" in want else ():
        assert run("convert", src, tmp_path / name, "--to", to, "--layout", name, "-q")[0] == 0


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("flax-to-", ["flax-to-flax", "flax-to-keras", "flax-to-gguf"]),
        ("in", ["inspect"]),
        ("", ["convert", "check"]),
        ("convert --to ", ["flax", "gguf"]),
        ("flax-to-gguf --dt", ["--dtype"]),
    ],
)
def test_shell_completion(words: str, want: list[str]) -> None:
    typed = ["g2conv", *words.split(" ")]
    env = {
        **os.environ,
        "_G2CONV_COMPLETE": "bash_complete",
        "COMP_WORDS": f"g2conv {words}",
        "COMP_CWORD": str(len(typed) - 1),
    }
    done = subprocess.run([EXE], env=env, capture_output=True, text=True, check=False)
    offered = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert offered >= set(want)
    assert all(o.startswith(typed[-1]) for o in offered)


# ---- advice

WRONG_CONFIGS = {
    "rope scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, ("yarn", "--config")),
    "attention bias": ({"attention_bias": True}, ("attention_bias", "--config")),
    "activation": ({"hidden_activation": "relu"}, ("relu", "--config")),
    "layer types": (
        {"layer_types": ["full_attention", "full_attention"]},
        ("layer_types[0]", "cannot be converted", "--config"),
    ),
    "number of layer types": ({"layer_types": ["full_attention"]}, ("2 layers", "--config")),
    "negative size": ({"hidden_size": -1}, ("hidden_size", "--config")),
    "another model": ({"model_type": "llama"}, ("llama", "Fix: ")),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_configuration_comes_with_advice(case: str, run, tmp_path: Path) -> None:
    values, words = WRONG_CONFIGS[case]
    status, _, err = run("inspect", edit_config(tmp_path / "src", **values))
    assert (status, err.startswith("error[E_CONFIG]: ")) == (3, True), err
    for word in (*words, "Fix: "):
        assert word in err
    assert "remove layer_types" not in err


def test_what_keras_cannot_express_names_another_way(run, tmp_path: Path) -> None:
    src = edit_config(tmp_path / "src", rope_theta=5e5, rope_parameters=None)
    status, _, err = run("safetensors-to-keras", src, tmp_path / "o")
    assert (status, "rope_theta is 500000" in err) == (3, True), err
    assert "Fix: convert to another framework" in err


def test_float8_weights_come_with_advice(run, tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    src = save(tmp_path / "src")
    weights = load_file(src / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(weights, src / "model.safetensors")
    status, _, err = run("safetensors-to-torch", src, tmp_path / "o")
    assert (status, err.startswith("error[E_DTYPE]: ")) == (3, True)
    for word in (name, "F8_E4M3", "Fix: ", "quantized copy"):
        assert word in err


def test_a_wrong_tokenizer_is_the_users_to_change(run, tmp_path: Path) -> None:
    status, _, err = run(
        "convert", sample_dir(), tmp_path / "o", "--to", "torch",
        "--tokenizer", sample_dir() / "config.json",
    )  # fmt: skip
    assert (status, "error[E_TOKENIZER]" in err) == (3, True)
    assert "with --tokenizer" in err
    assert "remove it" not in err


def test_one_shard_of_several_names_the_directory(run, tmp_path: Path) -> None:
    for to, pattern in (
        ("safetensors", "*-00002-of-*.safetensors"),
        ("torch", "*-00002-of-*.bin"),
        ("keras", "*_00001.*"),
    ):
        options = ("--to", to, "--max-shard-size", "2MB", "-q")
        assert run("convert", sample_dir(), tmp_path / to, *options)[0] == 0
        shard = next((tmp_path / to).glob(pattern))
        status, _, err = run("inspect", shard, "--config", sample_dir() / "config.json")
        assert (status, "error[E_MISSING_TENSOR]" in err) == (3, True), err
        assert f"one shard of several: pass its directory ({shard.parent})" in err


# ---- resuming


def interrupted(src: Path, dst: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    from g2kit.convert import convert

    with stopped_after(8, monkeypatch), pytest.raises(KeyboardInterrupt):
        convert(src, dst, to="safetensors", **options)
    assert dst.with_name(f"{dst.name}.partial").is_dir()


RESUMES = {
    "dtype": (("--dtype", "f32"), "--dtype was keep, now f32."),
    "shards": (("--max-shard-size", "1MB"), "--max-shard-size was not set, now 1000000"),
    "config": (("--config", "c.json"), "config sliding_window was 8, now 16"),
    "tokenizer": (("--tokenizer", "t.json"), "the content of tokenizer.json was not there"),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resume_says_in_words_what_differs(
    case: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, words = RESUMES[case]
    monkeypatch.chdir(tmp_path)
    config = small("gemma2-2b")
    src = save(tmp_path / "src", config=config)
    window = {"sliding_window": 16}
    Path("c.json").write_text(json.dumps(to_huggingface(config) | window))
    vocab = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(64)}, "merges": []}}
    Path("t.json").write_text(json.dumps(vocab))
    words = words.replace("was 8", f"was {config.sliding_window}")
    interrupted(src, tmp_path / "dst", monkeypatch)
    status, out, err = run("convert", src, "dst", "--to", "safetensors", *more, "--json")
    assert (status, "error[E_RESUME]" in err) == (7, True), err
    assert words in err
    assert "--no-resume" in err
    assert not any(len(word) > 40 for word in err.replace("/", " ").split()), "a raw hash"
    error = strict(out)["error"]
    assert error["found"].keys() == error["expected"].keys()
    assert run("convert", src, "dst", "--to", "safetensors", *more, "--no-resume", "-q")[0] == 0


def test_drop_padding_belongs_to_the_run(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding that is done already was taken under --drop-padding; without it nobody would look at the rows."""
    config = small("gemma2-2b")
    weights = random_weights(config, 2, rows=70)
    weights[canonical.EMBED_PADDING][2, 3] = 1
    src = tmp_path / "src"
    convert_checkpoint(checkpoint(config, weights), src, Options("flax"))
    interrupted(src, tmp_path / "dst", monkeypatch, drop_padding=True)
    status, _, err = run("flax-to-safetensors", src, tmp_path / "dst")
    assert (status, "--drop-padding was given, now not set" in err) == (7, True), err
    assert run("flax-to-safetensors", src, tmp_path / "dst", "--drop-padding", "-q")[0] == 0


def test_the_note_about_padding_is_clear(run, tmp_path: Path) -> None:
    src = save(tmp_path / "src", rows=70, to="flax")
    out = run("flax-to-safetensors", src, tmp_path / "o")[1]
    assert "6 embedding rows past vocab_size are padding and left out, once" in out
    assert "found to be all zero" in out


# ---- stopping


def test_stopping_a_command_that_writes_nothing_says_so(run, monkeypatch) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("g2kit.convert.api.fingerprint_report", stopped)
    status, out, err = run("fingerprint", sample_dir(), "--json")
    assert (status, err.strip()) == (130, "stopped: nothing was written.")
    report = strict(out)
    assert (report["exit_code"], report["error"]["code"]) == (130, "E_STOPPED")


def test_stopping_a_conversion_says_where_the_rest_lies(run, tmp_path: Path, monkeypatch) -> None:
    src = save(tmp_path / "src")
    with stopped_after(8, monkeypatch):
        status, _, err = run("safetensors-to-torch", src, tmp_path / "o")
    assert status == 130
    partial = tmp_path / "o.partial"
    assert err.strip() == (
        f"stopped: the destination is unchanged, what is done lies in {partial}. "
        "Run the same command again to continue."
    )
    assert partial.is_dir()
    assert run("safetensors-to-torch", src, tmp_path / "o", "-q")[0] == 0


# what is interrupted -> what the message says of the staging directory
AFTER_LANDING = {
    "g2kit.formats.output_commit.clear": "Run the same command again to clear up",
    "g2kit.convert.api._result_report": "",
    "g2kit.convert.show.result": "",
}


@pytest.mark.parametrize("where", AFTER_LANDING)
@pytest.mark.parametrize("name", ["o", "o.gguf"])
def test_stopping_after_the_output_is_in_place_says_that_it_is_complete(
    where: str, name: str, run, tmp_path: Path, monkeypatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    src, dst = save(tmp_path / "src"), tmp_path / name
    options = ("convert", src, dst, "--to", "gguf", "--overwrite")
    dst.mkdir() if name == "o" else dst.write_text("the old one")
    with monkeypatch.context() as m:
        m.setattr(where, stop)
        status, _, err = run(*options)
    assert status == 130
    again = AFTER_LANDING[where]
    said = f"stopped: {dst} is complete, only the report was not printed."
    assert err.strip() == said + (f" {again} {tmp_path / name}.partial." if again else "")
    assert run(*options)[0] == 0
    assert run("check", dst)[0] == 0
    assert not (tmp_path / f"{name}.partial").exists()


def test_a_terminated_inspection_is_a_json_document(tmp_path: Path) -> None:
    """SIGTERM while reading from a pipe that never ends cannot happen (pipes are refused), so stop a real one early."""
    fifo = tmp_path / "m.gguf"
    os.mkfifo(fifo)
    done = subprocess.run(
        [EXE, "inspect", fifo, "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, strict(done.stdout)["error"]["code"]) == (4, "E_IO")
    child = subprocess.Popen(
        [EXE, "fingerprint", sample_dir(), "--json"], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate()
    assert out == "" or isinstance(strict(out), dict), "whatever the moment, never half a document"


# ---- inspect without a configuration


@pytest.mark.parametrize("to", ["torch", "flax", "maxtext"])
def test_inspect_tells_what_it_can_without_a_configuration(to: str, run, tmp_path: Path) -> None:
    src = save(tmp_path / "src", to=to)
    for name in ("config.json", "g2kit.manifest.json", "generation_config.json"):
        (src / name).unlink(missing_ok=True)
    status, out, err = run("inspect", src, "--tensors")
    assert (status, err) == (0, "")
    assert "configuration: unknown, needs --config, because " in out
    assert "--layout" in out
    assert "hidden_size" in out
    report = strict(run("inspect", src, "--json")[1])
    assert report["config"] is None
    assert report["sizes"]["hidden_size"] == 24
    assert report["framework"] == to
    assert "--config" in report["config_unknown"]["fix"]
    assert [c["family"] for c in report["candidates"]] == ["gemma2"] * len(report["candidates"])
    full = strict(run("inspect", src, "--json", "--config", _config(tmp_path))[1])
    assert full["config"]["hidden_size"] == 24
    assert set(full) <= set(report)
    assert full["layout"] in [c["layout"] for c in report["candidates"]]
    assert [t["name"] for t in full["tensors"]] == [t["name"] for t in report["tensors"]]
    assert run("fingerprint", src)[0] == 3, "hashing needs the configuration"


def _config(root: Path) -> Path:
    path = root / "c.json"
    path.write_text(json.dumps(to_huggingface(small("gemma2-2b"))))
    return path


def test_a_damaged_configuration_is_still_an_error(run, tmp_path: Path) -> None:
    src = save(tmp_path / "src")
    (src / "config.json").write_text("{")
    assert run("inspect", src)[0] == 3


def test_quiet_is_quiet(run, tmp_path: Path) -> None:
    assert run("sample", tmp_path / "s", "-q") == (0, "", "")
    assert run("check", tmp_path / "s", "-q") == (0, "", "")
    assert run("fingerprint", tmp_path / "s", "-q")[1].startswith("g2:sha256:")


def test_config_errors_without_advice_say_how_to_give_one() -> None:
    from g2kit.model.config_formats import from_huggingface

    with pytest.raises(ConfigError, match="Fix: correct it, or pass"):
        from_huggingface({"model_type": "gemma2", "num_hidden_layers": "many"})
