r"""What makes two checkpoints the same: hashes of weights, whatever file format holds them.

A tensor's digest is the sha256 of its canonical bytes: little-endian, row-major, no padding. Its leaf binds name,
dtype, shape and digest::

    leaf = sha256("g2kit tensor v1\0" + string(name) + string(dtype) + u64(ndim) + u64(dim)… + digest)
    string(s) = u64(bytes of s) + s in UTF-8          u64 = 8 bytes, little-endian

The fingerprint is the Merkle tree hash of RFC 6962 section 2.1 over the leaves, ordered by name (Unicode code
points): ``sha256(0x00 + leaf)`` at the bottom, ``sha256(0x01 + left + right)`` above, the left side holding the
largest power of two that is smaller than the number of leaves; of no leaves at all, ``sha256("")``.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from .base import Array
from .dtypes import short
from .errors import DtypeError, ShapeError

PREFIX = "g2:sha256:"
_DOMAIN = b"g2kit tensor v1\0"
_BLOCK = 64 << 20  # bytes made contiguous at a time


class TensorHasher:
    """sha256 of one tensor's canonical bytes, from pieces in row-major order.

    Args:
        name: canonical name, for messages and the leaf.
        dtype: element type of the whole tensor.
        shape: of the whole tensor.
    """

    def __init__(self, name: str, dtype: np.dtype, shape: Sequence[int]) -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        self.shape = tuple(int(n) for n in shape)
        self._short = short(self.dtype)
        self._left = math.prod(self.shape)
        self._hash = hashlib.sha256()

    def update(self, array: Array) -> None:
        """Take the next elements; any shape, C order counts.

        Raises:
            DtypeError: not the tensor's dtype (byte order aside).
            ShapeError: more elements than the shape has.
        """
        little = self.dtype.newbyteorder("<")
        if array.dtype.newbyteorder("<") != little:
            raise DtypeError(f"expected {self.dtype}, got {array.dtype}.", tensor=self.name)
        if array.size > self._left:
            raise ShapeError(
                f"{array.size} elements given, shape {self.shape} has {self._left} left.",
                tensor=self.name,
            )
        self._left -= array.size
        for part in _contiguous(array):
            canonical = part if part.dtype == little else part.astype(little)
            # reshape before view: a 0-d array has no axis to reinterpret as bytes
            self._hash.update(canonical.reshape(-1).view(np.uint8).data)

    def fork(self) -> TensorHasher:
        """A copy that has taken the same elements so far."""
        other = TensorHasher(self.name, self.dtype, self.shape)
        other._left, other._hash = self._left, self._hash.copy()
        return other

    def hexdigest(self) -> str:
        """sha256 of the bytes, in hex.

        Raises:
            ShapeError: elements are missing.
        """
        if self._left:
            raise ShapeError(
                f"{self._left} elements of shape {self.shape} are missing.", tensor=self.name
            )
        return self._hash.hexdigest()

    def leaf(self) -> str:
        """The tensor's leaf, in hex; see :func:`leaf`."""
        return leaf(self.name, self._short, self.shape, self.hexdigest())


def _contiguous(array: Array) -> list[Array]:
    """The array in C order, copied piecewise where it must be copied."""
    if array.flags.c_contiguous or array.ndim == 0:
        return [np.ascontiguousarray(array)]
    rows = max(1, _BLOCK * len(array) // max(array.nbytes, 1))
    return [np.ascontiguousarray(array[k : k + rows]) for k in range(0, len(array), rows)]


def tensor_digest(name: str, array: Array) -> str:
    """sha256 in hex of a whole array's canonical bytes."""
    hasher = TensorHasher(name, array.dtype, array.shape)
    hasher.update(array)
    return hasher.hexdigest()


def leaf(name: str, dtype: str, shape: Sequence[int], sha256: str) -> str:
    """A tensor's leaf in hex, as the module's docstring defines it.

    Args:
        name: canonical name.
        dtype: g2kit's short name, such as ``bf16``.
        shape: of the tensor.
        sha256: of its bytes, in hex.
    """
    parts = [_DOMAIN, _string(name), _string(dtype), struct.pack("<Q", len(shape))]
    parts += [struct.pack("<Q", n) for n in shape]
    return hashlib.sha256(b"".join(parts) + bytes.fromhex(sha256)).hexdigest()


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def merkle_root(leaves: Mapping[str, str]) -> str:
    """Root in hex over leaves in hex by name; the mapping's order does not matter."""
    nodes = [bytes.fromhex(leaves[name]) for name in sorted(leaves)]
    return _tree(nodes).hex()


def _tree(leaves: Sequence[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = _tree(leaves[:split]), _tree(leaves[split:])
    return hashlib.sha256(b"\1" + left + right).digest()


def fingerprint(leaves: Mapping[str, str]) -> str:
    """The checkpoint's fingerprint, ``g2:sha256:<64 hex digits>``."""
    return PREFIX + merkle_root(leaves)
