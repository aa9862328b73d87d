"""A size that the result shall have -> what every linear weight becomes: least summed KL within the budget.

Losses come from :mod:`.sensitivity` and are taken to add up. Sizes are those of the files: a candidate is laid out to the
byte by the export's own planner before it counts as fitting. Weights that serving programs merge into one matrix
(q k v, gate up) get one scheme in the formats those programs read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..convert.open import Checkpoint
from ..formats.errors import UsageError, printable
from ..formats.packed.table import FORMATS as PACKED
from ..formats.packed.uniform import Grid
from ..formats.sharded import parse_size
from ..model import canonical
from . import export
from .choose import Target
from .ggml import block_format
from .ggml.export import planned_bytes as gguf_bytes
from .ggml.mixes import MIXES
from .hessian import STAGES
from .knapsack import Item, solve
from .scheme import Scheme

GGUF = "gguf"
# formats that say per module what it became, and whether their readers merge matrices
OVERRIDES: Mapping[str, bool] = {
    "compressed-tensors": True,
    "gptq": True,
    "mlx": False,
    GGUF: False,
}
_UNIFORM = tuple((bits, group) for bits in (2, 3, 4, 8) for group in (128, 64, 32))
_BLOCKS = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_SMALL_BLOCKS = ("Q4_0", "Q4_1", "Q8_0")  # for rows that do not divide into 256
_CHOICE = re.compile(r"([2348])(?:g(32|64|128)|row)")


@dataclass(frozen=True)
class Budget:
    """The size asked for; one of the two.

    Attributes:
        nbytes: of all files of weights, everything in them included.
        bits: per weight of the linear layers, scales included.
    """

    nbytes: int | None = None
    bits: Fraction | None = None

    @classmethod
    def of(cls, size: int | str | None, bits: float | str | None) -> Budget | None:
        """From ``--target-size`` and ``--target-bpw``; None without either.

        Raises:
            UsageError: both, or no size.
        """
        if size is None and bits is None:
            return None
        if size is not None and bits is not None:
            raise UsageError(
                "a target size and target bits per weight are both given.", fix="give one of them."
            )
        if size is not None:
            return cls(nbytes=parse_size(size) if isinstance(size, str) else int(size))
        try:
            found = Fraction(str(bits))
        except (ValueError, ZeroDivisionError):
            found = Fraction(0)
        if found <= 0:
            raise UsageError(
                f"{printable(str(bits), 40)} is no number of bits per weight.", fix="such as 3.5."
            )
        return cls(bits=found)

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{float(self.bits):g} bits per weight"
        return f"{self.nbytes} bytes"


@dataclass(frozen=True)
class Allocation:
    """What was decided.

    Attributes:
        targets: canonical name -> what it becomes.
        kl: sum of the losses.
        nbytes: of the files of weights.
        bits: per weight of the linear layers.
        smallest: reachable sizes, in what the budget is in.
        largest: as smallest.
    """

    targets: dict[str, Target]
    kl: float
    nbytes: int
    bits: float
    smallest: float
    largest: float


# ---------------------------------------------------------------- choices


def require_overrides(format: str) -> None:
    """Refuse a format that has one scheme for all.

    Raises:
        UsageError: names those that can.
    """
    if format in OVERRIDES:
        return
    fix = f"use --format {' or '.join(OVERRIDES)}."
    if format.startswith(f"{GGUF}-"):
        raise UsageError(
            f"{format} says itself what every weight becomes, so there is nothing to allocate.",
            fix=fix,
        )
    raise UsageError(f"{printable(format, 60)} has one scheme for all weights.", fix=fix)


def choices_for(
    format: str, checkpoint: Checkpoint, wanted: Sequence[str] | None, *, symmetric: bool
) -> tuple[Target, ...]:
    """What weights may become, by growing size.

    Args:
        format: one of :data:`OVERRIDES`.
        checkpoint: gives the shapes.
        wanted: such as ``4g128``, ``8row`` or ``Q4_K``; None for all that fit.
        symmetric: of uniform schemes.

    Raises:
        UsageError: one that the format cannot hold or the shapes do not divide into; fewer than two.
    """
    require_overrides(format)
    widths = {checkpoint.tensors[n].shape[1] for n in canonical.linears(checkpoint.tensors)}
    if wanted is None:
        names = _BLOCKS if all(w % 256 == 0 for w in widths) else _SMALL_BLOCKS
        found: list[Target] = list(names)
        if format != GGUF:
            fit = [(b, g) for b, g in _UNIFORM if all(w % g == 0 for w in widths)]
            found = [Scheme(b, g, symmetric) for b, g in fit]
    else:
        found = [_parsed(text, format, symmetric) for text in wanted]
    found = list(dict.fromkeys(found))
    for choice in found:
        for width in widths:
            _require_fit(choice, format, width)
    if len(found) < 2:
        raise UsageError(
            f"{len(found)} to choose from, where at least two are needed.", fix="give another."
        )
    widest = max(widths)
    return tuple(sorted(found, key=lambda c: bits_of(c, widest)))


def _parsed(text: str, format: str, symmetric: bool) -> Target:
    if format == GGUF:
        return block_format(text.strip()).name
    match = _CHOICE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{printable(text, 40)} is no scheme to choose from.",
            fix="write bits and group size, such as 4g128 or 8row.",
        )
    return Scheme(int(match[1]), int(match[2] or -1), symmetric)


def _require_fit(choice: Target, format: str, width: int) -> None:
    if isinstance(choice, str):
        block_format(choice).row_bytes(width)
        return
    grid = Grid(64, width, choice.bits, choice.width(width), choice.symmetric)
    why = PACKED[format].fault(grid)
    if why is not None:
        raise UsageError(f"{format} cannot hold {choice}: {why}.", fix="leave it out of --choices.")


def bits_of(choice: Target, in_features: int) -> float:
    """Stored bits per weight."""
    if isinstance(choice, str):
        return block_format(choice).bits
    return choice.bits_per_weight(in_features)


# ---------------------------------------------------------------- sizes


class _Sizes:
    """Bytes of files, without values."""

    def __init__(
        self, checkpoint: Checkpoint, dst: Path, format: str, options: Mapping[str, Any]
    ) -> None:
        self.checkpoint, self.dst, self.format, self.options = checkpoint, dst, format, options

    def payload(self, name: str, choice: Target) -> int:
        """Of one weight alone."""
        out, width = self.checkpoint.tensors[name].shape
        if isinstance(choice, str):
            return out * block_format(choice).row_bytes(width)
        grid = Grid(out, width, choice.bits, choice.width(width), choice.symmetric)
        total = 0
        for dtype, shape in PACKED[self.format].layout(grid).values():
            count = dtype.itemsize
            for n in shape:
                count *= n
            total += count
        return total

    def whole(self, targets: Mapping[str, Target]) -> int:
        """Of all files of weights."""
        format = preset_of(targets, self.checkpoint) if self.format == GGUF else self.format
        return planned_bytes(targets, self.checkpoint, self.dst, format, **self.options)


def planned_bytes(
    targets: Mapping[str, Target], checkpoint: Checkpoint, dst: Path, format: str, **options: Any
) -> int:
    """Bytes of the files of weights that come out, from an export planned to its end; refuses what that would refuse.

    Args:
        targets: canonical name -> what it becomes.
        checkpoint: gives the rest.
        dst: the destination.
        format: one of :data:`.plan.FORMATS`, or a preset's name.
        options: of the export.

    Raises:
        G2Error: as :func:`.export.export`.
    """
    if format.startswith(f"{GGUF}-"):
        return gguf_bytes(_Announced(targets), checkpoint, dst, format, **options)
    return export.planned_bytes(_Announced(targets), checkpoint, dst, format, **options)


class _Announced(Mapping[str, Any]):
    """Weights that are known by what they will become."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets

    def scheme_of(self, name: str) -> Scheme | None:
        found = self._targets[name]
        return found if isinstance(found, Scheme) else None

    def type_of(self, name: str) -> str | None:
        found = self._targets[name]
        return found if isinstance(found, str) else None

    def __getitem__(self, name: str) -> Any:
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def preset_of(targets: Mapping[str, Target], checkpoint: Checkpoint) -> str:
    """The GGUF preset after the type of most weights; it names the file's type and the embedding's."""
    sizes = Counter[str]()
    for name, target in targets.items():
        out, width = checkpoint.tensors[name].shape
        sizes[str(target)] += out * width
    commonest = max(sizes, key=lambda t: (sizes[t], t))
    return f"{GGUF}-{next(m.name for m in MIXES.values() if m.base == commonest)}"


