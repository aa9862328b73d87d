"""The bundled sample model: really a Gemma 2, really trained, and readable by the official implementation."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import sentencepiece

from g2kit.model import sample
from g2kit.model.config import GemmaConfig

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from g2kit.model import canonical  # noqa: E402
from g2kit.model.sample import train  # noqa: E402
from g2kit.model.sample.evaluate import Evaluation, evaluate, ngram_nats  # noqa: E402
from g2kit.model.sample.tokenizer import HTML  # noqa: E402
from g2kit.model.torch_gemma import forward  # noqa: E402

HELDOUT_TOKENS = 4096
PERPLEXITY_BOUND = 15.0
BITS_BOUND = 1.4  # xz needs 2.0

EXPECTED_IDS = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<2mass>": 5, "[@BOS@]": 6,
    **{f"<unused{i}>": 7 + i for i in range(99)},
    "<start_of_turn>": 106, "<end_of_turn>": 107,
    **{"\n" * n: 107 + n for n in range(1, 32)},
    **{"▁" * n: 137 + n for n in range(2, 31)},
    **{tag: 168 + i for i, tag in enumerate(HTML)},
    **{f"<0x{b:02X}>": 217 + b for b in range(256)},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(sample.sample_dir() / "tokenizer.model"))


@cache
def stored() -> dict[str, torch.Tensor]:
    return safetensors_torch.load_file(sample.sample_dir() / "model.safetensors")


@cache
def wide() -> dict[str, torch.Tensor]:
    return {name: w.float() for name, w in stored().items()}


@cache
def heldout_ids() -> torch.Tensor:
    processor = sentencepiece.SentencePieceProcessor(str(sample.sample_dir() / "tokenizer.model"))
    return torch.tensor(processor.encode(sample.heldout_text()))


@cache
def evaluation() -> Evaluation:
    return evaluate(wide(), heldout_ids()[:HELDOUT_TOKENS], train.CONFIG)


def test_importing_the_sample_imports_no_framework() -> None:
    code = "import sys, g2kit.model.sample as s; s.training_text(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_every_shipped_file_is_small() -> None:
    sizes = {p.name: p.stat().st_size for p in sample.sample_dir().iterdir() if p.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.model", "README.md"} <= set(sizes)
    assert max(sizes.values()) <= 8_000_000, sizes


def test_config_is_a_gemma2_with_every_feature_in_use() -> None:
    raw = json.loads((sample.sample_dir() / "config.json").read_text())
    assert raw == json.loads(json.dumps(sample.hf_config(train.CONFIG)))
    config: GemmaConfig = train.CONFIG
    assert config.family == raw["model_type"] == "gemma2"
    assert config.layer_types.count("sliding_attention") == 2
    assert config.layer_types.count("full_attention") == 2
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert config.query_pre_attn_scalar == config.head_dim
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.sliding_window or 0) * 3 < config.max_position_embeddings
    for tensor in canonical.tensors(config).values():
        if not tensor.is_norm:
            assert all(side % 256 == 0 for side in tensor.shape), tensor


def test_weights_are_the_canonical_tensors_in_bfloat16() -> None:
    expected = {t.name: t.shape for t in canonical.tensors(train.CONFIG).values()}
    assert {n: tuple(w.shape) for n, w in stored().items()} == expected
    assert {w.dtype for w in stored().values()} == {torch.bfloat16}
    assert all(w.isfinite().all() for w in stored().values())


def test_tokenizer_has_gemmas_first_473_ids(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> None:
    assert tokenizer.vocab_size() == train.CONFIG.vocab_size
    assert len(EXPECTED_IDS) == 473
    assert {p: tokenizer.piece_to_id(p) for p in EXPECTED_IDS} == EXPECTED_IDS
    assert all(tokenizer.is_control(i) for i in (0, 1, 2))
    assert tokenizer.is_unknown(3)
    assert all(tokenizer.is_byte(i) for i in range(217, 473))
    # one id per run, never split, and never a control piece taken from text
    assert tokenizer.encode("<start_of_turn>user\n\n\n    x<eos>")[0] == 106
    assert tokenizer.encode("\n" * 31 + "x")[0] == 138
    assert 1 not in tokenizer.encode("<eos>")


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "  leading and trailing  ", "a\n\n\n\tb\r\nc", "\n" * 70, " " * 70, "12345.678e-9",
        "<table><br></h6><unused3>", "naïve – “quoted” … €", "日本語 Ελληνικά עברית 한국어", "🧪👩‍🔬\u200b",
        "".join(map(chr, range(256))), "\U0010ffff\ufffe\ufeff",
    ],
)  # fmt: skip
def test_tokenizer_round_trip(text: str, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    ids = tokenizer.encode(text)
    assert 3 not in ids
    assert tokenizer.decode(ids) == text


def test_texts_round_trip_and_do_not_overlap(
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> None:
    held, seen = sample.heldout_text(), sample.training_text()
    assert 60_000 < len(held.encode()) < 130_000
    assert 60_000 < len(seen.encode()) < 130_000
    assert tokenizer.decode(tokenizer.encode(held)) == held
    windows = [held[i : i + 200] for i in range(0, len(held) - 200, 200)]
    assert not [w for w in windows if w in seen]


def test_heldout_perplexity(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    result = evaluation()
    assert len(result.nats) == HELDOUT_TOKENS
    assert result.perplexity < PERPLEXITY_BOUND
    size = len(tokenizer.decode(heldout_ids()[:HELDOUT_TOKENS].tolist()).encode())
    assert result.bits_per_byte(size) < BITS_BOUND


def test_ngram_baseline_is_witten_bell() -> None:
    a, b = np.array([1, 1, 2]), np.array([1, 2, 3])
    # N = 3 tokens of T = 2 kinds in a vocabulary of 4: (count + T / 4) / (N + T)
    assert np.exp(-ngram_nats(a, b, 4, 1)) == pytest.approx([2.5 / 5, 1.5 / 5, 0.5 / 5])
    # after 1 came 1 and 2: (1 + 2 * p(2)) / (2 + 2); nothing came after 2: unigram
    assert np.exp(-ngram_nats(a, b, 4, 2))[1:] == pytest.approx([(1 + 2 * 0.3) / 4, 0.1])


def test_both_soft_caps_are_exercised() -> None:
    result = evaluation()
    assert max(result.score_use) > 0.3, result
    assert result.logit_use > 0.3, result


def test_sliding_window_is_exercised() -> None:
    """Widening the window must change the model's answers: the local layers matter beyond it."""
    tokens = torch.cat((torch.tensor([2]), heldout_ids()[:255]))[None]
    every = train.CONFIG.with_(sliding_window=512)
    with torch.no_grad():
        windowed, full = (forward(tokens, wide(), c) for c in (train.CONFIG, every))
    assert torch.equal(windowed[:, :64], full[:, :64])
    assert (windowed - full)[:, 64:].abs().max() > 0.1


