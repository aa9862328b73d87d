"""Which block type every tensor gets: llama-quantize's mixes, as tables.

Source: llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp, for Gemma (dense, tied head) quantized with an
importance matrix. The embedding is the output head too, so it gets the output's type: Q6_K, or Q8_0 where rows do not
divide into its blocks. A type's own name means that type for every linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ...formats.errors import UsageError, printable
from ...model import canonical
from .types import FORMATS

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
Where = Callable[[int, int], bool]  # layer, layers


def _first(share: int) -> Where:
    return lambda i, n: i < n // share


def _below(count: int) -> Where:
    return lambda i, n: i < count


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third layer between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _all(i: int, n: int) -> bool:
    return True


_V, _DOWN, _OUT = (
    name.removeprefix(canonical.LAYER) for name in (canonical.V, canonical.DOWN, canonical.O)
)
Rules = tuple[tuple[str, Where, str], ...]  # linear, layers, type; the first that fits


@dataclass(frozen=True)
class Mix:
    """One preset.

    Attributes:
        name: as in ``gguf-NAME``.
        base: type of every linear that no rule concerns.
        file_type: llama.cpp's LLAMA_FTYPE, for ``general.file_type``.
        rules: exceptions.
        grouped: type of the value projection where four or more query heads share one.
    """

    name: str
    base: str
    file_type: int
    rules: Rules = field(default=())
    grouped: str | None = None

    @property
    def embedding(self) -> str:
        """Type of the embedding, which is the head."""
        return "Q8_0" if self.base == "Q8_0" else "Q6_K"


MIXES: Mapping[str, Mix] = {
    m.name: m
    for m in (
        Mix("q8_0", "Q8_0", 7),
        Mix("q4_0", "Q4_0", 2),
        Mix("q4_1", "Q4_1", 3),
        Mix("q3_k", "Q3_K", 11),
        Mix("q4_k", "Q4_K", 14),
        Mix("q5_k", "Q5_K", 16),
        Mix("q6_k", "Q6_K", 18),
        Mix("iq4_xs", "IQ4_XS", 30, grouped="Q5_K"),
        Mix("q3_k_s", "Q3_K", 11),
        Mix(
            "q3_k_m", "Q3_K", 12,
            ((_V, _below(2), "Q5_K"), (_V, _all, "Q4_K"), (_DOWN, _first(16), "Q5_K"), (_DOWN, _all, "Q4_K"),
             (_OUT, _all, "Q4_K")),
        ),
        Mix("q3_k_l", "Q3_K", 13, ((_V, _all, "Q5_K"), (_DOWN, _all, "Q5_K"), (_OUT, _all, "Q5_K"))),
        Mix("q4_k_s", "Q4_K", 14, ((_V, _below(4), "Q5_K"), (_DOWN, _first(8), "Q5_K"))),
        Mix("q4_k_m", "Q4_K", 15, ((_V, _more_bits, "Q6_K"), (_DOWN, _more_bits, "Q6_K"))),
        Mix("q5_k_s", "Q5_K", 16),
        Mix("q5_k_m", "Q5_K", 17, ((_V, _more_bits, "Q6_K"), (_DOWN, _more_bits, "Q6_K"))),
    )
}  # fmt: skip


def mix_of(name: str) -> Mix:
    """The preset of that name, with or without ``gguf-``, in either case.

    Raises:
        UsageError: there is none.
    """
    mix = MIXES.get(name.lower().removeprefix("gguf-"))
    if mix is None:
        raise UsageError(
            f"{printable(name)} is no GGUF mix.",
            fix=f"use one of {', '.join('gguf-' + n for n in MIXES)}.",
        )
    return mix


def tensor_types(
    mix: Mix, shapes: Mapping[str, tuple[int, ...]], *, heads_per_kv: int = 1
) -> dict[str, str]:
    """Canonical name -> block type of every linear weight and the embedding.

    Args:
        mix: the preset.
        shapes: canonical name -> shape, of the whole model.
        heads_per_kv: query heads that share a value head.

    Raises:
        UsageError: rows of a linear weight do not divide into the type's blocks; names them and the mixes that fit.
    """
    linears = canonical.linears(shapes)
    layers = 1 + max((_split(n)[0] for n in linears), default=-1)
    types = {n: _type_of(mix, *_split(n), layers, heads_per_kv) for n in linears}
    if odd := [n for n, t in types.items() if shapes[n][1] % FORMATS[t].weights]:
        first = odd[0]
        fits = [m.name for m in MIXES.values() if _fits(m, [shapes[n][1] for n in linears])]
        raise UsageError(
            f"{len(odd)} weights have rows that do not divide into blocks: {first} has {shapes[first][1]} inputs, "
            f"{types[first]} needs a multiple of {FORMATS[types[first]].weights}.",
            fix=f"use {', '.join('gguf-' + n for n in fits)}."
            if fits
            else "convert to gguf without quantizing.",
        )
    if canonical.EMBED in shapes:
        width = shapes[canonical.EMBED][1]
        wanted = [t for t in (mix.embedding, "Q8_0") if width % FORMATS[t].weights == 0]
        if wanted:
            types[canonical.EMBED] = wanted[0]
    return types


def _split(name: str) -> tuple[int, str]:
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    return int(match[1]), match[2]


def _type_of(mix: Mix, layer: int, leaf: str, layers: int, heads_per_kv: int) -> str:
    if leaf == _V and mix.grouped and heads_per_kv >= 4:
        return mix.grouped
    return next(
        (t for part, where, t in mix.rules if part == leaf and where(layer, layers)), mix.base
    )


def _fits(mix: Mix, widths: Iterable[int]) -> bool:
    types = {mix.base, *(t for _, _, t in mix.rules), *([mix.grouped] if mix.grouped else [])}
    return all(w % FORMATS[t].weights == 0 for w in widths for t in types)
