"""Orbax checkpoints of every kind: the official writer's files, what the official reader restores, and damage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from g2kit.formats import orbax, orbax_msgpack
from g2kit.formats.base import Source
from g2kit.formats.errors import (
    DtypeError,
    FileIOError,
    FormatError,
    G2Error,
    LimitError,
    NotFoundError,
    TruncatedError,
)
from g2kit.formats.orbax_locate import find_item
from g2kit.formats.orbax_metadata import split_param

from .orbax_files import (
    BF16,
    DATA,
    flat,
    huggingface,
    nested,
    official,
    same,
    save,
    stacked,
    walk,
    write_metadata,
    write_zarr,
)
from .plan_writer import random_array

NO_CHECKSUM = "Orbax stores no checksums"
TREE = nested(huggingface())


def names(tree: Any) -> dict[str, np.ndarray]:
    """Keys joined with ``/`` -> array."""
    return {"/".join(keys): np.asarray(value) for keys, value in walk(tree)}


def check(source: Source, want: dict[str, np.ndarray]) -> None:
    """The source holds exactly these arrays, whole and in parts."""
    assert set(source.tensors) == set(want)
    for name, array in want.items():
        tensor = source.tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert same(tensor.read(), array), name
        for i in (array.shape[0] - 1, 0):
            assert same(tensor.read((i,)), array[i]), name
        if array.ndim > 1:
            index = (slice(0, array.shape[0]), array.shape[1] // 2)
            assert same(tensor.read(index), array[index]), name


# directory in tests/data -> (item below it, tree, storage, structure)
OFFICIAL: dict[str, tuple[str, Any, str, str]] = {
    "orbax_flat": ("", flat(TREE), "ocdbt", "_METADATA"),
    "orbax_flat_zarr3": ("", flat(TREE), "ocdbt", "_METADATA"),
    "orbax_flat_legacy": ("", flat(TREE), "zarr directories", "checkpoint"),
    "orbax_kauldron": ("ckpt_0/default", {"params": TREE}, "ocdbt", "_METADATA"),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_checkpoints(name: str) -> None:
    item, tree, storage, structure = OFFICIAL[name]
    source = orbax.open_source(DATA / name)
    check(source, names(tree))
    assert source.format == "orbax"
    assert source.metadata["storage"] == storage
    assert source.metadata["structure"] == structure
    assert source.metadata["item"] == str(DATA / name / item)
    assert source.metadata["zarr"] == [3 if name.endswith("zarr3") else 2]
    keys = {"/".join(k): k for k, _ in walk(tree)}
    assert {n: source.metadata["keys"][n] for n in keys} == keys
    assert [n for n in source.notes if NO_CHECKSUM in n]
    assert all(f.is_file() for f in source.files)
    restored = official(DATA / name / item, standard=structure == "_METADATA")
    assert {"/".join(k) for k in restored if k[0] in tree} == set(source.tensors)
    for path, value in restored.items():
        if path[0] in tree:
            assert same(source.tensors["/".join(path)].read(), value)
        else:
            assert source.metadata["scalars"]["/".join(path)] == value
    source.check_unchanged()
    source.close()


def test_official_maxtext() -> None:
    source = orbax.open_source(DATA / "maxtext_scan")
    restored = official(DATA / "maxtext_scan" / "0" / "items")
    assert restored.pop(("opt_state",)) == {}
    assert source.metadata["empty"] == ["opt_state"]
    assert source.metadata["scalars"] == {"step": int(restored.pop(("step",)))}
    check(source, {"/".join(k): np.asarray(v) for k, v in restored.items()})
    scale = source.tensors["params/params/decoder/layers/mlp_local/wi_0/kernel"]
    gate = TREE["layer_2"]["mlp"]["gating_einsum"][0]
    assert same(scale.read((slice(0, 64), 1)), gate)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Written here by orbax: name -> directory, tree."""
    import jax
    import orbax.checkpoint as ocp

    base = tmp_path_factory.mktemp("written")
    mixed = {
        "step": 7,
        "rate": 0.25,
        "name": "a/b.c",
        "none": None,
        "empty": {},
        "list": [np.arange(3, dtype="f4"), {"w": np.ones((2, 2), "i4")}],
        "a/b": {"note": "nested string"},
        "zero": np.asarray(2.5, BF16),
    }
    plain = {"use_ocdbt": False}
    rows = {
        "nested": (TREE, {}),
        "stacked": (stacked(flat(TREE)), {}),
        "flat_zarr": (flat(TREE), plain),
        "flat_zarr3_plain": (flat(TREE), plain | {"use_zarr3": True}),
        "mixed": (mixed, {}),
        "mixed_plain": (mixed, plain),
        "jax": (jax.tree.map(jax.numpy.asarray, {"x": {"w": np.arange(6, dtype="f4")}}), {}),
    }
    out = {}
    for name, (tree, options) in rows.items():
        handler = ocp.PyTreeCheckpointHandler(**options)
        with ocp.Checkpointer(handler) as writer:
            writer.save(base / name, args=ocp.args.PyTreeSave(tree))
        out[name] = (base / name, tree)
    return out


