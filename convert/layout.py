"""The mapping language: a layout is a list of rules, each read in both directions.

A rule is data: a foreign name, the canonical tensors it holds, and named axes. ``Layout`` expands
the rules for one
config into rows (one foreign tensor each) and placements (one canonical tensor inside it). Three
axis names select rather
than reorder: ``part`` (one index per canonical tensor of the rule), ``layer`` (one index per
layer), and ``cat`` (the canonical
tensors' first axes end to end). No arithmetic happens here; a rule may name a step of
:mod:`.steps`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats.arena import empty
from ..formats.base import Index
from ..model import canonical
from ..model.config import Family, GemmaConfig

Array = npt.NDArray[Any]
KINDS = ("local", "global")  # Gemma 2's alternation, layer 0 first


@dataclass(frozen=True)
class Rule:
    """One line of a layout table.

    Attributes:
        foreign: name template. ``{i}`` is the layer; with a period P, ``{j}`` is i // P, ``{p}`` is
        i % P,
            ``{kind}`` is local or global, ``{suffix}`` is empty for layer 0 and ``_i`` for the
            others.
        canonical: canonical name templates it holds, in the order of the ``part`` or ``cat`` axis.
        axes: ``"foreign axes -> canonical axes"``, slowest first, such as ``"part k d h -> (k h)
        d"``.
        step: named arithmetic of :mod:`.steps` applied on the way out, undone on the way in.
        dtype: element type the format demands here, or None for the model's own.
    """

    foreign: str
    canonical: tuple[str, ...]
    axes: str
    step: str | None = None
    dtype: np.dtype | None = None


@dataclass(frozen=True)
class Reorder:
    """A bijection between a foreign box and a canonical array: reshape, transpose, reshape.

    Attributes:
        foreign_atoms: sizes of the atomic axes in foreign order.
        order: canonical order of those atoms.
        canonical_shape: shape after merging atoms.
        foreign_shape: shape of the box in the foreign array, selector axes removed.
    """

    foreign_atoms: tuple[int, ...]
    order: tuple[int, ...]
    canonical_shape: tuple[int, ...]
    foreign_shape: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether bytes stay in order, so any run of rows can be copied as it is."""
        return self.order == tuple(range(len(self.order)))

    def to_canonical(self, box: Array) -> Array:
        """Foreign box -> canonical array, C-contiguous."""
        if self.is_identity:
            return box.reshape(self.canonical_shape)
        return transposed(box.reshape(self.foreign_atoms), self.order).reshape(self.canonical_shape)

    def to_foreign(self, array: Array) -> Array:
        """Canonical array -> foreign box, C-contiguous."""
        if self.is_identity:
            return array.reshape(self.foreign_shape)
        atoms = [self.foreign_atoms[k] for k in self.order]
        back = tuple(int(k) for k in np.argsort(self.order))
        return transposed(array.reshape(atoms), back).reshape(self.foreign_shape)


@dataclass(frozen=True)
class Placement:
    """Where one canonical tensor lies inside a foreign one.

    Attributes:
        canonical: the tensor's canonical name.
        start: first index of its box on every foreign axis.
        size: size of the box on every foreign axis (1 on ``part`` and ``layer``).
        selectors: foreign axes that select (to be dropped after indexing).
        reorder: box to canonical array.
        step: named arithmetic, or None.
    """

    canonical: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    selectors: tuple[int, ...]
    reorder: Reorder
    step: str | None

    @property
    def index(self) -> Index:
        """Index that reads the box from the foreign array, selector axes dropped."""
        return tuple(
            a if k in self.selectors else slice(a, a + n)
            for k, (a, n) in enumerate(zip(self.start, self.size, strict=True))
        )

    def rows(self, start: int, stop: int) -> tuple[tuple[int, ...], Index, tuple[int, ...]]:
        """Box, read index and box shape of canonical rows ``start:stop``; only where order is kept.

        Returns:
            ``(first index of the box, index to read it, its full foreign shape)``.
        """
        axis = next(k for k in range(len(self.size)) if k not in self.selectors)
        first = list(self.start)
        first[axis] += start
        shape = list(self.size)
        shape[axis] = stop - start
        index = list(self.index)
        index[axis] = slice(first[axis], first[axis] + stop - start)
        return tuple(first), tuple(index), tuple(shape)


