"""Requests that share keys at several levels, for tests of cascades: the cascade, the cache, and the oracle's results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from serving_batch import Batch

import jitgen

Tensor = torch.Tensor


@dataclass
class SharedBatch:
    """Requests of ``q_lens`` rows; ``levels`` lists the groups of each level as (requests, keys), the last by request."""

    q_lens: Sequence[int]
    levels: Sequence[Sequence[tuple[int, int]]]
    page_size: int = 4
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    whole: Batch = field(init=False)  # the same requests, each with all its keys

    def __post_init__(self) -> None:
        self.head_dim_v = self.head_dim_v or self.head_dim
        for groups in self.levels:
            assert sum(n for n, _ in groups) == len(self.q_lens)
        generator = torch.Generator().manual_seed(self.seed + 1)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.q_lens]
        self.groups: list[list[tuple[int, int, Tensor, Tensor]]] = []  # rows, keys, k, v by level
        for groups in self.levels:
            found, first = [], 0
            for requests, keys in groups:
                k, v = (
                    torch.randn(keys, self.num_kv_heads, d, generator=generator).to(self.device, self.dtype)
                    for d in (self.head_dim, self.head_dim_v)
                )
                found.append((sum(self.q_lens[first : first + requests]), keys, k, v))
                for b in range(first, first + requests):
                    parts[b].append((k, v))
                first += requests
            self.groups.append(found)
        lengths = [(n, sum(k.shape[0] for k, _ in own)) for n, own in zip(self.q_lens, parts, strict=True)]
        self.whole = Batch(
            lengths, self.num_q_heads, self.num_kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.device, self.seed
        )
        self.whole.k = [torch.cat([k for k, _ in own]) for own in parts]
        self.whole.v = [torch.cat([v for _, v in own]) for own in parts]

    def build(self, spare: int = 3, form: str = "csr") -> tuple[tuple[Tensor, Tensor], jitgen.Cascade]:
        """K and V caches in scattered pages, NaN wherever no key lies, and the cascade."""
        size = self.page_size
        counts = [[-(-keys // size) for _, keys, _, _ in groups] for groups in self.groups]
        total = sum(map(sum, counts)) + spare
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        caches = tuple(
            torch.full((total, size, self.num_kv_heads, d), math.nan, dtype=self.dtype, device=self.device)
            for d in (self.head_dim, self.head_dim_v)
        )
        levels, at = [], 0
        for groups, sizes in zip(self.groups, counts, strict=True):
            lists = []
            for (_, _, k, v), count in zip(groups, sizes, strict=True):
                lists.append(order[at : at + count])
                at += count
                for cache, t in zip(caches, (k, v), strict=True):
                    for i, page in enumerate(lists[-1]):
                        part = t[i * size : (i + 1) * size]
                        cache[page, : part.shape[0]] = part
            table = self.whole.csr(lists) if form == "csr" else self.whole.block_table(lists)
            rows, keys = [n for n, _, _, _ in groups], [n for _, n, _, _ in groups]
            levels.append((self.whole.starts(rows), table, self.whole.ints(keys)))
        return caches, jitgen.Cascade(levels)  # type: ignore[return-value]

    def plan(self, variant: object = None, *, room: int = 0, **options: object) -> jitgen.Plan:
        rows = max(1, self.whole.total_q + room)
        return jitgen.Plan(
            max(1, len(self.q_lens) + room), rows, self.num_q_heads, self.num_kv_heads, self.head_dim,
            head_dim_v=self.head_dim_v, dtype=self.dtype, variant=variant, device=self.device,
            **{"levels": max(2, len(self.levels)), **options},
        )  # fmt: skip
