"""The commands' first moments: Ctrl-C while they are being imported is no traceback."""

import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
SCRIPTS = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_its_command(script: str) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    assert module == "g2kit.entry", "the command itself would be imported unprotected"
    assert callable(getattr(import_module(module), function))
    code = f"import sys; sys.argv = ['x', '--version']; from {module} import {function} as f; f()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{script}, version ")


def test_before_the_command_almost_nothing_is_imported() -> None:
    code = "import sys, g2kit.entry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "g2kit.entry" in loaded
    assert loaded.isdisjoint({"click", "numpy", "importlib.metadata", "g2kit.terminal"})


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.08, 0.12, 0.2])
def test_an_interrupt_while_importing_is_quiet(delay: float) -> None:
    code = (
        "import sys, g2kit.entry as e; real, sys.argv = e.import_module, ['g2conv', '--version']\n"
        "def told(name): print('go', flush=True); return real(name)\n"
        "e.import_module = told; e.g2conv()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert "Traceback" not in err
    assert child.returncode in (0, -signal.SIGINT, 128 + signal.SIGINT)


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); import g2kit.entry as e\n"
        "sys.argv = ['g2conv', '--version']\n"
        "try: e.g2conv()\n"
        "finally: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("True\n")
