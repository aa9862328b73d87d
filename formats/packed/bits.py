"""Small unsigned codes as a dense bit stream, and back: the one packing that GPTQ, MLX and compressed-tensors share.

Code ``i`` of a row takes bits ``[i * bits, (i + 1) * bits)``, least significant first, in little-endian 32-bit words; codes that
do not divide 32 straddle words. Rows end on a word, the rest of the last one is zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
_WHOLE = (1, 2, 4, 8)  # bits of which a byte holds a whole number of codes


def words_for(count: int, bits: int) -> int:
    """32-bit words that ``count`` codes take."""
    return -(-count * bits // 32)


def pack(codes: Codes, bits: int) -> Words:
    """Pack rows of codes.

    Args:
        codes: uint8 ``[rows, count]``, all below ``2**bits``.
        bits: 1 to 8.

    Returns:
        uint32 ``[rows, ceil(count * bits / 32)]``.

    Raises:
        ValueError: a code needs more bits.
    """
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    rows, count = codes.shape
    stream = np.zeros((rows, 4 * words_for(count, bits)), np.uint8)
    packed = _bytes_of_whole(codes, bits) if bits in _WHOLE else _bytes_of_eights(codes, bits)
    width = min(packed.shape[1], stream.shape[1])  # what padding adds beyond the last word is zero
    stream[:, :width] = packed[:, :width]
    return stream.view(np.dtype("<u4")).astype(np.uint32, copy=False)


def unpack(words: Words, bits: int, count: int) -> Codes:
    """The first ``count`` codes of every row; the inverse of :func:`pack`.

    Args:
        words: 32-bit words of either sign ``[rows, at least ceil(count * bits / 32)]``.
        bits: 1 to 8.
        count: codes per row.

    Returns:
        uint8 ``[rows, count]``.
    """
    rows = words.shape[0]
    stream = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    stream = stream.reshape(rows, 4 * words.shape[1])
    if bits == 8:
        return stream[:, :count].copy()
    if bits in _WHOLE:
        per, mask = 8 // bits, np.uint8((1 << bits) - 1)
        out = np.empty((rows, stream.shape[1] * per), np.uint8)
        for j in range(per):
            out[:, j::per] = (stream >> np.uint8(bits * j)) & mask
        return np.ascontiguousarray(out[:, :count])
    eights = -(-count // 8)
    padded = np.zeros((rows, eights * bits), np.uint8)
    width = min(padded.shape[1], stream.shape[1])
    padded[:, :width] = stream[:, :width]
    groups = np.zeros((rows, eights), np.uint64)
    for k in range(bits):
        groups |= padded[:, k::bits].astype(np.uint64) << np.uint64(8 * k)
    out = np.empty((rows, eights * 8), np.uint8)
    mask64 = np.uint64((1 << bits) - 1)
    for j in range(8):
        out[:, j::8] = (groups >> np.uint64(bits * j)) & mask64
    return np.ascontiguousarray(out[:, :count])


def _padded(codes: Codes, multiple: int) -> Codes:
    rest = -codes.shape[1] % multiple
    return np.pad(codes, ((0, 0), (0, rest))) if rest else codes


def _bytes_of_whole(codes: Codes, bits: int) -> Codes:
    per = 8 // bits
    codes = _padded(codes, per)
    out = codes[:, 0::per].copy()
    for j in range(1, per):
        out |= codes[:, j::per] << np.uint8(bits * j)
    return out


def _bytes_of_eights(codes: Codes, bits: int) -> Codes:
    """Eight codes make ``bits`` bytes."""
    codes = _padded(codes, 8)
    groups = np.zeros((len(codes), codes.shape[1] // 8), np.uint64)
    for j in range(8):
        groups |= codes[:, j::8].astype(np.uint64) << np.uint64(bits * j)
    out = np.empty((len(codes), groups.shape[1] * bits), np.uint8)
    for k in range(bits):
        out[:, k::bits] = (groups >> np.uint64(8 * k)) & np.uint64(0xFF)
    return out