@pytest.mark.parametrize("name", ["nested", "stacked", "flat_zarr", "flat_zarr3_plain", "jax"])
def test_written_by_orbax(name: str, written: dict[str, tuple[Path, Any]]) -> None:
    path, tree = written[name]
    check(orbax.open_source(path), names(tree))


@pytest.mark.parametrize("name", ["mixed", "mixed_plain"])
def test_leaves_that_are_no_arrays(name: str, written: dict[str, tuple[Path, Any]]) -> None:
    path, tree = written[name]
    source = orbax.open_source(path)
    assert set(source.tensors) == {"list/0", "list/1/w"}
    assert same(source.tensors["list/1/w"].read(), tree["list"][1]["w"])
    assert source.metadata["scalars"] == {
        "step": 7, "rate": 0.25, "name": "a/b.c", "a/b/note": "nested string", "zero": 2.5,
    }  # fmt: skip
    assert sorted(source.metadata["empty"]) == ["empty", "none"]
    assert source.metadata["keys"]["a/b/note"] == ("a/b", "note")
    json.dumps(source.metadata)


def copy(name: str, to: Path) -> Path:
    return shutil.copytree(DATA / name, to / name)


@pytest.mark.parametrize("name", ["orbax_flat", "orbax_flat_zarr3"])
def test_metadata_missing(name: str, tmp_path: Path) -> None:  # case 69
    path = copy(name, tmp_path)
    (path / "_METADATA").unlink()
    (path / "_CHECKPOINT_METADATA").unlink()
    source = orbax.open_source(path)
    check(source, names(flat(TREE)))
    keys = source.metadata["keys"]
    assert keys["transformer/layer_0/attn/q_einsum/w"] == ("transformer/layer_0/attn/q_einsum", "w")
    assert any(n.startswith("_METADATA is missing") for n in source.notes)
    assert any(n.startswith("_CHECKPOINT_METADATA is missing") for n in source.notes)
    assert source.metadata["structure"] == "array names"


