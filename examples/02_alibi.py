"""ALiBi: a bias linear in the distance, with one slope per head taken from a captured tensor.

Run it: python examples/02_alibi.py
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference


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
    variant = alibi(torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads))
    torch.manual_seed(0)
    k, v = torch.randn(2, heads, 1000, 64), torch.randn(2, heads, 1000, 64)
    # one variant serves the prompt and each token after it: the last query is always the last position
    for what, q_len in (("prompt", 1000), ("again", 1000), ("one token", 1)):
        q = torch.randn(2, heads, q_len, 64)
        begun = time.perf_counter()
        out = jitgen.attention(q, k, v, variant)
        elapsed = time.perf_counter() - begun
        error = (out - reference.attention(q, k, v, variant)).abs().max().item()
        print(f"{what:9}: {1e3 * elapsed:8.2f} ms, maximum error {error:.1e}")
        assert error < 1e-4, error


if __name__ == "__main__":
    main()
