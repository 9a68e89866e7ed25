"""A batch of requests of any lengths for tests of the serving calls: its tensors in every layout, and the oracle's results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import jitgen
from jitgen import reference
from jitgen.ir import walk
from jitgen.program import uses_index

Tensor = torch.Tensor


@dataclass
class Batch:
    """Requests with ``lengths`` of (query rows, keys), and normally distributed q, k and v."""

    lengths: Sequence[tuple[int, int]]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    q: Tensor = field(init=False)
    k: list[Tensor] = field(init=False)  # of every request
    v: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.head_dim_v = self.head_dim_v or self.head_dim
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        self.q = random(self.total_q, self.num_q_heads, self.head_dim)
        self.k = [random(n, self.num_kv_heads, self.head_dim) for _, n in self.lengths]
        self.v = [random(n, self.num_kv_heads, self.head_dim_v) for _, n in self.lengths]

    @property
    def total_q(self) -> int:
        return sum(n for n, _ in self.lengths)

    def ints(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def starts(self, sizes: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return self.ints([sum(sizes[:i]) for i in range(len(sizes) + 1)], dtype)

    def q_indptr(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.starts([n for n, _ in self.lengths], dtype)

    def kv_indptr(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.starts([n for _, n in self.lengths], dtype)

    def kv_len(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.ints([n for _, n in self.lengths], dtype)

    def plan(self, variant: object = None, *, room: int = 0, **options: object) -> jitgen.Plan:
        """A plan for this batch, updated with its lengths."""
        plan = jitgen.Plan(
            max(1, len(self.lengths) + room), max(1, self.total_q + room), self.num_q_heads, self.num_kv_heads, self.head_dim,
            head_dim_v=self.head_dim_v, dtype=self.dtype, variant=variant, device=self.device, **options,
        )  # fmt: skip
        return self.update(plan)

    def update(self, plan: jitgen.Plan) -> jitgen.Plan:
        if plan.layout == "ragged":
            return plan.update(self.q_indptr(), kv_indptr=self.kv_indptr())
        return plan.update(self.q_indptr(), self.kv_len())

    def ragged(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.k), torch.cat(self.v)

    def pages(self, page_size: int, spare: int = 3) -> tuple[Tensor, Tensor, list[list[int]]]:
        """K and V caches [pages, page_size, heads, dim] in scattered order, NaN wherever no key lies, and the page lists."""
        counts = [-(-n // page_size) for _, n in self.lengths]
        total = sum(counts) + spare
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        lists, at = [], 0
        caches = [
            torch.full((total, page_size, self.num_kv_heads, d), math.nan, dtype=self.dtype, device=self.device)
            for d in (self.head_dim, self.head_dim_v)
        ]
        for b, count in enumerate(counts):
            lists.append(order[at : at + count])
            at += count
            for cache, keys in zip(caches, (self.k[b], self.v[b]), strict=True):
                room = torch.full((count * page_size, *keys.shape[1:]), math.nan, dtype=self.dtype, device=self.device)
                room[: keys.shape[0]] = keys
                cache[lists[-1]] = room.view(count, page_size, *keys.shape[1:])
        return caches[0], caches[1], lists

    def csr(self, lists: list[list[int]], dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
        return self.starts([len(pages) for pages in lists], dtype), self.ints(
            [page for pages in lists for page in pages], dtype
        )

    def block_table(self, lists: list[list[int]], dtype: torch.dtype = torch.int32, extra: int = 2) -> Tensor:
        """Unused entries are no page numbers: they must not be read."""
        width = max((len(pages) for pages in lists), default=0) + extra
        return self.ints([pages + [-1] * (width - len(pages)) for pages in lists], dtype)

    def expected(
        self,
        variant: object = None,
        *,
        scale: float | None = None,
        q_index: str | None = None,
        lists: list[list[int]] | None = None,
        page_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp (NaN if the variant has none) of the oracle, row by row as the calls return them. ``lists``: the
        pages of each request, for variants that read them."""
        variant = jitgen.Variant() if variant is None else jitgen.Variant.of(variant)
        program = variant.trace().program
        of_rows = () if program.rows is None else program.rows.roots()
        reads_request = uses_index(program, "b") or any(n.op == "index" and n.attr == "b" for n in walk(*of_rows))
        has_lse = program.norm is None or program.norm.lse is not None
        out = torch.zeros(self.total_q, self.num_q_heads, self.head_dim_v, dtype=torch.float64, device=self.device)
        lse = torch.full((self.total_q, self.num_q_heads), math.nan, dtype=torch.float64, device=self.device)
        at = 0
        for b, (rows, _) in enumerate(self.lengths):
            if rows:
                place = slice(at, at + rows)
                # the oracle numbers the requests it is given: a variant that reads b gets as many copies as come before
                copies = b + 1 if reads_request else 1
                inputs = [t.transpose(0, 1).expand(copies, -1, -1, -1) for t in (self.q[place], self.k[b], self.v[b])]
                table = None if lists is None else self.ints(lists[b] or [0]).expand(copies, -1)
                options = {"scale": scale, "q_index": q_index, "page_table": table, "page_size": page_size}
                got = reference.attention(*inputs, variant, return_lse=has_lse, **options)
                one = got[0] if has_lse else got
                out[place] = one[-1].transpose(0, 1)
                if has_lse:
                    lse[place] = got[1][-1].T
            at += rows
        return out, lse


def poisoned(plan: jitgen.Plan, q: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers for out= and lse=, full of NaN."""
    out = torch.full((q.shape[0], plan.num_q_heads, plan.head_dim_v), math.nan, dtype=q.dtype, device=q.device)
    return out, torch.full(out.shape[:2], math.nan, dtype=torch.float32, device=q.device)
