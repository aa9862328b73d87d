"""What a torch pickle describes, without running it.

A pickle is a program; ``torch.load`` runs it, and even its restricted loader was bypassed twice (CVE-2025-32434,
CVE-2026-24747). This interpreter cannot import or call anything: it knows the opcodes that data needs and a table of
globals by name, and builds plain dicts, lists, tuples and descriptions of tensors. Any other global ends it with an
error that names the global. Sources: Lib/pickletools.py; torch/_weights_only_unpickler.py; torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import FormatError, G2Error, LimitError, UnsafeError, printable
from .torch_globals import (
    ALLOWED,
    STORAGES,
    UNSAFE_FIX,
    Global,
    Opaque,
    Storage,
    TensorView,
    call,
    is_size,
    put,
)

MAX_PICKLE = 16 << 20  # bytes
MAX_STEPS = 2_000_000  # 60,000 tensors in one file
_MAX_INT_BYTES = 32


def load(data: bytes, where: str | Path) -> Any:
    """The value a pickle describes: dict, list, tuple, str, bytes, numbers, :class:`TensorView`, :class:`Opaque`.

    Keys of dicts that are not strings become ``<type>``: only strings can name tensors.

    Args:
        data: the whole of ``data.pkl``.
        where: for messages.

    Raises:
        UnsafeError: it mentions a global outside of the table; nothing was executed.
        LayoutError: a tensor's offset, shape or strides are not sizes.
        LimitError: more steps or bytes than any checkpoint needs.
        FormatError: not a pickle, or it ends early or late.
    """
    value, end = load_prefix(data, where)
    if end != len(data):
        raise FormatError(f"{len(data) - end} bytes follow the end of the pickle.", where=where)
    return value


def load_prefix(data: bytes, where: str | Path, start: int = 0) -> tuple[Any, int]:
    """Like :func:`load` for a pickle that begins at ``start`` and may be followed by more; also returns its end."""
    if len(data) > MAX_PICKLE:
        raise LimitError(
            f"the pickle has {len(data)} bytes, at most {MAX_PICKLE} are read.", where=where
        )
    machine = _Machine(data, start)
    try:
        return machine.run(), machine.at
    except G2Error as e:
        e.where = str(where)
        raise


# ---------------------------------------------------------------- the machine

_STOP, _MARK = 0x2E, object()
_CONSTANTS = {b"N"[0]: None, 0x88: True, 0x89: False, b")"[0]: ()}
_INTEGERS = {b"K"[0]: "<B", b"M"[0]: "<H", b"J"[0]: "<i", b"G"[0]: ">d"}
_LENGTHS = {  # opcode -> width of the length, is it text
    b"X"[0]: (4, True), 0x8C: (1, True), 0x8D: (8, True),
    b"U"[0]: (1, False), b"T"[0]: (4, False), b"B"[0]: (4, False), b"C"[0]: (1, False), 0x8E: (8, False),
}  # fmt: skip


class _Machine:
    """The pickle virtual machine with nothing in it that could act."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.at = start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            op = self.take(1)[0]
            if op == _STOP:
                if len(self.stack) != 1 or self.stack[0] is _MARK:
                    raise FormatError(f"the pickle ends with {len(self.stack)} values, not one.")
                return self.stack[0]
            if op in _CONSTANTS:
                self.stack.append(_CONSTANTS[op])
            elif op in _INTEGERS:
                self.stack.append(self.number(_INTEGERS[op]))
            elif op in _LENGTHS:
                self.stack.append(self.string(*_LENGTHS[op]))
            elif op in _OPERATIONS:
                _OPERATIONS[op](self)
            else:
                raise FormatError(f"0x{op:02x} at byte {self.at - 1} is not a pickle opcode.")
        raise LimitError(f"the pickle has more than {MAX_STEPS} steps.")

    # operands

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) != size:
            raise FormatError(f"the pickle ends at byte {len(self.data)}, inside a value.")
        self.at += size
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, width: int, text: bool) -> str | bytes:
        raw = self.take(int.from_bytes(self.take(width), "little"))
        if not text:
            return raw
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(f"a string before byte {self.at} is not UTF-8.") from e

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise FormatError(f"the pickle ends at byte {len(self.data)}, inside a name.")
        raw, self.at = self.data[self.at : end], end + 1
        return raw.decode("utf-8", "backslashreplace")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise FormatError(f"the pickle takes a value that is not there, at byte {self.at}.")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise FormatError(f"the pickle takes a mark that is not there, at byte {self.at}.")

    # operations

    def long(self, width: int) -> None:
        size = int.from_bytes(self.take(width), "little")
        if size > _MAX_INT_BYTES:
            raise LimitError(f"an integer of {size} bytes, at most {_MAX_INT_BYTES} are read.")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1] if self.stack else self.pop()

    def recall(self, form: str) -> None:
        key = self.number(form)
        if key not in self.memo:
            raise FormatError(f"the pickle recalls value {key}, which it did not store.")
        self.stack.append(self.memo[key])

    def tuple(self, size: int) -> None:
        items = [self.pop() for _ in range(size)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        target = self.pop()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise FormatError(f"the pickle appends to a {type(target).__name__}.")
        self.stack.append(target)

    def update(self, items: list[Any]) -> None:
        target = self.pop()
        if len(items) % 2 or not isinstance(target, dict | Opaque):
            raise FormatError(f"the pickle sets items of a {type(target).__name__}.")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                put(target, key, value)
        self.stack.append(target)

    def frozenset(self) -> None:
        self.pop_mark()
        self.stack.append(Opaque("frozenset"))

    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafeError("its pickle names a global by what is no name.", fix=UNSAFE_FIX)
        full = f"{module[:200]}.{name[:200]}"
        if full not in ALLOWED:
            raise UnsafeError(
                f"its pickle uses {printable(full)}, which is not part of any checkpoint; "
                "nothing was executed.",
                fix=UNSAFE_FIX,
            )
        self.stack.append(Global(full))

    def reduce(self) -> None:
        args = self.pop()
        self.stack.append(call(self.pop(), args))

    def build(self) -> None:
        self.pop()  # attributes, such as a state dict's _metadata: no use for them
        if not self.stack or not isinstance(self.stack[-1], dict | TensorView | Opaque):
            raise UnsafeError("its pickle sets attributes of a function or class.", fix=UNSAFE_FIX)

    def persistent(self) -> None:
        pid = self.pop()
        # six in the format before torch 1.6, which is only looked at to see whether it is hostile
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("a persistent id is not a storage.")
        _, kind, key, location, count = pid[:5]
        if not isinstance(kind, Global) or kind.name not in STORAGES:
            raise FormatError("a storage's type is not a torch storage.")
        if not isinstance(key, str) or not isinstance(location, str) or not is_size(count):
            raise FormatError("a storage needs a key, a location and a size.")
        self.stack.append(Storage(kind.name.rpartition(".")[2], key, location, count))

    def refuse(self, what: str) -> None:
        raise UnsafeError(
            f"its pickle uses {printable(what, 100)}; nothing was executed.", fix=UNSAFE_FIX
        )


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: _discard(m.take(1)),  # PROTO
    0x95: lambda m: _discard(m.take(8)),  # FRAME
    b"("[0]: lambda m: m.stack.append(_MARK),
    b"}"[0]: lambda m: m.stack.append({}),
    b"]"[0]: lambda m: m.stack.append([]),
    0x8F: lambda m: m.stack.append(Opaque("set")),
    0x8A: lambda m: m.long(1),
    0x8B: lambda m: m.long(4),
    b"q"[0]: lambda m: m.remember(m.number("<B")),
    b"r"[0]: lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    b"h"[0]: lambda m: m.recall("<B"),
    b"j"[0]: lambda m: m.recall("<I"),
    b"t"[0]: lambda m: m.stack.append(tuple(m.pop_mark())),
    0x85: lambda m: m.tuple(1),
    0x86: lambda m: m.tuple(2),
    0x87: lambda m: m.tuple(3),
    b"a"[0]: lambda m: m.extend([m.pop()]),
    b"e"[0]: lambda m: m.extend(m.pop_mark()),
    0x90: lambda m: m.extend(m.pop_mark()),  # ADDITEMS
    0x91: lambda m: m.frozenset(),
    b"s"[0]: lambda m: m.update([m.pop(), m.pop()][::-1]),
    b"u"[0]: lambda m: m.update(m.pop_mark()),
    b"0"[0]: lambda m: _discard(m.pop()),
    b"1"[0]: lambda m: _discard(m.pop_mark()),
    b"c"[0]: lambda m: m.push_global(m.line(), m.line()),
    0x93: lambda m: m.push_global(*[m.pop(), m.pop()][::-1]),
    b"i"[0]: lambda m: m.refuse(f"INST, which creates a {m.line()}.{m.line()}"),
    b"R"[0]: _Machine.reduce,
    0x81: _Machine.reduce,  # NEWOBJ
    b"b"[0]: _Machine.build,
    b"Q"[0]: _Machine.persistent,
    b"o"[0]: lambda m: m.refuse("OBJ, which creates any class"),
    0x92: lambda m: m.refuse("NEWOBJ_EX, which creates any class"),
    0x82: lambda m: m.refuse("the copyreg extension registry"),
    0x83: lambda m: m.refuse("the copyreg extension registry"),
    0x84: lambda m: m.refuse("the copyreg extension registry"),
}


def _discard(_: object) -> None:
    """An operand that says nothing about the value."""
