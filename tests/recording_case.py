"""Recordings of the bundled sample, and ways to change one as somebody with the schema at hand would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fault_fs import Unsynced
from safetensors.numpy import load_file, save_file

from g2kit.convert import open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.probes import Probe, ProbeSet, build_probes, tokenizer_of
from g2kit.verify.recording import record
from g2kit.verify.runners import Runner, open_runner
from g2kit.verify.runners.base import Array

Arrays = dict[str, np.ndarray]


@lru_cache
def sample() -> Checkpoint:
    """The bundled sample, opened once."""
    return open_checkpoint(sample_dir())


@lru_cache
def few_probes() -> ProbeSet:
    """Six sequences of different lengths, the longest across the sliding window."""
    found = build_probes(sample().config, tokenizer_of(sample()), "smoke")
    chosen = [p for p in found if p.group in ("P0", "P3")] + found.group("P1")[:4]
    return ProbeSet(tuple(chosen), "smoke", 0, [{"group": "P2", "why": "a test"}])


def make(out: Path, runner: str = "torch", dtype: str = "float32", **options: Any) -> Path:
    """Record the sample."""
    with open_runner(runner, sample(), dtype=dtype) as r:
        record(r, few_probes(), out, checkpoint=sample(), fs=Unsynced(), **options)
    return out


class LogitsOnly(Runner):
    """A runner that keeps its hidden states and its table to itself, under the name of one that does."""

    name = "llama_cpp"
    gives = frozenset({"logits", "decode"})
    dtypes = ("float32",)

    def __init__(self, inner: Runner) -> None:
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def start(self, tokens: Any, padding: Any = None) -> None:
        self.batch = self._begin(tokens, padding)
        self.inner.start(tokens, padding)
        self.inner.finish()

    def logit_tiles(
        self, rows: int | None = None, positions: slice = slice(None)
    ) -> Iterator[tuple[int, int, Array]]:
        return self.inner.logit_tiles(rows, positions)

    def close(self) -> None:
        self.inner.close()


def resigned(
    source: Path,
    target: Path,
    arrays: Callable[[Arrays], None] = lambda a: None,
    document: Callable[[dict[str, Any]], None] = lambda d: None,
) -> Path:
    """A copy with changed content and every hash right again."""
    shutil.copytree(source, target)
    found = load_file(target / schema.ARRAYS)
    arrays(found)
    found = {n: np.ascontiguousarray(a) for n, a in found.items()}
    save_file(found, target / schema.ARRAYS)
    content = (target / schema.ARRAYS).read_bytes()
    import hashlib

    doc = json.loads((target / schema.DOCUMENT).read_text())
    doc["files"][schema.ARRAYS] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    document(doc)
    (target / schema.DOCUMENT).write_bytes(schema.dumps(doc))
    return target


def first_version(source: Path, target: Path) -> Path:
    """As the first version of the schema was written."""

    def without(document: dict[str, Any]) -> None:
        document["schema"] = schema.FIRST
        del document["model"]["tokenizer"], document["files"][schema.TOKENIZER]

    made = resigned(source, target, lambda a: a.__delitem__("final_norm"), without)
    (made / schema.TOKENIZER).unlink()
    return made


def probe(id_: str, tokens: list[int]) -> Probe:
    """A probe of these ids."""
    return Probe(id_, id_.split("/")[0], "test", id_, np.array(tokens, np.int64), None, True)