# ---------------------------------------------------------------- allocation


def allocate(
    sensitivity: Mapping[str, Any], checkpoint: Checkpoint, dst: Path, format: str, budget: Budget,
    choices: Sequence[Target], **options: Any,
) -> Allocation:  # fmt: skip
    """The allocation of least summed KL within a budget.

    Args:
        sensitivity: :meth:`.sensitivity.Sensitivity.run`'s result.
        checkpoint: what is quantized.
        dst: where it will go; decides whether GGUF is a file or a directory.
        format: one of :data:`OVERRIDES`.
        budget: the size.
        choices: of :func:`choices_for`.
        options: of the export that change sizes: ``dtype``, ``max_shard_size``, ``tokenizer``.

    Raises:
        UsageError: too small a budget; says what is reachable.
    """
    losses = {n: e["choices"] for n, e in sensitivity["linears"].items()}
    sizes = _Sizes(checkpoint, dst, format, options)
    return _Allocation(losses, checkpoint, sizes, budget, choices).run()


def require_reachable(
    checkpoint: Checkpoint, dst: Path, format: str, budget: Budget, choices: Sequence[Target],
    **options: Any,
) -> dict[str, Target]:  # fmt: skip
    """The smallest allocation; refuses a budget that it does not fit into. As :func:`allocate`, before anything is measured."""
    sizes = _Sizes(checkpoint, dst, format, options)
    return _Allocation({}, checkpoint, sizes, budget, choices).require()