def test_metadata_missing_elsewhere(written: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for name in ("nested", "stacked", "flat_zarr", "flat_zarr3_plain"):
        path = shutil.copytree(written[name][0], tmp_path / name)
        (path / "_METADATA").unlink()
        check(orbax.open_source(path), names(written[name][1]))
    path = copy("maxtext_scan", tmp_path)
    (path / "0/items/_METADATA").unlink()
    complete = orbax.open_source(DATA / "maxtext_scan")
    source = orbax.open_source(path)
    assert set(source.tensors) == set(complete.tensors)
    assert source.metadata["scalars"] == complete.metadata["scalars"]
    # a plain checkpoint of arrays only, found two directories up
    path = tmp_path / "up/model"
    shutil.copytree(DATA / "orbax_flat_legacy/transformer", path / "transformer")
    check(orbax.open_source(tmp_path / "up"), names(flat(TREE)))


def test_split_param() -> None:
    table = {
        "transformer/layer_0/attn/q_einsum.w": ("transformer/layer_0/attn/q_einsum", "w"),
        "layer_0.mlp.gating_einsum": ("layer_0", "mlp", "gating_einsum"),
        "params.params.decoder.layers.mlp_local.wi_0.kernel": (
            *("params", "params", "decoder", "layers", "mlp_local", "wi_0", "kernel"),
        ),
        "opt_state.0.mu.layer_0.mlp.linear": ("opt_state", "0", "mu", "layer_0", "mlp", "linear"),
        "step": ("step",),
        "model.layers.0.self_attn.q_proj.weight": ("model.layers.0.self_attn.q_proj.weight",),
        "version 1.5.w": ("version 1.5.w",),
        "a..w": ("a..w",),
    }
    assert {param: split_param(param) for param in table} == table


def test_unsplit_names_are_noted(tmp_path: Path) -> None:
    write_zarr(tmp_path, "model.layers.0.weight", np.ones(3, "f4"))
    source = orbax.open_source(tmp_path)
    assert list(source.tensors) == ["model.layers.0.weight"]
    assert any("not split: model.layers.0.weight" in n for n in source.notes)


# what lies where: made in a directory -> path to open, item found
def test_one_candidate_is_found(tmp_path: Path) -> None:
    flat_item = DATA / "orbax_flat"
    for place in ("default", "items", "0/items", "checkpoints/100/state", "gemma2-2b", "a/b/c/e"):
        base = tmp_path / place.replace("/", "-")
        shutil.copytree(flat_item, base / place)
        (base / "tokenizer.model").write_bytes(b"x")
        (base / ".cache").mkdir()
        (base / ".cache/_METADATA").write_text("{}")
        found = find_item(base)
        assert found.path == base / place
        assert found.notes == (f"read from {place}.",)
        assert found.root == base / place
    for marker in ("_METADATA", "manifest.ocdbt"):
        assert find_item(flat_item / marker).path == flat_item
    assert find_item(DATA / "orbax_flat_legacy/checkpoint").path == DATA / "orbax_flat_legacy"
    kauldron = find_item(DATA / "orbax_kauldron")
    assert kauldron.root == DATA / "orbax_kauldron/ckpt_0"
    shutil.rmtree(tmp_path / "0-items/0")
    with pytest.raises(FormatError, match=r"no checkpoint found: no manifest\.ocdbt"):
        find_item(tmp_path / "0-items")  # hidden directories do not count


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    for step in ("0/items", "100/items"):
        shutil.copytree(DATA / "orbax_flat", tmp_path / step)
    with pytest.raises(FormatError, match=r"2 checkpoints are below: 0/items, 100/items\.") as e:
        orbax.open_source(tmp_path)
    assert e.value.fix == f"pass the one you mean, such as {tmp_path / '100/items'}."
    check(orbax.open_source(tmp_path / "100"), names(flat(TREE)))


def test_no_candidate(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        orbax.open_source(tmp_path / "absent")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "x"')  # TensorFlow's
    with pytest.raises(FormatError, match="no checkpoint found"):
        orbax.open_source(tmp_path)
    with pytest.raises(FormatError, match="a directory"):
        orbax.open_source(DATA / "README.md")


def test_far_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2kit.formats.orbax_locate._MAX_ENTRIES", 3)
    for i in range(5):
        (tmp_path / str(i)).touch()
    with pytest.raises(LimitError, match="more than 3 files"):
        orbax.open_source(tmp_path)


def test_odd_paths(tmp_path: Path) -> None:
    path = tmp_path / "a b/%20 #1?x=ü&y"
    shutil.copytree(DATA / "orbax_flat", path / "ocdbt")
    shutil.copytree(DATA / "orbax_flat_legacy", path / "plain")
    for item in ("ocdbt", "plain"):
        check(orbax.open_source(path / item), names(flat(TREE)))
    for bad in (b"\xff", b"back\\slash"):
        place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + bad))
        shutil.copytree(DATA / "orbax_flat_legacy", place / "plain")
        check(orbax.open_source(place / "plain"), names(flat(TREE)))
        shutil.copytree(DATA / "orbax_flat", place / "ocdbt")
        with pytest.raises(FileIOError, match="backslash or with bytes that are not UTF-8"):
            orbax.open_source(place / "ocdbt")


def test_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    check(orbax.open_source(Path("orbax_flat")), names(flat(TREE)))


# conformance section E


def data_files(path: Path) -> list[Path]:
    """OCDBT data files of the processes, largest first."""
    return sorted(path.glob("ocdbt.process_*/d/*"), key=lambda p: -p.stat().st_size)


def test_67_bit_flips_cannot_be_noticed_and_it_says_so(tmp_path: Path) -> None:
    path = copy("orbax_flat_legacy", tmp_path)
    chunk = path / "transformer/final_norm.scale/0"
    data = bytearray(chunk.read_bytes())
    data[-5] ^= 1  # inside a literal of the zstd block
    chunk.write_bytes(data)
    source = orbax.open_source(path)
    assert any(NO_CHECKSUM in n for n in source.notes)
    read = source.tensors["transformer/final_norm/scale"].read()
    assert not same(read, TREE["final_norm"]["scale"])


