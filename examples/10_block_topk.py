"""Prefill that reads chosen blocks only: every tile of query rows and KV head attends to the blocks that suit it best.

A block of keys is scored by the mean of its keys against the mean of a tile's queries, as MoBA and the selection of Native
Sparse Attention do; the best are attended, and the tile's own block always. A request in a paged cache may have such lists
beside one that is being decoded, and the causal mask sees true positions.

Run it: python examples/10_block_topk.py
Source: MoBA (Lu et al. 2025), Native Sparse Attention (Yuan et al. 2025).
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
HEADS, KV_HEADS, HEAD_DIM, PAGE, BLOCK, TILE, CHOSEN = 8, 2, 64, 16, 64, 64, 4
Q_LEN, KV_LEN = 640, 1280  # a chunk of a prompt behind what the cache has of it
GROUP = HEADS // KV_HEADS


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def choose(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Blocks of every tile and KV head [tiles, KV_HEADS, CHOSEN], the one with the tile's own rows among them."""
    tiles = q.float().view(-1, TILE, KV_HEADS, GROUP, HEAD_DIM).mean((1, 3))
    blocks = k.float().view(-1, BLOCK, KV_HEADS, HEAD_DIM).mean(1)
    own = torch.arange((KV_LEN - Q_LEN) // BLOCK, KV_LEN // BLOCK, device=device).view(-1, 1, 1)
    number = torch.arange(KV_LEN // BLOCK, device=device)
    score = torch.einsum("thd,nhd->thn", tiles, blocks)
    score = score.masked_fill(number > own, -torch.inf).masked_fill(number == own, torch.inf)
    return score.topk(CHOSEN, dim=-1).indices


def main() -> None:
    torch.manual_seed(0)
    cache = torch.randn(KV_LEN // PAGE, 2, PAGE, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    table = torch.randperm(KV_LEN // PAGE, device=device)[None]
    q = torch.randn(Q_LEN, HEADS, HEAD_DIM, device=device, dtype=dtype)
    k, v = (cache[table[0], i].flatten(0, 1) for i in (0, 1))
    sizes = torch.tensor([0, Q_LEN], device=device), table, torch.tensor([KV_LEN], device=device)

    tiles = Q_LEN // TILE
    chosen = choose(q, k)
    starts = torch.arange(tiles + 1, device=device) * TILE
    selection = jitgen.Selection(*sizes, chosen, PAGE, list_indptr=starts, block_size=BLOCK)
    plan = jitgen.Plan(
        tiles, Q_LEN, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype, page_size=PAGE, selection="even",
        variant=jitgen.Variant(mask_mod=causal), device=device,
    ).update(selection)  # fmt: skip
    for call in ("first", "second"):
        begun = time.perf_counter()
        out = jitgen.paged_attention(q, cache, selection, plan).cpu()
        print(f"{call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms")

    is_read = torch.zeros(tiles, KV_HEADS, KV_LEN // BLOCK, dtype=torch.bool, device=device).scatter_(2, chosen, True)

    def wanted(b, h, q_idx, kv_idx, *, kv_h):
        return is_read[(q_idx - (KV_LEN - Q_LEN)) // TILE, kv_h, kv_idx // BLOCK] & (kv_idx <= q_idx)

    rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
    want = reference.attention(*rows, jitgen.Variant(mask_mod=wanted))[0].transpose(0, 1)
    error = (out - want.cpu()).abs().max().item()
    print(f"{chosen.numel() / (tiles * KV_HEADS * KV_LEN // BLOCK):.0%} of the blocks are read; maximum error {error:.1e}")
    assert error < allowed, error


if __name__ == "__main__":
    main()
