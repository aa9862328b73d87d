"""NaN, infinities and overflow: counted as bits, named with advice that helps, through formats that do arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import convert, fingerprint, open_checkpoint
from g2kit.convert.api import convert_checkpoint
from g2kit.convert.plan import Options
from g2kit.convert.steps import STEPS
from g2kit.formats.base import Array
from g2kit.formats.dtypes import BF16, F16, F32
from g2kit.formats.errors import NonFiniteError
from g2kit.model import canonical

CONFIG = small("gemma2-2b")
PLAIN_NAN, OTHER_NAN = 0x7FC0, 0x7FC5


def saved(root: Path, name: str, patterns: list[int], dtype: np.dtype = BF16) -> Path:
    """A model whose tensor ``name`` begins with these bit patterns."""
    weights = random_weights(CONFIG, 3, dtype)
    first = np.array(patterns, np.uint16 if dtype.itemsize == 2 else np.uint32).view(dtype)
    weights[name].reshape(-1)[: len(first)] = first
    return written(root, weights)


def written(root: Path, weights: dict[str, Array]) -> Path:
    convert_checkpoint(checkpoint(CONFIG, weights), root, Options("safetensors"))
    return root


def counts(report: dict[str, Any]) -> dict[str, int]:
    return {step["step"]: step["changed"] for step in report["lossy"]}


def test_a_nan_in_a_norm_comes_back_through_gguf(tmp_path: Path) -> None:
    src = saved(tmp_path / "src", canonical.FINAL_NORM, [PLAIN_NAN, 0x7F80, 0xFF80])
    there = convert(src, tmp_path / "o.gguf", to="gguf")
    assert counts(there)["plus_one"] == 0
    with open_checkpoint(tmp_path / "o.gguf") as c:
        assert {t.dtype for t in c.tensors.values()} == {BF16}
    back = convert(tmp_path / "o.gguf", tmp_path / "back", to="safetensors")
    assert counts(back) == {}, "nothing is rounded by reading"
    assert fingerprint(src) == fingerprint(tmp_path / "o.gguf") == fingerprint(tmp_path / "back")


def test_a_nan_that_says_more_is_counted(tmp_path: Path) -> None:
    src = saved(tmp_path / "src", canonical.FINAL_NORM, [OTHER_NAN, PLAIN_NAN])
    there = convert(src, tmp_path / "o.gguf", to="gguf")
    assert counts(there)["plus_one"] == 1
    assert there["source"]["fingerprint"] != there["output"]["fingerprint"]
    assert fingerprint(tmp_path / "o.gguf") == there["output"]["fingerprint"]
    with open_checkpoint(tmp_path / "o.gguf") as c:
        assert {t.dtype for t in c.tensors.values()} == {BF16}
    back = convert(tmp_path / "o.gguf", tmp_path / "back", to="safetensors")
    assert counts(back) == {"reading plus_one": 1}


def test_arithmetic_says_nothing_on_stderr_and_keeps_signs(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x = np.array([0x8000, 0x7F81, 0x7F7F, 0x0000], np.uint16).view(BF16)
    for name in ("embed_scale", "query_scale"):
        y = STEPS[name].forward(x, CONFIG, F32)
        assert np.signbit(y).tolist() == [True, False, False, False]
        assert STEPS[name].inverse(y, CONFIG, BF16).view(np.uint16)[[0, 3]].tolist() == [0x8000, 0]
    STEPS["plus_one"].forward(np.float32([3e38]), CONFIG, F16)
    assert not recwarn.list


LARGEST = 0x7F7F  # of bfloat16


@pytest.mark.parametrize(
    ("dtype", "bits", "options", "advice"),
    [
        # bfloat16 already: no wider exponent exists
        (BF16, [LARGEST, PLAIN_NAN, 0x7F80], {}, "no --dtype holds them; convert to a format"),
        (F16, [0x7BFF, 0x7E00], {}, "use --dtype bf16 or f32."),
        (F32, [0x47800000, 0x7FC00000], {"dtype": "f16"}, "use --dtype bf16 or f32."),
    ],
)
def test_what_overflows_is_counted_without_the_nans(
    dtype: np.dtype, bits: list[int], options: dict[str, str], advice: str, tmp_path: Path
) -> None:
    src = saved(tmp_path / "src", canonical.EMBED, bits, dtype)
    with pytest.raises(NonFiniteError) as e:
        convert(src, tmp_path / "o", to="maxtext", **options)
    assert e.value.what.startswith("1 finite weights are too large for ")
    assert "nan" not in str(e.value).lower().replace("nonfinite", "")
    assert "embedding stored times sqrt(d)" in e.value.what
    assert e.value.fix is not None
    assert e.value.fix.startswith(advice)
