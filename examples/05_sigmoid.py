"""Sigmoid attention: softmax replaced by a sigmoid of each logit, with no denominator.

Run it: python examples/05_sigmoid.py
"""

from __future__ import annotations

import math
import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)


class Sigmoid(jitgen.OnlineNorm):
    """Weights ``sigmoid(score)``; keys are independent, so nothing is carried along a row.

    Source:  Ramapuram et al. 2024, "Theory, analysis, and best practices for sigmoid self-attention".
    """

    state = {}  # noqa: RUF012  (named row values and where they start; none here)
    order = "any"

    def update(self, score, state):
        return torch.sigmoid(score), 1.0, state  # weights, factor for the output so far, new state

    def finalize(self, o, state):
        return o

    def merge(self, a, b):
        return {}, 1.0, 1.0  # of two parts of the keys: state, factors for their outputs. Plans may cut long requests


def main() -> None:
    torch.manual_seed(0)
    length = 1000
    q, k, v = (torch.randn(1, 8, length, 64, device=device, dtype=dtype) for _ in range(3))
    bias = -math.log(length)  # keeps the sum of the weights near 1 at the start of training

    def shifted(score, b, h, q_idx, kv_idx):
        return score + bias

    variant = jitgen.Variant(score_mod=shifted, softmax=Sigmoid)
    for call in ("first", "second"):
        begun = time.perf_counter()
        out = jitgen.attention(q, k, v, variant).cpu()  # cpu(): waits for a GPU
        print(f"{call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms")
    by_hand = (torch.sigmoid(q @ k.mT / math.sqrt(64) + bias) @ v).cpu()
    error = (out - reference.attention(q, k, v, variant).cpu()).abs().max().item()
    print(f"maximum error {error:.1e} against the oracle", end=", ")
    print(f"{(out - by_hand).abs().max().item():.1e} against PyTorch by hand")
    assert error < allowed, error


if __name__ == "__main__":
    main()
