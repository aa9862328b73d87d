"""What a run will quantize and need, settled and refused before a weight is read."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..convert.open import Checkpoint
from ..formats import output_paths as paths
from ..formats.errors import ConflictError, UsageError, printable
from ..formats.output_commit import exists_error
from ..formats.sharded import size_of
from ..model import canonical
from ..model.config import GemmaConfig
from . import export, own_text
from .choose import METHODS, Target
from .export_targets import TARGETS
from .ggml import block_format
from .ggml.export import require_mix
from .ggml.mixes import MIXES
from .hessian import HELD_ROWS
from .pipeline import Options
from .scheme import Scheme
from .work import work_path

if TYPE_CHECKING:
    from .known import Known

GGUF = "gguf-"
FORMATS = (*TARGETS, *(GGUF + name for name in MIXES), "gguf")  # the last with a target size only
_SINGLE = {"torch-int8": (".ckpt", ".pt", ".pth", ".bin")}
_FILES = (".gguf", ".safetensors", *_SINGLE["torch-int8"])


@dataclass(frozen=True)
class Goal:
    """What comes out.

    Attributes:
        format: one of :data:`FORMATS`.
        targets: canonical name of every linear weight -> what it becomes.
    """

    format: str
    targets: Mapping[str, Target]

    @property
    def is_gguf(self) -> bool:
        """Whether weights become ggml blocks."""
        return self.format.startswith(GGUF)

    def bits(self, name: str, checkpoint: Checkpoint) -> float:
        """Stored bits of a weight."""
        target, (out, columns) = self.targets[name], checkpoint.tensors[name].shape
        if isinstance(target, str):
            return block_format(target).bits * out * columns
        return target.bits_per_weight(columns) * out * columns

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Stored bits per quantized weight."""
        shapes = [checkpoint.tensors[n].shape for n in self.targets]
        return sum(self.bits(n, checkpoint) for n in self.targets) / sum(o * c for o, c in shapes)


def goal_of(
    checkpoint: Checkpoint, format: str, scheme: Scheme, exclude: Sequence[str] = ()
) -> Goal:
    """The goal of a format and a scheme; GGUF mixes bring their own types.

    Args:
        checkpoint: what is quantized.
        format: one of :data:`FORMATS`.
        scheme: of every linear weight.
        exclude: patterns (``*``, ``?``) of names of linear weights that stay as they are.

    Raises:
        UsageError: no such format, or it cannot hold the scheme; names what can. A pattern that nothing matches.
    """
    if format not in FORMATS:
        raise UsageError(
            f"{printable(format, 60)} is not a format g2quant writes.",
            fix=f"use one of {', '.join(FORMATS)}.",
        )
    linears = _without(canonical.linears(checkpoint.tensors), exclude)
    if format.startswith(GGUF):
        types = require_mix(format, checkpoint)
        return Goal(format, {n: types[n] for n in linears})
    schemes = dict.fromkeys(linears, scheme)
    for name in linears:
        scheme.width(checkpoint.tensors[name].shape[1])
    export.require_format(format, schemes, checkpoint)
    return Goal(format, schemes)


def _without(names: list[str], exclude: Sequence[str]) -> list[str]:
    """Names that no pattern matches."""
    unused = [p for p in exclude if not any(fnmatchcase(n, p) for n in names)]
    if unused:
        raise UsageError(
            f"no linear weight is called {printable(unused[0], 100)}.",
            fix=f"they are called as {names[0]}; * stands for anything.",
        )
    left = [n for n in names if not any(fnmatchcase(n, p) for p in exclude)]
    if not left:
        raise UsageError("every linear weight is excluded.", fix="exclude fewer.")
    return left


def require_method(method: str) -> None:
    """Refuse an unknown method."""
    if method not in METHODS:
        raise UsageError(f"{method!r} is not a method.", fix=f"use one of {', '.join(METHODS)}.")


def require_dense(checkpoint: Checkpoint, *, allow: bool) -> None:
    """Refuse weights that were quantized before.

    Raises:
        UsageError: some are, and it was not asked for.
    """
    if checkpoint.quantized and not allow:
        raise UsageError(
            f"{len(checkpoint.quantized)} weights are quantized already.",
            where=checkpoint.path,
            fix="quantize the checkpoint it was made from, bring its codes into another format with `g2quant export`, or "
            "pass --allow-requantize.",
        )


