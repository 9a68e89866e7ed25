"""ALiBi: a bias linear in the distance, with one slope per head taken from a captured tensor.

Run it: python examples/02_alibi.py
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)


def alibi(slopes: torch.Tensor) -> jitgen.Variant:
    """Causal attention biased by ``slopes[h] * (kv_idx - q_idx)``.

    Source:  Press, Smith and Lewis 2022, "Train short, test long".
    """

    def bias(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    def causal(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx

    return jitgen.Variant(score_mod=bias, mask_mod=causal)


def main() -> None:
    heads = 8
    variant = alibi(torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads))
    torch.manual_seed(0)
    k, v = (torch.randn(2, heads, 1000, 64, device=device, dtype=dtype) for _ in range(2))
    # one variant serves the prompt and each token after it: the last query is always the last position
    for what, q_len in (("prompt", 1000), ("again", 1000), ("one token", 1)):
        q = torch.randn(2, heads, q_len, 64, device=device, dtype=dtype)
        begun = time.perf_counter()
        out = jitgen.attention(q, k, v, variant).cpu()  # cpu(): waits for a GPU
        elapsed = time.perf_counter() - begun
        error = (out - reference.attention(q, k, v, variant).cpu()).abs().max().item()
        print(f"{what:9}: {1e3 * elapsed:8.2f} ms, maximum error {error:.1e}")
        assert error < allowed, error


if __name__ == "__main__":
    main()
