"""A service in miniature: attention with a capped logit and a window, and with ALiBi. Ends when its requests are served."""

from __future__ import annotations

import torch

import jitgen

cap, window = 50.0, 256
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
slopes = torch.logspace(0, -3, 8, device=device)


def softcap(score, b, h, q_idx, kv_idx):
    return cap * torch.tanh(score / cap)


def causal_window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


capped = jitgen.Variant(score_mod=softcap, mask_mod=causal_window)
biased = jitgen.Variant(score_mod=alibi, mask_mod=causal_window)


def main() -> None:
    torch.manual_seed(0)
    for name, variant in (("capped", capped), ("biased", biased)):
        q, k, v = (torch.randn(1, 8, 500, 64, device=device, dtype=dtype) for _ in range(3))
        error = (jitgen.attention(q, k, v, variant) - jitgen.reference.attention(q, k, v, variant)).abs().max().item()
        print(f"{name}: largest error against the oracle {error:.1e}")


if __name__ == "__main__":
    main()
