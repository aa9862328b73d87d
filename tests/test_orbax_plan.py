"""Planned checkpoints: the official readers restore them bit for bit, equal arguments give equal bytes."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings

from g2kit.formats import orbax
from g2kit.formats.base import ContainerPlan, Slot
from g2kit.formats.dtypes import TABLE
from g2kit.formats.errors import DtypeError, FormatError, LayoutError
from g2kit.formats.orbax_plan import CHUNK_BYTES, default_chunk

from .orbax_files import BF16, DATA, flat, huggingface, nested, official, same, stacked, walk
from .plan_writer import materialise, random_array

TREE = nested(huggingface())
KAULDRON = {("collections",): {}, ("opt_state",): {}, ("step",): 0}
MAXTEXT = {("opt_state",): {}, ("step",): np.int32(0)}


def write(
    tree: Any, directory: Path, **options: Any
) -> tuple[ContainerPlan, dict[str, np.ndarray]]:
    """Plan a tree, fill it the plainest way, and put strangers' files beside it."""
    leaves = {"/".join(keys): (keys, np.asarray(value)) for keys, value in walk(tree)}
    arrays = {name: array for name, (_, array) in leaves.items()}
    slots = [Slot(name, a.dtype, a.shape) for name, a in arrays.items()]
    keys = {name: path for name, (path, _) in leaves.items()}
    plan = orbax.plan(slots, keys=keys, **options)
    materialise(plan, arrays, directory)
    for name in ("config.json", "tokenizer.model", "g2kit.manifest.json", ".hidden"):
        (directory / name).write_text("{}")
    return plan, arrays


