"""Vertical-slash attention: every head attends to some columns, and to some diagonals, of its own.

The last queries of a prompt say which: their weights are summed by column and by distance, and the largest sums of each head
are kept. Blocks that hold a kept column or diagonal are listed for each head, and inside of them the mask says which elements
are meant, so the result is exact. Tiles without a listed block are never read.

Run it: python examples/09_vertical_slash.py
Source: MInference (Jiang et al. 2024).
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
HEADS, LENGTH, HEAD_DIM, BLOCK, PROBES, COLUMNS, DISTANCES = 4, 2048, 64, 64, 64, 24, 12


def choose(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns, and which distances from the diagonal, every head keeps: bool [HEADS, LENGTH] each."""
    row, column = torch.arange(LENGTH - PROBES, LENGTH, device=device)[:, None], torch.arange(LENGTH, device=device)
    logits = (q[0, :, -PROBES:].float() @ k[0].float().mT / HEAD_DIM**0.5).masked_fill(column > row, -torch.inf)
    weights = logits.softmax(-1)
    by_distance = torch.zeros(HEADS, LENGTH, device=device).scatter_add_(
        1, (row - column).clamp(min=0).flatten().expand(HEADS, -1), weights.flatten(1)
    )
    vertical, slash = (torch.zeros(HEADS, LENGTH, dtype=torch.bool, device=device) for _ in range(2))
    vertical.scatter_(1, weights.sum(1).topk(COLUMNS).indices, True)
    slash.scatter_(1, by_distance.topk(DISTANCES).indices, True)
    slash[:, 0] = True  # every row sees its own key
    return vertical, slash


def block_lists(vertical: torch.Tensor, slash: torch.Tensor) -> jitgen.BlockSparse:
    """The blocks that hold a kept element, as BSR lists of every head."""
    count = LENGTH // BLOCK
    has_column = vertical.view(HEADS, count, BLOCK).any(-1)
    has_distance = torch.nn.functional.pad(slash, (0, BLOCK)).view(HEADS, count + 1, BLOCK).any(-1)
    apart = torch.arange(count, device=device)[:, None] - torch.arange(count, device=device)
    # the distances inside of a block reach over two blocks of distances
    near = has_distance[:, apart.clamp(min=0)] | has_distance[:, (apart - 1).clamp(min=0)]
    listed = (near | has_column[:, None]) & (apart >= 0)
    ends = listed.sum(-1).flatten().cumsum(0).view(HEADS, count)
    indptr = torch.cat([ends[:, :1] - listed[:, :1].sum(-1), ends], -1)
    blocks = jitgen.BlockSparse.bsr(
        indptr, listed.nonzero()[:, 2], (LENGTH, LENGTH), (BLOCK, BLOCK), per_query_head=True
    )
    print(f"{float(listed.float().mean()) * 2:.0%} of the blocks that a causal mask leaves are listed")
    return blocks


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    vertical, slash = choose(q, k)
    blocks = block_lists(vertical, slash)

    def kept(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (vertical[h, kv_idx] | slash[h, q_idx - kv_idx])

    for call in ("first", "second"):
        begun = time.perf_counter()
        out = jitgen.block_sparse_attention(q, k, v, blocks, mask_mod=kept).cpu()
        print(f"{call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms")
    want = reference.attention(q, k, v, jitgen.Variant(mask_mod=kept)).cpu()
    error = (out - want).abs().max().item()
    print(f"maximum error {error:.1e}")
    assert error < allowed, error


if __name__ == "__main__":
    main()
