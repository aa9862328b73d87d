"""A damaged code that stays within its format's bounds: the manifest's hash notices, and without one the report says so."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from g2kit.convert.open import open_checkpoint
from g2kit.formats import safetensors
from g2kit.model import canonical
from g2kit.quant import quantize
from g2kit.verify.compare import compare_weights
from g2kit.verify.ledger import QUANTIZED
from g2kit.verify.promised import DAMAGED

DATA = Path(__file__).parent / "data" / "hf_sharded"
Q0 = canonical.Q.format(i=0)


@pytest.fixture(params=["int-quantized", "gguf-q8_0"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(3, 500, (8, 20))
    path = tmp_path / ("q.gguf" if request.param.startswith("gguf") else "q")
    groups = 32 if request.param.startswith("gguf") else -1
    quantize(DATA, path, 8, group_size=groups, method="rtn", format=request.param, calibration=ids)
    return path


def flip(path: Path) -> None:
    """The lowest bit of one code of the first query projection."""
    file = path if path.is_file() else path / "model.safetensors"
    with open_checkpoint(path) as opened:
        if path.is_file():
            at = opened.tensors[Q0].source.quantized.offset + 2  # behind the block's scale
        else:
            with closing(safetensors.open_source(file)) as raw:
                codes = raw.tensors[Q0].read().tobytes()
            at = file.read_bytes().index(codes)
    data = bytearray(file.read_bytes())
    data[at + 1] ^= 1
    file.write_bytes(data)


def w2(report: dict[str, Any]) -> dict[str, Any]:
    return next(c for c in report["claims"] if c["id"] == "W2")


def test_the_manifest_tells_a_damaged_code_from_rounding(packed: Path) -> None:
    good = compare_weights(DATA, packed)
    assert w2(good)["verdict"] == "PASS"
    assert "of them what the candidate's manifest names, bit for bit" in w2(good)["sentence"]
    rows = {r["name"]: r for r in good["ledger"] if r["rule"].startswith(QUANTIZED)}
    assert {r["promised"] for r in rows.values()} == {True}
    assert not any("no manifest" in s for s in good["not_verified"])
    flip(packed)
    bad = compare_weights(DATA, packed)
    assert w2(bad)["verdict"] == "FAIL"
    assert DAMAGED in w2(bad)["sentence"]
    rows = {r["name"]: r for r in bad["ledger"]}
    assert [n for n, r in rows.items() if r["promised"] is False] == [Q0]
    assert rows[Q0]["verdict"] == "FAIL"
    assert rows[Q0]["max_steps"] < 2  # its bounds alone would not have noticed


def test_without_a_manifest_the_report_says_what_cannot_be_seen(packed: Path) -> None:
    flip(packed)
    for manifest in packed.parent.rglob("*manifest.json"):
        manifest.unlink()
    report = compare_weights(DATA, packed)
    assert w2(report)["verdict"] == "PASS"
    assert "manifest" not in w2(report)["sentence"]
    assert any("would look like rounding" in s for s in report["not_verified"])


def test_a_manifest_of_other_files_promises_nothing(packed: Path) -> None:
    """Sizes differ, so it is not about these files; what it says must not fail them."""
    manifest = next(packed.parent.rglob("*manifest.json"))
    other = json.loads(manifest.read_text())
    assert other["files"]
    (packed if packed.is_file() else packed / "model.safetensors").open("ab").close()
    with open_checkpoint(packed) as opened:
        assert opened.sidecars.manifest_tensors is not None
    manifest.write_text(manifest.read_text().replace('"size": ', '"size": 1'))
    with open_checkpoint(packed) as opened:
        assert opened.sidecars.manifest_tensors is None
    assert w2(compare_weights(DATA, packed))["verdict"] == "PASS"


def test_a_zeroed_row_fails_at_any_number_of_bits(tmp_path: Path) -> None:
    """At two bits zeros are within a step of everything."""
    ids = np.random.default_rng(0).integers(3, 500, (8, 20))
    path = tmp_path / "q"
    quantize(DATA, path, 2, group_size=32, method="rtn", format="mlx", calibration=ids)
    assert w2(compare_weights(DATA, path))["verdict"] == "PASS"
    from safetensors.numpy import load_file, save_file

    arrays = load_file(path / "model.safetensors")
    prefix = Q0.removesuffix("weight")
    arrays[prefix + "weight"][5] = 0xAAAAAAAA  # code 2, the middle
    save_file(arrays, path / "model.safetensors", metadata={"format": "mlx"})
    (path / "g2kit.manifest.json").unlink()
    assert "row 5 is no nearer to the reference than zeros" in w2(
        compare_weights(DATA, path)
    )["sentence"]  # fmt: skip