@dataclass(frozen=True)
class Row:
    """One foreign tensor: its shape, and every canonical tensor inside it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Placement, ...]
    dtype: np.dtype | None
    layer_axis: int | None  # stacked layers: one chunk per layer suits streaming


@dataclass(frozen=True)
class Variant:
    """One concrete table of a framework, still independent of sizes.

    Attributes:
        name: what the user calls it (``--layout``).
        container: format module that holds it.
        rules: family -> table.
        periods: family -> period with which layers repeat in names and stacks (2 for local/global
            pairs); 1 where not given.
        ignored: patterns of foreign names that carry no weights (derived buffers, optimizer state).
        describe: one line for people.
    """

    name: str
    container: str
    rules: Mapping[Family, tuple[Rule, ...]]
    periods: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    describe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gating(self) -> str | None:
        """Orientation of Flax gating matrices, ``df`` or ``fd``; None for layouts that leave nothing open."""
        return {True: "fd", False: "df"}.get(self.options.get("transposed", ""))

    def is_ignored(self, name: str) -> bool:
        """Whether a foreign name is known to hold no weights."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


class Layout:
    """A variant's rules expanded for one config: every foreign tensor, every placement.

    Args:
        variant: the table.
        config: gives every named axis its size.
        embedding_rows: rows of the stored embedding; more than ``vocab_size`` when padded.

    Raises:
        ValueError: the table claims a name twice or does not hold exactly the model's tensors (a
        bug in the table).
    """

    def __init__(
        self, variant: Variant, config: GemmaConfig, embedding_rows: int | None = None
    ) -> None:
        self.variant = variant
        self.config = config
        self.period = variant.periods.get(config.family, 1)
        self.embedding_rows = embedding_rows or config.vocab_size
        self.tensors = dict(canonical.tensors(config))
        if self.embedding_rows > config.vocab_size:
            pad = (self.embedding_rows - config.vocab_size, config.hidden_size)
            self.tensors[canonical.EMBED_PADDING] = canonical.CanonicalTensor(
                canonical.EMBED_PADDING, "vocab d", pad
            )
        self.rows: dict[str, Row] = {}
        for rule in variant.rules[config.family]:
            self._expand(rule)
        self.placements = {p.canonical: (row, p) for row in self.rows.values() for p in row.parts}
        claimed = [p.canonical for row in self.rows.values() for p in row.parts]
        wrong = set(claimed) ^ set(self.tensors) | {n for n in claimed if claimed.count(n) > 1}
        if wrong:
            raise ValueError(f"layout {variant.name}: {sorted(wrong)[:3]} not mapped exactly once")

    def _expand(self, rule: Rule) -> None:
        left, right = (canonical.axis_groups(side) for side in rule.axes.split("->"))
        per_layer = "{i}" in rule.canonical[0]
        members: dict[str, list[int]] = {}
        for i in range(self.config.num_hidden_layers) if per_layer else (0,):
            members.setdefault(layer_name(rule.foreign, i, self.period), []).append(i)
        for name, layers in members.items():
            if name in self.rows:
                raise ValueError(f"layout {self.variant.name}: {name} is claimed by two rules")
            targets = [[c.format(i=i) for c in rule.canonical] for i in layers]
            if targets == [[canonical.EMBED]] and canonical.EMBED_PADDING in self.tensors:
                targets = [[canonical.EMBED, canonical.EMBED_PADDING]]
                left, right = [("cat",), ("d",)], [("out",), ("d",)]
            self.rows[name] = self._row(name, left, right, targets, rule)

    def _row(
        self,
        name: str,
        left: list[tuple[str, ...]],
        right: list[tuple[str, ...]],
        targets: list[list[str]],
        rule: Rule,
    ) -> Row:
        sizes = dict(self.config.axes) | {"layer": len(targets), "part": len(targets[0])}
        sizes["cat"] = sum(self.tensors[c].shape[0] for c in targets[0])
        shape = tuple(math.prod(sizes[a] for a in group) for group in left)
        drop = tuple(k for k, group in enumerate(left) if group in (("part",), ("layer",)))
        kept = [group for k, group in enumerate(left) if k not in drop]
        parts = []
        for layer, names in enumerate(targets):
            offset = 0
            for part, canonical_name in enumerate(names):
                target = self.tensors[canonical_name].shape
                at: dict[tuple[str, ...], int] = {
                    ("layer",): layer,
                    ("part",): part,
                    ("cat",): offset,
                }
                one: dict[tuple[str, ...], int] = {("layer",): 1, ("part",): 1, ("cat",): target[0]}
                offset += target[0]
                parts.append(
                    Placement(
                        canonical_name,
                        tuple(at.get(group, 0) for group in left),
                        tuple(one.get(g, n) for g, n in zip(left, shape, strict=True)),
                        drop,
                        _reorder(kept, right, sizes | {"out": target[0]}, target),
                        rule.step,
                    )
                )
        layer_axis = left.index(("layer",)) if ("layer",) in left else None
        return Row(name, shape, tuple(parts), rule.dtype, layer_axis)


