"""The globals a torch checkpoint may mention, and what stands for them here.

One table by name; nothing is imported. Calls that rebuild tensors give a :class:`TensorView`, calls that are harmless
but of no use here give an :class:`Opaque`, everything else is refused. Sources: torch/_utils.py;
torch/_weights_only_unpickler.py, ``_get_allowed_globals``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import FormatError, LayoutError, UnsafeError, printable

UNSAFE_FIX = "do not load this file with torch either; ask its author for safetensors."
_MAX_AXES = 64


@dataclass(frozen=True)
class Global:
    """A name the pickle mentions; from the table below, never imported."""

    name: str


@dataclass(frozen=True)
class Opaque:
    """What a harmless call would return; the call is not made. Such as ``torch.device``."""

    call: str


@dataclass(frozen=True)
class Storage:
    """A storage as the pickle describes it; nothing here was compared with the archive.

    Attributes:
        type: torch's class without its module, ``BFloat16Storage`` or ``UntypedStorage``.
        key: the record is ``data/<key>``.
        location: device it was on; ``meta`` has no data.
        count: elements (bytes when untyped).
    """

    type: str
    key: str
    location: str
    count: int


@dataclass(frozen=True)
class TensorView:
    """A view of a storage, in elements. Types are checked, bounds are not.

    Attributes:
        storage: what it views.
        dtype: torch's dtype name, or None when the storage's type says it.
        offset: first element.
        shape: sizes of the axes.
        strides: elements from one index to the next, for every axis.
        lazy: operations still pending on the values, ``conj`` or ``neg``; empty when there are none.
    """

    storage: Storage
    dtype: str | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    lazy: str = ""


def _view(args: Sequence[Any]) -> TensorView:
    """``_rebuild_tensor[_v2](storage, offset, size, stride[, requires_grad, hooks[, metadata]])``."""
    storage, offset, shape, strides = args[:4]
    return _checked_view(storage, None, offset, shape, strides, args[6:7])


def _view_v3(args: Sequence[Any]) -> TensorView:
    """``_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])``."""
    storage, offset, shape, strides, _, _, dtype = args[:7]
    if not isinstance(dtype, Global) or dtype.name not in _DTYPES:
        raise FormatError("a tensor's dtype is not a torch dtype.")
    name = dtype.name.removeprefix("torch.")
    return _checked_view(storage, name, offset, shape, strides, args[7:8])


def _checked_view(
    storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any, metadata: Sequence[Any]
) -> TensorView:
    if not isinstance(storage, Storage):
        raise FormatError("a tensor is rebuilt from something that is not a storage.")
    shape, strides = _plain(shape), _plain(strides)
    if len(shape) != len(strides) or not is_size(offset) or len(shape) > _MAX_AXES:
        raise LayoutError(
            f"a tensor has offset {_short(offset)}, shape {_short(shape)} and strides "
            f"{_short(strides)}; expected integers that are not negative, one stride per axis.",
            fix="the file is damaged or hostile; do not use it.",
        )
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    lazy = " and ".join(flag for flag in ("conj", "neg") if flags.get(flag))
    return TensorView(storage, dtype, offset, shape, strides, lazy)


def _plain(axes: Any) -> tuple[int, ...]:
    if not isinstance(axes, tuple) or not all(is_size(n) for n in axes):
        raise LayoutError(
            f"a tensor's shape or strides are {_short(axes)}; expected integers that are not "
            "negative.",
            fix="the file is damaged or hostile; do not use it.",
        )
    return axes


def is_size(n: Any) -> bool:
    """Whether it is an integer that can be a size or an offset."""
    return type(n) is int and 0 <= n < 1 << 63


def _short(value: Any) -> str:
    flat = isinstance(value, tuple) and len(value) <= _MAX_AXES
    if flat and all(isinstance(n, int) for n in value):
        return str(list(value))
    return str(value) if isinstance(value, int) else f"a {type(value).__name__}"


def _parameter(args: Sequence[Any]) -> TensorView:
    """``_rebuild_parameter(data, requires_grad, hooks[, state])``: the tensor itself."""
    if not isinstance(args[0], TensorView):
        raise FormatError("a parameter is rebuilt from something that is not a tensor.")
    return args[0]


def _from_type(args: Sequence[Any]) -> Any:
    """``_rebuild_from_type_v2(rebuild, class, args, state)``: a tensor that carries attributes."""
    rebuild, kind, inner, _ = args
    if not isinstance(kind, Global) or kind.name not in _TENSOR_CLASSES:
        raise UnsafeError("its pickle rebuilds a tensor subclass.", fix=UNSAFE_FIX)
    if isinstance(rebuild, Global) and rebuild.name == _FROM_TYPE:  # else as deep as the file asks
        raise FormatError("a tensor with attributes is rebuilt from another one.")
    return call(rebuild, inner)


def _ordered_dict(args: Sequence[Any]) -> dict[str, Any]:
    """``OrderedDict()`` or ``OrderedDict([(key, value), …])``."""
    result: dict[str, Any] = {}
    pairs = args[0] if args else []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise FormatError("an OrderedDict is built from something that is not pairs.")
        put(result, pair[0], pair[1])
    return result


_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_REBUILDS: dict[str, tuple[Callable[[Sequence[Any]], Any], range]] = {
    "collections.OrderedDict": (_ordered_dict, range(0, 2)),
    "torch._utils._rebuild_tensor": (_view, range(4, 5)),
    "torch._utils._rebuild_tensor_v2": (_view, range(6, 8)),
    "torch._utils._rebuild_tensor_v3": (_view_v3, range(7, 9)),
    "torch._utils._rebuild_parameter": (_parameter, range(3, 4)),
    "torch._utils._rebuild_parameter_with_state": (_parameter, range(4, 5)),
    _FROM_TYPE: (_from_type, range(4, 5)),
}


def _names(form: str, text: str) -> frozenset[str]:
    return frozenset(form.format(name) for name in text.split())


_HARMLESS = _names(
    "{}",
    """
    torch.Size torch.device torch.serialization._get_layout collections.Counter _codecs.encode
    builtins.set builtins.bytearray builtins.complex
    __builtin__.set __builtin__.bytearray __builtin__.complex
    torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_qtensor torch._utils._rebuild_nested_tensor
    """,
)
STORAGES = _names(
    "torch.{}Storage",
    """
    Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble
    QInt8 QUInt8 QInt32 QUInt4x2 QUInt2x4 storage.Untyped
    """,
)
_DTYPES = _names(
    "torch.{}",
    """
    float64 float32 float16 bfloat16 complex128 complex64 complex32
    int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool
    float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
    qint8 quint8 qint32 quint4x2 quint2x4
    per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric
    per_channel_affine_float_qparams
    """,
)
_TENSOR_CLASSES = frozenset(
    ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
)
ALLOWED = frozenset(_REBUILDS) | _HARMLESS | STORAGES | _DTYPES | _TENSOR_CLASSES


def call(function: Any, args: Any) -> Any:
    """What the call would return.

    Raises:
        UnsafeError: the function is not in the table.
        FormatError: wrong arguments.
        LayoutError: a tensor's offset, shape or strides are not sizes.
    """
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise UnsafeError("its pickle calls what is not a known function.", fix=UNSAFE_FIX)
    if function.name in _HARMLESS:
        return Opaque(function.name)
    if function.name not in _REBUILDS:
        raise UnsafeError(
            f"its pickle calls {function.name}, which is not a function.", fix=UNSAFE_FIX
        )
    rebuild, arity = _REBUILDS[function.name]
    if len(args) not in arity:
        raise FormatError(
            f"{function.name} is called with {len(args)} arguments, expected {arity[0]} to "
            f"{arity[-1]}."
        )
    return rebuild(args)


def put(target: dict[str, Any], key: Any, value: Any) -> None:
    """Set an item; keys that are not strings become ``<type>``, for they cannot name tensors."""
    if isinstance(key, str) and key in target:
        raise FormatError(f'the key "{printable(key, 100)}" is stored twice.')
    target[key if isinstance(key, str) else f"<{type(key).__name__}>"] = value
