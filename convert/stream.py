"""The engine: canonical tensors flow from the source's files into the target's slots, a block at a time.

Each task reads, hashes, reorders, casts and writes one tensor; two run at once, so reading ahead overlaps writing. A
tensor whose order changes is held whole (twice: before and after); everything else moves in blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..formats.arena import recycled
from ..formats.dtypes import BF16, F16, F32, short
from ..formats.errors import NonFiniteError, ResumeError
from ..formats.fingerprint import TensorHasher
from ..formats.manifest import TensorEntry
from .bits import bits
from .digest import (
    WORKERS,
    count_nonfinite,
    digest,
    entry,
    is_zero,
    meanwhile,
    read_ahead,
    run_all,
)
from .open import narrows
from .plan import Task
from .progress import SILENT, Tick

Array = npt.NDArray[Any]
ALONE = 256 << 20  # bytes
Write = Callable[[str, tuple[int, ...], Array], None]


@dataclass(frozen=True)
class TaskRecord:
    """What is known about one tensor once it is written.

    Attributes:
        source: digest of the canonical tensor that was read.
        output: digest of the canonical tensor the target's reader must give back.
        changed: elements whose value differs between the two.
        nonfinite: NaN and infinite elements in the source (carried over as they are).
        dropped: digest of the rows behind it that the target does not hold, if any.
        rounded: stored elements that undoing the source's own arithmetic rounded.
    """

    source: TensorEntry
    output: TensorEntry
    changed: int
    nonfinite: int
    dropped: TensorEntry | None = None
    rounded: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {
            "source": asdict(self.source),
            "output": asdict(self.output),
            "changed": self.changed,
            "nonfinite": self.nonfinite,
            "dropped": asdict(self.dropped) if self.dropped else None,
            "rounded": self.rounded,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskRecord:
        """The inverse of :meth:`to_json`.

        Raises:
            ResumeError: it is not what :meth:`to_json` gives.
        """
        try:
            return cls(
                _entry(data["source"]),
                _entry(data["output"]),
                int(data["changed"]),
                int(data["nonfinite"]),
                _entry(data["dropped"]) if data["dropped"] else None,
                int(data["rounded"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ResumeError(
                "the interrupted run noted a tensor in a way this version does not know.",
                fix="start afresh with --no-resume.",
            ) from None


def run_task(task: Task, write: Write, progress: Tick = SILENT) -> TaskRecord:
    """Move one tensor.

    Raises:
        NonFiniteError: a finite weight does not fit the target's dtype.
        LossyError: rows to be left out are not zero.
    """
    tensor, config = task.tensor, task.tensor.config
    source = TensorHasher(tensor.name, tensor.dtype, tensor.shape)
    read_dtype = task.read_dtype
    output = TensorHasher(tensor.name, read_dtype, tensor.shape) if task.changes else source
    tensor.rounded = 0
    changed = nonfinite = 0
    for start, stop, x in read_ahead(_blocks(task)):
        hashed = meanwhile(partial(source.update, x))
        with recycled():
            bad = count_nonfinite(x)
            nonfinite += bad
            y = x
            if task.changes:
                y = _changed(task, x, bad)
                if _narrows(task, y):
                    read_dtype = task.narrow or read_dtype
                    output = TensorHasher(tensor.name, read_dtype, tensor.shape)
                step = task.step
                back = step.inverse(y, config, read_dtype) if step else _cast(y, read_dtype)
                output.update(back)
                changed += _differences(x, back)
            _put(task, start, stop, y, write)
        hashed.result()
        progress(x.nbytes, tensor.name)
    dropped = digest(task.dropped) if task.dropped is not None else None
    if dropped is not None and task.refusal is not None and not is_zero(dropped):
        raise task.refusal
    return TaskRecord(entry(source), entry(output), changed, nonfinite, dropped, tensor.rounded)


def _changed(task: Task, x: Array, bad: int) -> Array:
    """The block as the target stores it; ``bad`` of its elements are not finite before."""
    config = task.tensor.config
    y = task.step.forward(x, config, task.dtype) if task.step else _cast(x, task.dtype)
    overflow = count_nonfinite(y) - bad
    if overflow > 0:
        raise _too_large(task, x, overflow)
    return y


def _too_large(task: Task, x: Array, overflow: int) -> NonFiniteError:
    largest = float(np.abs(x[np.isfinite(x)].astype(np.float64)).max())
    stored, how = largest, ""
    if step := task.step:
        stored = largest * step.factor(task.tensor.config) + step.offset
        how = f" once stored as the format has them ({step.describe})"
    fitting = [d for d in (BF16, F16, F32) if stored <= float(ml_dtypes.finfo(d).max)]
    return NonFiniteError(
        f"{overflow} finite weights are too large for {short(task.dtype)}{how} (largest magnitude {largest:.6g}).",
        where=task.tensor.source.where,
        tensor=task.tensor.name,
        fix=f"use --dtype {' or '.join(map(short, fitting))}."
        if fitting
        else "no --dtype holds them; convert to a format that stores weights as they are, such as safetensors.",
    )


def _narrows(task: Task, stored: Array) -> bool:
    """Whether the reader will give this norm back in the model's dtype; see ``open``."""
    if task.narrow is None or task.step is None:
        return False
    return narrows(task.step, stored, task.tensor.config, task.narrow)


