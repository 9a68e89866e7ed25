"""Suite sparse: attention over a share of the blocks of the matrix of logits, in turns with dense attention over all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

import jitgen
from jitgen.bench.config import BenchConfig
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import rate_text, rate_unit

DENSITIES = (0.1, 0.25, 0.5)
LENGTHS = {"cuda": 16384, "cpu": 2048}
CHECKED = 64  # rows whose output is compared
DENSE = "jitgen-dense"  # attends every block
PEER_NAMES = ("flashinfer-fa2", "flashinfer-fa3")
NOTE = "operations a second count visited blocks; dense attention, of all blocks, takes turns with the others"


@dataclass
class Blocks:
    """One sequence whose block rows have random blocks of 128 x 128, the first among them."""

    device: str
    length: int
    density: float
    dtype: str
    seed: int
    block: int = 128
    heads: tuple[int, int, int] = (32, 8, 128)

    def __post_init__(self) -> None:
        num_q, num_kv, dim = self.heads
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def random(heads: int) -> torch.Tensor:
            made = torch.randn(self.length, heads, dim, generator=generator, device=self.device)
            return made.to(getattr(torch, self.dtype))

        self.q, self.k, self.v = random(num_q), random(num_kv), random(num_kv)
        count = self.length // self.block
        self.listed = torch.rand(count, count, generator=generator, device=self.device) < self.density
        self.listed[:, 0] = True
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.indptr = torch.cat([zero, self.listed.sum(1).cumsum(0)]).int()
        self.indices = self.listed.nonzero()[:, 1].int()
        self.share = float(self.listed.float().mean())
        self.rows = torch.arange(CHECKED, device=self.device) * (self.length // CHECKED)

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64 of some rows, from the definition."""
        num_q, num_kv, dim = self.heads
        q = self.q[self.rows].double().view(CHECKED, num_kv, -1, dim)
        seen = self.listed[self.rows // self.block].repeat_interleave(self.block, 1) | (contender == DENSE)
        logits = torch.einsum("rhgd,khd->rhgk", q, self.k.double()) / math.sqrt(dim)
        weights = logits.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
        return torch.einsum("rhgk,khd->rhgd", weights, self.v.double()).reshape(CHECKED, num_q, dim)

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours, the same blocks as a mask of ordinary attention, all blocks, and FlashInfer's by both of its backends."""
        found: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
            "jitgen": self.ours, "jitgen-mask": self.by_mask, DENSE: self.dense,
        }  # fmt: skip
        peers = {f"flashinfer-{backend}": partial(self.flashinfer, backend) for backend in ("fa2", "fa3")}
        return found | (peers if self.device == "cuda" else {})

    def ours(self) -> Callable[[], torch.Tensor]:
        blocks = jitgen.BlockSparse.bsr(self.indptr, self.indices, (self.length, self.length), (self.block, self.block))
        qkv = [t.transpose(0, 1)[None] for t in (self.q, self.k, self.v)]

        def run() -> torch.Tensor:
            return jitgen.block_sparse_attention(*qkv, blocks)[0].transpose(0, 1)  # type: ignore[arg-type]

        return run

    def by_mask(self) -> Callable[[], torch.Tensor]:
        blocks = jitgen.BlockSparse.bsr(self.indptr, self.indices, (self.length, self.length), (self.block, self.block))
        qkv = [t.transpose(0, 1)[None] for t in (self.q, self.k, self.v)]
        return lambda: jitgen.attention(*qkv, mask_mod=blocks.mask_mod)[0].transpose(0, 1)  # type: ignore[arg-type,index]

    def dense(self) -> Callable[[], torch.Tensor]:
        qkv = [t.transpose(0, 1)[None] for t in (self.q, self.k, self.v)]
        return lambda: jitgen.attention(*qkv)[0].transpose(0, 1)  # type: ignore[arg-type,index]

    def flashinfer(self, backend: str) -> Callable[[], torch.Tensor]:
        from flashinfer import BlockSparseAttentionWrapper

        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        wrapper = BlockSparseAttentionWrapper(workspace, backend=backend)
        wrapper.plan(
            self.indptr, self.indices, self.length, self.length, self.block, self.block, *self.heads,
            q_data_type=self.q.dtype, kv_data_type=self.q.dtype, o_data_type=self.q.dtype,
        )  # fmt: skip
        return lambda: wrapper.run(self.q, self.k, self.v)

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Operations a second of both products in visited blocks, and how that compares with the dense kernel."""
        num_q, _, dim = self.heads
        unit, _ = rate_unit(self.device)
        share = 1.0 if name == DENSE else self.share
        rate = f"{rate_text(4 * self.length**2 * share * num_q * dim / ms / 1e9, self.device)} {unit}"
        return rate if name == DENSE or DENSE not in of else f"{rate}, {share * of[DENSE] / ms:.1%} of dense per block"


def cells(config: BenchConfig) -> list[Cell]:
    """Each density."""
    length = 512 if config.quick and config.device == "cpu" else LENGTHS[config.device]
    dtype = "bfloat16" if config.device == "cuda" else "float32"
    densities = DENSITIES[1:2] if config.quick else DENSITIES
    return [Cell(f"{dtype} hd128 32/8 {length} blocks 128x128 {d:.0%}", partial(_make, length, d, dtype)) for d in densities]


def _make(length: int, density: float, dtype: str, device: str, seed: int) -> Blocks:
    return Blocks(device, length, density, dtype, seed)


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("sparse", cells(config), config, NOTE)
