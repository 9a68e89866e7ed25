"""Attention sinks: a learned logit per head that takes part in the normalisation and contributes no value.

Run it: python examples/04_sink.py
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
window = 128


def causal_window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def main() -> None:
    torch.manual_seed(0)
    heads = 8
    q = torch.randn(1, heads, 1000, 64, device=device, dtype=dtype)
    k, v = (torch.randn(1, 2, 1000, 64, device=device, dtype=dtype) for _ in range(2))
    variant = jitgen.Variant(mask_mod=causal_window, sink=torch.linspace(-2.0, 6.0, heads, device=device))
    for call in ("first", "second"):
        begun = time.perf_counter()
        out, lse = (t.cpu() for t in jitgen.attention(q, k, v, variant, return_lse=True))  # cpu(): waits for a GPU
        print(f"{call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms")
    want, want_lse = (t.cpu() for t in reference.attention(q, k, v, variant, return_lse=True))
    error, lse_error = (out - want).abs().max().item(), (lse - want_lse).abs().max().item()
    print(f"maximum error {error:.1e}, of the logsumexp {lse_error:.1e}")

    without = jitgen.attention(q, k, v, mask_mod=causal_window).cpu()
    share = (out.norm(dim=-1) / without.norm(dim=-1)).mean(dim=(0, 2))
    print("share of the weight left to the keys, by head:", " ".join(f"{s:.2f}" for s in share.tolist()))
    assert max(error, lse_error) < allowed


if __name__ == "__main__":
    main()
