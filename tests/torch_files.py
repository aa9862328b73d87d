"""PyTorch archives put together by hand, opcode by opcode, so that tests can write what torch never would."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

FLOAT = "FloatStorage"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def plain(value: object) -> bytes:
    """Opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def table(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


ORDERED_DICT = call(glob("collections", "OrderedDict"))


def storage(key="0", count=6, kind=FLOAT, location="cpu", module="torch") -> bytes:
    pid = (text("storage"), glob(module, kind), text(key), text(location), plain(count))
    return tup(*pid) + b"Q"


def tensor(of=None, offset=0, shape=(2, 3), strides=(3, 1), rebuild="_rebuild_tensor_v2") -> bytes:
    return call(
        glob("torch._utils", rebuild),
        storage() if of is None else of,
        plain(offset),
        plain(shape),
        plain(strides),
        plain(False),
        ORDERED_DICT,
    )


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def archive(
    tree: bytes,
    records: Mapping[str, bytes],
    *,
    folder: str = "archive",
    order: str | None = "little",
    method: Mapping[str, int] | None = None,
    streamed: bool = False,
) -> bytes:
    """A zip archive as torch writes it, around a pickle.

    Args:
        tree: the whole of ``data.pkl``.
        records: storages by key.
        folder: of all records.
        order: content of ``byteorder``, or None for none.
        method: zip compression by record name.
        streamed: with data descriptors behind the data, as torch writes it.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(_Unseekable(out) if streamed else out, "w", zipfile.ZIP_STORED) as z:

        def write(name: str, data: bytes) -> None:
            kind = (method or {}).get(name, zipfile.ZIP_STORED)
            z.writestr(zipfile.ZipInfo(f"{folder}/{name}"), data, kind)

        write("data.pkl", tree)
        if order is not None:
            write("byteorder", order.encode())
        for key, data in records.items():
            write(f"data/{key}", data)
        write("version", b"3\n")
    return out.getvalue()


class _Unseekable(io.RawIOBase):
    """Makes zipfile write what it writes to a pipe."""

    def __init__(self, out: io.BytesIO) -> None:
        self.out = out

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self.out.write(data)


def save(path: Path, items: Mapping[str, bytes], records: Mapping[str, bytes], **options) -> Path:
    """A bare state dict of tensors given as opcodes."""
    path.write_bytes(archive(pickled(table(items)), records, **options))
    return path
