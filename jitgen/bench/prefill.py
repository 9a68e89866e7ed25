"""Suite prefill: a batch of requests through a plan, keys ragged or in pages: whole prompts, and chunks of long ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import jitgen
from jitgen.bench.config import BenchConfig
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.peers import only_output
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import rate_text, rate_unit
from jitgen.bench.workloads import causal

HEADS = (32, 8, 128)
# requests, query rows of each, keys of each, page size (0: ragged keys), window (0: all keys before a row), lengths
CUDA_CELLS = (
    (1, 16384, 16384, 0, 0, "const"), (4, 4096, 4096, 0, 0, "const"), (16, 1024, 1024, 0, 0, "const"),
    (1, 16384, 16384, 16, 0, "const"), (4, 4096, 4096, 16, 0, "const"), (16, 1024, 1024, 16, 0, "const"),
    (16, 1024, 1024, 16, 0, "uniform"), (4, 4096, 4096, 64, 0, "const"), (4, 4096, 4096, 1, 0, "const"),
    (4, 4096, 4096, 16, 1024, "const"), (4, 512, 8192, 16, 0, "const"), (1, 2048, 32768, 16, 0, "const"),
)  # fmt: skip
CPU_CELLS = ((1, 1024, 1024, 0, 0, "const"), (1, 1024, 1024, 16, 0, "const"), (4, 64, 1024, 16, 0, "uniform"))
QUICK_CELLS = {"cuda": ((4, 4096, 4096, 16, 0, "const"),), "cpu": ((2, 64, 128, 16, 0, "uniform"),)}
CHECKED = 16  # rows whose output is compared
WORKSPACE_BYTES = 256 << 20  # of FlashInfer
PEER_NAMES = ("flashinfer-fa2", "flashinfer-fa3", "fa3", "sdpa")
NOTE = (
    "BxQ: Q query rows in each of B requests, on K: over K keys each, the last Q of them their own; uniform: rows and keys of "
    "a request are 1/2 to 3/2 of that; operations a second count visible pairs; a plan serves all layers and is not timed"
)


@dataclass
class Prompts:
    """``batch`` requests with ``q_len`` query rows and ``kv_len`` keys each; what a row sees ends with its own key."""

    device: str
    batch: int
    q_len: int
    kv_len: int
    page_size: int
    window: int
    lengths: str
    dtype: str
    seed: int
    heads: tuple[int, int, int] = HEADS

    def __post_init__(self) -> None:
        num_q, num_kv, dim = self.heads
        generator = torch.Generator(self.device).manual_seed(self.seed)
        kind = getattr(torch, self.dtype)
        shares = torch.ones(self.batch)
        if self.lengths == "uniform":
            shares = 0.5 + torch.rand(self.batch, generator=torch.Generator().manual_seed(1))
        self.kv_lens = [max(1, round(self.kv_len * share)) for share in shares.tolist()]
        self.q_lens = [max(1, round(self.q_len * share)) for share in shares.tolist()]
        page = self.page_size or 1
        pages = [-(-n // page) for n in self.kv_lens]

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(kind)

        self.q = random(sum(self.q_lens), num_q, dim)
        self.k, self.v = (random(sum(pages), page, num_kv, dim) for _ in range(2))
        self.q_indptr, self.page_indptr, self.kv_indptr = (self._starts(n) for n in (self.q_lens, pages, self.kv_lens))
        self.kv_counts = torch.tensor(self.kv_lens, dtype=torch.int32, device=self.device)
        self.last_page = (self.kv_counts - 1) % page + 1
        self.pages = torch.arange(sum(pages), dtype=torch.int32, device=self.device)
        if self.page_size:
            order = torch.randperm(sum(pages), generator=generator, device=self.device)
            self.pages = order.int()
        self.rows = torch.linspace(0, len(self.q) - 1, min(CHECKED, len(self.q)), device=self.device).long()

    def _starts(self, lengths: list[int]) -> torch.Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)

    def keys_of(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request, [kv_len, num_kv_heads, head_dim]."""
        first, end = self.page_indptr[b : b + 2].tolist()
        chosen = self.pages[first:end].long()
        return tuple(t[chosen].flatten(0, 1)[: self.kv_lens[b]] for t in (self.k, self.v))  # type: ignore[return-value]

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64 from the definition, the same of all contenders; rows one at a time."""
        return self._wanted

    @cached_property
    def _wanted(self) -> torch.Tensor:
        num_q, num_kv, dim = self.heads
        starts, outs = self.q_indptr.tolist(), []
        for row in self.rows.tolist():
            b = sum(row >= start for start in starts[1:])
            end = self.kv_lens[b] - self.q_lens[b] + row - starts[b] + 1
            k, v = (t[max(0, end - self.window if self.window else 0) : end].double() for t in self.keys_of(b))
            q = self.q[row].double().view(num_kv, -1, dim)
            weights = (torch.einsum("hgd,khd->hgk", q, k) / math.sqrt(dim)).softmax(-1)
            outs.append(torch.einsum("hgk,khd->hgd", weights, v).reshape(num_q, dim))
        return torch.stack(outs)

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours, FlashInfer's wrappers with each backend, and FlashAttention 3; on a CPU SDPA."""
        if self.device == "cpu":
            return {"sdpa": self.sdpa, "jitgen": self.ours}
        peers = {f"flashinfer-{backend}": partial(self.flashinfer, backend) for backend in ("fa2", "fa3")}
        return peers | {"fa3": self.fa3, "jitgen": self.ours}

    def ours(self) -> Callable[[], torch.Tensor]:
        """One plan, and jitgen.ragged_attention or jitgen.paged_attention."""
        window = self.window

        def sliding(b: object, h: object, q_idx: int, kv_idx: int) -> bool:
            return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

        num_q, num_kv, dim = self.heads
        layout = {"page_size": self.page_size} if self.page_size else {"layout": "ragged"}
        plan = jitgen.Plan(
            self.batch, len(self.q), num_q, num_kv, dim, dtype=self.q.dtype, device=self.q.device,
            variant=sliding if window else causal, max_q_len=max(self.q_lens), max_kv_len=max(self.kv_lens), **layout,
        )  # fmt: skip
        if not self.page_size:
            plan.update(self.q_indptr, kv_indptr=self.kv_indptr)
            return lambda: jitgen.ragged_attention(self.q, self.k[:, 0], self.v[:, 0], plan)  # type: ignore[return-value]
        plan.update(self.q_indptr, self.kv_counts)
        table = jitgen.PageTable.csr(self.page_indptr, self.pages)
        return lambda: jitgen.paged_attention(self.q, (self.k, self.v), table, plan)  # type: ignore[return-value]

    def flashinfer(self, backend: str) -> Callable[[], torch.Tensor]:
        """FlashInfer's prefill wrappers; each backend compiles for a minute or more the first time."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        options = {"causal": True, "window_left": self.window - 1 if self.window else -1, "q_data_type": self.q.dtype}
        if not self.page_size:
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)
            wrapper.plan(self.q_indptr, self.kv_indptr, *self.heads, **options)
            return lambda: wrapper.run(self.q, self.k[:, 0], self.v[:, 0])
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        lists = self.q_indptr, self.page_indptr, self.pages, self.last_page
        wrapper.plan(*lists, *self.heads, self.page_size, **options)
        return lambda: wrapper.run(self.q, (self.k, self.v))

    def fa3(self) -> Callable[[], torch.Tensor]:
        """FlashAttention 3, forward-only package; of pages it takes a padded table."""
        from fa3_fwd_interface import flash_attn_varlen_func, flash_attn_with_kvcache

        options = {"causal": True, "window_size": (self.window - 1, 0) if self.window else (-1, -1)}
        longest = max(self.q_lens)
        if not self.page_size:
            starts = {"cu_seqlens_q": self.q_indptr, "cu_seqlens_k": self.kv_indptr}
            call = partial(flash_attn_varlen_func, max_seqlen_q=longest, max_seqlen_k=max(self.kv_lens), **starts, **options)
            return lambda: only_output(call(self.q, self.k[:, 0], self.v[:, 0]))
        counts = self.page_indptr.diff()
        table = torch.zeros(self.batch, int(counts.max()), dtype=torch.int32, device=self.device)
        table[torch.arange(table.shape[1], device=self.device) < counts[:, None]] = self.pages
        call = partial(
            flash_attn_with_kvcache, cache_seqlens=self.kv_counts, page_table=table, cu_seqlens_q=self.q_indptr,
            max_seqlen_q=longest, **options,
        )  # fmt: skip
        return lambda: only_output(call(self.q, self.k, self.v))

    def sdpa(self) -> Callable[[], torch.Tensor]:
        """torch SDPA request by request, on keys copied together beforehand, with a mask where rows are a chunk."""
        calls = []
        for b, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            k, v = (t.transpose(0, 1)[None].contiguous() for t in self.keys_of(b))
            q = self.q[self.q_indptr[b] : self.q_indptr[b + 1]].transpose(0, 1)[None]
            keys = torch.arange(kv_len, device=self.device)
            own = keys[kv_len - q_len :, None]
            is_whole = q_len == kv_len and not self.window
            mask = None if is_whole else (keys <= own) & (own - keys < (self.window or kv_len))
            calls.append(partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=is_whole, enable_gqa=True))
        return lambda: torch.cat([call()[0].transpose(0, 1) for call in calls])

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Operations of both products on visible pairs in a second."""
        pairs = 0
        for q_len, kv_len in zip(self.q_lens, self.kv_lens, strict=True):
            seen = torch.arange(kv_len - q_len + 1, kv_len + 1)
            pairs += int(seen.clamp(max=self.window or kv_len).sum())
        num_q, _, dim = self.heads
        return f"{rate_text(4 * pairs * num_q * dim / ms / 1e9, self.device)} {rate_unit(self.device)[0]}"


def cells(config: BenchConfig) -> list[Cell]:
    """Batches, layouts and masks."""
    sizes = QUICK_CELLS[config.device] if config.quick else CUDA_CELLS if config.device == "cuda" else CPU_CELLS
    dtype, short = ("bfloat16", "bf16") if config.device == "cuda" else ("float32", "fp32")
    num_q, num_kv, dim = HEADS
    found = []
    for batch, q_len, kv_len, page_size, window, lengths in sizes:
        where = f"page {page_size}" if page_size else "ragged"
        keys = f" on {kv_len}" if kv_len != q_len else ""
        mask = f" window {window}" if window else " causal"
        label = f"{short} hd{dim} {num_q}/{num_kv} {where} {batch}x{q_len}{keys}{mask} {lengths}"
        found.append(Cell(label, partial(_make, batch, q_len, kv_len, page_size, window, lengths, dtype)))
    return found


def _make(
    batch: int, q_len: int, kv_len: int, page_size: int, window: int, lengths: str, dtype: str, device: str, seed: int
) -> Prompts:
    return Prompts(device, batch, q_len, kv_len, page_size, window, lengths, dtype, seed)


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("prefill", cells(config), config, NOTE)
