"""Standard streams that are closed, full, unread or of a narrow encoding; too little memory; what --quiet leaves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from g2kit.convert.cli import g2conv
from g2kit.model.sample import sample_dir
from g2kit.terminal import run_cli

SAMPLE = str(sample_dir())
# both commands, the way their entry points call them
COMMANDS = {
    "g2conv": "from g2kit.convert.cli import main; main()",
    "g2verify": "from g2kit.verify.cli import main; main()",
}


def shell(
    command: str, *args: str | bytes, redirect: str = "", **env: str
) -> tuple[int, bytes, bytes]:
    """Run a command under bash with redirections: exit code, stdout, stderr."""
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "${{@:2}}" {redirect}', sys.executable, COMMANDS[command], *args],
        env=os.environ | env, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("redirect", "help_status"),
    [
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        (">/dev/full", 4),
        ("2>/dev/full", 0),
        ("| true; exit ${PIPESTATUS[0]}", 141),
        ("2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_exit_codes_do_not_depend_on_the_streams(
    command: str, redirect: str, help_status: int
) -> None:
    for args, want in ((("--help",), help_status), (("--no-such-option",), 2)):
        status, _, err = shell(command, *args, redirect=redirect)
        assert status == want
        assert b"Traceback" not in err
        assert b"E_INTERNAL" not in err


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_weights_land_in_a_closed_stream(redirect: str, tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert shell("g2conv", "convert", SAMPLE, str(out), "--to", "torch", redirect=redirect)[0] == 0
    assert run_cli(g2conv, ["check", str(out), "-q"]) == 0


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_report_that_cannot_be_printed_takes_nothing_back(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    args = ("convert", SAMPLE, str(out), "--to", "torch", *options)
    status, _, err = shell("g2conv", *args, redirect=">/dev/full")
    assert status == 4
    assert err.decode() == (
        f"error[E_IO]: standard output: {out} is complete, only the report could not be printed: "
        "No space left on device. Fix: look at where standard output goes.\n"
    )
    assert run_cli(g2conv, ["check", str(out), "-q"]) == 0


def test_a_report_file_stays_when_stdout_is_full(tmp_path: Path) -> None:
    kept = tmp_path / "r.json"
    args = ("weights", SAMPLE, SAMPLE, "--report", str(kept))
    status, _, err = shell("g2verify", *args, redirect=">/dev/full")
    assert status == 4
    assert f"{kept} is complete, only the report" in err.decode()
    assert json.loads(kept.read_text())["verdict"] == "PASS"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_path_can_be_printed(encoding: str, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/a\xff\n\xe2\x82\xac"
    Path(os.fsdecode(odd)).symlink_to(SAMPLE)
    status, out, err = shell("g2conv", "fingerprint", odd, PYTHONIOENCODING=encoding)
    assert (status, err) == (0, b"")
    assert rb"a\udcff\n" in out
    assert out.count(b"\n") == 1
    status, out, _ = shell("g2conv", "inspect", odd, "--json", PYTHONIOENCODING=encoding)
    assert status == 0
    assert os.fsencode(json.loads(out.decode("ascii"))["path"]) == odd


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_called_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("g2kit.convert.api.inspect", fail)
    assert run_cli(g2conv, ["inspect", SAMPLE]) == 4
    assert capsys.readouterr().err.startswith("error[E_MEMORY]: out of memory (")


def test_other_runtime_errors_are_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("dictionary changed size")

    monkeypatch.setattr("g2kit.convert.api.inspect", fail)
    assert run_cli(g2conv, ["inspect", SAMPLE]) == 70
    assert "E_INTERNAL" in capsys.readouterr().err


def test_a_write_without_memory_is_called_so() -> None:
    from g2kit.formats.output_fs import explain

    found = explain(OSError(errno.ENOMEM, "Cannot allocate memory"), "write", Path("f"))
    assert (found.code, found.exit_code) == ("E_MEMORY", 4)


def test_quiet_leaves_the_answer_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(json.loads((sample_dir() / "config.json").read_text()) | {"attn_logit_softcapping": None})
    )  # fmt: skip
    args = ["inspect", SAMPLE, "--config", str(config)]
    assert run_cli(g2conv, args) == 0
    loud = capsys.readouterr().out
    assert "\nwarnings\n" in loud
    assert run_cli(g2conv, [*args, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.err, quiet.out) == ("", loud[: loud.index("\nwarnings\n") + 1])
