"""A recording that was changed, cut, made by something else or by a later version is an error, never a PASS."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording_case import Arrays, few_probes, first_version, make, resigned, sample

from g2kit.formats.errors import (
    ChecksumError,
    ConfigError,
    DtypeError,
    ExtraTensorError,
    FileIOError,
    FormatError,
    G2Error,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TokenizerError,
    TruncatedError,
)
from g2kit.model.sample import sample_dir
from g2kit.verify import recording_schema as schema
from g2kit.verify.compare import compare, record_model
from g2kit.verify.recording import compare_recording, compare_recordings, open_recording
from g2kit.verify.runners import open_runner
from g2kit.verify.views import changed, edited

pytest.importorskip("torch")
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "rec", with_embedding=True)


def put(*path: str | int, value: Any) -> Edit:
    """Set a field of the document."""

    def edit(doc: dict[str, Any]) -> None:
        at: Any = doc
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return edit


def drop(*path: str) -> Edit:
    """Remove one."""

    def edit(doc: dict[str, Any]) -> None:
        at: Any = doc
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return edit


def test_resigning_alone_changes_nothing(good: Path, tmp_path: Path) -> None:
    with open_recording(resigned(good, tmp_path / "r")) as r, open_recording(good) as own:
        assert r.probes.sha256 == own.probes.sha256
        assert np.array_equal(r.array("lse", 2), own.array("lse", 2))


# every one of these with right hashes, as another program could write it
DOCUMENTS: dict[str, tuple[Edit, type[G2Error], str]] = {
    "future": (put("schema", value="g2kit.recording/3"), FormatError, "g2kit.recording/3; this g2kit reads .*/1 and .*/2.*newer"),
    "past": (put("schema", value="g2kit.recording/0"), FormatError, "schema g2kit.recording/0"),
    "foreign": (put("schema", value="g2kit.report/1"), FormatError, "not a g2kit recording.*g2verify record"),
    "no schema": (drop("schema"), FormatError, "not a g2kit recording"),
    "number as schema": (put("schema", value=1), FormatError, "not a g2kit recording"),
    "missing key": (drop("floor"), FormatError, "missing or unknown keys: floor"),
    "unknown key": (put("extra", value=1), FormatError, "missing or unknown keys: extra"),
    "kind": (put("kind", value="pickle"), FormatError, "kind must be one of hidden, top-k"),
    "dtype": (put("runner", "dtype", value="float16"), FormatError, "runner.dtype must be one of"),
    "runner": (put("runner", value=[]), FormatError, "runner must be an object"),
    "run": (put("run", value=1), FormatError, "run must be an object"),
    "config key": (drop("model", "config", "head_dim"), FormatError, "model.config must be an object with"),
    "config text": (put("model", "config", "rope_theta", value="10"), FormatError, "model.config.rope_theta must be a number"),
    "config negative": (put("model", "config", "vocab_size", value=-1), FormatError, "model.config.vocab_size must be"),
    "config huge": (put("model", "config", "vocab_size", value=1 << 50), FormatError, "model.config.vocab_size must be"),
    "config wrong": (put("model", "config", "head_dim", value=63), ConfigError, "head_dim must be even"),
    "config eos": (put("model", "config", "eos_token_id", value=["a"]), FormatError, "eos_token_id must be whole"),
    "other vocabulary": (put("model", "config", "vocab_size", value=3073), ShapeError, "3072.*, expected .*3073"),
    "other depth": (put("model", "config", "num_hidden_layers", value=6), ShapeError, "shape is .* expected .*7"),
    "fingerprint": (put("model", "fingerprint", value="g2:sha256:zz"), FormatError, "model.fingerprint must be g2:sha256:"),
    "embedding hash": (put("model", "embedding_sha256", value="0" * 63), FormatError, "model.embedding_sha256 must be"),
    "embedding dtype": (put("model", "embedding_dtype", value="int8"), FormatError, "model.embedding_dtype must be one of"),
    "no embedding": (put("settings", "embedding", value=False), ExtraTensorError, "no such arrays: embedding"),
    "floor": (put("floor", value={"kl_max": 1}), FormatError, "not a noise floor"),
    "floor list": (put("floor", value=[1]), FormatError, "not a noise floor"),
    "no probes": (put("probes", "list", value=[]), FormatError, "probes.list must be not empty"),
    "probes list": (put("probes", "list", value={}), FormatError, "probes.list must be of type list"),
    "a probe": (put("probes", "list", 0, value=3), FormatError, r"probes.list\[\] must be an object"),
    "scored": (put("probes", "list", 0, "scored", value=1), FormatError, r"scored must be of type bool"),
    "empty probe": (put("probes", "list", 0, "length", value=0), FormatError, "length must be at least 1"),
    "bool length": (put("probes", "list", 0, "length", value=True), FormatError, "length must be of type int"),
    "huge length": (put("probes", "list", 0, "length", value=1 << 39), ShapeError, "expected"),
    "other length": (put("probes", "list", 0, "length", value=5), ShapeError, "expected"),
    "other hash": (put("probes", "list", 0, "tokens_sha256", value="0" * 64), ChecksumError, "the tokens of probe P0/"),
    "probes hash": (put("probes", "sha256", value="0" * 64), ChecksumError, "the probes' hash is 000"),
    "renamed probe": (put("probes", "list", 0, "id", value="P0/other"), ChecksumError, "the probes' hash is"),
    "skipped": (put("probes", "skipped", value=[1]), FormatError, "probes.skipped must be objects"),
    "other file": (put("files", value={"../x": {"size": 1, "sha256": "0" * 64}}), FormatError, "files.arrays.* must be there"),
    "size": (put("files", "arrays.safetensors", "size", value=-1), FormatError, "files.size must be"),
    "larger": (put("files", "arrays.safetensors", "size", value=1 << 39), TruncatedError, "bytes, the recording says"),
    "smaller": (put("files", "arrays.safetensors", "size", value=5), ChecksumError, "bytes, the recording says 5"),
    "other sha": (put("files", "arrays.safetensors", "sha256", value="0" * 64), ChecksumError, "the file's sha256 is"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document(good: Path, tmp_path: Path, name: str) -> None:
    edit, error, match = DOCUMENTS[name]
    with pytest.raises(error, match=match):
        open_recording(resigned(good, tmp_path / "r", document=edit))


def at(name: str, index: Any, value: Any) -> Callable[[Arrays], None]:
    """Set elements of an array."""

    def edit(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return edit


def swap_top(arrays: Arrays) -> None:
    ids, logits = arrays["topk_id"].copy(), arrays["topk_logit"].copy()
    ids[3, :2], logits[3, :2] = ids[3, 1::-1], logits[3, 1::-1]
    arrays["topk_id"], arrays["topk_logit"] = ids, logits


def repeat_id(arrays: Arrays) -> None:
    arrays["topk_id"] = arrays["topk_id"].copy()
    arrays["topk_id"][3, 1] = arrays["topk_id"][3, 0]


def remake(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    """Replace an array."""
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


def raised(point: int, factor: float = 1.01) -> Callable[[np.ndarray], np.ndarray]:
    """What was noted behind a block, larger."""

    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[:, point] *= factor
        return x

    return change


NAN, INF = float("nan"), float("inf")
CHANGES: dict[str, tuple[Callable[[Arrays], None], type[G2Error], str]] = {
    "missing": (lambda a: a.__delitem__("lse"), MissingTensorError, "arrays are missing: lse"),
    "several missing": (lambda a: [a.__delitem__(n) for n in ("lse", "norm")], MissingTensorError, "missing: lse, norm"),
    "extra": (lambda a: a.__setitem__("zebra", a["lse"]), ExtraTensorError, "kind hidden has no such arrays: zebra"),
    "wider": (remake("norm", lambda x: x.astype("f8")), DtypeError, "norm: the array holds float64, expected float32"),
    "shorter": (remake("lse", lambda x: x[:-1]), ShapeError, r"lse: the array's shape is \(\d+,\), expected"),
    "fewer of the largest": (remake("topk_id", lambda x: x[:, :8]), ShapeError, r"topk_id: .* expected \(\d+, 256\)"),
    "NaN in states": (at("final_hidden", (5, 3), NAN), NonFiniteError, "final_hidden: row 5 has a NaN"),
    "infinite lse": (at("lse", 7, INF), NonFiniteError, "lse: row 7 has a NaN or infinity"),
    "NaN logit": (at("topk_logit", (7, 9), NAN), NonFiniteError, "topk_logit: row 7"),
    "NaN in a whole row": (at("sample_logits", (1, 5), NAN), NonFiniteError, "sample_logits: row 1"),
    "NaN projection": (at("projection", (2, 1, 0), -INF), NonFiniteError, "projection: row 2"),
    "NaN norm": (at("norm", (2, 1), NAN), NonFiniteError, "norm: row 2"),
    "NaN next logit": (at("next_logit", 2, NAN), NonFiniteError, "next_logit: row 2"),
    "NaN embedding": (at("embedding", (9, 9), NAN), NonFiniteError, "embedding: row 9"),
    "negative norm": (at("norm", (2, 1), -1), FormatError, "norm: in rows 0 to .*: a norm is negative"),
    "token too large": (at("tokens", 3, 3072), TokenizerError, "tokens: .* outside the vocabulary"),
    "negative token": (at("tokens", 3, -1), TokenizerError, "outside the vocabulary"),
    "other token": (at("tokens", 3, 77), ChecksumError, "the tokens of probe .* are not those"),
    "id too large": (at("topk_id", (3, 0), 3072), FormatError, "outside the vocabulary or named twice"),
    "id twice": (repeat_id, FormatError, "outside the vocabulary or named twice"),
    "not descending": (swap_top, FormatError, "not in descending order"),
    "lse too small": (remake("lse", lambda x: x - 8), FormatError, "lse: row 0: the log-sum-exp is less"),
    "sampled twice": (remake("sample_at", lambda x: x * 0), FormatError, "not ascending positions"),
    "sampled outside": (at("sample_at", -1, 1 << 40), FormatError, "not ascending positions"),
    "row of another position": (remake("sample_logits", lambda x: x[::-1]), FormatError, "position .* of probe .* contradict"),
    "lse larger": (remake("lse", lambda x: x + 1), FormatError, "contradict the recorded log-sum-exp"),
    "last block's projections": (at("projection", (7, -1, 3), 0.25), FormatError, "3 .*last block's projections are not"),
    "last block's norm": (remake("norm", lambda x: x * np.float32(1.001)), FormatError, "last block's projections are not"),
    "final norm": (remake("final_norm", lambda x: x + 0.01), FormatError, "last block's projections are not"),
    "final norm of 0": (remake("final_norm", lambda x: x * 0 - 1), FormatError, "last block's projections are not"),
    "norms of a block": (remake("norm", raised(2, 20)), FormatError, "norms behind block 1 contradict their projections"),
    "next logit": (remake("next_logit", lambda x: x + np.float32(1e-3)), FormatError, "next token's logit contradicts"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_arrays(good: Path, tmp_path: Path, name: str) -> None:
    edit, error, match = CHANGES[name]
    with pytest.raises(error, match=match):
        open_recording(resigned(good, tmp_path / "r", edit))


COMPARED: dict[str, tuple[Callable[[Arrays], None], type[G2Error], str]] = {
    "states of another layer": (remake("final_hidden", lambda x: x * 1.001), FormatError, "last block's projections"),
    "states swapped": (remake("final_hidden", lambda x: x[::-1]), FormatError, "last block's projections"),
    "another embedding": (remake("embedding", lambda x: x[::-1]), ChecksumError, "carried along is not the one"),
    "a block's projections": (at("projection", (9, 2, slice(None)), 0.0), FormatError, "5 .*behind block 1 and not .*block 2"),
    "a block's projections, one percent": (remake("projection", raised(3)), FormatError, "behind block 2 and not .* block 3"),
    "a block's norms, 0.01 percent": (remake("norm", raised(2, 1.0001)), FormatError, "norm recorded behind block 1 differs"),
    "one norm": (at("norm", (9, 2), 900.0), FormatError, "5 .*norm recorded behind block 1 differs"),
    "the embedding's projections": (remake("projection", raised(0)), FormatError, "the embedded token's projections"),
    "the embedding's norms": (remake("norm", raised(0)), FormatError, "the embedded token's projections"),
    "one state": (at("final_hidden", (200, slice(None)), 1.0), FormatError, "last block's projections"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_contradictions_show_when_logits_are_made(good: Path, tmp_path: Path, name: str) -> None:
    edit, error, match = COMPARED[name]
    with pytest.raises(error, match=match):
        compared(resigned(good, tmp_path / "r", edit))


def compared(recording: Path) -> None:
    """Open one and compare the sample with it."""
    with open_recording(recording) as r, open_runner("torch", sample()) as runner:
        compare_recording(r, runner)


def test_states_of_the_first_version_are_held_against_the_logits(
    good: Path, tmp_path: Path
) -> None:
    """Without the final norm's weights, projections say nothing of the states; the recorded logits do."""
    for i, change in enumerate((lambda x: x * np.float32(1.001), lambda x: x[::-1])):
        forged = resigned(good, tmp_path / f"{i}", remake("final_hidden", change))
        with pytest.raises(FormatError, match="rounding explains"):
            compared(first_version(forged, tmp_path / f"old{i}"))


