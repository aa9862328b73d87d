"""What a comparison is to do: one frozen object that commands, library calls and shards share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..formats.errors import UsageError
from ..formats.named_files import require_there
from .batches import BATCH_TOKENS
from .claims import budget_of
from .profiles import DEFAULT_PROFILE
from .runners import RUNNERS
from .side import DEFAULT_RUNNER, Engine

# runners that take packed weights as float32; the others serve them with kernels of their own
DEQUANTIZING = ("torch", "jax")
_SHARD = re.compile(r"([1-9][0-9]{0,6})/([1-9][0-9]{0,6})")


@dataclass(frozen=True)
class Options:
    """How two sides are compared.

    Attributes:
        profile: ``smoke``, ``ci`` or ``full``, see :mod:`.probes`; None for ``ci``, or as recorded.
        reference: how the reference is run.
        candidate: how the candidate is run.
        text: file whose documents replace the built-in ones.
        tokens: ``.npy`` of ids, or an array, that replaces them.
        budget: mean KL in nats allowed to a candidate with changed weights; None for the preset of its bits.
        k: thresholds are this many times the noise floor.
        seed: of pseudo-random ids; None for 0, or as recorded.
        batch_tokens: largest padded batch.
        reference_embedding: checkpoint with the embedding of a recorded reference that does not carry it.
        candidate_embedding: the same for a recorded candidate.
        shard: ``(i, n)``, from 0: do this share only; None for all of it, and what needs all of it.
    """

    profile: str | None = None
    reference: Engine = field(default_factory=Engine)
    candidate: Engine = field(default_factory=Engine)
    text: str | Path | None = None
    tokens: str | Path | npt.NDArray[Any] | None = None
    budget: float | str | None = None
    k: float = 10.0
    seed: int | None = None
    batch_tokens: int = BATCH_TOKENS
    reference_embedding: str | Path | None = None
    candidate_embedding: str | Path | None = None
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse, before any work, what could only fail after it."""
        budget_of(16.0, self.budget)
        if not 1 <= self.k <= 1e6:
            raise UsageError(
                f"k is {self.k:g}, expected 1 to 1e6: a threshold below the noise floor means nothing, and far above "
                "it lets every fault pass.",
                fix="leave it out for 10.",
            )
        for path in (self.text, self.tokens):
            if isinstance(path, str | Path):
                require_there(path, fix="name a file to take tokens from.")

    def require_no_tokens(self) -> None:
        """Raise UsageError if any option asks for other tokens than a recording's own."""
        names = ("text", "tokens", "profile", "seed")
        if given := [f"--{n}" for n in names if getattr(self, n) is not None]:
            raise UsageError(
                f"a recording has its own tokens, so {' and '.join(given)} cannot apply.",
                fix=f"leave out {' and '.join(given)}, or record again with {'it' if len(given) == 1 else 'them'}.",
            )

    def require_embeddings(self, *, recorded: tuple[bool, bool]) -> None:
        """Raise an error if an embedding is named for a side that is no recording, or is not there.

        Args:
            recorded: whether reference and candidate are recordings.
        """
        given = (self.reference_embedding, self.candidate_embedding)
        for side, path, needs in zip(("reference", "candidate"), given, recorded, strict=True):
            if path is not None and not needs:
                raise UsageError(
                    f"--{side}-embedding is for a recording, the {side} is a checkpoint and has its own.",
                    fix="leave it out.",
                )
            if isinstance(path, str | Path):
                require_there(path, fix="name a checkpoint with the recorded embedding.")

    @property
    def share(self) -> tuple[int, int]:
        """``(i, n)``, ``(0, 1)`` for all."""
        return self.shard or (0, 1)

    def describe(self) -> dict[str, Any]:
        """The report's ``settings``, but for what the probes say; the same for every shard."""
        return {
            "profile": self.profile or DEFAULT_PROFILE,
            "seed": self.seed or 0,
            "k": self.k,
            "batch_tokens": self.batch_tokens,
            "text": None if self.text is None else str(self.text),
            "tokens_from": str(self.tokens) if isinstance(self.tokens, str | Path) else None,
            "budget_option": self.budget,
            "reference_engine": {**self.reference.describe()},
            "candidate_engine": {**self.candidate.describe()},
        }


def engines(
    *,
    runner: str | None = None,
    cand_runner: str | None = None,
    dtype: str | None = None,
    cand_dtype: str | None = None,
    device: str | None = None,
    cand_device: str | None = None,
    mesh: str | None = None,
) -> tuple[Engine, Engine]:
    """Both sides' engines from options; what is not said of the candidate is as the reference has it, where it can.

    Raises:
        UsageError: unknown runner or type, or a mesh without the jax runner.
    """
    ref = Engine(runner or DEFAULT_RUNNER, dtype, device)
    name = cand_runner or ref.runner
    info = RUNNERS.get(name)
    inherits = cand_dtype is None and info is not None and dtype in info.dtypes
    # devices go by the framework's names, so one is inherited within a framework only
    place = cand_device if cand_device is not None else device if name == ref.runner else None
    cand = Engine(name, dtype if inherits else cand_dtype, place)
    pair = [_with_mesh(e, mesh) for e in (ref, cand)]
    if mesh is not None and not any(e.options for e in pair):
        raise UsageError(
            "a mesh needs the jax runner.", fix="add --runner jax or --cand-runner jax."
        )
    for engine in pair:
        _ = engine.computes_in
    return pair[0], pair[1]


def _with_mesh(engine: Engine, mesh: str | None) -> Engine:
    if mesh is None or engine.runner != "jax":
        return engine
    return replace(engine, options={"resident": True, "mesh": mesh})


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` as ``(1, 8)``.

    Raises:
        UsageError: it reads otherwise, or i is beyond n.
    """
    found = _SHARD.fullmatch(text.strip())
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(
            f"shard {text!r} is not of the form i/N with i from 1 to N.", fix="for example 2/8."
        )
    return int(found[1]) - 1, int(found[2])
