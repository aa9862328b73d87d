"""The interpreter agrees with pickle on data and refuses everything else."""

import contextlib
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from g2kit.formats import torch_unpickler
from g2kit.formats.errors import FormatError, G2Error, LayoutError, LimitError, UnsafeError
from g2kit.formats.torch_globals import Opaque, Storage, TensorView
from g2kit.formats.torch_unpickler import load

from .torch_files import (
    ORDERED_DICT,
    call,
    glob,
    pickled,
    plain,
    storage,
    table,
    tensor,
    text,
    tup,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**127), 2**127) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text(max_size=9), inner, max_size=4).map(OrderedDict),
    max_leaves=12,
)  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_agrees_with_pickle_on_data(value, protocol):
    data = pickle.dumps(value, protocol)
    assert same(load(data, "f"), pickle.loads(data))
    short = pickletools.optimize(data)
    assert same(load(short, "f"), pickle.loads(short))


@given(PLAIN.filter(lambda v: not contains_bytes(v)))
def test_agrees_with_pickle_on_data_of_protocol_2(value):
    data = pickle.dumps(value, 2)
    assert same(load(data, "f"), pickle.loads(data))


def contains_bytes(value) -> bool:  # protocol 2 has no opcode for them
    if isinstance(value, dict):
        return any(map(contains_bytes, value.values()))
    if isinstance(value, list | tuple):
        return any(map(contains_bytes, value))
    return isinstance(value, bytes)


def test_bytes_of_protocol_2_and_sets_are_opaque():
    assert load(pickle.dumps(b"x", 2), "f") == Opaque("_codecs.encode")
    assert load(pickle.dumps({1}, 2), "f") == Opaque("__builtin__.set")
    assert load(pickle.dumps([{1, 2}, frozenset("ab")], 4), "f") == [
        Opaque("set"), Opaque("frozenset"),
    ]  # fmt: skip


def test_keys_that_are_not_strings_cannot_name_anything():
    assert load(pickle.dumps({0: 1, 1: 2, "a": 3, (1, 2): 4}, 2), "f") == {
        "<int>": 2, "a": 3, "<tuple>": 4,
    }  # fmt: skip


def test_tensors():
    assert load(pickled(tensor()), "f") == TensorView(
        Storage("FloatStorage", "0", "cpu", 6), None, 0, (2, 3), (3, 1)
    )
    parameter = call(
        glob("torch._utils", "_rebuild_parameter"), tensor(), plain(True), ORDERED_DICT
    )
    assert load(pickled(parameter), "f") == load(pickled(tensor()), "f")
    attributes = call(
        glob("torch._tensor", "_rebuild_from_type_v2"),
        glob("torch._utils", "_rebuild_parameter"),
        glob("torch.nn.parameter", "Parameter"),
        tup(tensor(), plain(True), ORDERED_DICT),
        plain({"note": 1}),
    )
    assert load(pickled(attributes), "f") == load(pickled(tensor()), "f")


def test_tensor_of_untyped_storage():
    body = call(
        glob("torch._utils", "_rebuild_tensor_v3"),
        storage("7", 12, "UntypedStorage", module="torch.storage"),
        *map(plain, (1, (4,), (1,), False, None)),
        glob("torch", "float8_e4m3fn"),
    )
    assert load(pickled(body), "f") == TensorView(
        Storage("UntypedStorage", "7", "cpu", 12), "float8_e4m3fn", 1, (4,), (1,)
    )


def test_state_dict_metadata_is_dropped():
    body = ORDERED_DICT + b"(" + text("w") + tensor() + b"u" + plain({"_metadata": {}}) + b"b"
    assert list(load(pickled(body), "f")) == ["w"]


def test_ordered_dict_of_pairs():
    body = call(glob("collections", "OrderedDict"), plain([["a", 1], ["b", 2]]))
    assert load(pickled(body), "f") == {"a": 1, "b": 2}
    with pytest.raises(FormatError, match="not pairs"):
        load(pickled(call(glob("collections", "OrderedDict"), plain([1]))), "f")


