"""A capped logit and a sliding window, as in Gemma 2; the captured numbers change without a new kernel.

Run it: python examples/01_softcap.py
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
cap, window = 50.0, 256


def soft_cap(score, b, h, q_idx, kv_idx):
    return cap * torch.tanh(score / cap)


def causal_window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def main() -> None:
    global cap, window
    variant = jitgen.Variant(score_mod=soft_cap, mask_mod=causal_window)
    torch.manual_seed(0)
    q = 4 * torch.randn(1, 8, 1000, 64, device=device, dtype=dtype)  # large logits, so that the cap matters
    k, v = (torch.randn(1, 2, 1000, 64, device=device, dtype=dtype) for _ in range(2))
    for call, (cap, window) in enumerate(((50.0, 256), (30.0, 100), (30.0, 100)), start=1):
        begun = time.perf_counter()
        out = jitgen.attention(q, k, v, variant).cpu()  # cpu(): waits for a GPU
        elapsed = time.perf_counter() - begun
        error = (out - reference.attention(q, k, v, variant).cpu()).abs().max().item()
        print(f"call {call}: cap {cap}, window {window:3}: {1e3 * elapsed:8.2f} ms, maximum error {error:.1e}")
        assert error < allowed, error


if __name__ == "__main__":
    main()