# what every position has; of ``sample_at`` and ``sample_logits`` the tables above have cases
ROWS = (
    "tokens",
    "lse",
    "topk_id",
    "topk_logit",
    "next_logit",
    "final_hidden",
    "projection",
    "norm",
)


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_two_positions_exchanged(good: Path, tmp_path: Path, name: str) -> None:
    """With right hashes, and at positions of which no row of logits was recorded whole."""

    def edit(arrays: Arrays) -> None:
        one, two = [i for i in range(5, 40) if i not in arrays["sample_at"]][:2]
        arrays[name] = arrays[name].copy()
        arrays[name][[one, two]] = arrays[name][[two, one]]

    with pytest.raises((FormatError, ChecksumError)):
        compared(resigned(good, tmp_path / "r", edit))


@pytest.mark.parametrize("name", ["projection", "norm", "final_hidden"])
def test_a_changed_recording_is_refused_by_a_recording_too(
    good: Path, tmp_path: Path, name: str
) -> None:
    forged = resigned(good, tmp_path / "r", lambda a: scale(a, name))
    with (
        open_recording(good) as own,
        pytest.raises(
            FormatError,
            match=r"behind block 1 and not|recorded behind block 1 differs|last block's",
        ),
        open_recording(forged) as r,
    ):
        compare_recordings(own, r)


