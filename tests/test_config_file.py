"""What config.json says besides a GemmaConfig's fields reaches C0's verdict; so does a file that --config replaces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from g2kit.model.sample import sample_dir
from g2kit.verify.identity import FUNCTION, USE, Identity, compare_identity
from g2kit.verify.side import open_side

NAMES = ("config.json", "model.safetensors", "tokenizer.model")


def copied(to: Path, **changes: Any) -> Path:
    """The sample with other values in its config.json."""
    to.mkdir()
    for name in NAMES[1:]:
        shutil.copy(sample_dir() / name, to / name)
    keys = json.loads((sample_dir() / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(keys))
    return to


def compared(ref: Path, cand: Path, config: Any = None) -> Identity:
    with open_side(ref) as a, open_side(cand, config) as b:
        return compare_identity(a, b)


@pytest.mark.parametrize(("key", "value", "kind"), [
    ("tie_word_embeddings", False, FUNCTION),
    ("tie_word_embeddings", None, FUNCTION),
    ("tie_word_embeddings", 0, FUNCTION),
    ("hidden_activation", "gelu", FUNCTION),
    ("sliding_window_size", 32, FUNCTION),
    ("quantization_config", {"quant_method": "bitsandbytes"}, FUNCTION),
    ("num_experts", 8, FUNCTION),
    ("architectures", ["GemmaForCausalLM"], FUNCTION),
    ("torch_dtype", "float16", USE),
    ("dtype", "float16", USE),
])  # fmt: skip
def test_each_wrong_key_is_a_difference(tmp_path: Path, key: str, value: Any, kind: str) -> None:
    found = compared(sample_dir(), copied(tmp_path / "c", **{key: value}))
    assert [(d.field, d.candidate, d.kind) for d in found.differences] == [
        (f"config.{key}", value, kind)
    ]


def test_what_is_wrong_on_both_sides_is_no_difference(tmp_path: Path) -> None:
    one, two = (copied(tmp_path / n, tie_word_embeddings=False, num_experts=8) for n in "ab")
    assert compared(one, two).differences == ()


def test_a_null_window_beside_the_older_key_is_named(tmp_path: Path) -> None:
    changes = {"sliding_window": None, "layer_types": None}
    found = compared(sample_dir(), copied(tmp_path / "c", **changes))
    assert any("sliding_window" in d.field and d.kind == FUNCTION for d in found.differences)


def test_a_replaced_configuration_that_disagrees_is_said(tmp_path: Path) -> None:
    wrong = copied(tmp_path / "c", sliding_window=32, sliding_window_size=32, num_experts=8)
    found = compared(sample_dir(), wrong, sample_dir() / "config.json")
    assert found.differences == ()
    said = [t for t in found.untested if "--config replaced the candidate's own" in t]
    assert len(said) == 1
    assert "sliding_window is 32, 64 was used" in said[0]
    assert "num_experts is 8" in said[0]


def test_each_side_is_shown_with_its_own_window(tmp_path: Path) -> None:
    """The candidate's older key contradicts its own window; the reference's does not."""
    found = compared(sample_dir(), copied(tmp_path / "c", sliding_window=65))
    assert [str(d) for d in found.differences] == ["sliding_window is 64 / 65"]
    other = copied(tmp_path / "d", sliding_window=65, sliding_window_size=32)
    assert [str(d) for d in compared(sample_dir(), other).differences] == [
        "sliding_window is 64 / 65",
        "config.sliding_window_size is 64 / 32",
    ]


def test_a_replaced_configuration_that_agrees_is_not_mentioned() -> None:
    found = compared(sample_dir(), sample_dir(), sample_dir() / "config.json")
    assert found.untested == ()