def test_68_truncated_data_file(tmp_path: Path) -> None:
    path = copy("orbax_flat", tmp_path)
    file = data_files(path)[0]
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(
        TruncatedError, match=r"transformer/layer_\d/\S+: transformer/\S+: the value ends early"
    ) as e:
        orbax.open_source(path)
    assert "copy the checkpoint again" in str(e.value)
    assert e.value.exit_code == 3


def test_68_missing_data_file(tmp_path: Path) -> None:
    path = copy("orbax_flat", tmp_path)
    data_files(path)[0].unlink()
    with pytest.raises(TruncatedError, match=r"transformer/layer_\d/\S+: .*data file is missing"):
        orbax.open_source(path)


def test_68_missing_tree_nodes_and_manifest(tmp_path: Path) -> None:
    path = copy("orbax_flat", tmp_path)
    for node in (path / "d").iterdir():
        node.unlink()
    with pytest.raises(TruncatedError, match="none of its arrays can"):
        orbax.open_source(path)
    (path / "manifest.ocdbt").unlink()  # its commit marker is there: the copy is incomplete
    with pytest.raises(TruncatedError, match=r"manifest\.ocdbt is missing"):
        orbax.open_source(path)


def test_68_missing_chunk_and_array(tmp_path: Path) -> None:
    path = copy("orbax_flat_legacy", tmp_path)
    array = path / "transformer/layer_1/mlp/linear.w"
    (array / "0.0").unlink()
    with pytest.raises(
        TruncatedError, match=r"transformer/layer_1/mlp/linear/w: 1 of 1 chunks are missing"
    ):
        orbax.open_source(path)
    shutil.rmtree(array)
    with pytest.raises(
        TruncatedError, match=r"1 of 38 arrays of checkpoint are not stored: transformer/layer_1"
    ):
        orbax.open_source(path)


def test_70_uncommitted_directories(tmp_path: Path) -> None:
    path = tmp_path / "100.orbax-checkpoint-tmp-1722"
    shutil.copytree(DATA / "orbax_kauldron/ckpt_0", path)
    before = sorted(path.rglob("*"))
    for opened in (path, path / "default", tmp_path):
        with pytest.raises(FormatError, match=r"uncommitted: .*save in progress") as e:
            orbax.open_source(opened)
        assert "nothing was changed or deleted" in str(e.value)
    assert sorted(path.rglob("*")) == before
    shutil.copytree(DATA / "orbax_kauldron/ckpt_0", tmp_path / "99")
    source = orbax.open_source(tmp_path)
    assert source.metadata["item"].endswith("99/default")
    assert any("never finished" in n and "tmp-1722" in n for n in source.notes)


def test_70_unmerged_processes(tmp_path: Path) -> None:
    path = copy("orbax_flat", tmp_path)
    for name in ("manifest.ocdbt", "commit_success.txt"):
        (path / name).unlink()
    with pytest.raises(
        FormatError, match=r"uncommitted: manifest.ocdbt is missing while ocdbt.process_"
    ):
        orbax.open_source(path)
    assert (path / "ocdbt.process_0").is_dir()


def test_70_no_commit_marker_is_noted(tmp_path: Path) -> None:
    path = copy("orbax_flat", tmp_path)
    (path / "commit_success.txt").unlink()
    assert not [n for n in orbax.open_source(path).notes if "committed" in n]  # it has a timestamp
    meta = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    meta["commit_timestamp_nsecs"] = None
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(meta))
    assert [
        n for n in orbax.open_source(path).notes if "nothing says that the save was committed" in n
    ]
    (path / "_CHECKPOINT_METADATA").write_text("{")
    assert [n for n in orbax.open_source(path).notes if "cannot be read and was ignored" in n]


def test_71_72_stored_shape_and_dtype_are_told(tmp_path: Path) -> None:
    """Comparing them with the architecture is the caller's; ``write_shape`` is one host's and is not believed."""
    array = np.arange(6, dtype="f4").reshape(2, 3)
    write_zarr(tmp_path, "x.w", array)
    write_metadata(tmp_path, {("x", "w"): "jax.Array"})
    meta = tmp_path / "_METADATA"
    meta.write_text(
        meta.read_text().replace(
            '"skip_deserialize": false', '"skip_deserialize": false, "write_shape": [9]'
        )
    )
    tensor = orbax.open_source(tmp_path).tensors["x/w"]
    assert (tensor.shape, tensor.dtype, tensor.stored) == ((2, 3), np.dtype("f4"), "<f4, blosc")


