"""Decode batches that suite decode runs, and who runs them: one query row per request, keys in pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from jitgen.bench.peers import Unsupported

ZIPF_POWER = 1.2
LENGTHS = ("const", "uniform", "zipf")


@dataclass(frozen=True)
class DecodeCell:
    """A batch of ``batch`` requests with ``mean`` keys on average, in pages of ``page_size``."""

    batch: int
    mean: int
    lengths: str
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Name of the cell in tables and for --filter."""
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        heads = f"{self.num_q_heads}/{self.num_kv_heads}"
        return f"{short} hd{self.head_dim} {heads} page {self.page_size} {self.batch}x{self.mean} {self.lengths}"

    @property
    def bytes(self) -> int:
        """Bytes of K and V that have to be read."""
        return 2 * sum(key_counts(self)) * self.num_kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize


def key_counts(cell: DecodeCell) -> list[int]:
    """Keys of each request: all the mean; within half of it; or proportional to rank ** -1.2, with the same total."""
    generator = torch.Generator().manual_seed(1)
    if cell.lengths == "const":
        shares = torch.ones(cell.batch)
    elif cell.lengths == "uniform":
        shares = 0.5 + torch.rand(cell.batch, generator=generator)
    else:
        shares = torch.arange(1, cell.batch + 1) ** -ZIPF_POWER
        shares = shares[torch.randperm(cell.batch, generator=generator)]
    counts = (shares / shares.sum() * cell.batch * cell.mean).floor().clamp(min=1)
    return [int(n) for n in counts]


@dataclass(frozen=True)
class DecodeProblem:
    """A cell with its tensors. Pages of a request lie scattered."""

    cell: DecodeCell
    q: torch.Tensor  # [batch, num_q_heads, head_dim]
    cache: torch.Tensor  # [pages, 2, page_size, num_kv_heads, head_dim]
    q_indptr: torch.Tensor
    kv_len: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor

    def keys_of(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request, [kv_len, num_kv_heads, head_dim], copied together."""
        pages = self.cache[self.indices[self.indptr[b] : self.indptr[b + 1]].long()]
        n = int(self.kv_len[b])
        return tuple(pages[:, i].flatten(0, 1)[:n] for i in (0, 1))  # type: ignore[return-value]


def make_problem(cell: DecodeCell, device: str, seed: int = 0) -> DecodeProblem:
    """Normal random tensors of a cell."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        dtype = getattr(torch, cell.dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    counts = torch.tensor(key_counts(cell), dtype=torch.int32)
    pages = (counts + cell.page_size - 1) // cell.page_size
    indptr = F.pad(pages.cumsum(0), (1, 0)).to(torch.int32)
    total = int(indptr[-1])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    cache = torch.empty(
        total, 2, cell.page_size, cell.num_kv_heads, cell.head_dim, device=device, dtype=getattr(torch, cell.dtype)
    )
    for first in range(0, total, 4096):  # in parts: the float32 numbers of a large cache would not fit beside it
        part = cache[first : first + 4096]
        part.copy_(random(*part.shape))
    q_indptr = torch.arange(cell.batch + 1, dtype=torch.int32)
    q = random(cell.batch, cell.num_q_heads, cell.head_dim)
    return DecodeProblem(cell, q, cache, *(t.to(device) for t in (q_indptr, counts, indptr, order)))


# ---- contenders ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeCalls:
    """What a contender does once per step, and what it does in every layer; the second returns the output."""

    plan: Callable[[], object]
    run: Callable[[], torch.Tensor]


def prepare_jitgen(problem: DecodeProblem) -> DecodeCalls:
    """jitgen.paged_attention with a plan for one row per request."""
    import jitgen

    cell = problem.cell
    plan = jitgen.Plan(
        cell.batch, cell.batch, cell.num_q_heads, cell.num_kv_heads, cell.head_dim,
        dtype=problem.q.dtype, max_q_len=1, device=problem.q.device,
    )  # fmt: skip
    table = jitgen.PageTable.csr(problem.indptr, problem.indices)

    def run() -> torch.Tensor:
        return jitgen.paged_attention(problem.q, problem.cache, table, plan)  # type: ignore[return-value]

    return DecodeCalls(lambda: plan.update(problem.q_indptr, problem.kv_len), run)


def prepare_flashinfer(problem: DecodeProblem) -> DecodeCalls:
    """FlashInfer's decode wrapper, on tensor cores where query heads share KV heads."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    cell = problem.cell
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=problem.q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=cell.num_q_heads // cell.num_kv_heads >= 4)
    last = (problem.kv_len - 1) % cell.page_size + 1

    def plan() -> None:
        wrapper.plan(
            problem.indptr, problem.indices, last, cell.num_q_heads, cell.num_kv_heads, cell.head_dim, cell.page_size,
            q_data_type=problem.q.dtype,
        )  # fmt: skip

    return DecodeCalls(plan, lambda: wrapper.run(problem.q, problem.cache))


def prepare_flashinfer_persistent(problem: DecodeProblem) -> DecodeCalls:
    """FlashInfer's load-balanced persistent kernel."""
    from flashinfer import BatchAttention

    cell, wrapper = problem.cell, BatchAttention(kv_layout="NHD")

    def plan() -> None:
        wrapper.plan(
            problem.q_indptr, problem.indptr, problem.indices, problem.kv_len, cell.num_q_heads, cell.num_kv_heads,
            cell.head_dim, cell.head_dim, cell.page_size, q_data_type=problem.q.dtype, kv_data_type=problem.q.dtype,
        )  # fmt: skip

    return DecodeCalls(plan, lambda: wrapper.run(problem.q, problem.cache)[0])


def prepare_sdpa(problem: DecodeProblem) -> DecodeCalls:
    """torch SDPA request by request, on keys copied together beforehand: what there is without a paged kernel."""
    cell = problem.cell
    if cell.batch > 16 and problem.q.is_cuda:
        raise Unsupported("one launch for each request")
    keys = [tuple(t.transpose(0, 1)[None].contiguous() for t in problem.keys_of(b)) for b in range(cell.batch)]
    scale = 1 / math.sqrt(cell.head_dim)

    def run() -> torch.Tensor:
        outs = [
            F.scaled_dot_product_attention(problem.q[b][None, :, None], k, v, scale=scale, enable_gqa=True)[:, :, 0]
            for b, (k, v) in enumerate(keys)
        ]
        return torch.cat(outs)

    return DecodeCalls(lambda: None, run)


PEERS: dict[str, tuple[Callable[[DecodeProblem], DecodeCalls], tuple[str, ...]]] = {
    "flashinfer": (prepare_flashinfer, ("cuda",)),
    "flashinfer-persistent": (prepare_flashinfer_persistent, ("cuda",)),
    "sdpa": (prepare_sdpa, ("cpu", "cuda")),
}


def expected(problem: DecodeProblem) -> torch.Tensor:
    """Attention in float64 from the definition; requests one at a time."""
    outs, group = [], problem.cell.num_q_heads // problem.cell.num_kv_heads
    for b in range(problem.cell.batch):
        k, v = (t.double().repeat_interleave(group, 1) for t in problem.keys_of(b))
        logits = torch.einsum("hd,khd->hk", problem.q[b].double(), k) / math.sqrt(problem.cell.head_dim)
        outs.append(torch.einsum("hk,khd->hd", logits.softmax(-1), v))
    return torch.stack(outs)
