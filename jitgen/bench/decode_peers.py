"""Batches that suite decode runs, and who runs them: one query row per request, or prefills among them; keys in pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from jitgen.bench.peers import Unsupported

ZIPF_POWER = 1.2
LENGTHS = ("const", "uniform", "zipf")
ROWS_AT_ONCE = 512  # of the definition: logits in float64 take memory


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
    prefills: int = 0  # the first so many requests have a query row for every key, and all are causal

    @property
    def label(self) -> str:
        """Name of the cell in tables and for --filter."""
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        heads = f"{self.num_q_heads}/{self.num_kv_heads}"
        mixed = f" {self.prefills} prefills" if self.prefills else ""
        return f"{short} hd{self.head_dim} {heads} page {self.page_size} {self.batch}x{self.mean} {self.lengths}{mixed}"

    @property
    def bytes(self) -> int:
        """Bytes of K and V that have to be read."""
        return 2 * sum(key_counts(self)) * self.num_kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize


def row_counts(cell: DecodeCell) -> list[int]:
    """Query rows of each request."""
    return [n if b < cell.prefills else 1 for b, n in enumerate(key_counts(cell))]


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
    q: torch.Tensor  # [rows, num_q_heads, head_dim]
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
    q_indptr = F.pad(torch.tensor(row_counts(cell)).cumsum(0), (1, 0)).to(torch.int32)
    q = random(int(q_indptr[-1]), cell.num_q_heads, cell.head_dim)
    return DecodeProblem(cell, q, cache, *(t.to(device) for t in (q_indptr, counts, indptr, order)))


# ---- contenders ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeCalls:
    """What a contender does once per step, and what it does in every layer; the second returns the output."""

    plan: Callable[[], object]
    run: Callable[[], torch.Tensor]


def causal(b: object, h: object, q_idx: int, kv_idx: int) -> bool:
    """What a row sees."""
    return kv_idx <= q_idx


def prepare_jitgen(problem: DecodeProblem) -> DecodeCalls:
    """jitgen.paged_attention with one plan for all requests."""
    import jitgen

    cell = problem.cell
    options = {"variant": causal, "page_size": cell.page_size} if cell.prefills else {"max_q_len": 1}
    plan = jitgen.Plan(
        cell.batch, problem.q.shape[0], cell.num_q_heads, cell.num_kv_heads, cell.head_dim,
        dtype=problem.q.dtype, device=problem.q.device, **options,
    )  # fmt: skip
    table = jitgen.PageTable.csr(problem.indptr, problem.indices)

    def run() -> torch.Tensor:
        return jitgen.paged_attention(problem.q, problem.cache, table, plan)  # type: ignore[return-value]

    return DecodeCalls(lambda: plan.update(problem.q_indptr, problem.kv_len), run)


def prepare_flashinfer(problem: DecodeProblem, backend: str = "") -> DecodeCalls:
    """FlashInfer's decode wrapper: as it is by default, or on tensor cores with one of its backends."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    cell = problem.cell
    _refuse_prefills(cell)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=problem.q.device)
    options = {"use_tensor_cores": True, "backend": backend} if backend else {}
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", **options)
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
            cell.head_dim, cell.head_dim, cell.page_size, causal=cell.prefills > 0, q_data_type=problem.q.dtype,
            kv_data_type=problem.q.dtype,
        )  # fmt: skip

    return DecodeCalls(plan, lambda: wrapper.run(problem.q, problem.cache)[0])


@dataclass(frozen=True)
class Halves:
    """The prefills and the decodes of a batch, each as a batch of its own: q_indptr, indptr, indices, last_page_len."""

    rows: int  # of the prefills
    prefill: tuple[torch.Tensor, ...]
    decode: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, problem: DecodeProblem) -> Halves:
        cell, n = problem.cell, problem.cell.prefills
        if n == 0:
            raise Unsupported("no prefills in the batch")
        last = (problem.kv_len - 1) % cell.page_size + 1
        pages, rows = int(problem.indptr[n]), int(problem.q_indptr[n])
        prefill = problem.q_indptr[: n + 1], problem.indptr[: n + 1], problem.indices[:pages], last[:n]
        decode = problem.q_indptr[n:] - rows, problem.indptr[n:] - pages, problem.indices[pages:], last[n:]
        return cls(rows, tuple(t.contiguous() for t in prefill), tuple(t.contiguous() for t in decode))