def scale(arrays: Arrays, name: str) -> None:
    arrays[name] = arrays[name].copy()
    arrays[name][:, 2] *= np.float32(1.5)


def test_an_honest_fault_is_no_contradiction(good: Path) -> None:
    """One block wrong: the difference is there behind all later blocks."""
    name = next(n for n in sample().tensors if ".1." in n and "gate_proj" in n)
    faulty = changed(sample(), {name: edited(sample().tensors[name], lambda w: w * 2)})
    with open_recording(good) as r, open_runner("torch", faulty) as runner:
        found = compare_recording(r, runner)
    assert [e.reached > 1e-3 for e in found.errors] == [False, False, True, True, True, True]


def test_a_config_that_gives_other_logits_is_found(good: Path, tmp_path: Path) -> None:
    """Arrays fit any soft-cap; the rows recorded whole do not."""
    edit = put("model", "config", "final_logit_softcapping", value=None)
    with (
        open_recording(resigned(good, tmp_path / "r", document=edit)) as r,
        open_runner("torch", sample()) as runner,
        pytest.raises(FormatError, match="rounding explains"),
    ):
        compare_recording(r, runner)


# ---------------------------------------------------------------- damage

FILES = [schema.DOCUMENT, schema.ARRAYS, schema.TOKENIZER]