class _Allocation:
    def __init__(
        self, losses: Mapping[str, Any], checkpoint: Checkpoint, sizes: _Sizes, budget: Budget,
        choices: Sequence[Target],
    ) -> None:  # fmt: skip
        self.linears = canonical.linears(checkpoint.tensors)
        self.checkpoint, self.sizes, self.budget, self.choices = checkpoint, sizes, budget, choices
        self.losses = losses
        self.units = _units(self.linears, merged=OVERRIDES[sizes.format])
        self.weights = sum(self._count(n) for n in self.linears)

    def _count(self, name: str) -> int:
        out, width = self.checkpoint.tensors[name].shape
        return out * width

    def _size(self, name: str, choice: Target) -> int:
        """In bytes, or bits where the budget is in bits."""
        if self.budget.bits is None:
            return self.sizes.payload(name, choice)
        return round(bits_of(choice, self.checkpoint.tensors[name].shape[1]) * self._count(name))

    def _sizes(self, unit: Sequence[str]) -> list[int]:
        return [sum(self._size(n, c) for n in unit) for c in self.choices]

    def _losses(self, unit: Sequence[str]) -> list[float]:
        return [sum(float(self.losses[n][str(c)]["kl"]) for n in unit) for c in self.choices]

    def _spread(self, picks: Sequence[int]) -> dict[str, Target]:
        chosen = {
            n: self.choices[k] for unit, k in zip(self.units, picks, strict=True) for n in unit
        }
        return {n: chosen[n] for n in self.linears}

    def _end(self, pick: Callable[..., int]) -> dict[str, Target]:
        """The smallest or largest allocation."""
        sizes = [self._sizes(unit) for unit in self.units]
        return self._spread([pick(range(len(s)), key=s.__getitem__) for s in sizes])

    def _measure(self, targets: Mapping[str, Target]) -> Fraction:
        """Size, in what the budget is in."""
        if self.budget.bits is not None:
            return self._bits(targets)
        return Fraction(self.sizes.whole(targets))

    def require(self) -> dict[str, Target]:
        """The smallest allocation, which must fit."""
        smallest = self._end(min)
        limit = self.budget.bits if self.budget.bits is not None else self.budget.nbytes
        assert limit is not None
        if self._measure(smallest) > limit:
            raise self._unreachable(
                float(self._measure(smallest)), float(self._measure(self._end(max)))
            )
        return smallest

    def run(self) -> Allocation:
        smallest = self.require()
        items = [Item(self._sizes(unit), self._losses(unit)) for unit in self.units]
        if self.budget.bits is not None:
            picks = solve(items, int(self.budget.bits * self.weights))
        else:
            picks = self._within(items, smallest)
        targets = smallest if picks is None else self._spread(picks)
        kl = sum(float(self.losses[n][str(t)]["kl"]) for n, t in targets.items())
        return Allocation(
            targets, kl, self.sizes.whole(targets), float(self._bits(targets)), float(self._measure(smallest)),
            float(self._measure(self._end(max))),
        )  # fmt: skip

    def _bits(self, targets: Mapping[str, Target]) -> Fraction:
        total = sum(
            round(bits_of(t, self.checkpoint.tensors[n].shape[1]) * self._count(n))
            for n, t in targets.items()
        )
        return Fraction(total, self.weights)

    def _within(self, items: Sequence[Item], smallest: Mapping[str, Target]) -> list[int] | None:
        """Headers and padding depend on what is chosen: what they take too much is taken off, and solved again."""
        assert self.budget.nbytes is not None
        payload = sum(self._size(n, t) for n, t in smallest.items())
        room = self.budget.nbytes - (self.sizes.whole(smallest) - payload)
        while (picks := solve(items, room)) is not None:
            over = self.sizes.whole(self._spread(picks)) - self.budget.nbytes
            if over <= 0:
                return picks
            used = sum(i.sizes[k] for i, k in zip(items, picks, strict=True))
            room = min(room, used) - over
        return None

    def _unreachable(self, low: float, high: float) -> UsageError:
        if self.budget.bits is not None:
            ends = f"from {low:.4g} to {high:.4g} bits per weight"
        else:
            ends = f"from {low:.0f} to {high:.0f} bytes"
        return UsageError(
            f"{self.budget} cannot be reached: {', '.join(map(str, self.choices))} give {ends}.",
            fix="ask for more, or allow smaller schemes with --choices.",
            found=str(self.budget),
            expected=[low, high],
        )


def _units(linears: Sequence[str], *, merged: bool) -> list[tuple[str, ...]]:
    """What gets one scheme."""
    if not merged:
        return [(n,) for n in linears]
    layers = dict.fromkeys(int(n.split(".")[2]) for n in linears)
    have = set(linears)
    found = [tuple(n for n in stage.names(i) if n in have) for i in layers for stage in STAGES]
    return [unit for unit in found if unit]