def layer_name(template: str, layer: int, period: int) -> str:
    """A foreign name template filled in for one layer."""
    suffix = f"_{layer}" if layer else ""
    return template.format(
        i=layer, j=layer // period, p=layer % period, kind=KINDS[layer % 2], suffix=suffix
    )


def _reorder(
    box: list[tuple[str, ...]],
    right: list[tuple[str, ...]],
    sizes: dict[str, int],
    shape: tuple[int, ...],
) -> Reorder:
    box = [("out",) if group == ("cat",) else group for group in box]
    atoms = [a for group in box for a in group]
    wanted = [a for group in right for a in group]
    if sorted(atoms) != sorted(wanted):
        raise ValueError(f"axes {atoms} and {wanted} differ")
    got = tuple(math.prod(sizes[a] for a in group) for group in right)
    if got != shape:
        raise ValueError(f"axes {right} give {got}, canonical shape is {shape}")
    return Reorder(
        tuple(sizes[a] for a in atoms),
        tuple(atoms.index(a) for a in wanted),
        shape,
        tuple(math.prod(sizes[a] for a in group) for group in box),
    )


def transposed(x: Array, order: tuple[int, ...]) -> Array:
    """``x.transpose(order)`` as a C-contiguous copy, in tiles that stay in cache."""
    view = _merge(x, order)
    out = empty(view.shape, x.dtype)
    if view.ndim < 2 or view.strides[-1] == x.itemsize:
        out[...] = view
    else:
        # the source's fastest axis is not last: copy tiles that are short in both
        fast = int(np.argmin(view.strides))
        _tiles(out, view, fast)
    return out.reshape([x.shape[k] for k in order])


def _merge(x: Array, order: tuple[int, ...]) -> Array:
    """Transposed view with axes that stay neighbours merged."""
    runs: list[list[int]] = []
    for k in order:
        if runs and runs[-1][-1] + 1 == k:
            runs[-1].append(k)
        else:
            runs.append([k])
    by_source = sorted(range(len(runs)), key=lambda r: runs[r][0])
    merged = x.reshape([math.prod(x.shape[k] for k in runs[r]) for r in by_source])
    return merged.transpose([by_source.index(r) for r in range(len(runs))])


def _tiles(
    out: Array, view: Array, fast: int, along_fast: int = 128, along_last: int = 512
) -> None:
    """Copy in tiles: read a tile in the source's order into cache, then write it in the output's order."""
    outer = [range(n) for k, n in enumerate(view.shape[:-1]) if k != fast]
    for lead in np.ndindex(*(len(r) for r in outer)):
        index: list[int | slice] = list(lead)
        index.insert(fast, slice(None))
        o, v = out[tuple(index)], view[tuple(index)]
        for a in range(0, v.shape[0], along_fast):
            for b in range(0, v.shape[1], along_last):
                tile = np.ascontiguousarray(v[a : a + along_fast, b : b + along_last].T)
                o[a : a + along_fast, b : b + along_last] = tile.T


def rules_for(
    families: Iterable[Family], build: Callable[[Family], tuple[Rule, ...]]
) -> dict[Family, tuple[Rule, ...]]:
    """Family -> table, for layouts that hold several families."""
    return {family: build(family) for family in families}
