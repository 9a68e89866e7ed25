"""Small models of transformers with random weights, made from configs, for the tests of jitgen.compat.transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.17", reason="transformers 5.17 or later is not installed: pip install '.[transformers]'"
)

from jitgen.compat.transformers import register  # noqa: E402

VOCAB, LENGTH, WINDOW = 128, 37, 16
COMMON = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, pad_token_id=0,
    max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
)  # fmt: skip
GROUPED = dict(COMMON, num_key_value_heads=2)
ALTERNATING = ["sliding_attention", "full_attention"]
LATENT = dict(
    COMMON, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=32,
)  # fmt: skip

# name: class of the config and its arguments. Windows are shorter than the inputs.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", dict(GROUPED, head_dim=16)),
    "mistral": ("MistralConfig", dict(GROUPED, head_dim=16, sliding_window=WINDOW)),
    "mistral, head dim 20": ("MistralConfig", dict(GROUPED, head_dim=20, sliding_window=WINDOW)),
    "gemma2": (
        "Gemma2Config",
        dict(GROUPED, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    ),
    "gemma3": ("Gemma3TextConfig", dict(GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING)),
    "gemma4": (  # layers of two head dims
        "Gemma4TextConfig",
        dict(
            GROUPED, head_dim=256, global_head_dim=512, sliding_window=WINDOW, layer_types=ALTERNATING,
            vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16,
        ),
    ),
    "gpt-oss": (
        "GptOssConfig",
        dict(
            GROUPED, head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2, layer_types=ALTERNATING,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
    "llama4": (
        "Llama4TextConfig",
        dict(
            GROUPED, head_dim=16, num_hidden_layers=4, attention_chunk_size=WINDOW, num_local_experts=2,
            intermediate_size_mlp=64,
        ),
    ),
    "doge": ("DogeConfig", dict(GROUPED, keep_window_size=8)),
    "deepseek-v3": ("DeepseekV3Config", LATENT),
    "deepseek-v3.2": ("DeepseekV32Config", dict(LATENT, index_topk=8, index_n_heads=4, index_head_dim=16)),
}  # fmt: skip


def decoder(name: str) -> Any:
    """A causal language model."""
    kind, given = DECODERS[name]
    return with_weights(transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**given)))


def with_weights(model: Any) -> Any:
    """A model for inference, with weights that make its attention weights differ."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = 1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5
            weight.data = scale * torch.randn(weight.shape, generator=generator)
        elif name.endswith("sinks"):
            weight.data = torch.randn(weight.shape, generator=generator)
    return model.eval()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of three sequences, and a mask that pads two of them at their left."""
    ids = torch.randint(5, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :30] = 0, 0
    return ids, mask


@contextmanager
def counted(name: str = "jitgen") -> Iterator[list[str]]:
    """Registers jitgen; the classes of the layers that it computed the attention of."""
    layers: list[str] = []
    register(name, lambda module: layers.append(type(module).__name__))
    try:
        yield layers
    finally:
        register(name)


@torch.no_grad()
def by_both(model: Any, run: Any) -> tuple[Any, Any]:
    """What ``run(model)`` gives with eager attention and with jitgen's, which must have been called."""
    results = []
    with counted() as layers:
        for implementation in ("eager", "jitgen"):
            assert not layers
            model.set_attn_implementation(implementation)
            results.append(run(model))
    assert layers, f"{type(model).__name__} did not call the attention that was registered"
    return results[0], results[1]


def cache_argument(model: Any) -> str:
    """How the model's forward calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """Greedy tokens after those given."""
    given = dict(max_new_tokens=2 * WINDOW - 5, do_sample=False) | options
    return model.generate(ids, attention_mask=mask, **given)


def assert_near(got, want):
    """Equal up to float32's rounding of the largest values, in a few layers."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