def test_73_other_subtrees_are_listed(tmp_path: Path) -> None:
    tree = {
        "params": {"params": {"w": np.ones((2, 2), "f4")}},
        "opt_state": {"mu": {"w": np.zeros((2, 2), "f4")}, "count": np.asarray(3)},
    }
    source = orbax.open_source(save(tmp_path / "c", tree))
    assert set(source.tensors) == {"params/params/w", "opt_state/mu/w"}
    assert source.metadata["scalars"] == {"opt_state/count": 3}


def test_74_saved_by_sixteen_hosts(tmp_path: Path) -> None:
    import asyncio

    import tensorstore as ts
    from orbax.checkpoint._src.serialization import ocdbt_utils, tensorstore_utils

    array = random_array(1, BF16, (8, 32, 10))
    norm = random_array(2, BF16, (32,))
    spec = {"shape": [8, 32, 10], "chunks": [2, 8, 10], "dtype": "bfloat16"}
    for host in range(16):
        row, column = 2 * (host % 4), 8 * (host // 4)
        part = tmp_path / f"ocdbt.process_{host}"
        box = array[row : row + 2, column : column + 8]
        kv = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{part}/"}}
        opened = ts.open(
            {"driver": "zarr", "kvstore": kv | {"path": "x.w/"}, "metadata": spec},
            create=True, open=True,
        ).result()  # fmt: skip
        opened[row : row + 2, column : column + 8].write(box).result()
        if host == 5:  # removed below: the metadata that the merge keeps must be another's
            store = ts.KvStore.open(kv | {"path": "x.w/"}).result()
            store.write(".zarray", None).result()
        if host == 3:
            ts.open(
                {"driver": "zarr", "kvstore": kv | {"path": "n.scale/"}, "dtype": "bfloat16"},
                create=True, shape=[32],
            ).result().write(norm).result()  # fmt: skip
    write_metadata(tmp_path, {("x", "w"): "jax.Array", ("n", "scale"): "jax.Array"})
    with pytest.raises(FormatError, match="uncommitted"):
        orbax.open_source(tmp_path)
    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    merge = ocdbt_utils.merge_ocdbt_per_process_files(tmp_path, context, use_zarr3=False)
    asyncio.run(merge)
    source = orbax.open_source(tmp_path)
    check(source, {"x/w": array, "n/scale": norm})
    shutil.rmtree(tmp_path / "ocdbt.process_5")
    with pytest.raises(TruncatedError, match=r"x/w: x\.w/\d\.\d\.0: "):
        orbax.open_source(tmp_path)


def test_75_written_while_read(tmp_path: Path) -> None:
    path = copy("orbax_flat_legacy", tmp_path)
    source = orbax.open_source(path)
    source.check_unchanged()
    chunk = path / "transformer/final_norm.scale/0"
    chunk.write_bytes(chunk.read_bytes() + b"x")
    with pytest.raises(FileIOError, match="changed while it was read"):
        source.check_unchanged()
    chunk.unlink()
    with pytest.raises(FileIOError, match="went away"):
        source.check_unchanged()


# metadata that lies


def edited(tmp_path: Path, edit: Callable[[Any], None]) -> Path:
    write_zarr(tmp_path, "x.w", np.ones((2, 3), "f4"))
    write_zarr(tmp_path, "y.w", np.ones((2, 3), "f4"))
    write_metadata(tmp_path, {("x", "w"): "jax.Array", ("y", "w"): "np.ndarray"})
    meta = json.loads((tmp_path / "_METADATA").read_text())
    edit(meta)
    (tmp_path / "_METADATA").write_text(json.dumps(meta))
    return tmp_path


X = "('x', 'w')"


def put(*path: Any) -> Callable[[Any], None]:
    *where, last, value = path

    def edit(meta: Any) -> None:
        for key in where:
            meta = meta[key]
        meta[last] = value

    return edit


KEY = ("tree_metadata", X, "key_metadata")
LIES: dict[str, tuple[Callable[[Any], None], type[G2Error], str]] = {
    "no tree": (put("tree_metadata", None), FormatError, "must be an object, found null"),
    "no leaves": (put("tree_metadata", {}), FormatError, "holds no arrays"),
    "leaf": (put("tree_metadata", X, 3), FormatError, "key_metadata must be a list"),
    "no keys": (put(*KEY, []), FormatError, "1 to 64 keys"),
    "key": (put(*KEY, 0, "key", None), FormatError, "a key must be a string, found .*None"),
    "value": (put("tree_metadata", X, "value_metadata", {}), FormatError, "have a value_type"),
    "twice": (put(*KEY, 0, "key", "y"), FormatError, "more than one leaf: y/w"),
    "same array": (
        put(*KEY, [{"key": "y.w", "key_type": 2}]),
        FormatError,
        r"array names that mean more than one leaf: y\.w",
    ),
    "gone": (put(*KEY, 0, "key", "z"), TruncatedError, "1 of 2 arrays of _METADATA are not stored: z/w"),
    "parent": (put(*KEY, 0, "key", "../x"), FormatError, "looks like a path out of the directory"),
    "absolute": (put(*KEY, 0, "key", "/etc/passwd"), FormatError, "looks like a path out"),
    "control": (put(*KEY, 0, "key", "x\n"), FormatError, "control characters"),
    "long": (put(*KEY, 0, "key", "x" * 5000), FormatError, "5002 characters"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies(lie: str, tmp_path: Path) -> None:
    edit, kind, message = LIES[lie]
    with pytest.raises(kind, match=message) as e:
        orbax.open_source(edited(tmp_path, edit))
    assert str(tmp_path) in str(e.value)


def test_metadata_of_old_versions_and_odd_types(tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        meta["tree_metadata"][X]["value_metadata"] = {"value_type": "some.new.Array"}
        meta["tree_metadata"][X]["key_metadata"][0] = {"key": 0, "key_type": 1}
        meta["tree_metadata"]["('s',)"] = {
            "key_metadata": [{"key": "s", "key_type": 2}],
            "value_metadata": {"value_type": "string", "skip_deserialize": False},
        }

    path = edited(tmp_path, edit)
    (path / "x.w").rename(path / "0.w")
    write_zarr(path, "stray.w", np.ones(2, "f4"))
    source = orbax.open_source(path)
    assert list(source.tensors) == ["0/w", "y/w"]
    assert source.metadata["scalars"] == {"s": None}
    assert any("does not list were ignored: stray.w" in n for n in source.notes)
    assert any("the string s is not in _strings.json" in n for n in source.notes)


def test_both_kinds_of_storage(tmp_path: Path) -> None:
    """Some old checkpoints keep part of their arrays beside the database."""
    write_zarr(tmp_path, "x.w", np.ones((2, 3), "f4"), ocdbt=True)
    write_zarr(tmp_path, "y.w", np.zeros((2, 3), "f4"))
    source = orbax.open_source(tmp_path)
    check(source, {"x/w": np.ones((2, 3), "f4"), "y/w": np.zeros((2, 3), "f4")})
    assert source.metadata["storage"] == "ocdbt and zarr directories"


def test_two_metadata_files_for_one_array(tmp_path: Path) -> None:
    write_zarr(tmp_path, "x.w", np.ones((2, 3), "f4"))
    (tmp_path / "x.w/zarr.json").write_text("{}")
    with pytest.raises(FormatError, match=r"x\.w has both \.zarray and zarr\.json"):
        orbax.open_source(tmp_path)


# the msgpack file


def ext(code: int, *parts: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(list(parts), use_bin_type=True))


def legacy(tmp_path: Path, tree: Any) -> Path:
    write_zarr(tmp_path, "x.w", np.ones((2, 3), "f4"))
    data = tree if isinstance(tree, bytes) else msgpack.packb(tree, use_bin_type=True)
    (tmp_path / "checkpoint").write_bytes(data)
    return tmp_path


def test_inline_values(tmp_path: Path) -> None:
    norm = random_array(3, BF16, (5, 2))
    tree = {
        "x": {"w": "PLACEHOLDER://x.w"},
        "n": {"scale": ext(1, [5, 2], "bfloat16", norm.tobytes())},
        "old": ext(1, [5, 2], b"V2", norm.tobytes()),
        "step": 7,
        "rate": ext(3, [], "float32", np.float32(0.5).tobytes()),
        "z": ext(1, [], "int64", np.int64(4).tobytes()),
        "c": ext(2, 1.0, 2.0),
        "l": [1, {"w": "text"}, []],
        "none": None,
        "empty": {},
    }
    source = orbax.open_source(legacy(tmp_path, tree))
    check(source, {"x/w": np.ones((2, 3), "f4"), "n/scale": norm, "old": norm})
    assert source.metadata["scalars"] == {
        "step": 7, "rate": 0.5, "z": 4, "c": 1 + 2j, "l/0": 1, "l/1/w": "text",
    }  # fmt: skip
    assert source.metadata["empty"] == ["l/2", "none", "empty"]
    assert source.tensors["n/scale"].stored == "bfloat16, inline"
    with pytest.raises(IndexError):
        source.tensors["n/scale"].read((5,))


def test_official_reader_agrees_on_inline_values(tmp_path: Path) -> None:
    path = copy("orbax_flat_legacy", tmp_path)
    tree = msgpack.unpackb((path / "checkpoint").read_bytes())
    norm = random_array(3, np.dtype("f4"), (64,))
    tree["transformer/final_norm"]["scale"] = ext(1, [64], "float32", norm.tobytes())
    (path / "checkpoint").write_bytes(msgpack.packb(tree, use_bin_type=True))
    restored = official(path, standard=False)
    check(orbax.open_source(path), {"/".join(k): np.asarray(v) for k, v in restored.items()})


def test_inline_values_beside_metadata(tmp_path: Path) -> None:
    path = legacy(tmp_path, {"x": {"w": "PLACEHOLDER://x.w"}, "step": 9})
    write_metadata(path, {("x", "w"): "jax.Array", ("step",): "scalar"})
    assert orbax.open_source(path).metadata["scalars"] == {"step": 9}


BAD_MSGPACK: dict[str, tuple[Any, type[G2Error], str]] = {
    "deep": (b"\x81\xa1a" * 5000 + b"\x01", FormatError, "not a msgpack tree: StackError"),
    "deep tree": ({"a": {"b": []}}, LimitError, "nests more than"),
    "cut": (b"\x82\xa1a\x01", FormatError, "not a msgpack tree"),
    "long array": (b"\x81\xa1a\xdd\xff\xff\xff\xff", FormatError, "exceeds max_array_len"),
    "twice": (b"\x82\xa1a\x01\xa1a\x02", FormatError, "a key twice"),
    "number key": ({1: 2}, FormatError, "not a msgpack tree"),
    "bytes key": ({b"a": 2}, FormatError, "keys that are no strings"),
    "bytes": ({"a": b"1"}, FormatError, "a is a bytes"),
    "bad text": (b"\x81\xa1\xff\x01", FormatError, "not a msgpack tree"),
    "extension": ({"a": msgpack.ExtType(9, b"")}, FormatError, "unknown msgpack extension 9"),
    "time": ({"a": msgpack.Timestamp(1)}, FormatError, "a is a Timestamp"),
    "dtype": ({"a": ext(1, [1], "object", b"12345678")}, DtypeError, "element type object"),
    "size": ({"a": ext(1, [2**40], "float32", b"1234")}, FormatError, "has 4 bytes"),
    "negative": ({"a": ext(1, [-1, -4], "int8", b"1234")}, FormatError, r"has shape \(-1, -4\)"),
    "parts": ({"a": ext(1, 1, 2)}, FormatError, r"must be \(shape, dtype, bytes\)"),
    "complex": ({"a": ext(2, 1)}, FormatError, "must have two parts"),
    "complex text": ({"a": ext(2, "x", 1)}, FormatError, "not a msgpack tree"),
    "nested": ({"a": msgpack.ExtType(1, msgpack.packb(ext(1, 1)))}, FormatError, "must be"),
    "no array": ({"a": 1}, FormatError, "holds no arrays|the value"),
    "lost": ({"a": "PLACEHOLDER://../../x"}, TruncatedError, "1 of 1 arrays of checkpoint are not stored: a"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_MSGPACK)
def test_bad_msgpack(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, kind, message = BAD_MSGPACK[bad]
    if bad == "deep tree":
        monkeypatch.setattr(orbax_msgpack, "MAX_DEPTH", 1)
    path = legacy(tmp_path, tree)
    if bad == "no array":
        source = orbax.open_source(path)
        assert source.metadata["scalars"] == {"a": 1}
        return
    with pytest.raises(kind, match=message) as e:
        orbax.open_source(path)
    assert str(tmp_path) in str(e.value)


def test_msgpack_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = legacy(tmp_path, {"a": list(range(50)), "x": {"w": "PLACEHOLDER://x.w"}})
    with monkeypatch.context() as patch:
        patch.setattr(orbax_msgpack, "MAX_LEAVES", 20)
        with pytest.raises(LimitError, match="more than 20 leaves"):
            orbax.open_source(path)
    monkeypatch.setattr(orbax_msgpack, "MAX_BYTES", 20)
    with pytest.raises(LimitError, match="bytes, at most 20"):
        orbax.open_source(path)


# fuzz: a valid checkpoint with a few bytes changed opens, or is refused in good order

FUZZED = ("_METADATA", "checkpoint", "x.w/.zarray", "z.w/zarr.json", "x.w/0.0", "z.w/c/0/0")


@pytest.fixture(scope="module")
def fuzzable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    write_zarr(path, "x.w", random_array(1, BF16, (6, 5)), compressor={"id": "zstd", "level": 1})
    inner = {"chunk_shape": [3, 5], "codecs": [{"name": "bytes"}, {"name": "zstd"}]}
    codecs = [{"name": "sharding_indexed", "configuration": inner}]
    write_zarr(path, "z.w", random_array(2, BF16, (6, 5)), zarr=3, codecs=codecs)
    names = {("x", "w"): "jax.Array", ("z", "w"): "np.ndarray", ("i",): "scalar"}
    write_metadata(path, names, store_array_data_equal_to_fill_value=True)
    tree = {
        "x": {"w": "PLACEHOLDER://x.w"},
        "i": ext(3, [], "float32", np.float32(0.5).tobytes()),
        "j": ext(1, [2], "bfloat16", b"1234"),
    }
    (path / "checkpoint").write_bytes(msgpack.packb(tree, use_bin_type=True))
    read_all(path)
    return path


def read_all(path: Path) -> None:
    source = orbax.open_source(path)
    for tensor in source.tensors.values():
        if tensor.nbytes < 1 << 20:
            assert tensor.read().shape == tensor.shape
    source.close()


def refusal(path: Path) -> str | None:
    """What a G2Error says; anything else raised fails the test."""
    try:
        read_all(path)
    except G2Error as e:
        return str(e)
    return None


edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "copy", "cut"]),
        st.integers(0, 10_000),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for kind, at, byte in changes:
        at %= len(out) + 1
        if kind == "set" and at < len(out):
            out[at] = byte
        elif kind == "insert":
            out[at:at] = bytes([byte])
        elif kind == "delete":
            del out[at : at + byte % 16]
        elif kind == "copy":
            out[at:at] = out[at : at + byte]
        elif kind == "cut":
            del out[at:]
    return bytes(out)


@pytest.mark.parametrize("file", FUZZED)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits)
def test_fuzz(file: str, fuzzable: Path, changes: list[tuple[str, int, int]]) -> None:
    target = fuzzable / file
    original = target.read_bytes()
    hidden = fuzzable / "_METADATA" if file == "checkpoint" else None
    try:
        if hidden:
            hidden.rename(fuzzable / "hidden")
        target.write_bytes(mutate(original, changes))
        message = refusal(fuzzable)
    finally:
        target.write_bytes(original)
        if hidden:
            (fuzzable / "hidden").rename(hidden)
    assert message is None or (len(message) < 3000 and str(fuzzable) in message)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits, which=st.integers(0, 100))
def test_fuzz_ocdbt(changes: list[tuple[str, int, int]], which: int, ocdbt_copy: Path) -> None:
    files = sorted(p for p in ocdbt_copy.rglob("*") if p.is_file() and p.name != "_METADATA")
    target = files[which % len(files)]
    original = target.read_bytes()
    try:
        target.write_bytes(mutate(original, changes))
        message = refusal(ocdbt_copy)
    finally:
        target.write_bytes(original)
    assert message is None or str(ocdbt_copy) in message


@pytest.fixture(scope="module")
def ocdbt_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy("orbax_flat", tmp_path_factory.mktemp("ocdbt"))


def test_importing_loads_no_framework() -> None:
    code = """
import sys
from pathlib import Path
import g2kit.formats.orbax
assert not {"jax", "orbax", "torch", "flax", "tensorstore"} & set(sys.modules)
source = g2kit.formats.orbax.open_source(Path(sys.argv[1]))
source.tensors["transformer/final_norm/scale"].read()
assert not {"jax", "orbax", "torch", "flax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, DATA / "orbax_flat"], check=True)
