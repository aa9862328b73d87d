"""fingerprint.py against a second implementation written from its docstring and RFC 6962."""

import itertools
import subprocess
import sys
from hashlib import sha256

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2kit.formats import dtypes
from g2kit.formats.errors import DtypeError, ShapeError
from g2kit.formats.fingerprint import (
    TensorHasher,
    fingerprint,
    leaf,
    merkle_root,
    tensor_digest,
)

from .plan_writer import random_array

KNOWN = "g2:sha256:8768110e858265c800e3c21cb895db7a4a4eea63e95309ff3b8b1165a1b530d9"
DTYPES = [row.dtype for row in dtypes.TABLE]


def u64(n: int) -> bytes:
    return n.to_bytes(8, "little")


def leaf_again(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    text = [u64(len(s.encode())) + s.encode() for s in (name, dtype)]
    dims = u64(len(shape)) + b"".join(map(u64, shape))
    return sha256(
        b"g2kit tensor v1\x00" + text[0] + text[1] + dims + sha256(data).digest()
    ).digest()


def root_again(leaves: list[bytes]) -> bytes:
    """RFC 6962 from the bottom up: pair level by level, the odd one out rises unpaired."""
    if not leaves:
        return sha256().digest()
    level = [sha256(b"\x00" + x).digest() for x in leaves]
    while len(level) > 1:
        pairs = [level[k : k + 2] for k in range(0, len(level), 2)]
        level = [sha256(b"\x01" + p[0] + p[1]).digest() if len(p) == 2 else p[0] for p in pairs]
    return level[0]


hex64 = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.dictionaries(st.text(), hex64, max_size=40), st.randoms(use_true_random=False))
def test_the_root_is_that_of_rfc_6962_in_name_order(leaves, rng):
    want = root_again([bytes.fromhex(leaves[n]) for n in sorted(leaves)]).hex()
    names = list(leaves)
    rng.shuffle(names)
    assert merkle_root({n: leaves[n] for n in names}) == want
    assert fingerprint(leaves) == f"g2:sha256:{want}"


