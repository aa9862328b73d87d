"""What ties the parts of one comparison together: the weights every shard ran, and that nothing is missing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..convert.digest import digest, run_all
from ..convert.open import Checkpoint, LazyTensor
from ..convert.progress import Progress
from ..formats.errors import FormatError, NonFiniteError
from ..formats.fingerprint import PREFIX
from ..model import canonical
from ..model.config import GemmaConfig
from .identity import SIZE
from .side import Side

_FIX = "run that shard again."


def weights_of(side: Side, progress: Progress) -> str:
    """A hash over every weight of a side: the same paths may hold other files by the time the next shard runs.

    Args:
        side: a checkpoint or a recording.
        progress: told of bytes.
    """
    if side.checkpoint is None:
        assert side.recording is not None
        return side.recording.id
    progress.start(sum(t.nbytes for t in side.checkpoint.tensors.values()), "identity")
    text = json.dumps(_digests(side.checkpoint, progress), sort_keys=True)
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()


def _digests(checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    def job(tensor: LazyTensor) -> Callable[[], Any]:
        def work() -> Any:
            try:
                found = digest(tensor, progress)
            except NonFiniteError as e:  # packed weights name the damaged block; claims will say so
                return str(e)
            return [found.dtype, list(found.shape), found.sha256]

        return work

    return run_all({n: job(t) for n, t in checkpoint.tensors.items()})


def check_complete(parts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts that together lack a tensor or a position: a verdict over what is left would say too much.

    The tensors follow from the configuration, the positions from the list of probes.

    Args:
        parts: all parts of one comparison.

    Raises:
        FormatError: something is missing or there twice; says what.
    """
    first = parts[0]
    if any(d["kind"] == SIZE for d in first["identity"]["differences"]):
        return
    if first["candidate"]["kind"] == first["reference"]["kind"] == "checkpoint":
        _check_ledger(parts)
    if first["kind"] == "compare":
        _check_once(first)
        _check_lockstep(parts, "lockstep")
        if first["kernel_name"] is not None:
            _check_lockstep(parts, "kernel")


def _check_once(first: Mapping[str, Any]) -> None:
    """What only the first shard has."""
    if first["coverage"] is None or (first["floor"] is None and first["floor_reason"] is None):
        raise FormatError("the first shard has no coverage or no noise floor.", fix=_FIX)


def _check_ledger(parts: Sequence[Mapping[str, Any]]) -> None:
    rows = [r["name"] for p in parts for r in p["ledger"] or ()]
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in parts[0]["reference"]["config"].items()
    }
    config = GemmaConfig(**values)
    _check_all("tensors", rows, list(canonical.tensors(config)), extra=True)


def _check_lockstep(parts: Sequence[Mapping[str, Any]], name: str) -> None:
    for part in parts:
        if part[name] is None:
            shard = part["shard"] or (0, 1)
            raise FormatError(f"shard {shard[0] + 1} of {shard[1]} has no {name}.", fix=_FIX)
    probes = parts[0]["probes"]
    ids = [row[0] for row in probes["list"]]
    records = [r for p in parts for r in p[name]["records"]]
    _check_all("sequences", [r["document"] for r in records], ids)
    positions = sum(len(r["stats"]["kl"]) for r in records)
    if positions != probes["tokens"]:
        raise FormatError(
            f"the parts hold {positions} positions, the probes have {probes['tokens']}.", fix=_FIX
        )
    for part in parts:
        traced = {t[1] for t in part[name]["traces"]}
        for layer, _ in part[name]["kinds"] if traced else ():
            mine = [t[0] for t in part[name]["traces"] if t[1] == layer and t[2] == "accumulated"]
            _check_all(
                f"sequences of layer {layer}", mine, [r["document"] for r in part[name]["records"]]
            )


def _check_all(
    what: str, found: Sequence[str], expected: Sequence[str], *, extra: bool = False
) -> None:
    missing = [n for n in expected if n not in set(found)]
    twice = [n for n, count in Counter(found).items() if count > 1]
    other = [] if extra else [n for n in found if n not in set(expected)]
    for names, word in ((missing, "missing"), (twice, "there twice"), (other, "unknown")):
        if names:
            raise FormatError(
                f"the parts do not hold all {what}: {len(names)} {word}, the first {names[0]!r}; "
                f"found {len(set(found))}, expected {len(expected)}.",
                fix=_FIX,
            )