def _entry(data: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(int(n) for n in data["shape"])
    return TensorEntry(str(data["dtype"]), shape, str(data["sha256"]))


def _blocks(task: Task) -> Iterator[tuple[int, int, Array]]:
    placement = task.placement
    same_rows = placement.reorder.is_identity and (
        placement.reorder.foreign_shape == task.tensor.shape
    )
    if same_rows:
        yield from task.tensor.blocks()
    else:
        yield 0, task.tensor.shape[0], task.tensor.read()


def _put(task: Task, start: int, stop: int, y: Array, write: Write) -> None:
    placement = task.placement
    if (start, stop) == (0, task.tensor.shape[0]):
        write(
            task.row.name, placement.start, placement.reorder.to_foreign(y).reshape(placement.size)
        )
        return
    first, _, shape = placement.rows(start, stop)
    write(task.row.name, first, y.reshape(shape))


def _cast(x: Array, dtype: np.dtype) -> Array:
    with np.errstate(over="ignore"):  # overflow is counted and reported
        return x.astype(dtype, copy=False)


def _differences(before: Array, after: Array) -> int:
    """Elements whose bits are not the same any more, in the wider of the two dtypes."""
    if np.can_cast(before.dtype, after.dtype):
        before = before.astype(after.dtype, copy=False)
    else:
        after = after.astype(before.dtype, copy=False)
    return int(np.count_nonzero(bits(before) != bits(after)))


def run_tasks(
    tasks: Iterable[Task],
    write: Write,
    complete: Callable[[str, dict[str, Any]], None],
    done: Mapping[str, Mapping[str, Any]],
    progress: Tick = SILENT,
    workers: int = WORKERS,
) -> dict[str, TaskRecord]:
    """Run every task that is not done yet, in order, on ``workers`` threads.

    Args:
        tasks: what to move.
        write: puts a box into the output.
        complete: told of each finished task with its journal record.
        done: journal records of tasks an interrupted run finished.
        progress: told of bytes moved, those of finished tasks included.
        workers: threads.
    """

    def job(task: Task) -> Callable[[], TaskRecord]:
        def run() -> TaskRecord:
            name = task.tensor.name
            if name in done:
                progress(task.tensor.nbytes, name)
                return TaskRecord.from_json(done[name])
            record = run_task(task, write, progress)
            complete(name, record.to_json())
            return record

        return run

    records: dict[str, TaskRecord] = {}
    # a tensor that is most of a file moves alone, so that its file is written, and hashed, nearly in order
    for large, group in groupby(tasks, lambda t: t.tensor.nbytes > ALONE):
        jobs = {t.tensor.name: job(t) for t in group}
        records |= run_all(jobs, 1 if large else workers, threading.Event())
    return records
