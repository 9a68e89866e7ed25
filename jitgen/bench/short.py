"""Suite short: few query rows over many keys in dense tensors, as a decode step of a model without pages has them."""

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
from jitgen.bench.report import SuiteReport
from jitgen.families import SM90_ARCHS
from jitgen.target import detect_cuda

# head dim, query heads, key heads; batch, query rows, keys
HEADS = ((128, 32, 8), (128, 32, 32), (256, 16, 8))
SHAPES = {
    "cuda": ((1, 1, 4096), (1, 1, 65536), (4, 1, 16384), (32, 1, 4096), (1, 4, 16384)),
    "cpu": ((1, 1, 2048), (1, 4, 2048)),
}
WHOLE = "jitgen-whole"
PEER_NAMES = ("sdpa", "flex")
NOTE = "whole: the kernel for any lengths, which reads the keys of a head in one CTA, once for each query head"


@dataclass
class Step:
    """The last rows of some sequences, under a causal mask; keys are [batch, heads, length, head_dim] in memory."""

    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    batch: int
    q_len: int
    kv_len: int
    device: str
    seed: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def make(heads: int, length: int) -> torch.Tensor:
            shape = (self.batch, heads, length, self.head_dim)
            return torch.randn(shape, generator=generator, device=self.device).bfloat16()

        self.q, self.k, self.v = (
            make(self.num_q_heads, self.q_len),
            make(self.num_kv_heads, self.kv_len),
            make(self.num_kv_heads, self.kv_len),
        )
        self.rows = torch.arange(self.batch * self.num_q_heads * self.q_len, device=self.device)

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64, the same for all contenders."""
        del contender
        return self.exact

    @cached_property
    def exact(self) -> torch.Tensor:
        group, heads = self.num_q_heads // self.num_kv_heads, []
        keep = self.kept()
        for h in range(self.num_q_heads):  # one at a time: keys in float64 take four times their memory
            k, v = (t[:, h // group].double() for t in (self.k, self.v))
            logits = self.q[:, h].double() @ k.mT / math.sqrt(self.head_dim)
            heads.append(logits.masked_fill(~keep, -math.inf).softmax(-1) @ v)
        return torch.stack(heads, 1).flatten(0, 2)

    def kept(self) -> torch.Tensor:
        """Which keys each row sees."""
        rows = torch.arange(self.kv_len - self.q_len, self.kv_len, device=self.device)
        return torch.arange(self.kv_len, device=self.device) <= rows[:, None]

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours as it is called, ours with whole keys, torch's own and FlexAttention."""
        found = {"jitgen": partial(self.ours, None)}
        if self.device == "cuda":
            is_hopper = detect_cuda(accelerated=True).arch in SM90_ARCHS
            found[WHOLE] = partial(self.ours, "sm90" if is_hopper else "sm80")
        return {**found, "sdpa": self.sdpa, "flex": self.flex}

    def ours(self, family: str | None) -> Callable[[], torch.Tensor]:
        variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)
        return lambda: jitgen.attention(self.q, self.k, self.v, variant, family=family).flatten(0, 2)  # type: ignore[union-attr]

    def sdpa(self) -> Callable[[], torch.Tensor]:
        """A single row sees all keys, and needs no mask."""
        mask = None if self.q_len == 1 else self.kept()
        has_groups = self.num_q_heads != self.num_kv_heads
        call = partial(F.scaled_dot_product_attention, self.q, self.k, self.v, attn_mask=mask, enable_gqa=has_groups)
        return lambda: call().flatten(0, 2)

    def flex(self) -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        offset = self.kv_len - self.q_len
        sizes = (None, None, self.q_len, self.kv_len)
        mask = create_block_mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset, *sizes, device=self.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        has_groups = self.num_q_heads != self.num_kv_heads
        return lambda: compiled(self.q, self.k, self.v, block_mask=mask, enable_gqa=has_groups).flatten(0, 2)  # type: ignore[union-attr]

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Bandwidth of K and V, each read once."""
        del name, of
        return f"{2 * self.k.numel() * self.k.itemsize / ms / 1e6:.0f} GB/s"


def cells(config: BenchConfig) -> list[Cell]:
    """Heads, batches, rows and lengths."""
    found = []
    for head_dim, num_q_heads, num_kv_heads in HEADS[: 1 if config.quick else None]:
        for batch, q_len, kv_len in SHAPES[config.device]:
            label = f"bf16 hd{head_dim} {num_q_heads}/{num_kv_heads} {batch}x{kv_len}, {q_len} row{'s' if q_len > 1 else ''}"
            found.append(Cell(label, partial(Step, head_dim, num_q_heads, num_kv_heads, batch, q_len, kv_len)))
    return found


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("short", cells(config), config, NOTE)
