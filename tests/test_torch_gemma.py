"""The forward pass against Hugging Face transformers, an independent implementation, on random small models."""

from __future__ import annotations

import pytest
import torch
from configs import ARCHITECTURES, small

from g2kit.model import canonical, torch_gemma
from g2kit.model.config import GemmaConfig

transformers = pytest.importorskip("transformers")

# fp32 rounding of sums over at most a few hundred terms, logits up to the soft-cap of 30
ATOL = 30 * 2**-23 * 64


def official(config: GemmaConfig, seed: int) -> torch.nn.Module:
    """transformers' model of that config with random weights, in float32, eager attention."""
    common = {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "attn_implementation": "eager",
    }
    if config.family == "gemma":
        cls, cfg = transformers.GemmaForCausalLM, transformers.GemmaConfig(**common)
    else:
        cls, cfg = (
            transformers.Gemma2ForCausalLM,
            transformers.Gemma2Config(
                **common,
                query_pre_attn_scalar=int(config.query_pre_attn_scalar),
                sliding_window=config.sliding_window,
                attn_logit_softcapping=config.attn_logit_softcapping,
                final_logit_softcapping=config.final_logit_softcapping,
            ),
        )
    torch.manual_seed(seed)
    model = cls(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)  # large: soft-caps and norms must matter
    return model


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_logits_equal_transformers(arch: str) -> None:
    config = small(arch, layers=3)
    model = official(config, 1)
    weights = {
        n: p.detach() for n, p in model.state_dict().items() if n in canonical.tensors(config)
    }
    assert set(weights) == set(canonical.tensors(config))
    tokens = torch.randint(
        0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        want = model(tokens).logits
        got = torch_gemma.forward(tokens, weights, config)
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("arch", ["gemma-2b", "gemma2-9b"])
def test_decoding_step_by_step_equals_prefill(arch: str) -> None:
    """Past three windows, with a cache that grows one position at a time."""
    config = small(arch)
    weights = {n: p.detach() for n, p in official(config, 3).state_dict().items()}
    tokens = torch.randint(
        0, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(4)
    )
    want = torch_gemma.forward(tokens, weights, config)
    caches: list[torch_gemma.Cache | None] = [None] * config.num_hidden_layers
    table = weights[canonical.EMBED]
    for t in range(tokens.shape[1]):
        x = torch_gemma.embed(tokens[:, t : t + 1], table, config)
        at = torch.full((2, 1), t)
        for i in range(config.num_hidden_layers):
            x, caches[i] = torch_gemma.block(x, weights, i, config, at, cache=caches[i])
        got = torch_gemma.unembed(x, weights[canonical.FINAL_NORM], table, config)
        torch.testing.assert_close(got[:, 0], want[:, t], atol=ATOL, rtol=0)


def test_left_padding_changes_nothing() -> None:
    config = small("gemma2-2b")
    weights = {n: p.detach() for n, p in official(config, 5).state_dict().items()}
    tokens = torch.randint(1, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(6))
    want = torch_gemma.forward(tokens, weights, config)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), dim=1)
    got = torch_gemma.forward(padded, weights, config, padding=padded != 0)
    torch.testing.assert_close(got[:, 3:], want, atol=ATOL, rtol=0)


def test_the_sliding_window_matters() -> None:
    """The comparison above would notice a missing window: without it the logits are far off."""
    config = small("gemma2-2b")
    weights = {n: p.detach() for n, p in official(config, 7).state_dict().items()}
    tokens = torch.randint(
        0, config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(8)
    )
    near = torch_gemma.forward(tokens, weights, config)
    far = torch_gemma.forward(tokens, weights, config.with_(sliding_window=1000))
    w = config.sliding_window
    assert w is not None
    torch.testing.assert_close(near[:, :w], far[:, :w], atol=ATOL, rtol=0)
    assert (near[:, w:] - far[:, w:]).abs().max() > 100 * ATOL
