"""From the pattern of a divergence to a sentence on what may be wrong: a table of known mistakes.

One layer means a weight; every other layer the local/global order; all layers a hyper-parameter; positions from the window
on the sliding window. The intermediate that parts first names the weight or step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .divergence import Divergence, Inside, divergent
from .ledger import Row
from .lockstep import LockstepResult

if TYPE_CHECKING:
    from .floor import Floor

SMALL = 1e-3  # relative error: below it a step is a little off, above it is another one
LIMIT = 3  # hypotheses given


@dataclass(frozen=True)
class Hypothesis:
    """What may be wrong, and the pattern it follows from."""

    text: str
    because: str

    def to_json(self) -> dict[str, str]:
        """The report's form."""
        return {"text": self.text, "because": self.because}


@dataclass(frozen=True)
class Pattern:
    """What a divergence looks like.

    Attributes:
        layers: ``embedding``, ``one``, ``two``, ``local``, ``global``, ``all``, ``some``, ``final``, ``head``; ``from`` where
            only accumulated errors are known; ``nan`` where the first layer to differ is not finite.
        positions: ``all``, or ``far``: from the window on, give or take one.
        tap: the first intermediate beyond the floor in the first of these blocks; None where nobody looked.
        size: ``small`` or ``large`` relative error.
        diagonal: whether scores of a token with itself differ too, None where scores do not or nobody looked.
        first: the first of the layers.
        second: the second, where there are two.
        position: the first position.
        window: sliding window.
        lossy: the candidate's weights are known to be rounded.
    """

    layers: str
    positions: str
    tap: str | None
    size: str
    diagonal: bool | None
    first: int
    second: int | None
    position: int
    window: int | None
    lossy: bool

    @property
    def edge(self) -> int | None:
        """Position relative to the window."""
        return None if self.window is None else self.position - self.window


@dataclass(frozen=True)
class Rule:
    """One known mistake: every condition that is given must hold; ``text`` is filled from the pattern.

    Where the configurations differ in one of ``fields``, the rule would only say so again.
    """

    text: str
    layers: tuple[str, ...] = ()
    positions: str | None = None
    taps: tuple[str, ...] = ()
    size: str | None = None
    diagonal: bool | None = None
    edge: int | None = None
    lossy: bool | None = None
    fields: tuple[str, ...] = ()

    def fits(self, p: Pattern) -> bool:
        """Whether every condition holds."""
        return (
            (not self.layers or p.layers in self.layers)
            and (self.positions is None or self.positions == p.positions)
            and (not self.taps or p.tap in self.taps)
            and (self.size is None or self.size == p.size)
            and (self.diagonal is None or self.diagonal == p.diagonal)
            and (self.edge is None or self.edge == p.edge)
            and (self.lossy is None or self.lossy == p.lossy)
        )


