"""Suite mla: decode with absorbed latent attention (DeepSeek): rows of 512 + 64 elements in pages, the first 512 values too.

With 128 query heads there is as much to compute as to read, with 16 the rows only have to be read: hence two figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import jitgen
from jitgen.bench.config import BenchConfig
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.report import SuiteReport
from jitgen.bench.workloads import causal

LATENT, ROTATED = 512, 64  # columns that are keys and values, and those that are keys only
SCALE = 192**-0.5  # of the heads before they were absorbed: 128 + 64
PAGE = 64
# requests, keys of each, query heads, query rows of each request
CUDA_CELLS = (
    (128, 4096, 128, 1), (16, 16384, 128, 1), (1, 65536, 128, 1), (64, 1024, 128, 1), (32, 4096, 128, 2),
    (128, 4096, 16, 1), (16, 16384, 16, 1), (1, 65536, 16, 1), (64, 1024, 16, 1),
)  # fmt: skip
CPU_CELLS = ((1, 4096, 16, 1), (4, 1024, 16, 1))
QUICK_CELLS = {"cuda": ((16, 16384, 128, 1),), "cpu": ((2, 256, 16, 1),)}
CHECKED = 8  # rows whose output is compared
WORKSPACE_BYTES = 128 << 20  # of FlashInfer
PEER_NAMES = ("flashinfer-fa2", "flashinfer-fa3", "sdpa")
NOTE = (
    "GB/s: bytes of the cached rows; TFLOP/s: of the unmasked (query, key) pairs, 2 x (576 + 512) FLOP each; q2: two query "
    "rows of each request, causal; a plan serves all layers and is not timed"
)


@dataclass
class Latent:
    """``batch`` requests of ``kv_len`` keys and ``q_len`` query rows over a cache of latent rows; pages lie scattered."""

    device: str
    batch: int
    kv_len: int
    heads: int
    q_len: int
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        kind, width = getattr(torch, self.dtype), LATENT + ROTATED
        per_request = -(-self.kv_len // PAGE)
        pages, total_q = self.batch * per_request, self.batch * self.q_len
        self.cache = torch.randn(pages, PAGE, width, generator=generator, device=self.device).to(kind)
        self.q = torch.randn(total_q, self.heads, width, generator=generator, device=self.device).to(kind)
        order = torch.randperm(pages, generator=generator, device=self.device)
        self.table = order.int().view(self.batch, per_request)
        ends = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        self.q_indptr, self.kv_indptr = ends * self.q_len, ends * per_request
        self.kv_lens = torch.full((self.batch,), self.kv_len, dtype=torch.int32, device=self.device)
        self.rows = torch.arange(total_q, device=self.device)[:: max(1, total_q // CHECKED)]

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64 from the definition, the same of all contenders; rows one at a time."""
        return self._wanted

    @cached_property
    def _wanted(self) -> torch.Tensor:
        outs = []
        for row in self.rows.tolist():
            b, place = divmod(row, self.q_len)
            keys = self.keys_of(b)[: self.kv_len - self.q_len + place + 1].double()
            weights = (self.q[row].double() @ keys.T * SCALE).softmax(-1)
            outs.append(weights @ keys[:, :LATENT])
        return torch.stack(outs)

    def keys_of(self, b: int) -> torch.Tensor:
        """The rows of a request, [kv_len, 576]."""
        return self.cache[self.table[b].long()].flatten(0, 1)[: self.kv_len]

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours, and FlashInfer's wrapper with each of its backends; on a CPU SDPA."""
        if self.device == "cpu":
            return {"sdpa": self.sdpa, "jitgen": self.ours}
        peers = {f"flashinfer-{backend}": partial(self.flashinfer, backend) for backend in ("fa2", "fa3")}
        return peers | {"jitgen": self.ours}

    def ours(self) -> Callable[[], torch.Tensor]:
        """jitgen.paged_attention over the cache as it is."""
        plan = jitgen.Plan(
            self.batch, self.q.shape[0], self.heads, 1, LATENT + ROTATED, head_dim_v=LATENT, dtype=self.q.dtype,
            device=self.q.device, page_size=PAGE, variant=causal if self.q_len > 1 else None,
        )  # fmt: skip
        plan.update(self.q_indptr, self.kv_lens)
        return lambda: jitgen.paged_attention(self.q, self.cache, self.table, plan, scale=SCALE)  # type: ignore[return-value]

    def flashinfer(self, backend: str) -> Callable[[], torch.Tensor]:
        """FlashInfer's wrapper, with the two parts of q and of the cache as tensors of their own."""
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        wrapper = BatchMLAPagedAttentionWrapper(workspace, backend=backend)
        wrapper.plan(
            self.q_indptr, self.kv_indptr, self.table.flatten(), self.kv_lens, self.heads, LATENT, ROTATED, PAGE,
            self.q_len > 1, SCALE, self.q.dtype, self.q.dtype,
        )  # fmt: skip
        parts = [part.contiguous() for t in (self.q, self.cache) for part in t.split((LATENT, ROTATED), -1)]
        return lambda: wrapper.run(*parts)

    def sdpa(self) -> Callable[[], torch.Tensor]:
        """torch SDPA request by request, on keys copied together beforehand."""
        keys = [self.keys_of(b)[None, None].contiguous() for b in range(self.batch)]
        queries = self.q.view(self.batch, self.q_len, self.heads, -1).transpose(1, 2)
        own = torch.arange(self.q_len, device=self.device)[:, None] + self.kv_len - self.q_len
        mask = torch.arange(self.kv_len, device=self.device) <= own if self.q_len > 1 else None

        def run() -> torch.Tensor:
            outs = [
                F.scaled_dot_product_attention(q[None], k, k[..., :LATENT], attn_mask=mask, scale=SCALE, enable_gqa=True)[0]
                for q, k in zip(queries, keys, strict=True)
            ]
            return torch.stack(outs).transpose(1, 2).flatten(0, 1)

        return run

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Bytes read and operations done in a second."""
        num_bytes = self.batch * self.kv_len * self.cache.shape[-1] * self.cache.element_size()
        pairs = self.batch * sum(self.kv_len - place for place in range(self.q_len))
        flops = 2 * pairs * self.heads * (2 * LATENT + ROTATED)
        return f"{num_bytes / ms / 1e6:.0f} GB/s, {flops / ms / 1e9:.0f} TFLOP/s"


def cells(config: BenchConfig) -> list[Cell]:
    """Batches, lengths and heads."""
    sizes = QUICK_CELLS[config.device] if config.quick else CUDA_CELLS if config.device == "cuda" else CPU_CELLS
    dtype, short = ("bfloat16", "bf16") if config.device == "cuda" else ("float32", "fp32")
    return [
        Cell(f"{short} {LATENT}+{ROTATED} {heads}/1 page {PAGE} {batch}x{kv_len}{f' q{q_len}' if q_len > 1 else ''}",
             partial(_make, batch, kv_len, heads, q_len, dtype))
        for batch, kv_len, heads, q_len in sizes
    ]  # fmt: skip


def _make(batch: int, kv_len: int, heads: int, q_len: int, dtype: str, device: str, seed: int) -> Latent:
    return Latent(device, batch, kv_len, heads, q_len, dtype, seed)


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("mla", cells(config), config, NOTE)
