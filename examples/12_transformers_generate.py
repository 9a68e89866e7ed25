"""A language model of Hugging Face transformers generating text with its attention computed by jitgen, and a new attention for
it in one function: logits that fall with the distance of the key.

The model is small and its weights are random, so nothing is fetched; a checkpoint goes the same way, by from_pretrained.
Install what it needs: pip install '.[transformers]'. Run it: python examples/12_transformers_generate.py
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, MistralConfig

import jitgen
from jitgen.compat.transformers import register

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
SLOPE = 0.05


def nearer_is_louder(score, b, h, q_idx, kv_idx):
    return score - SLOPE * (h + 1) * (q_idx - kv_idx)


def small_model():
    """A Mistral with a window of 64 keys, 8 query heads and 2 key heads."""
    config = MistralConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, sliding_window=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(device, dtype).eval()


def batch() -> dict[str, torch.Tensor]:
    """Two prompts of 200 and 150 tokens, padded on the left."""
    ids = torch.randint(1, 1000, (2, 200), device=device)
    real = torch.ones_like(ids)
    real[1, :50] = 0
    return {"input_ids": ids, "attention_mask": real}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    register()
    register("nearer", jitgen.Variant(score_mod=nearer_is_louder))
    model, prompts = small_model(), batch()
    real = prompts["attention_mask"].bool()
    logits, tokens = {}, {}
    for name in ("sdpa", "jitgen", "nearer"):
        model.set_attn_implementation(name)  # or from_pretrained(..., attn_implementation=name)
        for call in ("first", "second"):
            begun = time.perf_counter()
            logits[name] = model(**prompts).logits[real].float()
            tokens[name] = model.generate(**prompts, max_new_tokens=20, do_sample=False)[:, 200:].cpu()
            print(f"{name:6} {call:6} prefill and generation: {1e3 * (time.perf_counter() - begun):8.1f} ms")
    error = (logits["jitgen"] - logits["sdpa"]).abs().max().item()
    print(f"largest logit {logits['sdpa'].abs().max().item():.2f}, maximum error {error:.1e}")
    print(f"tokens that differ from sdpa's: {(tokens['jitgen'] != tokens['sdpa']).sum()} of {tokens['sdpa'].numel()}")
    print(f"with the new attention: {(tokens['nearer'] != tokens['sdpa']).sum()} of {tokens['sdpa'].numel()}")
    assert error < allowed, error


if __name__ == "__main__":
    main()
