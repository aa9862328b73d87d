"""What is installed: one top-level name, the folders, the sample, the command; no benchmarks, no tests."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_only_top_level_name_is_g2kit(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"g2kit"}
    assert wheel.name.endswith("-py3-none-any.whl"), "no compiler needed"


def test_everything_that_is_needed_is_there(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"g2kit/{p.relative_to(ROOT)}"
        for folder in ("formats", "model", "convert", "verify", "report")
        for p in (ROOT / folder).rglob("*.py")
    }
    assert sources <= names
    texts = {f"g2kit/{p.relative_to(ROOT)}" for p in (ROOT / "verify/texts").iterdir()}
    assert len(texts) > 10
    assert texts <= names
    for name in (
        "py.typed",
        "terminal.py",
        "model/sample/model.safetensors",
        "model/sample/tokenizer.model",
        "machine.py",
        "outputs.py",
        "sealed.py",
        "report/schema.json",
        "report/quantized/schema.json",
        "report/page.css",
        "report/page.js",
    ):
        assert f"g2kit/{name}" in names
    assert not [n for n in names if "/tests/" in n or "/bench/" in n]


def test_the_installed_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """From the wheel and not from the checkout: unpacked elsewhere, run from an empty directory."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import g2kit, sys; from g2kit.convert.cli import main; "
        f"assert g2kit.__file__.startswith({str(site)!r}), g2kit.__file__; "
        "main(['sample', 'out', '--to', 'torch'])"
    )
    # -S: no .pth files, so an editable install of the checkout stays out; its dependencies do not
    dependencies = sysconfig.get_paths()["purelib"]
    script = f"import sys; sys.path[:0] = [{str(site)!r}, {dependencies!r}]; {code}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.ckpt").exists()
