"""Calibration sequences: one BOS each, no padding, spread over what is given, a share kept apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert.chat_template import GEMMA_TEMPLATE
from g2kit.convert.open import Checkpoint, open_checkpoint
from g2kit.formats.errors import (
    FormatError,
    G2Error,
    NonFiniteError,
    NotFoundError,
    TokenizerError,
    UsageError,
)
from g2kit.model import torch_gemma as tg
from g2kit.model.sample import sample_dir, training_text
from g2kit.quant.calibration import Wanted, divide, read_calibration, render_chat
from g2kit.quant.sampling import sample_sequences
from g2kit.quant.weights import Weights, as_tensor

SMALL = Wanted(samples=6, seq_len=32, held_out=0.34)


@pytest.fixture(scope="module")
def sample() -> Iterator[Checkpoint]:
    with open_checkpoint(sample_dir()) as checkpoint:
        yield checkpoint


def test_text_becomes_sequences_with_one_bos_and_a_held_out_share(
    sample: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(training_text()[:20000])
    found = read_calibration(file, sample, SMALL)
    assert (len(found.train), len(found.held)) == (6, 2)
    for ids in (*found.train, *found.held):
        assert ids.shape == (32,)
        assert ids[0] == 2
        assert (ids[1:] != 2).all()
        assert (ids != 0).all()
    kept = {i.tobytes() for i in found.held}
    assert not kept & {i.tobytes() for i in found.train}
    assert found.sha256 == read_calibration(file, sample, SMALL).sha256
    assert found.tokens == 6 * 32
    assert found.held_tokens == 2 * 32


def test_sequences_are_spread_over_all_of_a_text(sample: Checkpoint, tmp_path: Path) -> None:
    stream = np.arange(300, 300 + 31 * 80)  # 80 pieces, told apart by their first id
    found = read_calibration(stream, sample, Wanted(8, 32, 0.25))
    firsts = sorted(int(ids[1]) for ids in (*found.train, *found.held))
    assert firsts == [300 + 31 * 8 * k for k in range(10)]


def test_jsonl_of_texts(sample: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"text": training_text()[k * 900 : (k + 1) * 900] + "\u2028x"} for k in range(12)]
    file.write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n\n")
    found = read_calibration(file, sample, SMALL)
    assert {len(i) for i in found.train} == {32}


def _chats(n: int) -> list[dict[str, object]]:
    text = training_text()
    return [
        {
            "messages": [
                {"role": "user", "content": f"  {text[k * 40 : k * 40 + 30 + k]} "},
                {
                    "role": "assistant",
                    "content": text[5000 + k * 70 : 5000 + k * 70 + 20 * (k + 1)],
                },
            ]
        }
        for k in range(n)
    ]


def test_conversations_keep_their_lengths_and_go_through_the_template(
    sample: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, _chats(8))))
    found = read_calibration(file, sample, Wanted(6, 64, 0.3))
    lengths = [len(i) for i in found.train]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    start_of_turn = 106
    for ids in (*found.train, *found.held):
        assert list(ids[:2]) == [2, start_of_turn]
        assert (ids == 2).sum() == 1


def test_our_chat_text_is_the_templates() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(GEMMA_TEMPLATE)
    for chat in _chats(3):
        messages = chat["messages"]
        want = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=False)
        assert f"<bos>{render_chat(messages)}" == want  # type: ignore[arg-type]


def test_two_dimensional_ids_are_taken_as_they_are_with_bos_added_where_none_is(
    sample: Checkpoint, tmp_path: Path
) -> None:
    body = np.arange(300, 300 + 4 * 20).reshape(4, 20).astype(np.uint16)
    np.save(tmp_path / "ids.npy", body)
    found = read_calibration(tmp_path / "ids.npy", sample, SMALL)
    with_bos = np.concatenate([np.full((4, 1), 2), body], 1)
    assert {i.tobytes() for i in (*found.train, *found.held)} == {
        row.astype(np.int64).tobytes() for row in with_bos
    }
    assert read_calibration(with_bos, sample, SMALL).sha256 == found.sha256


def _bad_rows(kind: str) -> np.ndarray:
    ids = np.full((4, 20), 300)
    ids[:, 0] = 2
    at = {"no bos": (2, 0, 301), "two": (1, 7, 2), "padded": (3, 19, 0), "range": (0, 5, 10**6)}
    row, column, value = at[kind]
    ids[row, column] = value
    return ids


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no bos", "sequence 2 has BOS (id 2) nowhere"),
        ("two", "sequence 1 has BOS (id 2) at positions [0, 7]"),
        ("padded", "sequence 3 is padded (id 0)"),
        ("range", "token ids run from 2 to 1000000"),
    ],
)
def test_unsound_ids_are_refused(sample: Checkpoint, kind: str, says: str) -> None:
    with pytest.raises(UsageError) as e:
        read_calibration(_bad_rows(kind), sample, SMALL)
    assert says in str(e.value)


def test_too_little_is_refused_with_what_would_fit(sample: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use --seq-len 31 or less"):
        read_calibration(np.arange(300, 360), sample, Wanted(4, 64))
    with pytest.raises(UsageError, match="at least 2 are needed"):
        read_calibration(np.arange(300, 360)[None], sample, Wanted(4, 64))
    file = tmp_path / "empty.txt"
    file.write_text(" \n ")
    with pytest.raises(UsageError, match="there is no text"):
        read_calibration(file, sample, SMALL)
    with pytest.raises(UsageError, match="the model's context 512"):
        read_calibration(file, sample, Wanted(4, 513))


@pytest.mark.parametrize(
    ("values", "says"),
    [((0, 32, 0.1), "--samples is 0"), ((4, 7, 0.1), "--seq-len is 7"), ((4, 32, 0.0), "held-out")],
)
def test_wanted_is_checked(values: tuple[int, int, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Wanted(*values)


def test_files_that_are_not_what_they_say(sample: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_calibration(tmp_path / "none.txt", sample, SMALL)
    for name, content, kind in (
        ("a.txt", b"\xff\xfe", FormatError),
        ("a.npy", b"nonsense", FormatError),
        ("a.jsonl", b'{"text": 3}', FormatError),
        ("b.jsonl", b"{", FormatError),
        ("c.jsonl", b'{"text": "a"}\n{"messages": [{"role":"user","content":"x"}]}', UsageError),
        ("d.jsonl", b'{"messages": [{"role":"system","content":"x"}]}', FormatError),
        ("e.jsonl", b'{"messages": [{"role":"assistant","content":"x"}]}', FormatError),
        ("f.jsonl", b'{"messages": []}', FormatError),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind):
            read_calibration(tmp_path / name, sample, SMALL)


def test_text_without_a_tokenizer(sample: Checkpoint, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(sample_dir() / name, tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("text")
    with open_checkpoint(tmp_path) as bare, pytest.raises(TokenizerError, match="token ids"):
        read_calibration(file, bare, SMALL)


@settings(max_examples=40)
@given(st.binary(max_size=300))
def test_any_bytes_give_sequences_or_an_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, open_checkpoint(sample_dir()) as checkpoint:
        for name in ("x.npy", "x.jsonl"):
            file = Path(folder) / name
            file.write_bytes((b"\x93NUMPY\x01\x00" if name == "x.npy" else b'{"text": "') + data)
            try:
                found = read_calibration(file, checkpoint, Wanted(2, 8, 0.5))
            except G2Error:
                continue
            assert found.train
            assert found.held


def test_dividing_keeps_every_sequence_once(sample: Checkpoint) -> None:
    rows = [np.array([2, *range(300 + k, 320 + k)]) for k in range(9)]
    for wanted in (Wanted(8, 32, 0.125), Wanted(100, 32, 0.5), Wanted(1, 32, 1.0)):
        found = divide(rows, "rows", sample.config, wanted)
        every = [i.tobytes() for i in (*found.train, *found.held)]
        assert len(every) == len(set(every)) == min(9, wanted.total)


def test_the_model_writes_sequences_of_its_own(sample: Checkpoint) -> None:
    weights = Weights(sample, 1 << 30)
    one = sample_sequences(weights, 3, 12, seed=5)
    # the same whether blocks are kept or read again
    assert [i.tolist() for i in sample_sequences(Weights(sample), 3, 12, seed=5)] == [
        i.tolist() for i in one
    ]
    assert all(len(i) == 12 and i[0] == 2 and not {0, 1, 2} & set(i[1:].tolist()) for i in one)
    assert one[0].tolist() != one[1].tolist()
    other = sample_sequences(weights, 3, 12, seed=6, prefix=[106])
    assert [int(i[1]) for i in other] == [106] * 3


def test_what_it_writes_is_likelier_than_chance(sample: Checkpoint) -> None:
    weights = Weights(sample, 1 << 30)
    ids = torch.from_numpy(np.stack(sample_sequences(weights, 4, 24, seed=1)))
    held = {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in sample.tensors.items()}
    with torch.no_grad():
        logp = torch.log_softmax(tg.forward(ids, held, sample.config), -1)
    mean = logp[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    entropy = -(logp.exp() * logp).sum(-1).mean()
    # text drawn from the model is as likely as its entropy says
    assert abs(float(-mean - entropy)) < 0.7


def test_embedding_rows_equal_the_forward_pass(sample: Checkpoint) -> None:
    ids = torch.tensor([[2, 500, 501, 900], [2, 3, 3, 1500]])
    table = torch.from_numpy(sample.tensors["model.embed_tokens.weight"].read().astype(np.float32))
    assert torch.equal(Weights(sample).embed(ids), tg.embed(ids, table, sample.config))


def test_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(NonFiniteError, match="1 of 3 weights") as e:
        as_tensor(np.array([1, np.nan, 2], np.float16), "model.norm.weight")
    assert e.value.tensor == "model.norm.weight"