def test_official_implementation_gives_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        sample.sample_dir(), dtype=torch.float32, attn_implementation="eager"
    )
    assert model.config.sliding_window == 64
    tokens = torch.cat((torch.tensor([2]), heldout_ids()[1000:1299]))[None]
    with torch.no_grad():
        theirs, ours = model(tokens).logits, forward(tokens, wide(), train.CONFIG)
    assert tokens.shape[1] > 4 * 64
    assert (theirs - ours).abs().max() < 1e-3


def test_generation_continues_text(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Greedy text after a directive learnt from the documentation ends its line and goes on in words."""
    prompt = [2, *tokenizer.encode(".. function:: open(path)\n\n   Return the")]
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(40):
            logits = forward(torch.tensor([tokens]), wide(), train.CONFIG)[0, -1]
            tokens.append(int(logits.argmax()))
    new = tokens[len(prompt) :]
    assert all(i >= 108 for i in new), "control or unused pieces were generated"
    text = tokenizer.decode(new)
    common = {"the", "of", "a", "is", "to", "in", "and", "for", "with", "by", "*path*"}
    assert len(common & set(text.split())) >= 2, text
    assert len(set(new)) > 12, f"degenerate repetition: {text!r}"


def test_batches_are_a_pure_function_of_the_step_and_cover_the_text() -> None:
    stream = torch.arange(1000)
    first = train.batch(stream, 3, 4, 16, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(first, train.batch(stream, 3, 4, 16, 0), strict=True)
    )
    assert (first[0][:, 0] == 2).all()
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    per_epoch = 1000 // 16 - 1
    starts = [int(train.batch(stream, s, 1, 16, 0)[1][0, 0]) for s in range(per_epoch)]
    assert len(set(starts)) == per_epoch
