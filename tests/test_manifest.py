"""manifest.py: deterministic, complete, and believed only when every byte agrees."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats import manifest as mf
from g2kit.formats.errors import ChecksumError, FileIOError, FormatError, G2Error, InputError
from g2kit.formats.fingerprint import fingerprint, leaf

from .fault_fs import Unsynced
from .output_case import Case

A, B = "a" * 64, "b" * 64
FULL = mf.Manifest(
    tool_version="0.1.0",
    format="gguf",
    layout="gguf",
    dtype="mixed",
    source_fingerprint="g2:sha256:" + A,
    tensors={
        "model.norm.weight": mf.TensorEntry("bf16", (64,), A),
        "model.embed_tokens.weight": mf.TensorEntry("f32", (512, 64), B),
    },
    files={"b/c.bin": mf.FileEntry(0, A), "a.bin": mf.FileEntry(1 << 40, B)},
    lossy=(mf.LossyStep("norm + 1", {"model.norm.weight": 3}), mf.LossyStep("to f16", {})),
    padding_rows={"model.embed_tokens.weight": 128},
    notes=("Größe “x”\n", "second"),
    config={"hidden_size": 64},
    gating="fd",
)


def write(path: Path, doc: dict) -> Path:
    """A manifest whose self-hash is right, whatever it says."""
    doc = {k: v for k, v in doc.items() if k != "self_sha256"}
    doc["self_sha256"] = mf._self_hash(doc)
    path.write_text(json.dumps(doc))
    return path


def test_round_trip_and_same_bytes(tmp_path):
    path = tmp_path / mf.NAME
    path.write_bytes(FULL.dumps())
    assert mf.load(path) == FULL
    assert mf.load(path).dumps() == FULL.dumps()
    turned = dataclasses.replace(
        FULL,
        tensors=dict(reversed(FULL.tensors.items())),
        files=dict(reversed(FULL.files.items())),
    )
    assert turned.dumps() == FULL.dumps()


def test_manifests_of_the_first_version_are_read(tmp_path):
    old = {k: v for k, v in json.loads(FULL.dumps()).items() if k not in ("config", "gating")}
    found = mf.load(write(tmp_path / mf.NAME, old))
    assert found == dataclasses.replace(FULL, config=None, gating=None)


def test_the_manifest_of_a_part(made, tmp_path):
    out, manifest = made
    at = out / mf.NAME
    assert [mf.covering(p) for p in (out, out / "a.bin", out / "sub", out / "sub/grid")] == [at] * 4
    (out / "other").touch()
    assert mf.covering(out / "other") is None
    assert mf.covering(tmp_path) is None
    assert mf.describes(at, manifest, out)
    (out / "a.bin").write_bytes(b"another model's")
    assert not mf.describes(at, manifest, out)


def test_what_the_file_says():
    doc = json.loads(FULL.dumps())
    assert doc["schema"] == "g2kit.manifest"
    assert doc["version"] == 1
    assert doc["fingerprint"] == fingerprint(
        {n: leaf(n, t.dtype, t.shape, t.sha256) for n, t in FULL.tensors.items()}
    )
    assert doc["fingerprint"] == FULL.fingerprint
    assert doc["tensors"]["model.norm.weight"] == {"dtype": "bf16", "shape": [64], "sha256": A}
    assert doc["files"]["a.bin"] == {"size": 1 << 40, "sha256": B}
    assert doc["lossy"][0] == {"name": "norm + 1", "counts": {"model.norm.weight": 3}}
    assert doc["padding_rows"] == {"model.embed_tokens.weight": 128}
    assert list(doc) == sorted(doc)


def json_equal(data: bytes) -> bool:
    try:
        return json.loads(data) == json.loads(FULL.dumps())
    except ValueError:
        return False


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_is_believed(tmp_path_factory, at, flip):
    data = bytearray(FULL.dumps())
    data[at % len(data)] ^= flip
    path = tmp_path_factory.mktemp("m") / mf.NAME
    path.write_bytes(data)
    if json_equal(data):  # white space outside of strings
        assert mf.load(path) == FULL
        return
    with pytest.raises(InputError, match=mf.NAME):
        mf.load(path)


@settings(max_examples=60)
@given(st.integers(0, 10**6))
def test_no_torn_manifest_is_believed(tmp_path_factory, at):
    data = FULL.dumps()
    path = tmp_path_factory.mktemp("m") / mf.NAME
    path.write_bytes(data[: at % (len(data) - 2)])
    with pytest.raises(FormatError, match="manifest"):
        mf.load(path)


def changed(**changes) -> dict:
    return json.loads(FULL.dumps()) | changes


TENSOR = {"dtype": "bf16", "shape": [64], "sha256": A}


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        ({}, "not a g2kit manifest"),
        (changed(schema="other"), "not a g2kit manifest"),
        (changed(version=2), "version 2; this g2kit reads version 1.*newer g2kit"),
        (changed(version=True), "version must be a whole number"),
        (changed(extra=1), "missing or unknown keys: extra"),
        ({k: v for k, v in changed().items() if k != "notes"}, "missing or unknown keys: notes"),
        (changed(format=1), "format must be a string"),
        (changed(notes="x"), "notes must be an array"),
        (changed(notes=[1]), "notes must be a string"),
        (changed(config=[]), "config must be an object"),
        (changed(gating="xy"), "gating must be df, fd or null"),
        (changed(tensors=[]), "tensors must be an object"),
        (changed(tensors={"a": 1}), r"tensors\.a must be an object"),
        (changed(tensors={"a": {}}), r"tensors\.a must be an object with dtype, sha256, shape"),
        (changed(tensors={"a": TENSOR | {"shape": [-1]}}), "a whole number, not negative"),
        (changed(tensors={"a": TENSOR | {"shape": [1 << 63]}}), "a whole number"),
        (changed(tensors={"a": TENSOR | {"shape": [1.5]}}), "a whole number"),
        (changed(tensors={"a": TENSOR | {"sha256": "A" * 64}}), "64 lower-case hex digits"),
        (changed(tensors={"a": TENSOR | {"sha256": "a" * 63}}), "64 lower-case hex digits"),
        (changed(files={"a": {"size": 1}}), r"files\.a must be an object with sha256, size"),
        (changed(files={"a": {"size": -1, "sha256": A}}), "not negative"),
        (changed(source_fingerprint="x"), "source_fingerprint must be a fingerprint"),
        (changed(lossy=[{"name": "x"}]), "lossy must be an object with counts, name"),
        (changed(padding_rows={"a": "1"}), r"padding_rows\.a must be a whole number"),
    ],
)
def test_a_wrong_document_is_refused(tmp_path, doc, message):
    path = write(tmp_path / mf.NAME, doc)
    with pytest.raises(FormatError, match=message) as e:
        mf.load(path)
    assert str(path) in str(e.value)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "", "a//b", "C:x", "a\nb"])
def test_file_names_stay_inside(tmp_path, name):
    path = write(tmp_path / mf.NAME, changed(files={name: {"size": 0, "sha256": A}}))
    with pytest.raises(G2Error, match="file name") as e:
        mf.load(path)
    assert e.value.code == "E_PATH"


def test_hashes_that_do_not_fit(tmp_path):
    path = tmp_path / mf.NAME
    path.write_text(json.dumps(changed(dtype="f32")))
    with pytest.raises(ChecksumError, match=r"self_sha256 is .*, its content gives"):
        mf.load(path)
    write(path, changed(fingerprint="g2:sha256:" + A))
    with pytest.raises(ChecksumError, match=f"fingerprint is g2:sha256:{A}, its content gives"):
        mf.load(path)


def test_not_json_at_all(tmp_path):
    path = tmp_path / mf.NAME
    for data in (b"", b"[]", b"null", b"{", b"\xff", b'{"a":1,"a":2}'):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            mf.load(path)
    with pytest.raises(FileIOError):
        mf.load(tmp_path / "absent")


# ---- comparing files


@pytest.fixture
def made(tmp_path) -> tuple[Path, mf.Manifest]:
    Case().run(tmp_path / "out", fs=Unsynced())
    return tmp_path / "out", mf.load(tmp_path / "out" / mf.NAME)


def test_files_as_written_pass(made):
    out, manifest = made
    seen: list[int] = []
    mf.check_files(out, manifest, seen.append)
    assert sum(seen) == sum(f.size for f in manifest.files.values())


def test_every_bit_of_every_file_counts(made):
    out, manifest = made
    for name, entry in manifest.files.items():
        data = (out / name).read_bytes()
        for at in {0, entry.size // 2, entry.size - 1} if data else ():
            for bit in (1, 128):
                bad = bytearray(data)
                bad[at] ^= bit
                (out / name).write_bytes(bad)
                with pytest.raises(ChecksumError, match=rf"1 differences .*: {name} has sha256"):
                    mf.check_files(out, manifest)
        (out / name).write_bytes(data)
    mf.check_files(out, manifest)


def test_all_differences_are_listed_at_once(made):
    out, manifest = made
    (out / "a.bin").unlink()
    (out / "d.bin").write_bytes(b"short")
    (out / "config.json").write_bytes(b'{"a": 2}\n')
    (out / "sub/more").write_text("")
    (out / "link").symlink_to("nowhere")
    with pytest.raises(ChecksumError) as e:
        mf.check_files(out, manifest)
    said = str(e.value)
    assert "5 differences" in said
    for part in (
        "a.bin is missing",
        "d.bin has 5 bytes, expected 304",
        "config.json has sha256",
        "sub/more is not in the manifest",
        "link is not in the manifest",
    ):
        assert part in said
    assert (e.value.code, e.value.exit_code) == ("E_CHECKSUM", 3)


def test_a_long_list_is_cut(made):
    out, manifest = made
    for k in range(30):
        (out / f"x{k}").touch()
    (out / "a.bin").unlink()
    with pytest.raises(ChecksumError, match=r"31 differences .*a\.bin is missing.* and 11 more"):
        mf.check_files(out, manifest)


def test_files_added_later_are_no_fault(made):
    out, manifest = made
    assert mf.check_files(out, manifest) == []
    (out / "README.md").touch()
    (out / "sub/.gitattributes").touch()
    assert mf.check_files(out, manifest) == ["README.md", "sub/.gitattributes"]


def test_a_single_file(tmp_path):
    dst = tmp_path / "model.gguf"
    Case(single=True).run(dst, fs=Unsynced())
    manifest = mf.load(mf.path_for(dst))
    (tmp_path / "unrelated").touch()
    mf.check_files(dst, manifest)
    renamed = dst.rename(tmp_path / "other.gguf")
    assert mf.check_files(renamed, manifest) == []  # told by its bytes
    with pytest.raises(ChecksumError, match=r"1 differences .* model\.gguf is missing"):
        mf.check_files(dst, manifest)


def test_odd_things_in_the_place_of_files_do_not_hang(made):
    out, manifest = made
    (out / "d.bin").unlink()
    os.mkfifo(out / "d.bin")
    with pytest.raises(FileIOError, match="not a regular file"):
        mf.check_files(out, manifest)
    (out / "d.bin").unlink()
    (out / "d.bin").mkdir()
    with pytest.raises(ChecksumError, match=r"d\.bin is missing"):
        mf.check_files(out, manifest)
