"""The import direction, the light import, and that both guards can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# each folder may import itself and what stands left of it; report is a leaf
ORDER = ("formats", "model", "convert", "quant", "verify")
HEAVY = ("torch", "jax", "triton", "transformers", "tensorflow")


def wrong_imports(source: str, folder: str, depth: int) -> list[str]:
    """Relative imports of ``source``, a file ``depth`` levels below the package, that point right."""
    allowed = ORDER[: ORDER.index(folder) + 1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            targets = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            found += [t for t in targets if t in ORDER and t not in allowed]
        if isinstance(node, ast.ImportFrom) and node.module and node.module.endswith("cli"):
            found.append("cli")
    return found


@pytest.mark.parametrize("folder", [f for f in ORDER if (ROOT / f).is_dir()])
def test_imports_point_left(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if path.name != "cli.py":
            depth = len(path.relative_to(ROOT).parts) - 1
            assert wrong_imports(path.read_text(), folder, depth) == [], path


def test_the_direction_guard_can_fail() -> None:
    assert wrong_imports("from ..convert import layout", "formats", 1) == ["convert"]
    assert wrong_imports("from ...verify.x import y", "model", 2) == ["verify"]
    assert wrong_imports("from .cli import main", "convert", 1) == ["cli"]
    assert wrong_imports("from ..formats import base", "convert", 1) == []


def loaded(code: str) -> set[str]:
    """Heavy modules loaded after running ``code`` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "g2kit",
        "g2kit.convert",
        "g2kit.convert.cli",
        "g2kit.convert.api",
        "g2kit.model.sample",
        "g2kit.verify.cli",
        "g2kit.verify.compare",
        "g2kit.report",
    ],
)
def test_import_is_light(module: str) -> None:
    assert loaded(f"import {module}") == set()


def test_the_light_import_guard_can_fail() -> None:
    assert loaded("import g2kit.model.torch_gemma") == {"torch"}


def test_opening_and_converting_load_no_framework(tmp_path: Path) -> None:
    code = (
        "from g2kit.convert import convert; from g2kit.model.sample import sample_dir\n"
        f"convert(sample_dir(), {str(tmp_path / 'a')!r}, to='torch')\n"
        f"convert({str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}, to='flax')"
    )
    assert loaded(code) == set()