def prepare_flashinfer_pod(problem: DecodeProblem) -> DecodeCalls:
    """FlashInfer's kernel for prefills and decodes at the same time."""
    from flashinfer import BatchPODWithPagedKVCacheWrapper

    cell, halves, q, cache = problem.cell, Halves.of(problem), problem.q, problem.cache
    wrapper = BatchPODWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8, device=q.device), "NHD")
    heads = cell.num_q_heads, cell.num_kv_heads, cell.head_dim, cell.page_size

    def plan() -> None:
        wrapper.plan(*halves.prefill, *halves.decode, *heads, q_data_type=q.dtype, kv_data_type=q.dtype)

    def run() -> torch.Tensor:
        return torch.cat(wrapper.run(q[: halves.rows], cache, q[halves.rows :], cache, causal_p=True)[:2])

    return DecodeCalls(plan, run)


def prepare_flashinfer_two(problem: DecodeProblem) -> DecodeCalls:
    """FlashInfer's prefill wrapper, then its decode wrapper."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    cell, halves, q, cache = problem.cell, Halves.of(problem), problem.q, problem.cache
    spaces = [torch.empty(256 << 20, dtype=torch.uint8, device=q.device) for _ in range(2)]
    prefill = BatchPrefillWithPagedKVCacheWrapper(spaces[0], "NHD")
    decode = BatchDecodeWithPagedKVCacheWrapper(spaces[1], "NHD", use_tensor_cores=cell.num_q_heads // cell.num_kv_heads >= 4)
    heads = cell.num_q_heads, cell.num_kv_heads, cell.head_dim, cell.page_size

    def plan() -> None:
        prefill.plan(*halves.prefill, *heads, causal=True, q_data_type=q.dtype, kv_data_type=q.dtype)
        decode.plan(*halves.decode[1:], *heads, q_data_type=q.dtype)

    def run() -> torch.Tensor:
        return torch.cat([prefill.run(q[: halves.rows], cache), decode.run(q[halves.rows :], cache)])

    return DecodeCalls(plan, run)


def _refuse_prefills(cell: DecodeCell) -> None:
    if cell.prefills:
        raise Unsupported("one row per request only")


def prepare_sdpa(problem: DecodeProblem) -> DecodeCalls:
    """torch SDPA request by request, on keys copied together beforehand: what there is without a paged kernel."""
    cell = problem.cell
    _refuse_prefills(cell)
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
    "flashinfer-fa2": (partial(prepare_flashinfer, backend="fa2"), ("cuda",)),
    "flashinfer-fa3": (partial(prepare_flashinfer, backend="fa3"), ("cuda",)),
    "flashinfer-persistent": (prepare_flashinfer_persistent, ("cuda",)),
    "flashinfer-pod": (prepare_flashinfer_pod, ("cuda",)),
    "flashinfer-two": (prepare_flashinfer_two, ("cuda",)),
    "sdpa": (prepare_sdpa, ("cpu", "cuda")),
}


def expected(problem: DecodeProblem) -> torch.Tensor:
    """Attention in float64 from the definition; some rows of a request at a time."""
    outs, group, rows = [], problem.cell.num_q_heads // problem.cell.num_kv_heads, row_counts(problem.cell)
    for b, start in enumerate(problem.q_indptr[:-1].tolist()):
        k, v = (t.double().repeat_interleave(group, 1) for t in problem.keys_of(b))
        for first in range(0, rows[b], ROWS_AT_ONCE):
            q = problem.q[start + first : start + min(first + ROWS_AT_ONCE, rows[b])].double()
            logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(problem.cell.head_dim)
            last = k.shape[0] - rows[b] + first + torch.arange(q.shape[0], device=q.device)
            logits.masked_fill_(torch.arange(k.shape[0], device=q.device) > last[:, None], -math.inf)
            outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    return torch.cat(outs)
