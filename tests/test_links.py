"""Symbolic links: none leads out of a checkpoint, Hugging Face's cache and links the user names work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from g2kit.convert import api, convert, fingerprint
from g2kit.formats.errors import UnsafePathError
from g2kit.model.sample import sample_dir

# framework and layout -> files of its checkpoint, as glob patterns, the first of each pattern is taken
FILES = {
    "safetensors": ["model.safetensors", "g2kit.manifest.json", "config.json", "tokenizer.model"],
    "gguf": ["*.gguf"],
    "torch": ["*.ckpt"],
    "keras": ["*.weights.h5"],
    "flax": ["_METADATA", "_CHECKPOINT_METADATA", "**/.zarray", "**/0.0"],
}
CASES = [(to, pattern) for to, patterns in FILES.items() for pattern in patterns]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    for to in FILES:
        convert(sample_dir(), root / to, to=to, check="none")
    return root


def linked(outputs: Path, to: str, pattern: str, root: Path, away: Path) -> Path:
    """A copy of an output in which one file is a link to ``away``."""
    shutil.copytree(outputs / to, root)
    file = next(p for p in sorted(root.glob(pattern)) if p.is_file())
    away.mkdir(parents=True)
    target = away / ("f" * 64)
    file.rename(target)
    file.symlink_to(target)
    return file


@pytest.mark.parametrize(("to", "pattern"), CASES)
def test_a_link_out_of_the_directory_is_not_followed(
    to: str, pattern: str, outputs: Path, tmp_path: Path
) -> None:
    linked(outputs, to, pattern, tmp_path / "m", tmp_path / "away")
    with pytest.raises(UnsafePathError, match=r"symbolic link leads to .*outside its directory"):
        api.check(tmp_path / "m")
    if "manifest" not in pattern:
        with pytest.raises(UnsafePathError, match="symbolic link leads to"):
            fingerprint(tmp_path / "m")


@pytest.mark.parametrize(("to", "pattern"), CASES)
def test_links_of_the_hugging_face_cache_are_followed(
    to: str, pattern: str, outputs: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models--x" / "snapshots" / "abc"
    root.parent.mkdir(parents=True)
    linked(outputs, to, pattern, root, tmp_path / "models--x" / "blobs")
    assert fingerprint(root) == fingerprint(outputs / to)
    assert api.check(root)["tensors"]


@pytest.mark.parametrize("to", ["safetensors", "gguf", "torch"])
def test_a_link_that_the_user_names_is_followed(to: str, outputs: Path, tmp_path: Path) -> None:
    file = linked(outputs, to, FILES[to][0], tmp_path / "m", tmp_path / "away")
    assert fingerprint(file) == fingerprint(outputs / to)
    (tmp_path / "link").symlink_to(outputs / to)
    assert fingerprint(tmp_path / "link") == fingerprint(outputs / to)


def test_an_item_that_is_a_link_out_of_the_run_is_not_followed(
    outputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "default").symlink_to(outputs / "flax")
    with pytest.raises(UnsafePathError, match="symbolic link leads to"):
        fingerprint(tmp_path / "run")


def test_other_parts_of_a_split_gguf_stay_in_the_directory(outputs: Path, tmp_path: Path) -> None:
    source = next((outputs / "gguf").glob("*.gguf"))
    for k in (1, 2):
        (tmp_path / f"m-0000{k}-of-00002.gguf").symlink_to(source)
    with pytest.raises(UnsafePathError, match=r"m-00002-of-00002\.gguf: .*symbolic link leads to"):
        fingerprint(tmp_path / "m-00001-of-00002.gguf")