@given(st.data())
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_noticed(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    copy = tmp_path / "r"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    content = bytearray((copy / name).read_bytes())
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] ^= data.draw(st.integers(1, 255))
    (copy / name).write_bytes(content)
    error = None
    try:
        with open_recording(copy) as r, open_recording(good) as own:
            same = r.document == own.document  # blank for blank between two tokens of JSON
    except G2Error as e:
        error = e
    assert same if error is None else str(copy) in str(error)


@given(st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_is_noticed(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    copy = tmp_path / "r"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    size = (copy / name).stat().st_size
    os.truncate(copy / name, data.draw(st.integers(0, size - 2)))
    with pytest.raises(G2Error):
        open_recording(copy)


def test_messages_of_damage(good: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    flipped = copy("flipped") / schema.ARRAYS
    content = bytearray(flipped.read_bytes())
    content[-7] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(
        ChecksumError, match=r"arrays.safetensors: the file's sha256 is .* changed or damaged"
    ):
        open_recording(flipped.parent)
    os.truncate(flipped, 1000)
    with pytest.raises(TruncatedError, match="the file has 1000 bytes, the recording says"):
        open_recording(flipped.parent)
    flipped.unlink()
    with pytest.raises(FileIOError, match=r"arrays.safetensors: cannot open: No such file"):
        open_recording(flipped.parent)
    for key in ("run", "environment", "model"):
        edited = copy(key) / schema.DOCUMENT
        doc = json.loads(edited.read_text())
        doc[key]["added"] = 1
        edited.write_text(json.dumps(doc))
        with pytest.raises(
            ChecksumError, match=r"recording.json: self_sha256 is .*, its content gives"
        ):
            open_recording(edited.parent)
    doc = json.loads((good / schema.DOCUMENT).read_text())
    doc["id"] = "sha256:" + "0" * 64
    doc["self_sha256"] = schema.self_sha256(doc)
    edited.write_text(json.dumps(doc))
    with pytest.raises(ChecksumError, match="id is sha256:000"):
        open_recording(edited.parent)


def test_what_is_no_recording(good: Path, tmp_path: Path) -> None:
    with pytest.raises(FileIOError, match=r"recording.json: cannot open"):
        open_recording(sample_dir())
    with pytest.raises(FileIOError, match="cannot open"):
        open_recording(tmp_path / "nowhere")
    for content, error, match in (
        ("", FormatError, "not JSON"),
        ("[]", FormatError, "top level must be a JSON object"),
        ("{}", FormatError, "not a g2kit recording"),
        ('{"schema": "g2kit.recording/1", "schema": 1}', FormatError, "appears twice"),
        ("[" * 100_000, LimitError, "nests"),
        ('{"schema": NaN}', FormatError, "not finite"),
    ):
        (tmp_path / schema.DOCUMENT).write_text(content)
        with pytest.raises(error, match=match):
            open_recording(tmp_path)
    shutil.copy(good / schema.ARRAYS, tmp_path / schema.DOCUMENT)
    with pytest.raises(G2Error):
        open_recording(tmp_path)


def test_every_part_of_the_document_may_be_anything(good: Path, tmp_path: Path) -> None:
    """Right hashes, wrong types everywhere: only ever a G2Error, or a field that is for readers alone."""
    original = json.loads((good / schema.DOCUMENT).read_text())
    for name in (schema.ARRAYS, schema.TOKENIZER):
        (tmp_path / name).hardlink_to(good / name)
    anything = set()
    for path in places({k: v for k, v in original.items() if k not in ("id", "self_sha256")}):
        for value in (None, -1, "x", []):
            doc = json.loads(json.dumps(original))
            put(*path, value=value)(doc)
            (tmp_path / schema.DOCUMENT).write_bytes(schema.dumps(doc))
            try:
                open_recording(tmp_path).close()
                anything.add(path[:2])
            except G2Error:
                pass
    told = {(x, k) for x in ("run", "environment", "settings") for k in original[x]}
    told |= {
        ("model", k) for k in ("config", "format", "layout", "dtypes", "quantized", "parameters")
    }
    told |= {("model", "tokenizer"), *(("runner", k) for k in ("name", "device", "version"))}
    told |= {("probes", k) for k in ("profile", "seed", "skipped", "list")}
    # environment and run may be any object; floor may be absent; dtype another of the same width
    told |= {("run",), ("environment",), ("floor",), ("model", "embedding_dtype")}
    assert anything <= told, anything - told


def places(doc: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths to every value; of a list its first."""
    pairs: list[tuple[str | int, Any]] = []
    if isinstance(doc, dict):
        pairs = list(doc.items())
    elif isinstance(doc, list):
        pairs = list(enumerate(doc[:1]))
    return [p for k, v in pairs for p in ((*prefix, k), *places(v, (*prefix, k)))]


def test_a_file_that_changes_under_the_comparison(good: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "r"))
    with open_recording(copy) as r, open_runner("torch", sample()) as runner:
        os.utime(copy / schema.ARRAYS, (1, 1))
        with pytest.raises(FileIOError, match="the file changed while it was read"):
            compare_recording(r, runner)
    assert len(few_probes()) == 6


# ---- what a recording says of its own noise


def larger_floor(factor: float) -> Edit:
    """Noise so large that nothing is ever above it, or a little larger."""

    def edit(doc: dict[str, Any]) -> None:
        for e in doc["floor"]["estimators"]:
            for name in ("kl_max", "kl_mean"):
                e[name] *= factor**2
            e["rms_logit"] *= factor
            for name in ("hidden", "isolated"):
                e[name] = [x * factor for x in e[name]]
        for name in ("kl_max", "kl_mean", "rms_logit"):
            doc["floor"][name] *= factor if name == "rms_logit" else factor**2

    return edit


@pytest.fixture(scope="module")
def with_floor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("floor") / "r"
    record_model(sample_dir(), out, profile="smoke", with_embedding=True)
    return out


@pytest.mark.parametrize(("factor", "verdict"), [(3.0, "PASS"), (1e4, "INCONCLUSIVE")])
def test_noise_beyond_any_machine_decides_nothing(
    factor: float, verdict: str, with_floor: Path, tmp_path: Path
) -> None:
    forged = resigned(with_floor, tmp_path / "r", document=larger_floor(factor))
    claims = {c["id"]: c for c in compare(forged, sample_dir())["claims"]}
    assert claims["X1"]["verdict"] == verdict
    if verdict != "PASS":
        assert any("no noise is that large" in m for m in claims["X1"]["missing"])


def test_noise_of_another_compute_type_is_refused(with_floor: Path, tmp_path: Path) -> None:
    forged = resigned(with_floor, tmp_path / "r", document=put("floor", "dtype", value="bfloat16"))
    with pytest.raises(FormatError, match=r"floor.dtype must be the run's compute type, float32"):
        open_recording(forged)


def test_nan_in_a_recording_is_no_verdict_on_weights(good: Path, tmp_path: Path) -> None:
    forged = resigned(good, tmp_path / "r", at("final_hidden", (5, 3), NAN))
    with pytest.raises(FormatError, match="row 5 has a NaN"):
        compare(forged, sample_dir())
