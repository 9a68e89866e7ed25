"""Suite fp8: attention over e4m3 tensors, over the same numbers in bfloat16, and over those that they were rounded from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

import jitgen
from jitgen.bench.config import BenchConfig
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.peers import only_output
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import rate_text, rate_unit
from jitgen.bench.workloads import causal

HEADS = {64: 32, 128: 16, 256: 8}  # head dim -> heads: a hidden size of 2048
SHAPES = {"cuda": ((4, 4096), (1, 16384)), "cpu": ((1, 1024),)}  # batch, length
CHECKED = 64  # rows of all sequences whose output is compared
SIXTEEN = "jitgen-bf16"
UNROUNDED = "jitgen-bf16-unrounded"
PEER_NAMES = ("fa3",)
NOTE = (
    "all but jitgen-bf16-unrounded read the same numbers: those of q, k and v that e4m3 has; P is rounded to e4m3 too, so "
    "errors differ. More bits draw more power: bf16 is slower on unrounded numbers where the card is short of it"
)


@dataclass
class EightBits:
    """Sequences of standard normal q, k and v, rounded to e4m3."""

    head_dim: int
    num_heads: int
    batch: int
    length: int
    is_causal: bool
    device: str
    seed: int
    dtype: str = "float8_e4m3fn"

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.batch, self.length, self.num_heads, self.head_dim)
        normal = [torch.randn(shape, generator=generator, device=self.device) for _ in range(3)]
        self.eight = [t.to(torch.float8_e4m3fn).transpose(1, 2) for t in normal]
        self.sixteen = [t.bfloat16() for t in self.eight]
        self.unrounded = [t.bfloat16().transpose(1, 2) for t in normal]
        tokens = self.batch * self.length
        self.rows = torch.arange(CHECKED, device=self.device) * tokens // CHECKED

    def expected(self, contender: str) -> torch.Tensor:
        """Attention in float64 of some rows."""
        return self.exact_unrounded if contender == UNROUNDED else self.exact

    @cached_property
    def exact(self) -> torch.Tensor:
        return self.attend(self.sixteen)

    @cached_property
    def exact_unrounded(self) -> torch.Tensor:
        return self.attend(self.unrounded)

    def attend(self, qkv: list[torch.Tensor]) -> torch.Tensor:
        """The rows that are compared, in float64."""
        found = []
        for row in self.rows.tolist():
            batch, place = divmod(row, self.length)
            end = place + 1 if self.is_causal else self.length
            q, k, v = (t[batch] for t in qkv)
            logits = torch.einsum("hd,hkd->hk", q[:, place].double(), k[:, :end].double()) / math.sqrt(self.head_dim)
            found.append(torch.einsum("hk,hkd->hd", logits.softmax(-1), v[:, :end].double()))
        return torch.stack(found)

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Ours in 8 and twice in 16 bits, and FlashAttention 3 in 8."""
        found: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
            "jitgen": partial(self.ours, self.eight),
            SIXTEEN: partial(self.ours, self.sixteen),
            UNROUNDED: partial(self.ours, self.unrounded),
        }
        return found | ({"fa3": self.fa3} if self.device == "cuda" else {})

    def ours(self, qkv: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        mask = causal if self.is_causal else None
        return lambda: jitgen.attention(*qkv, mask_mod=mask).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type,union-attr]

    def fa3(self) -> Callable[[], torch.Tensor]:
        from fa3_fwd_interface import flash_attn_func

        q, k, v = (t.transpose(1, 2) for t in self.eight)
        return lambda: only_output(flash_attn_func(q, k, v, causal=self.is_causal)).flatten(0, 1)

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """Operations a second of both products, and the speed over our 16 bits on the same numbers."""
        pairs = self.length * (self.length + 1) / 2 if self.is_causal else self.length**2
        unit, _ = rate_unit(self.device)
        rate = f"{rate_text(4 * self.batch * pairs * self.num_heads * self.head_dim / ms / 1e9, self.device)} {unit}"
        return rate if name in (SIXTEEN, UNROUNDED) or SIXTEEN not in of else f"{rate}, {of[SIXTEEN] / ms:.2f} of bf16"


def cells(config: BenchConfig) -> list[Cell]:
    """Head dims, lengths, full and causal."""
    found = []
    for head_dim, num_heads in HEADS.items():
        for batch, length in SHAPES[config.device][: 1 if config.quick else None]:
            for is_causal in (False, True):
                label = f"e4m3 hd{head_dim} {num_heads}/{num_heads} {batch}x{length} {'causal' if is_causal else 'full'}"
                found.append(Cell(label, partial(EightBits, head_dim, num_heads, batch, length, is_causal)))
    return found


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    return run_suite("fp8", cells(config), config, NOTE)