def sources_of(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files of a checkpoint, and where they lie; nothing where it is in memory."""
    files = checkpoint.source.files
    return (checkpoint.path, *files) if files else ()


def require_destination(
    dst: Path,
    format: str,
    checkpoint: Checkpoint,
    *,
    overwrite: bool,
    inputs: Sequence[Path] = (),
) -> None:
    """Refuse now what the export would refuse after hours.

    Args:
        dst: the destination.
        format: what will be written.
        checkpoint: the source.
        overwrite: whether ``dst`` may be there.
        inputs: what else is read.

    Raises:
        UsageError: the name is that of a file the format does not have.
        ConflictError: the destination exists, is of another kind, or is not apart from the source or another input.
        FileIOError: there is no directory to put it into.
    """
    dst = paths.normalise(dst)
    single = (
        dst.suffix == ".gguf" if format.startswith(GGUF) else dst.suffix in _SINGLE.get(format, ())
    )
    if not single and dst.suffix.lower() in _FILES and not dst.is_dir():
        raise _not_written_so(dst, format)
    if paths.check_kind(dst, is_file=single) and not overwrite:
        raise _with_work(dst) if (work_path(dst) / "journal").is_file() else exists_error(dst)
    paths.check_apart([dst, work_path(dst)], (*sources_of(checkpoint), *inputs))
    paths.check_names(dst, {}, (".partial", ".quantizing"))


def _not_written_so(dst: Path, format: str) -> UsageError:
    own = (".gguf",) if format.startswith(GGUF) else _SINGLE.get(format, ())
    fix = "name a directory" + (f", or a file ending in {' or '.join(own)}" if own else "")
    if dst.suffix.lower() == ".gguf" and not own:
        fix += ", or pass a GGUF type such as --format gguf-q4_k_m"
    return UsageError(f"{format} is not written to a {dst.suffix} file.", where=dst, fix=f"{fix}.")


def _with_work(dst: Path) -> ConflictError:
    """A run that ended between its last two steps, or was begun to replace what is there."""
    return ConflictError(
        f"the destination exists, and {printable(str(work_path(dst)))} holds the work of an interrupted run for it.",
        where=dst,
        fix="`g2conv check` tells whether the destination is complete; if so remove the work, else pass --overwrite to "
        "go on.",
    )


def memory_limit(given: int | str | None) -> int:
    """Bytes to work in: as given, a number or a text such as ``4GB``, or half of what is available now."""
    limit = size_of("max_memory", given)
    if limit is not None:
        return limit
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keeps_states(config: GemmaConfig, rows: int, limit: int) -> bool:
    """Whether the hidden states of two blocks fit into a quarter of the memory."""
    return 8 * rows * config.hidden_size <= limit // 4


def needs(
    checkpoint: Checkpoint,
    goal: Goal,
    known: Known,
    options: Options,
    dst: Path,
    limit: int,
    nbytes: int,
) -> dict[str, Any]:
    """Bytes and seconds a run will take, roughly: JSON-ready. ``writing_…`` is the calibration text that the model writes.

    Args:
        checkpoint: what is quantized.
        goal: what comes out.
        known: of the inputs.
        options: of the run.
        dst: the destination.
        limit: memory to work in.
        nbytes: of the files of weights that come out.
    """
    config, wanted = checkpoint.config, known.wanted
    rows = _Rows.of(known, tuned=options.recover != "none", doubled=options.method == "gptq+")
    shapes = [t.shape for t in canonical.tensors(config).values() if "layers.0." in t.name]
    matrices = [(s[0], s[1]) for s in shapes if len(s) == 2]
    block = sum(out * n for out, n in matrices)
    stored = block * config.num_hidden_layers * goal.bits_per_weight(checkpoint) / 8
    at = next(p for p in dst.absolute().parents if p.exists())
    memory, seconds = 0, 0.0
    if known.text is None:
        memory, seconds = own_text.cost(checkpoint, wanted, limit)
    flops = _flops(config, matrices, rows, known, options)
    return {
        "output_bytes": nbytes,
        "work_bytes": round(8 * rows.states * config.hidden_size + stored),
        "free_bytes": shutil.disk_usage(at).free,
        "peak_bytes": max(memory, _peak(config, matrices, rows, known, options)) + (350 << 20),
        "seconds": round(config.num_hidden_layers * flops / _speed()),
        "writing_bytes": memory,
        "writing_seconds": round(seconds),
    }


@dataclass(frozen=True)
class _Rows:
    """Tokens.

    Attributes:
        seen: that go through a block.
        train: that Hessians are gathered from.
        states: whose hidden states are kept.
        longest: of a sequence.
    """

    seen: int
    train: int
    states: int
    longest: int

    @classmethod
    def of(cls, known: Known, *, tuned: bool, doubled: bool) -> _Rows:
        if known.direct:
            return cls(0, 0, 0, 0)
        w, text = known.wanted, known.text
        train = w.samples * w.seq_len if text is None else text.tokens
        held = w.held * w.seq_len if text is None else text.held_tokens
        longest = w.seq_len if text is None else max(map(len, (*text.train, *text.held)))
        copies = 2 if tuned or doubled else 1
        return cls(train + held, train, copies * train + 2 * held, longest)


def _peak(
    config: GemmaConfig, matrices: list[tuple[int, int]], rows: _Rows, known: Known, options: Options
) -> int:  # fmt: skip
    """Bytes: two copies of a block; the Hessian and its factor; of the weight: error, values, codes, products and grid."""
    block, largest = sum(o * n for o, n in matrices), max(o * n for o, n in matrices)
    if known.direct:
        return 4 * 5 * largest
    widths = {n for _, n in matrices}
    wide = max(widths)
    all_at_once = 0 if options.sequential else sum(n * n for n in widths)
    factors = 1 if options.method == "rtn" else 2
    plus = 3 * wide * wide if options.method == "gptq+" else 0
    held = options.held_rows * (wide if options.sequential else sum(widths))
    tokens = max(options.batch_tokens, rows.longest)
    forward = tokens * (
        3 * config.intermediate_size + 8 * config.hidden_size + 3 * config.num_attention_heads * rows.longest
    )  # fmt: skip
    states = 2 * rows.states * config.hidden_size if options.keep_states else 0
    working = max(factors * wide * wide + plus + 5 * largest, forward + wide * wide)
    return 4 * (2 * block + block // 4 + all_at_once + working + held + states)


def _flops(
    config: GemmaConfig, matrices: list[tuple[int, int]], rows: _Rows, known: Known, options: Options
) -> float:  # fmt: skip
    """Floating-point operations of a block, everything in terms of matrix products."""
    block = sum(o * n for o, n in matrices)
    # the search goes over every weight about 600 times, at a tenth of the speed of a product
    search = 6000.0 * block
    if known.direct:
        return search
    passes = 3.2 if options.sequential else 2.0
    forward = 2.0 * block * (passes * rows.seen + rows.states - rows.seen)
    hessians = sum(1.2 * rows.train * n * n for n in {n for _, n in matrices})
    rounding = 0.0 if options.method == "rtn" else sum(25.0 * o * n * n for o, n in matrices)
    tuning = 0.0
    if options.recover != "none":
        # forwards, again with gradients, and two products backwards
        steps = options.blockwise.steps + options.end_to_end.steps
        tuning = 8.0 * block * options.end_to_end.tokens * steps
    return search + forward + hessians + (2 if options.method == "gptq+" else 1) * rounding + tuning


def _speed() -> float:
    """Floating-point operations per second of a matrix product on this machine, now."""
    x = torch.randn(512, 512)
    x @ x
    began = time.monotonic()
    for _ in range(4):
        x @ x
    return 4 * 2 * 512.0**3 / max(1e-6, time.monotonic() - began)


def plain_targets(goal: Goal) -> dict[str, int]:
    """How many weights become what."""
    return dict(Counter(map(str, goal.targets.values())))


__all__ = ["FORMATS", "GGUF", "HELD_ROWS", "Goal", "goal_of", "needs"]