_ONE = ("one", "two", "some")
_MANY = ("all", "from")
_WINDOW = ("sliding_window", "layer_types")
_ALL = (*_WINDOW, "attn_logit_softcapping", "query_pre_attn_scalar", "rope_theta", "rms_norm_eps")
# in order of precedence
RULES: tuple[Rule, ...] = (
    Rule("a weight in {place} is damaged, or a number there is too large for the compute type", ("nan",)),
    Rule("the weights are rounded or quantized: an error of this kind in all layers is expected",
         ("all", "from", "some", "embedding"), lossy=True, positions="all"),
    Rule("the candidate's sliding window is one smaller", ("local",), "far", edge=-1, fields=_WINDOW),
    Rule("the sliding window differs or is ignored in local layers", ("local",), "far", fields=_WINDOW),
    Rule("global layers are run with a sliding window", ("global",), "far", fields=_WINDOW),
    Rule("local and global layers are exchanged, or all layers are run as one kind", ("all",), "far", fields=_WINDOW),
    Rule("layer {first} is run with another sliding window, or as the other kind", ("one",), "far", fields=_WINDOW),
    Rule("the sliding window or the order of local and global layers differs", ("from", "some", "two"), "far", fields=_WINDOW),
    Rule("the norms' gain is wrong: 1 is added once too often or not at all", _MANY, taps=("attn_in",), size="large"),
    Rule("the norms' epsilon differs, or norms are rounded otherwise",
         _MANY, taps=("attn_in",), size="small", fields=("rms_norm_eps",)),
    Rule("queries are scaled by another factor (query_pre_attn_scalar)",
         _MANY, taps=("scores",), diagonal=True, fields=("query_pre_attn_scalar",)),
    Rule("RoPE differs (rope_theta, or how dimensions are paired)",
         _MANY, taps=("scores",), diagonal=False, fields=("rope_theta",)),
    Rule("queries' scale or RoPE differs", _MANY, taps=("scores",), fields=("query_pre_attn_scalar", "rope_theta")),
    Rule("the soft-cap of attention scores differs or is missing", _MANY, taps=("o_in",), fields=("attn_logit_softcapping",)),
    Rule("the activation differs (GELU exact instead of its tanh approximation?), or gate and up are exchanged",
         _MANY, taps=("down_in", "mlp_out")),
    Rule("norms after attention and before the feed-forward are exchanged or wrong", _MANY, taps=("after_attn", "mlp_in")),
    Rule("layers {first} and {second} are exchanged, or the same mistake is in both", ("two",)),
    Rule("layer {first}: input_layernorm's gain is wrong", _ONE, taps=("attn_in",)),
    Rule("layer {first}: q_proj or k_proj is wrong", _ONE, taps=("scores",)),
    Rule("layer {first}: v_proj is wrong", _ONE, taps=("o_in",)),
    Rule("layer {first}: o_proj is wrong", _ONE, taps=("attn_out",)),
    Rule("layer {first}: post_attention_layernorm's gain is wrong", _ONE, taps=("after_attn",)),
    Rule("layer {first}: the gain of the norm before the feed-forward is wrong", _ONE, taps=("mlp_in",)),
    Rule("layer {first}: gate_proj or up_proj is wrong (exchanged?)", _ONE, taps=("down_in",)),
    Rule("layer {first}: down_proj is wrong", _ONE, taps=("mlp_out",)),
    Rule("layer {first}: post_feedforward_layernorm's gain is wrong", _ONE, taps=("out",)),
    Rule("a weight of layer {first} is wrong", ("one",)),
    Rule("rows of the embedding are exchanged, shifted or scaled", ("embedding",), size="large"),
    Rule("some embedding values or the embedding's scale are a little off", ("embedding",), size="small"),
    Rule("the final norm's gain or epsilon is wrong", ("final",), fields=("rms_norm_eps",)),
    Rule("the final soft-cap or the output head differs", ("head",), fields=("final_logit_softcapping",)),
    Rule("a step in local layers only differs", ("local",), fields=_WINDOW),
    Rule("a step in global layers only differs", ("global",), fields=_WINDOW),
    Rule("a hyper-parameter or an arithmetic step differs in every layer", ("all",), fields=_ALL),
    Rule("something differs from layer {first} on; errors of single blocks are not known here", ("from",),
         fields=_ALL),
)  # fmt: skip

# field of the config -> (layers, taps) that its change shows in
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sliding_window": (("local", "one", "some", "from", "all"), ("o_in",)),
    "layer_types": (("local", "global", "one", "some", "from", "all"), ("o_in",)),
    "attn_logit_softcapping": (("all", "from", "some", "one"), ("o_in",)),
    "final_logit_softcapping": (("head",), ()),
    "query_pre_attn_scalar": (("all", "from"), ("scores",)),
    "rope_theta": (("all", "from"), ("scores",)),
    "rms_norm_eps": (("all", "from", "some", "one", "final"), ("attn_in",)),
}


def hypotheses(
    result: LockstepResult,
    floor: Floor,
    *,
    inside: Inside | None = None,
    scan: Sequence[Inside] = (),
    differences: Iterable[Mapping[str, Any]] = (),
    rows: Iterable[Row] = (),
    lossy: bool = False,
) -> list[Hypothesis]:
    """What may be wrong, most likely first.

    Args:
        result: of a comparison.
        floor: its noise.
        inside: what :func:`.divergence.look_inside` found in the first divergent block.
        scan: what :func:`.divergence.scan_taps` found, where no block's output is beyond the floor.
        differences: ``{"field", "reference", "candidate"}`` of the configurations.
        rows: the ledger: where something is not finite, or all weights are rounded, its failed tensors are the likeliest cause.
        lossy: the candidate's weights are known to be rounded or quantized.

    Returns:
        Nothing where nothing is beyond the floor.
    """
    p = pattern_of(result, floor, inside=inside, scan=scan, lossy=lossy)
    if p is None:
        return []
    place = _place(result, p.first)
    because = _because(p, place)
    damaged = _damaged(rows) if lossy or p.layers == "nan" else []
    if damaged:
        return [Hypothesis(text, because) for text in damaged[:LIMIT]]
    shown = [d for d in differences if _shows(d["field"], p)]
    found = [
        Hypothesis(
            f"the configurations differ in {d['field']}: "
            f"{_value(d['reference'])} and {_value(d['candidate'])}",
            f"{because}, as that would show",
        )
        for d in shown
    ]
    facts = {"first": p.first, "second": p.second, "place": place}
    named = {d["field"] for d in shown}
    rule = next((r for r in RULES if r.fits(p)), None)
    if rule is not None and not named & set(rule.fields):
        found.append(Hypothesis(rule.text.format(**facts), because))
    return found[:LIMIT]


def _value(x: Any) -> str:
    return "none" if x is None else f"{x:g}" if isinstance(x, float) else str(x)


def _damaged(rows: Iterable[Row]) -> list[str]:
    """Tensors that differ though they should not, those with NaN or infinities first."""
    bad = [r for r in rows if r.verdict != "PASS"]
    bad.sort(key=lambda r: r.nonfinite <= r.reference_nonfinite)
    return [f"{r.name} is damaged: {r.note or r.bound}" for r in bad]


