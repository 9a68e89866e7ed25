"""Requests whose rows see chosen blocks of keys, for tests of selections: the lists, and the oracle's results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from serving_batch import Batch

import jitgen
from jitgen import reference

Tensor = torch.Tensor


@dataclass
class ChosenBatch:
    """``lengths`` of (query rows, keys); each list of ``tile`` rows has ``blocks`` blocks of ``block_size`` keys for each KV
    head, or the same for all with ``shared``, and the newest block that its last row may see among them with ``newest``."""

    lengths: Sequence[tuple[int, int]]
    tile: int = 4
    blocks: int = 3
    block_size: int = 8
    page_size: int = 8
    shared: bool = False
    newest: bool = True
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.whole = Batch(
            self.lengths, self.num_q_heads, self.num_kv_heads, self.head_dim, 0, self.dtype, self.device, self.seed
        )
        self.generator = torch.Generator().manual_seed(self.seed + 2)
        starts, self.rows = [0], []  # of each list: request, first and last row in it
        for b, (q_len, _) in enumerate(self.lengths):
            for first in range(0, q_len, self.tile):
                self.rows.append((b, first, min(first + self.tile, q_len)))
                starts.append(starts[-1] + self.rows[-1][2] - first)
        self.list_indptr = self.whole.ints(starts)
        self.chosen = self.draw()

    def draw(self) -> Tensor:
        """Block numbers [lists, KV heads, blocks] in no order; -1 where a request has fewer."""
        heads = 1 if self.shared else self.num_kv_heads
        found = torch.full((len(self.rows), heads, self.blocks), -1)
        for i, (b, _, end) in enumerate(self.rows):
            q_len, kv_len = self.lengths[b]
            newest = max(kv_len - q_len + end - 1, 0) // self.block_size
            for h in range(heads):
                most = newest + 1 if self.newest else -(-kv_len // self.block_size)
                order = torch.randperm(most, generator=self.generator)[: self.blocks]
                if self.newest and newest not in order.tolist():
                    order[int(torch.randint(len(order), (), generator=self.generator))] = newest
                found[i, h, : len(order)] = order
        place = torch.randperm(self.blocks, generator=self.generator)
        return found[:, :, place].int().to(self.device)

    def caches(self, behind: float = float("nan")) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """K and V in scattered pages, with ``behind`` where no key lies, and the page table."""
        k, v, lists = self.whole.pages(self.page_size)
        return tuple(t.nan_to_num(nan=behind) for t in (k, v)), self.whole.block_table(lists)  # type: ignore[return-value]

    def select(self, table: Tensor) -> jitgen.Selection:
        return jitgen.Selection(
            self.whole.q_indptr(), table, self.whole.kv_len(), self.chosen, self.page_size, list_indptr=self.list_indptr,
            block_size=self.block_size,
        )  # fmt: skip

    def plan(self, variant: object = None, *, room: int = 0, **options: object) -> jitgen.Plan:
        w = self.whole
        return jitgen.Plan(
            len(self.rows) + room, w.total_q + room, w.num_q_heads, w.num_kv_heads, w.head_dim, dtype=w.dtype, variant=variant,
            device=w.device, **{"page_size": self.page_size, "selection": "even" if self.newest else "uneven", **options},
        )  # fmt: skip

    def expected(self, variant: jitgen.Variant | None = None) -> tuple[Tensor, Tensor]:
        """Output and logsumexp in float64, as the calls return them."""
        variant, w = variant or jitgen.Variant(), self.whole
        out = torch.zeros(w.total_q, w.num_q_heads, w.head_dim, dtype=torch.float64, device=w.device)
        lse = torch.zeros(w.total_q, w.num_q_heads, dtype=torch.float64, device=w.device)
        at = 0
        for b, (q_len, kv_len) in enumerate(self.lengths):
            seen = torch.zeros(w.num_kv_heads, q_len, kv_len + self.block_size, dtype=torch.bool)
            for i, (of, first, end) in enumerate(self.rows):
                for h in range(w.num_kv_heads if of == b else 0):
                    for block in self.chosen[i, 0 if self.shared else h].tolist():
                        if block >= 0:
                            seen[h, first:end, block * self.block_size :][..., : self.block_size] = True
            seen = seen.to(w.device)

            def is_chosen(b, h, q_idx, kv_idx, *, kv_h, ctx_len, seen=seen):  # type: ignore[no-untyped-def]
                return seen[kv_h, q_idx - ctx_len, kv_idx]

            own = variant.mask_mod
            masked = jitgen.Variant(
                score_mod=variant.score_mod, mask_mod=is_chosen if own is None else jitgen.and_masks(is_chosen, own),
                sink=variant.sink, output_transform=variant.output_transform, lse_transform=variant.lse_transform,
            )  # fmt: skip
            place = slice(at, at + q_len)
            inputs = [t.transpose(0, 1).expand(b + 1, -1, -1, -1) for t in (w.q[place], w.k[b], w.v[b])]
            found, found_lse = reference.attention(*inputs, masked, return_lse=True)  # as many copies as there are requests
            out[place], lse[place] = found[-1].transpose(0, 1), found_lse[-1].T
            at += q_len
        return out, lse