def test_the_root_of_the_rfc_test_vectors():
    """Certificate Transparency's reference tree (google/certificate-transparency, merkle tree tests)."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    }
    for n, want in roots.items():
        assert merkle_root({str(k): x for k, x in enumerate(inputs[:n])}) == want


@given(st.dictionaries(st.text(), hex64, min_size=1, max_size=12), st.data())
def test_any_change_changes_the_root(leaves, data):
    root = merkle_root(leaves)
    name = data.draw(st.sampled_from(sorted(leaves)))
    bit = data.draw(st.integers(0, 255))
    flipped = (int(leaves[name], 16) ^ (1 << bit)).to_bytes(32, "big").hex()
    assert merkle_root({**leaves, name: flipped}) != root
    assert merkle_root({n: x for n, x in leaves.items() if n != name}) != root


@pytest.mark.parametrize("dtype", DTYPES, ids=dtypes.short)
def test_a_leaf_binds_everything(dtype):
    array = random_array(3, dtype, (3, 4))
    hasher = TensorHasher("a.w", dtype, (3, 4))
    hasher.update(array)
    short = dtypes.short(dtype)
    assert hasher.leaf() == leaf_again("a.w", short, (3, 4), array.tobytes()).hex()
    digest = hasher.hexdigest()
    assert digest == sha256(array.tobytes()).hexdigest() == tensor_digest("a.w", array)
    others = {
        leaf("a.x", short, (3, 4), digest),
        leaf("a.w", "other", (3, 4), digest),
        leaf("a.w", short, (4, 3), digest),
        leaf("a.w", short, (12,), digest),
        leaf("a.w", short, (3, 4, 1), digest),
        leaf("a.w", short, (3, 4), sha256(b"").hexdigest()),
    }
    assert len(others) == 6
    assert hasher.leaf() not in others


def test_fields_cannot_run_into_each_other():
    digest = sha256(b"").hexdigest()
    assert leaf("ab", "c", (), digest) != leaf("a", "bc", (), digest)
    assert leaf("a", "f32", (1, 2), digest) != leaf("a", "f32", (1,), digest)


@given(
    st.lists(st.integers(0, 5), max_size=3), st.lists(st.integers(0, 200), max_size=4), st.data()
)
def test_pieces_give_the_digest_of_the_whole(shape, cuts, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    array = random_array(1, dtype, tuple(shape))
    flat = array.reshape(-1)
    edges = sorted({0, len(flat), *(c % (len(flat) + 1) for c in cuts)})
    hasher = TensorHasher("t", dtype, shape)
    for a, b in itertools.pairwise(edges):
        hasher.update(flat[a:b])
    assert hasher.hexdigest() == sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("block", [1, 100, 64 << 20])
def test_memory_order_and_byte_order_do_not_matter(monkeypatch, block):
    monkeypatch.setattr("g2kit.formats.fingerprint._BLOCK", block)
    array = random_array(5, np.dtype("<f4"), (6, 7, 5))
    want = tensor_digest("t", array)
    assert tensor_digest("t", np.asfortranarray(array)) == want
    assert tensor_digest("t", np.ascontiguousarray(array.T).T) == want
    assert tensor_digest("t", array[::-1][::-1]) == want
    hasher = TensorHasher("t", np.dtype("<f4"), array.shape)
    hasher.update(array.astype(">f4"))
    assert hasher.hexdigest() == want
    assert tensor_digest("t", array[::2, 1:]) == sha256(array[::2, 1:].tobytes()).hexdigest()


def test_every_bit_counts_nan_payloads_and_signed_zeros_too():
    array = np.zeros(4, ml_dtypes.bfloat16)
    seen = {tensor_digest("t", array)}
    for bit in range(64):
        raw = array.view(np.uint8).copy()
        raw[bit // 8] ^= 1 << bit % 8
        seen.add(tensor_digest("t", raw.view(ml_dtypes.bfloat16)))
    assert len(seen) == 65


def test_what_does_not_fit_is_refused():
    hasher = TensorHasher("blk.w", np.dtype("f4"), (2, 3))
    with pytest.raises(DtypeError, match=r"blk\.w: expected float32, got int32"):
        hasher.update(np.zeros(6, np.int32))
    hasher.update(np.zeros(4, np.float32))
    with pytest.raises(ShapeError, match=r"blk\.w: 2 elements of shape \(2, 3\) are missing"):
        hasher.hexdigest()
    with pytest.raises(ShapeError, match=r"3 elements given, shape \(2, 3\) has 2 left"):
        hasher.update(np.zeros(3, np.float32))
    hasher.update(np.zeros(2, np.float32))
    assert hasher.hexdigest() == sha256(bytes(24)).hexdigest()
    with pytest.raises(DtypeError, match="dtype object is not supported"):
        TensorHasher("t", np.dtype(object), (1,))


def test_hashing_needs_no_second_copy():
    """A contiguous array is hashed in place: peak memory does not grow by its size."""
    code = (
        "import numpy as np\n"
        "from g2kit.formats.fingerprint import tensor_digest\n"
        "from g2kit.machine import peak_rss\n"
        "a = np.ones(64 << 20, np.uint8)\n"
        "tensor_digest('x', a[:9])\n"
        "before = peak_rss()\n"
        "tensor_digest('t', a)\n"
        "print(peak_rss() - before)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 16  # MiB


def test_a_known_fingerprint_stays():
    """The definition is public: a changed value here breaks every manifest in the world."""
    arrays = {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.float32(1).reshape(())}
    leaves = {n: leaf(n, "f32", a.shape, tensor_digest(n, a)) for n, a in arrays.items()}
    plain = root_again([leaf_again(n, "f32", a.shape, a.tobytes()) for n, a in arrays.items()])
    assert fingerprint(leaves) == "g2:sha256:" + plain.hex() == KNOWN