LAYOUTS: dict[str, tuple[Any, str | None, Any, dict[str, tuple[int, ...]]]] = {
    "flat": (flat(TREE), None, None, {}),
    "nested": (TREE, None, None, {}),
    "stacked": (
        stacked(flat(TREE)),
        None,
        None,
        {"transformer/stacked_layers/attention_type_1/attn/kv_einsum/w": (1, 2, 2, 64, 32)},
    ),
    "kauldron": ({"params": TREE}, "default", KAULDRON, {}),
    "maxtext": (
        {"params": {"params": {"decoder": {"layers": {"q": {"kernel": random_array(1, BF16, (8, 4, 3, 2))}}}}}},
        "0/items",
        MAXTEXT,
        {"params/params/decoder/layers/q/kernel": (8, 1, 3, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_readers_restore_it(layout: str, tmp_path: Path) -> None:
    tree, item, constants, chunks = LAYOUTS[layout]
    _, arrays = write(tree, tmp_path, item=item, constants=constants, chunk_shapes=chunks)
    place = tmp_path / (item or "")
    for standard in (True, False):
        restored = official(place, standard=standard)
        for keys, value in (constants or {}).items():
            found = restored.pop(keys)
            assert found == value
            assert not isinstance(value, np.generic) or found.dtype == value.dtype
        assert {"/".join(k) for k in restored} == set(arrays)
        for keys, value in restored.items():
            assert same(value, arrays["/".join(keys)])
    source = orbax.open_source(tmp_path)
    assert {n: t.shape for n, t in source.tensors.items()} == {
        n: a.shape for n, a in arrays.items()
    }
    assert list(source.tensors) == list(arrays)
    assert all(same(source.tensors[n].read(), a) for n, a in arrays.items())
    scalars = {"/".join(k): v for k, v in (constants or {}).items() if v != {}}
    assert source.metadata["scalars"] == scalars
    assert not [n for n in source.notes if "missing" in n or "committed" in n]


def test_googles_loader_imitated(tmp_path: Path) -> None:
    """What google-deepmind/gemma does: tree from the metadata, arrays asked for as replicated jax arrays."""
    import jax
    import orbax.checkpoint as ocp

    write(flat(TREE), tmp_path / "flat")
    write({"params": TREE}, tmp_path / "kauldron", item="default", constants=KAULDRON)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        for name, marks in (("flat", "transformer/"), ("kauldron", "")):
            path = tmp_path / name
            meta = reader.metadata(path)
            if meta.item_metadata is None:
                assert (path / "_CHECKPOINT_METADATA").exists()
                path = path / "default"
                meta = reader.metadata(path)
            tree = meta.item_metadata.tree
            if name == "kauldron":
                assert set(tree) == {"collections", "opt_state", "params", "step"}
            assert all(key.startswith(marks) for key in tree)
            wanted = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
            )
            got = reader.restore(path, wanted)
            want = flat(TREE) if name == "flat" else TREE
            found = dict(walk(got if name == "flat" else got["params"]))
            assert set(found) == {k for k, _ in walk(want)}
            assert all(isinstance(found[k], jax.Array) and same(found[k], v) for k, v in walk(want))


def test_checkpoint_manager_finds_the_step(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tree, item, constants, _ = LAYOUTS["maxtext"]
    _, arrays = write(tree, tmp_path, item=item, constants=constants)
    with ocp.CheckpointManager(tmp_path, item_names=("items",)) as manager:
        assert manager.latest_step() == 0
        args = ocp.args.Composite(items=ocp.args.StandardRestore())
        restored = manager.restore(0, args=args)["items"]
    kernel = restored["params"]["params"]["decoder"]["layers"]["q"]["kernel"]
    assert same(kernel, arrays["params/params/decoder/layers/q/kernel"])


def test_same_keys_as_the_official_checkpoints(tmp_path: Path) -> None:
    write(flat(TREE), tmp_path / "flat")
    write({"params": TREE}, tmp_path / "kauldron", item="default", constants=KAULDRON)
    for ours, theirs in (
        ("flat", "orbax_flat"),
        ("kauldron/default", "orbax_kauldron/ckpt_0/default"),
    ):
        a, b = (json.loads((p / "_METADATA").read_text()) for p in (tmp_path / ours, DATA / theirs))
        assert set(a) == set(b)
        top = {"('collections', 'x')", "('opt_state', 'count')"}  # the fixture's own
        for label in set(b["tree_metadata"]) - top:
            assert (
                a["tree_metadata"][label]["key_metadata"]
                == b["tree_metadata"][label]["key_metadata"]
            )
    ours = json.loads((tmp_path / "kauldron/_CHECKPOINT_METADATA").read_text())
    theirs = json.loads((DATA / "orbax_kauldron/ckpt_0/_CHECKPOINT_METADATA").read_text())
    assert ours["item_handlers"] == theirs["item_handlers"]
    assert set(ours) == set(theirs)


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    tree, item, constants, chunks = LAYOUTS["maxtext"]
    plans = [
        write(tree, tmp_path / x, item=item, constants=constants, chunk_shapes=chunks)[0]
        for x in "ab"
    ]
    assert plans[0] == plans[1]
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert [str(f) for f in files if "kernel" in str(f)] == [
        "0/items/params.params.decoder.layers.q.kernel/.zarray",
        *(f"0/items/params.params.decoder.layers.q.kernel/0.{n}.0.0" for n in range(4)),
    ]
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    text = b"".join((tmp_path / "a" / f).read_bytes() for f in files)
    assert str(tmp_path).encode() not in text
    assert (
        plans[0].nbytes
        == sum(
            f.stat().st_size
            for f in (tmp_path / "a").rglob("*")
            if f.is_file() and f.suffix != ".json"
        )
        - len("{}") * 2
    )  # the strangers


key = st.text("abAB01_-/ .é", min_size=1, max_size=8).filter(
    lambda k: not any(p in ("", ".", "..") for p in k.split("/")) and not k.endswith((".", " "))
)
dtypes = st.sampled_from([row.dtype for row in TABLE])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=40)
@given(st.data())
def test_random_trees(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("tree")
    paths = data.draw(
        st.lists(st.lists(key, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)
    )
    arrays, keys, chunks = {}, {}, {}
    for i, path in enumerate(paths):
        array = random_array(i, data.draw(dtypes), data.draw(shapes))
        if array.dtype == np.bool_:
            array = array.view("u1") % 2 == 1
        name = f"slot {i}"
        arrays[name], keys[name] = array, path
        if array.shape and data.draw(st.booleans()):
            chunks[name] = tuple(data.draw(st.integers(1, 6)) for _ in array.shape)
    slots = [Slot(n, a.dtype, a.shape) for n, a in arrays.items()]
    try:
        plan = orbax.plan(slots, keys=keys, chunk_shapes=chunks)
    except LayoutError:  # clashing keys; what is refused is told in test_what_cannot_be_written
        return
    materialise(plan, arrays, directory)
    for name, array in arrays.items():
        param = ".".join(keys[name])
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}/{param}/"}}
        read = ts.open(spec, open=True, read=True).result().read().result()
        assert same(np.asarray(read), array)
    leaves = {"/".join(path) for path in keys.values()}
    if len(leaves) < len(keys) or any(leaf.startswith("/") for leaf in leaves):
        with pytest.raises(FormatError):
            orbax.open_source(directory)
        return
    source = orbax.open_source(directory)
    for name, array in arrays.items():
        leaf = "/".join(keys[name])
        if array.shape:
            assert same(source.tensors[leaf].read(), array)
        else:
            assert source.metadata["scalars"][leaf] == array.item() or array != array
    assert source.metadata["keys"] == {"/".join(k): k for k in keys.values()}


def slot(name: str, shape: tuple[int, ...] = (4,), dtype: Any = BF16) -> Slot:
    return Slot(name, np.dtype(dtype), shape)


def test_large_arrays_are_split_by_rows() -> None:
    embedding = slot("e", (256128, 4608))  # 27B: 2.36 GB
    rows, width = default_chunk(embedding)
    assert width == 4608
    assert rows * width * 2 <= CHUNK_BYTES
    assert 256128 % rows == 0  # no padding is written
    plan = orbax.plan([embedding], keys={"e": ("embedder", "input_embedding")})
    assert {f.size for f in plan.files if "input_embedding/" in f.name and ".z" not in f.name} == {
        rows * width * 2
    }
    assert sum(c.shape[0] for c in plan.chunks["e"]) == 256128
    assert default_chunk(slot("g", (2, 4608, 36864))) == (1, 4608, 36864)
    assert default_chunk(slot("p", (1009, 1 << 20))) == (
        127,
        1 << 20,
    )  # a prime: the last chunk is padded
    assert default_chunk(slot("one", (1, 1 << 28))) == (1, 1 << 28)
    assert default_chunk(slot("s", ())) == ()
    assert default_chunk(slot("z", (0, 3))) == (1, 3)


LAYOUT_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no keys": ({"slots": [slot("a")], "keys": {}}, "no Orbax keys for a"),
    "empty keys": ({"slots": [slot("a")], "keys": {"a": ()}}, "no Orbax keys for a"),
    "twice": (
        {"slots": [slot("a"), slot("b")], "keys": {"a": ("x",), "b": ("x",)}},
        "are given twice",
    ),
    "constant twice": (
        {"slots": [slot("a")], "keys": {"a": ("x",)}, "constants": {("x",): 1}},
        "are given twice",
    ),
    "leaf and subtree": (
        {"slots": [slot("a"), slot("b")], "keys": {"a": ("x",), "b": ("x", "y")}},
        "both a leaf and a subtree: x",
    ),
    "same directory": (
        {"slots": [slot("a"), slot("b")], "keys": {"a": ("x.y",), "b": ("x", "y")}},
        "two files would be",
    ),
    "file and directory": (
        {"slots": [slot("a"), slot("b")], "keys": {"a": ("x",), "b": ("x/0",)}},
        "both a file and a directory: x/0",
    ),
    "parent": ({"slots": [slot("a")], "keys": {"a": ("../x",)}}, "cannot be a file name"),
    "absolute": ({"slots": [slot("a")], "keys": {"a": ("/x",)}}, "cannot be a file name"),
    "backslash": ({"slots": [slot("a")], "keys": {"a": ("x\\y",)}}, "cannot be a file name"),
    "long": ({"slots": [slot("a")], "keys": {"a": ("x" * 300,)}}, "cannot be a file name"),
    "item": ({"slots": [slot("a")], "keys": {"a": ("x",)}, "item": "../i"}, "cannot be a file name"),
    "rank": (
        {"slots": [slot("a")], "keys": {"a": ("x",)}, "chunk_shapes": {"a": (1, 1)}},
        r"a: chunk \(1, 1\) does not suit shape \(4,\)",
    ),
    "zero chunk": (
        {"slots": [slot("a")], "keys": {"a": ("x",)}, "chunk_shapes": {"a": (0,)}},
        "does not suit",
    ),
    "array constant": (
        {"slots": [], "keys": {}, "constants": {("x",): np.ones(3)}},
        "only scalars fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUT_ERRORS)
def test_what_cannot_be_written(case: str) -> None:
    arguments, message = LAYOUT_ERRORS[case]
    with pytest.raises(LayoutError, match=message):
        orbax.plan(arguments.pop("slots"), **arguments)


def test_types_that_zarr_cannot_name() -> None:
    with pytest.raises(DtypeError, match=r"not supported|no name for"):
        orbax.plan([slot("a", dtype=ml_dtypes.int4)], keys={"a": ("x",)})
    with pytest.raises(DtypeError, match="is no number"):
        orbax.plan([], keys={}, constants={("x",): "text"})
