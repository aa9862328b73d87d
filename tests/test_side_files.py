"""Files that users load beside the weights reach C0's verdict; what only one side has is said to be unverified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g2kit.convert import convert
from g2kit.model.sample import sample_dir
from g2kit.verify.compare import compare_weights
from g2kit.verify.identity import NOTE, USE, Identity, compare_identity
from g2kit.verify.side import Side, open_side

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with all the side files of a Hugging Face directory."""
    out = tmp_path_factory.mktemp("full") / "hf"
    convert(sample_dir(), out, to="safetensors")
    return out


def changed(full: Path, to: Path, name: str, change: Change) -> Path:
    shutil.copytree(full, to)
    tree = json.loads((to / name).read_text())
    change(tree)
    (to / name).write_text(json.dumps(tree))
    return to


def compared(ref: Path, cand: Path) -> Identity:
    with open_side(ref) as a, open_side(cand) as b:
        return compare_identity(a, b)


def swap_pieces(tree: dict[str, Any]) -> None:
    vocab = tree["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


CASES: dict[str, tuple[str, Change]] = {
    "tokenizer.json id of": ("tokenizer.json", swap_pieces),
    "tokenizer.json against tokenizer.model": ("tokenizer.json", swap_pieces),
    "tokenizer.json merges": ("tokenizer.json", lambda t: t["model"]["merges"].reverse()),
    "tokenizer.json normalizer": ("tokenizer.json", lambda t: t.update(normalizer=None)),
    "tokenizer_config.json tokenizer_class": (
        "tokenizer_config.json", lambda t: t.update(tokenizer_class="LlamaTokenizer")),
    "tokenizer_config.json auto_map": (
        "tokenizer_config.json", lambda t: t.update(auto_map={"AutoTokenizer": ["x.T", None]})),
    "tokenizer.add_bos_token": ("tokenizer_config.json", lambda t: t.update(add_bos_token=False)),
    "tokenizer.add_eos_token": ("tokenizer_config.json", lambda t: t.update(add_eos_token=True)),
    "tokenizer_config.json bos_token": (
        "tokenizer_config.json", lambda t: t.update(bos_token="<eos>")),
    "generation_config.json eos_token_id": (
        "generation_config.json", lambda t: t.update(eos_token_id=7)),
    "special_tokens_map.json bos_token": (
        "special_tokens_map.json", lambda t: t.update(bos_token="<eos>")),
}  # fmt: skip


@pytest.mark.parametrize("field", CASES)
def test_each_file_is_compared(full: Path, tmp_path: Path, field: str) -> None:
    found = compared(full, changed(full, tmp_path / "c", *CASES[field]))
    assert [d.kind for d in found.differences if d.field.startswith(field)][:1] == [USE]


def test_the_merge_that_differs_is_shown(full: Path, tmp_path: Path) -> None:
    def swap(tree: dict[str, Any]) -> None:
        merges = tree["model"]["merges"]
        merges[5], merges[6] = merges[6], merges[5]

    found = compared(full, changed(full, tmp_path / "c", "tokenizer.json", swap))
    (one,) = found.differences
    assert one.field == "tokenizer.json merges, from 5 on"
    assert one.reference != one.candidate


def test_classes_that_read_gemma_alike_and_code_left_out_are_no_difference(
    full: Path, tmp_path: Path
) -> None:
    name = "tokenizer_config.json"
    one = changed(full, tmp_path / "a", name, lambda t: t.update(auto_map={"AutoTokenizer": "x.T"}))
    two = changed(
        full, tmp_path / "b", name, lambda t: t.update(tokenizer_class="GemmaTokenizerFast")
    )
    assert compared(one, two).differences == ()


def test_another_chat_template_is_a_difference(full: Path, tmp_path: Path) -> None:
    one, two = (
        changed(full, tmp_path / n, "tokenizer_config.json", lambda t, n=n: t.update(chat_template=n))  # type: ignore[misc]
        for n in "ab"
    )  # fmt: skip
    assert [(d.field, d.kind) for d in compared(one, two).differences] == [("chat template", USE)]
    found = compared(full, two)
    assert found.differences == ()
    assert any("chat template (candidate)" in said for said in found.untested)


@pytest.mark.parametrize(("name", "key", "ref", "cand"), [
    ("tokenizer_config.json", "add_bos_token", False, True),
    ("generation_config.json", "eos_token_id", 1, [1, 107]),
])  # fmt: skip
def test_what_g2conv_mends_is_a_note(
    full: Path, tmp_path: Path, name: str, key: str, ref: Any, cand: Any
) -> None:
    one, two = (
        changed(full, tmp_path / n, name, lambda t, v=v: t.update({key: v}))  # type: ignore[misc]
        for n, v in (("a", ref), ("b", cand))
    )
    assert [d.kind for d in compared(one, two).differences] == [NOTE]
    assert [d.kind for d in compared(two, one).differences] == [USE]


@pytest.mark.parametrize("flag", ["add_bos_token", "add_space_prefix"])
def test_flags_of_a_gguf_are_compared(tmp_path: Path, flag: str) -> None:
    convert(sample_dir(), tmp_path / "m.gguf", to="gguf")
    with open_side(sample_dir()) as ref, open_side(tmp_path / "m.gguf") as cand:
        assert compare_identity(ref, cand).of(USE) == []
        kv = dict(cand.opened.source.metadata["kv"])
        key = f"tokenizer.ggml.{flag}"
        cand.opened.source.metadata["kv"] = kv | {key: not kv[key]}
        found = compare_identity(ref, Side(cand.path, cand.checkpoint, None)).of(USE)
    assert [d.field for d in found] == [f"tokenizer.{flag}"]


def test_files_beside_a_gguf_are_not_its_own(full: Path, tmp_path: Path) -> None:
    name, change = CASES["tokenizer.add_bos_token"]
    folder = changed(full, tmp_path / "c", name, change)
    convert(sample_dir(), tmp_path / "m.gguf", to="gguf")
    (tmp_path / "m.gguf").rename(folder / "m.gguf")
    assert compared(full, folder / "m.gguf").of(USE) == []


@pytest.mark.parametrize("target", ["safetensors", "gguf", "flax", "keras", "torch", "maxtext"])
def test_lossless_conversions_pass(full: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / ("m.gguf" if target == "gguf" else "m")
    convert(full, out, to=target)
    for ref, cand in ((full, out), (out, full), (sample_dir(), out)):
        claims = {c["id"]: c for c in compare_weights(ref, cand)["claims"]}
        assert claims["C0"]["verdict"] == "PASS", claims["C0"]["sentence"]


def test_a_side_without_tokenizer_is_not_claimed_to_have_the_same(
    full: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((full / name).read_bytes())
    report = compare_weights(full, bare)
    claim = next(c for c in report["claims"] if c["id"] == "C0")
    assert "tokenizer" not in claim["title"]
    assert any("tokenizer.json (reference)" in said for said in report["not_verified"])
