"""Which table's shapes hold under a configuration, and what shapes alone say of a model."""

from __future__ import annotations

from ..formats.base import Source
from ..formats.errors import ConfigError, ShapeError
from ..model import canonical
from ..model.config import PRESETS, GemmaConfig
from ..model.config_formats import closest_preset, shape_differences
from .detect import Match
from .layout import Layout, layer_name


def _shapes_differ(
    source: Source, layout: Layout
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """``(name, found, expected)`` of every tensor whose shape the layout does not allow."""
    return [
        (name, source.tensors[name].shape, row.shape)
        for name, row in layout.rows.items()
        if source.tensors[name].shape != row.shape
    ]


def _layout(source: Source, fit: Match, config: GemmaConfig) -> Layout:
    """The fit expanded, with as many embedding rows as the file has."""
    name = next(r.foreign for r in fit.variant.rules[fit.family] if canonical.EMBED in r.canonical)
    shape = source.tensors[name].shape
    rows = shape[0] if shape and shape[0] > config.vocab_size else None
    return Layout(fit.variant, config, rows)


def axis_sizes(source: Source, fit: Match) -> dict[str, int] | None:
    """Sizes of the named axes that the first layer's shapes show; None when they contradict each other."""
    sizes: dict[str, int] = {"layers": fit.num_layers}
    fused = 0
    period = fit.variant.periods.get(fit.family, 1)
    for rule in fit.variant.rules[fit.family]:
        shape = source.tensors[layer_name(rule.foreign, 0, period)].shape
        groups = canonical.axis_groups(rule.axes.split("->")[0])
        if len(groups) != len(shape):
            return None
        for group, size in zip(groups, shape, strict=True):
            if group == ("cat",):
                fused = size
            elif group not in (("layer",), ("part",)):
                axis = group[0] if len(group) == 1 else f"({' '.join(group)})"
                if sizes.setdefault(axis, size) != size:
                    return None
    if fused:  # q, k and v rows in one matrix
        sizes["(k h)"] = (fused - sizes["(n h)"]) // 2
    return sizes


def _fused_misfit(fit: Match, config: GemmaConfig) -> bool:
    fused = fit.variant.options.get("fused", False)
    return fused and config.num_attention_heads != config.num_key_value_heads


def fit_shapes(
    source: Source, fits: list[Match], config: GemmaConfig, gating: str | None = None
) -> Layout:
    """The one table whose shapes all hold under ``config``.

    Raises:
        ConfigError: the config is another family's or depth's, or orientation cannot be told.
        ShapeError: shapes contradict the config; lists them and names the released size they fit, if any.
    """
    same = [f for f in fits if f.family == config.family]
    if not same or same[0].num_layers != config.num_hidden_layers:
        f = (same or fits)[0]
        raise ConfigError(
            f"the tensors are {f.num_layers} layers of {f.family}, the configuration says "
            f"{config.num_hidden_layers} layers of {config.family}.",
            where=source.path,
            fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
            found=[f.family, f.num_layers],
            expected=[config.family, config.num_hidden_layers],
        )
    candidates = [_layout(source, f, config) for f in same if not _fused_misfit(f, config)]
    if not candidates:
        raise ConfigError(
            "query, key and value are stored as one tensor, which needs as many kv heads as heads; the "
            f"configuration says {config.num_attention_heads} and {config.num_key_value_heads}.",
            where=source.path,
            fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
        )
    wrong = [_shapes_differ(source, layout) for layout in candidates]
    fitting = [layout for layout, bad in zip(candidates, wrong, strict=True) if not bad]
    if len(fitting) > 1:
        return _choose_orientation(source, fitting, config, gating)
    if fitting:
        return fitting[0]
    bad = min(wrong, key=len)
    lines = [f"{n} is {found}, expected {want}" for n, found, want in bad[:6]]
    more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
    raise ShapeError(
        f"{len(bad)} shapes contradict the configuration: {'; '.join(lines)}{more}.",
        where=source.path,
        tensor=bad[0][0] if len(bad) == 1 else None,
        fix=_looks_like(source, fits) or "pass the configuration of this model with --config.",
        found={name: list(shape) for name, shape, _ in bad},
        expected={name: list(shape) for name, _, shape in bad},
    )


def _looks_like(source: Source, fits: list[Match]) -> str | None:
    """Advice when the shapes are a released model's."""
    for fit in fits:
        sizes = axis_sizes(source, fit)
        if sizes is None:
            continue
        name = closest_preset(fit.family, sizes)
        if name and not shape_differences(name, sizes):
            return f"this looks like {name}; pass --config {name}."
    return None


def _choose_orientation(
    source: Source, fitting: list[Layout], config: GemmaConfig, gating: str | None
) -> Layout:
    """Both gating orientations fit only when hidden_size equals intermediate_size."""
    if gating is not None:
        wanted = gating == "fd"
        return next(x for x in fitting if x.variant.options.get("transposed") == wanted)
    for released in PRESETS.values():
        if released.config.with_(eos_token_id=config.eos_token_id) == config:
            return next(
                x
                for x in fitting
                if x.variant.options.get("transposed") == released.gating_transposed
            )
    raise ConfigError(
        f"hidden_size and intermediate_size are both {config.hidden_size}, so shapes do not tell "
        "whether gating_einsum is [2, d, f] or [2, f, d].",
        where=source.path,
        fix="pass --gating df or --gating fd.",
    )
