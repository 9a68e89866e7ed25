"""Documents packed into one sequence: each token attends to the earlier tokens of its own document.

Tiles outside the documents are never read; no table of blocks is built. Run it: python examples/03_document_mask.py
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)


def packed(lengths: list[int]) -> jitgen.Variant:
    """Causal attention inside documents of these lengths."""
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().to(device)
    start = torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    # doc[q_idx] == doc[kv_idx] and causal says the same; this form gives bounds that a whole tile can be compared with
    def same_document(b, h, q_idx, kv_idx):
        return (kv_idx >= start[doc[q_idx]]) & (kv_idx <= q_idx)

    return jitgen.Variant(mask_mod=same_document)


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 4096, 64, device=device, dtype=dtype) for _ in range(3))
    for what, lengths in (("one", [4096]), ("four", [1500, 96, 2000, 500]), ("many", [64] * 64)):
        variant = packed(lengths)
        for call in ("first", "second"):
            begun = time.perf_counter()
            out = jitgen.attention(q, k, v, variant).cpu()  # cpu(): waits for a GPU
            print(f"{what:4} document(s), {call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms", end=", ")
        # the oracle holds the whole matrix of logits, so only the last rows are compared: they keep their positions
        last = reference.attention(q[:, :, -512:], k, v, variant).cpu()
        error = (out[:, :, -512:] - last).abs().max().item()
        print(f"maximum error {error:.1e}")
        assert error < allowed, error


if __name__ == "__main__":
    main()
