"""Orbax checkpoints for tests: the model of tests/data as Flax trees, and zarr arrays of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from safetensors import safe_open

DATA = Path(__file__).parent / "data"
BF16 = np.dtype(ml_dtypes.bfloat16)
D, F, H, K, HEAD, LAYERS = 64, 192, 4, 2, 32, 4


def huggingface() -> dict[str, np.ndarray]:
    """The model of tests/data as transformers wrote it."""
    found = {}
    for file in sorted((DATA / "hf_sharded").glob("*.safetensors")):
        with safe_open(file, "numpy") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return found


def nested(hf: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The same as Google's nested Flax tree, gating ``[2, D, F]``."""

    def layer(i: int) -> dict[str, Any]:
        p = f"model.layers.{i}."
        q, k, v, o = (hf[f"{p}self_attn.{x}_proj.weight"] for x in "qkvo")
        gate, up, down = (hf[f"{p}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        return {
            "attn": {
                "q_einsum": {"w": q.reshape(H, HEAD, D).transpose(0, 2, 1)},
                "kv_einsum": {
                    "w": np.stack([x.reshape(K, HEAD, D).transpose(0, 2, 1) for x in (k, v)])
                },
                "attn_vec_einsum": {"w": o.reshape(D, H, HEAD).transpose(1, 2, 0)},
            },
            "mlp": {"gating_einsum": np.stack([gate.T, up.T]), "linear": down.T},
            **{
                flax: {"scale": hf[f"{p}{name}.weight"]}
                for flax, name in (
                    ("pre_attention_norm", "input_layernorm"),
                    ("post_attention_norm", "post_attention_layernorm"),
                    ("pre_ffw_norm", "pre_feedforward_layernorm"),
                    ("post_ffw_norm", "post_feedforward_layernorm"),
                )
            },
        }

    return {
        "embedder": {"input_embedding": hf["model.embed_tokens.weight"]},
        "final_norm": {"scale": hf["model.norm.weight"]},
        **{f"layer_{i}": layer(i) for i in range(LAYERS)},
    }


def flat(tree: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Google's two-level tree of a nested one."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for keys, array in walk(tree):
        mlp = keys[-2:-1] == ("mlp",)
        outer, leaf = (keys, "w") if mlp else (keys[:-1], keys[-1])
        out.setdefault("/".join(("transformer", *outer)), {})[leaf] = np.ascontiguousarray(array)
    return out


def stacked(tree: Mapping[str, dict[str, np.ndarray]], period: int = 2) -> dict[str, Any]:
    """Layers ``period * slice + p`` of a flat tree stacked along a new first axis."""
    out: dict[str, Any] = {}
    for outer, leaves in tree.items():
        first, _, rest = outer.removeprefix("transformer/").partition("/")
        if not first.startswith("layer_"):
            out[outer] = leaves
        elif (p := int(first.removeprefix("layer_"))) < period:
            same = [tree[f"transformer/layer_{i}/{rest}"] for i in range(p, LAYERS, period)]
            out[f"transformer/stacked_layers/attention_type_{p}/{rest}"] = {
                leaf: np.stack([s[leaf] for s in same]) for leaf in leaves
            }
    return out


def walk(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys and value of every leaf; empty nodes are leaves."""
    children = dict(enumerate(tree)) if isinstance(tree, list) else tree
    if isinstance(children, Mapping) and children:
        for key, child in children.items():
            yield from walk(child, (*keys, str(key)))
    else:
        yield keys, tree


def same(a: Any, b: Any) -> bool:
    """Equal shape, dtype and bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def official(path: Path, *, standard: bool = True) -> dict[tuple[str, ...], Any]:
    """What orbax itself restores."""
    import orbax.checkpoint as ocp

    reader = ocp.StandardCheckpointer() if standard else ocp.PyTreeCheckpointer()
    with reader:
        return dict(walk(reader.restore(path.absolute())))


def save(path: Path, tree: Any, **options: Any) -> Path:
    """Write a tree with orbax itself."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer(**options) as writer:
        writer.save(path.absolute(), tree)
    return path


def kvstore(directory: Path, name: str, ocdbt: bool) -> dict[str, Any]:
    """tensorstore's specification of one array's place."""
    base = {"driver": "file", "path": f"{directory.absolute()}/"}
    if ocdbt:
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return base | {"path": f"{base['path']}{name}/"}


def write_zarr(
    directory: Path,
    name: str,
    array: np.ndarray,
    *,
    zarr: int = 2,
    ocdbt: bool = False,
    store_fill: bool = True,
    **metadata: Any,
) -> None:
    """Write one array with tensorstore, in one chunk unless the metadata says otherwise."""
    extended = array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8"))
    dtypes = {2: array.dtype.name if extended else array.dtype.str, 3: array.dtype.name}
    named = {"dtype" if zarr == 2 else "data_type": dtypes[zarr]}
    whole = [max(n, 1) for n in array.shape]
    grid = {"name": "regular", "configuration": {"chunk_shape": whole}}
    named |= {"chunks": whole} if zarr == 2 else {"chunk_grid": grid}
    spec = {
        "driver": "zarr" if zarr == 2 else "zarr3",
        "kvstore": kvstore(directory, name, ocdbt),
        "metadata": {"shape": list(array.shape), **named, **metadata},
        "store_data_equal_to_fill_value": store_fill,
    }
    ts.open(spec, create=True, open=True).result().write(array).result()


def write_metadata(directory: Path, names: Mapping[tuple[str, ...], str], **top: Any) -> None:
    """A ``_METADATA`` file for arrays: keys -> value type."""
    tree = {
        str(keys): {
            "key_metadata": [{"key": k, "key_type": 2} for k in keys],
            "value_metadata": {"value_type": kind, "skip_deserialize": False},
        }
        for keys, kind in names.items()
    }
    (directory / "_METADATA").write_text(json.dumps({"tree_metadata": tree, **top}))