def _place(result: LockstepResult, layer: int) -> str:
    names = {-1: "the embedding", len(result.blocks): "the final norm"}
    return names.get(layer, f"layer {layer}")


def _shows(name: str, p: Pattern) -> bool:
    layers, taps = _FIELDS.get(name, ((), ()))
    return p.layers in layers and (p.tap is None or not taps or p.tap in taps)


def pattern_of(
    result: LockstepResult,
    floor: Floor,
    *,
    inside: Inside | None = None,
    scan: Sequence[Inside] = (),
    lossy: bool = False,
) -> Pattern | None:
    """The pattern of a divergence; None where nothing is beyond the floor."""
    found = divergent(result, floor)
    if not found:
        head = _head(result, floor, lossy)
        return head or (_scanned(result, scan, lossy) if scan else None)
    blocks = [d for d in found if d.kind in ("local", "global")]
    first = found[0]
    starts = [d.position for d in (blocks or found)]
    errors = [d.error for d in found if d.error is not None]
    known = inside is not None and inside.layer == first.layer
    return Pattern(
        layers=_layers(result, found, blocks),
        positions=_positions(min(starts), result.window),
        tap=inside.tap if inside is not None and known else None,
        size=_size(inside.error if inside is not None and known else max(errors, default=1.0)),
        diagonal=inside.diagonal if inside is not None and known else None,
        first=first.layer,
        second=found[1].layer if len(found) > 1 else None,
        position=min(starts),
        window=result.window,
        lossy=lossy,
    )


def _size(error: float | None) -> str:
    return "small" if error is not None and error < SMALL else "large"


def _positions(first: int, window: int | None) -> str:
    return "far" if window is not None and window > 1 and first >= window - 1 else "all"


def _scanned(result: LockstepResult, scan: Sequence[Inside], lossy: bool) -> Pattern:
    """The pattern of blocks whose intermediates, not their outputs, are beyond the floor."""
    one = scan[0]
    return Pattern(
        _which(result, {i.layer for i in scan}), _positions(one.position, result.window), one.tap, "small",
        one.diagonal, one.layer, scan[1].layer if len(scan) > 1 else None, one.position, result.window, lossy,
    )  # fmt: skip


def _layers(result: LockstepResult, found: list[Divergence], blocks: list[Divergence]) -> str:
    if found[0].error is None:
        return "nan"
    if found[0].kind in ("embedding", "final"):
        return found[0].kind
    return _which(result, {d.layer for d in blocks}) if found[0].isolated else "from"


def _which(result: LockstepResult, layers: set[int]) -> str:
    """``one``, or all of a kind, or ``two``, or ``some``."""
    if len(layers) == 1:
        return "one"
    return _kinds(result, layers) or ("two" if len(layers) == 2 else "some")


def _kinds(result: LockstepResult, layers: set[int]) -> str | None:
    """``all``, ``local`` or ``global`` where these are exactly the layers of that kind."""
    for name, wanted in (
        ("all", ("local", "global")),
        ("local", ("local",)),
        ("global", ("global",)),
    ):
        if layers == {e.layer for e in result.blocks if e.kind in wanted}:
            return name
    return None


def _head(result: LockstepResult, floor: Floor, lossy: bool) -> Pattern | None:
    """Logits beyond the floor where no hidden state is."""
    limit = floor.threshold("kl_max")
    if not result.errors or limit is None:
        return None
    for r in result.records:
        beyond = (~(r.stats.kl <= limit)).nonzero()[0]
        if len(beyond):
            layer = len(result.blocks) + 1
            at = int(beyond[0])
            return Pattern(
                "head", "all", None, "large", None, layer, None, at, result.window, lossy
            )
    return None


_LAYERS = {
    "embedding": "the embedded tokens differ",
    "one": "only layer {first} differs by itself",
    "two": "only layers {first} and {second} differ by themselves",
    "local": "the local layers differ by themselves, the global ones do not",
    "global": "the global layers differ by themselves, the local ones do not",
    "all": "every layer differs by itself",
    "some": "several layers differ by themselves, the first is {first}",
    "from": "hidden states differ from layer {first} on",
    "final": "only what follows the last block differs",
    "head": "hidden states agree, logits do not",
    "nan": "what {place} puts out is the first that is not finite",
}


def _because(p: Pattern, place: str) -> str:
    parts = [_LAYERS[p.layers].format(first=p.first, second=p.second, place=place)]
    if p.positions == "far":
        parts.append(f"from position {p.position} on (the window is {p.window})")
    if p.tap is not None:
        parts.append(f"beginning with {p.tap}")
        if p.tap == "scores" and p.diagonal is not None:
            also = "also" if p.diagonal else "not"
            parts.append(f"{also} between a token and itself")
    return ", ".join(parts)
