"""Parts of a comparison: all of the same weights, and nothing missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert.open import Checkpoint
from g2kit.formats.errors import FormatError, UsageError
from g2kit.model import canonical
from g2kit.verify.compare import merge, part_of
from g2kit.verify.options import Options, engines
from g2kit.verify.shards import dumps_part

CONFIG = small("gemma2-2b", layers=2)
WEIGHTS = random_weights(CONFIG, 1)
Part = dict[str, Any]


def model(changes: dict[str, np.ndarray] | None = None) -> Checkpoint:
    return checkpoint(CONFIG, {**WEIGHTS, **(changes or {})})


def shard(i: int, ref: Checkpoint, cand: Checkpoint) -> Part:
    one, two = engines()
    options = Options("smoke", one, two, batch_tokens=128, shard=(i, 2))
    loaded: Part = json.loads(dumps_part(part_of(ref, cand, options)))
    return loaded


@pytest.fixture(scope="module")
def whole() -> list[Part]:
    return [shard(i, model(), model()) for i in (0, 1)]


def save(directory: Path, parts: list[Part]) -> list[Path]:
    paths = [directory / f"{i}.json" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(dumps_part(part))
    return paths


def test_whole_parts_merge(whole: list[Part], tmp_path: Path) -> None:
    assert merge(save(tmp_path, whole))["verdict"] in ("PASS", "INCONCLUSIVE")


@pytest.mark.parametrize("side", [0, 1])
def test_parts_of_other_weights_are_refused(side: int, whole: list[Part], tmp_path: Path) -> None:
    """Tensors that the second shard does not look at itself are exchanged before it runs."""
    looked_at = {r["name"] for r in whole[1]["ledger"]}
    zeroed = {n: np.zeros_like(w) for n, w in WEIGHTS.items() if n not in looked_at}
    assert zeroed
    sides = [model(), model()]
    sides[side] = model({n: w for n, w in zeroed.items() if n != canonical.EMBED})
    late = shard(1, sides[0], sides[1])
    with pytest.raises(UsageError, match="different comparisons: they have not the same weights"):
        merge(save(tmp_path, [whole[0], late]))


def drop_row(parts: list[Part]) -> None:
    parts[0]["ledger"].pop(3)


def drop_ledgers(parts: list[Part]) -> None:
    for part in parts:
        part["ledger"] = []


def drop_lockstep(parts: list[Part]) -> None:
    parts[1]["lockstep"] = None


def drop_record(parts: list[Part]) -> None:
    parts[1]["lockstep"]["records"].pop()


def drop_trace(parts: list[Part]) -> None:
    traces = parts[0]["lockstep"]["traces"]
    traces.remove(next(t for t in traces if t[1] == 1 and t[2] == "accumulated"))


def drop_positions(parts: list[Part]) -> None:
    stats = parts[0]["lockstep"]["records"][0]["stats"]
    for column in stats.values():
        column.pop()


def drop_coverage(parts: list[Part]) -> None:
    parts[0]["coverage"] = None


def drop_floor(parts: list[Part]) -> None:
    parts[0]["floor"] = parts[0]["floor_reason"] = None


def row_twice(parts: list[Part]) -> None:
    parts[0]["ledger"].append(parts[0]["ledger"][0])


@pytest.mark.parametrize(("damage", "message"), [
    (drop_row, "all tensors: 1 missing"), (drop_ledgers, "all tensors"),
    (drop_lockstep, "shard 2 of 2 has no lockstep"), (drop_record, "all sequences: 1 missing"),
    (drop_trace, "sequences of layer 1: 1 missing"), (drop_positions, "positions, the probes have"),
    (row_twice, "1 there twice"), (drop_coverage, "no coverage"), (drop_floor, "no coverage or no noise"),
])  # fmt: skip
def test_incomplete_parts_are_an_error(
    damage: Callable[[list[Part]], None], message: str, whole: list[Part], tmp_path: Path
) -> None:
    parts = json.loads(json.dumps(whole))
    damage(parts)
    with pytest.raises(FormatError, match=message):
        merge(save(tmp_path, parts))
