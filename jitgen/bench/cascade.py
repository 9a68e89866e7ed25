"""Suite cascade: one token of every request, where all share a prefix: listed once, for each request, and copied for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

import jitgen
from jitgen.bench.config import BenchConfig
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.report import SuiteReport

PAGE = 16
PEER_NAMES = ("flashinfer",)
# requests, keys of the prefix, keys of each suffix
CUDA_CELLS = ((64, 32768, 256), (16, 8192, 256), (128, 32768, 128), (4, 2048, 512))
CPU_CELLS = ((16, 4096, 64),)
QUICK_CELLS = {"cuda": ((64, 32768, 256),), "cpu": ((4, 256, 32),)}
CHECKED = 8  # requests whose output is compared
NOTE = (
    "unshared: the same pages listed for every request, which L2 may hold; copies: one for every request, as in a cache "
    "without sharing has them; a plan serves all layers and is not timed"
)
SPARE_BYTES = 4 << 30  # left free on a GPU beside the copies


@dataclass
class SharedPrefix:
    """Decode of ``batch`` requests over a prefix of all and a suffix of each; pages lie scattered."""

    device: str
    batch: int
    prefix: int
    suffix: int
    dtype: str
    seed: int
    heads: tuple[int, int, int] = (32, 8, 128)

    def __post_init__(self) -> None:
        num_q, num_kv, dim = self.heads
        generator = torch.Generator(self.device).manual_seed(self.seed)
        kind = getattr(torch, self.dtype)
        pages = (self.prefix + self.batch * self.suffix) // PAGE
        self.cache = torch.randn(pages, 2, PAGE, num_kv, dim, generator=generator, device=self.device).to(kind)
        self.q = torch.randn(self.batch, num_q, dim, generator=generator, device=self.device).to(kind)
        order = torch.randperm(pages, generator=generator, device=self.device).int()
        self.shared = order[: self.prefix // PAGE]
        self.own = order[self.prefix // PAGE :].view(self.batch, -1)
        self.q_indptr = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        self.rows = torch.arange(self.batch, device=self.device)[:: max(1, self.batch // CHECKED)]

    def ints(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64 from the definition, the same of all contenders; requests one at a time."""
        return self._wanted

    @cached_property
    def _wanted(self) -> torch.Tensor:
        num_q, num_kv, dim = self.heads
        outs = []
        for b in self.rows.tolist():
            pages = self.cache[torch.cat([self.shared, self.own[b]]).long()]
            k, v = (pages[:, i].flatten(0, 1).double() for i in (0, 1))
            q = self.q[b].double().view(num_kv, -1, dim)
            weights = (torch.einsum("hgd,khd->hgk", q, k) / math.sqrt(dim)).softmax(-1)
            outs.append(torch.einsum("hgk,khd->hgd", weights, v).reshape(num_q, dim))
        return torch.stack(outs)

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours, the same without sharing, and FlashInfer's cascade."""
        found: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {"jitgen": self.ours, "jitgen-unshared": self.unshared}
        if self.has_room():
            found["jitgen-copies"] = self.copies
        return found | ({"flashinfer": self.flashinfer} if self.device == "cuda" else {})

    def has_room(self) -> bool:
        """Whether a GPU can hold a copy of the prefix for every request; a CPU is trusted to."""
        page = self.cache.nbytes // self.cache.shape[0]
        needed = self.batch * (self.prefix + self.suffix) // PAGE * page + SPARE_BYTES
        return self.device != "cuda" or torch.cuda.mem_get_info()[0] >= needed

    def plan(self, **options: Any) -> jitgen.Plan:
        fixed = {"dtype": self.q.dtype, "page_size": PAGE, "device": self.device}
        return jitgen.Plan(self.batch, self.batch, *self.heads, **fixed, **options)

    def ours(self) -> Callable[[], torch.Tensor]:
        prefix = (self.ints(0, self.batch), self.shared[None], self.ints(self.prefix))
        cascade = jitgen.Cascade([prefix, (self.q_indptr, self.own, self.ints(*[self.suffix] * self.batch))])
        plan = self.plan(levels=2).update(cascade)
        return lambda: jitgen.paged_attention(self.q, self.cache, cascade, plan)  # type: ignore[return-value]

    def alone(self, cache: torch.Tensor, table: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A call that knows of no sharing."""
        plan = self.plan(max_q_len=1).update(self.q_indptr, self.ints(*[self.prefix + self.suffix] * self.batch))
        return lambda: jitgen.paged_attention(self.q, cache, table, plan)  # type: ignore[return-value]

    def table(self) -> torch.Tensor:
        """Pages of each request, the shared ones in front."""
        return torch.cat([self.shared.expand(self.batch, -1), self.own], 1).contiguous()

    def unshared(self) -> Callable[[], torch.Tensor]:
        return self.alone(self.cache, self.table())

    def copies(self) -> Callable[[], torch.Tensor]:
        table = self.table()
        order = torch.randperm(table.numel(), device=self.device)
        cache = torch.empty(table.numel(), *self.cache.shape[1:], dtype=self.cache.dtype, device=self.device)
        for pages, places in zip(table, order.view(table.shape), strict=True):
            cache[places] = self.cache[pages.long()]
        return self.alone(cache, order.view(table.shape).int())

    def flashinfer(self) -> Callable[[], torch.Tensor]:
        from flashinfer import MultiLevelCascadeAttentionWrapper

        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        rows = [self.ints(0, self.batch), self.q_indptr]
        starts = [self.ints(0, self.prefix // PAGE), self.q_indptr * (self.suffix // PAGE)]
        last = [self.ints(PAGE), self.ints(*[PAGE] * self.batch)]
        pages = [self.shared, self.own.flatten()]
        wrapper.plan(rows, starts, pages, last, *self.heads, PAGE, q_data_type=self.q.dtype, kv_data_type=self.q.dtype)
        return lambda: wrapper.run(self.q, self.cache)

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Speed over the same without sharing."""
        others = [other for other in ("unshared", "copies") if f"jitgen-{other}" in of]
        return ", ".join(f"{of[f'jitgen-{other}'] / ms:.1f}x {other}" for other in others)


def cells(config: BenchConfig) -> list[Cell]:
    """Batches and lengths."""
    sizes = QUICK_CELLS[config.device] if config.quick else CUDA_CELLS if config.device == "cuda" else CPU_CELLS
    dtype = "bfloat16" if config.device == "cuda" else "float32"
    return [
        Cell(f"{dtype} hd128 32/8 page {PAGE} {b} x ({p} shared + {s})", partial(_make, b, p, s, dtype)) for b, p, s in sizes
    ]


def _make(batch: int, prefix: int, suffix: int, dtype: str, device: str, seed: int) -> SharedPrefix:
    return SharedPrefix(device, batch, prefix, suffix, dtype, seed)


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("cascade", cells(config), config, NOTE)