# ---------------------------------------------------------------- refused


def rebuild(name: str, *args: bytes) -> bytes:
    return pickled(call(glob("torch._utils", name), *args))


def from_type(function: bytes, kind: bytes) -> bytes:
    return pickled(
        call(glob("torch._tensor", "_rebuild_from_type_v2"), function, kind, plain(()), plain({}))
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


SYSTEM = f"{os.system.__module__}.system"
HOSTILE = {
    "reduce": (pickled(call(glob("os", "system"), text("touch executed"))), "os.system"),
    "mentioned only": (pickled(glob("builtins", "eval") + b"0N"), "builtins.eval"),
    "inside a list": (pickle.dumps({"a": [1, Evil()]}, 2), SYSTEM),
    "protocol 4": (pickle.dumps(Evil(), 4), SYSTEM),
    "dotted name": (b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93.", "torch.serialization.os.system"),
    "through an allowed module": (pickled(glob("torch._utils", "_import_dotted_name")), "torch._utils._import_dotted_name"),
    "another name of an allowed one": (pickled(glob("torch.storage", "_load_from_bytes")), "torch.storage._load_from_bytes"),
    "INST": (pickled(b"(" + text("x") + b"ios\nsystem\n"), "os.system"),
    "INST of an allowed class": (pickled(b"(icollections\nOrderedDict\n"), "collections.OrderedDict"),
    "OBJ": (pickled(b"(" + glob("collections", "OrderedDict") + b"o"), "OBJ"),
    "NEWOBJ_EX": (pickled(glob("collections", "OrderedDict") + b")}\x92"), "NEWOBJ_EX"),
    "extension registry": (pickled(b"\x82\x01"), "extension registry"),
    "BUILD of a function": (pickled(glob("torch._utils", "_rebuild_tensor_v2") + plain({"x": 1}) + b"b"), "sets attributes"),
    "call of a result": (pickled(call(tensor(), text("x"))), "not a known function"),
    "call of a class": (pickled(call(glob("torch", "FloatStorage"), plain(9))), "torch.FloatStorage"),
    "global named by a tuple": (b"\x80\x04" + plain((1, 2)) + text("x") + b"\x93.", "no name"),
    "tensor subclass": (from_type(glob("torch._utils", "_rebuild_parameter"), glob("torch", "float32")), "subclass"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_and_names(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, name = HOSTILE[case]
    with pytest.raises(UnsafeError) as e:
        load(data, "model.bin")
    assert name in str(e.value)
    assert str(e.value).startswith("model.bin: ")
    assert e.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_the_hostile_files_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["protocol 4"][0])
    assert (tmp_path / "executed").exists()


DAMAGED = {
    "empty": (b"", FormatError, "ends at byte 0"),
    "no stop": (b"\x80\x02N", FormatError, "ends at byte 3"),
    "nothing left": (b"\x80\x02.", FormatError, "0 values"),
    "mark left": (b"\x80\x02(.", FormatError, "1 values"),
    "two left": (b"\x80\x02NN.", FormatError, "2 values"),
    "more behind": (b"\x80\x02N.N.", FormatError, "2 bytes follow"),
    "unknown opcode": (b"\x80\x02\xff.", FormatError, "0xff at byte 2"),
    "unmarked": (b"\x80\x02Nt.", FormatError, "mark"),
    "pop of nothing": (b"\x80\x02\x85.", FormatError, "not there"),
    "pop of a mark": (b"\x80\x02(\x85.", FormatError, "not there"),
    "unknown memo": (b"\x80\x02h\x05.", FormatError, "recalls value 5"),
    "memo of nothing": (b"\x80\x02q\x05.", FormatError, "not there"),
    "long string": (b"\x80\x02X\xff\xff\xff\xffab.", FormatError, "inside a value"),
    "endless name": (b"\x80\x02cos", FormatError, "inside a name"),
    "not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", FormatError, "UTF-8"),
    "long integer": (b"\x80\x02\x8b\xff\xff\xff\x7f1.", LimitError, "2147483647 bytes"),
    "items of a number": (b"\x80\x02K\x01(NNu.", FormatError, "items of a int"),
    "odd items": (b"\x80\x02}(NNNu.", FormatError, "items"),
    "append to a tuple": (b"\x80\x02)Na.", FormatError, "appends"),
    "doubled key": (pickled(b"}(" + text("a") + b"N" + text("a") + b"Nu"), FormatError, '"a" is stored twice'),
    "persistent id": (pickled(text("0") + b"Q"), FormatError, "persistent id"),
    "storage of nothing": (pickled(tup(text("storage"), *map(plain, (1, 2, 3, 4))) + b"Q"), FormatError, "type"),
    "negative storage": (pickled(storage(count=-1)), FormatError, "size"),
    "tensor without storage": (pickled(tensor(plain(3))), FormatError, "not a storage"),
    "parameter of nothing": (rebuild("_rebuild_parameter", *map(plain, (1, 2, 3))), FormatError, "not a tensor"),
    "few arguments": (rebuild("_rebuild_tensor_v2", storage()), FormatError, "1 arguments, expected 6 to 7"),
    "dtype is no dtype": (rebuild("_rebuild_tensor_v3", storage(), *map(plain, (0, (1,), (1,), 0, 0, 0))), FormatError, "dtype"),
    "endless attributes": (
        from_type(glob("torch._tensor", "_rebuild_from_type_v2"), glob("torch", "Tensor")),
        FormatError, "from another one",
    ),
    "steps": (b"\x80\x02" + b"N0" * 1_100_000 + b"N.", LimitError, "steps"),
    "bytes": (b"\x80\x02" + bytes(16 << 20), LimitError, "at most 16777216"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    data, error, message = DAMAGED[case]
    with pytest.raises(error) as e:
        load(data, "model.bin")
    assert message in str(e.value)
    assert type(e.value) is error


HUGE = (1 << 63, 1 << 254)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (-1, (2, 3), (3, 1)), (0, (2, 3), (-3, 1)), (0, (-2, 3), (3, 1)), (0, (2, 3), (1,)),
        (0, (2.0, 3), (3, 1)), (0, (True, 3), (3, 1)), (True, (2, 3), (3, 1)), (0, "23", (3, 1)),
        (0, [2, 3], (3, 1)), (None, (2, 3), (3, 1)), (0, (HUGE[0],), (1,)), (0, (1,), (HUGE[1],)),
        (HUGE[0], (1,), (1,)), (0, (1,) * 65, (1,) * 65), (0, ((1,), 2), (3, 1)),
    ],
)  # fmt: skip
def test_sizes_that_are_none(offset, shape, strides):
    with pytest.raises(LayoutError, match="not negative"):
        load(pickled(tensor(None, offset, shape, strides)), "f")


def test_deep_nesting_is_not_recursion():
    for body in (b")" + b"\x85" * 100_000, b"]" * 100_000 + b"a" * 99_999):
        load(pickled(body), "f")
    with pytest.raises(UnsafeError):
        load(pickled(b")" + b"\x85" * 100_000 + b")R"), "f")


@settings(max_examples=400)
@given(st.binary(max_size=60))
def test_any_bytes(data):
    try_load(data)


SEED = pickled(table({"a.weight": tensor(), "b": plain([1, 2.5, None, ("x",)]), "c": ORDERED_DICT}))


@settings(max_examples=400)
@given(st.data())
def test_mutated(data):
    image = bytearray(SEED)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(image) - 1))
        cut = data.draw(st.integers(0, 6))
        image[at : at + cut] = data.draw(st.binary(max_size=6))
        if not image:
            break
    try_load(bytes(image))


def try_load(data: bytes) -> None:
    with contextlib.suppress(G2Error):
        load(data, "f")


def test_imports_nothing():
    source = Path(torch_unpickler.__file__).read_text()
    assert "import pickle" not in source
    assert "__import__" not in source
    assert "getattr" not in source
