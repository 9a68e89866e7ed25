"""Shapes and variants that the suites run, and how much work each is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F

BLOCK = 128  # side of the squares in which "visited area" is counted
DOCUMENT_FRACTIONS = (0.35, 0.02, 0.2, 0.005, 0.11, 0.05, 0.005, 0.16, 0.1)  # of the sequence: mixed document lengths


@dataclass(frozen=True)
class Cell:
    """One shape, dtype and variant."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    length: int
    head_dim: int
    dtype: str
    variant: str = "full"
    layout: str = "bshd"  # how q, k, v lie in memory: bshd (heads inside positions) or bhsd
    num_keys: int = 0  # of a plain kernel over a given area (same_area); 0: length

    @property
    def shape(self) -> Cell:
        """The cell without its variant: cells of one shape are timed together."""
        return replace(self, variant="full", num_keys=0)

    @property
    def kv_length(self) -> int:
        return self.num_keys or self.length

    @property
    def variant_label(self) -> str:
        """The variant, with the number of keys where it is not the length."""
        return f"{self.variant} {self.num_keys}" if self.num_keys else self.variant

    @property
    def shape_label(self) -> str:
        """Everything but the variant."""
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        return f"{short} hd{self.head_dim} {self.num_q_heads}/{self.num_kv_heads} {self.batch}x{self.length}"

    @property
    def label(self) -> str:
        """Name of the cell in tables and for --filter."""
        return f"{self.shape_label} {self.variant_label}"

    def flops(self, pairs: int) -> int:
        """Operations of the two matrix products over ``pairs`` (query, key) pairs per head."""
        return 4 * self.batch * self.num_q_heads * pairs * self.head_dim


@dataclass(frozen=True)
class Hooks:
    """A variant as FlexAttention-style functions, and how libraries with built-in variants name it."""

    score_mod: Callable[..., torch.Tensor] | None = None
    mask_mod: Callable[..., torch.Tensor] | None = None
    sink: torch.Tensor | None = None
    is_causal: bool = False
    softcap: float | None = None
    window_left: int | None = None  # keeps q_idx - kv_idx <= window_left
    is_builtin: bool = False  # the three fields above say all there is to say
    documents: tuple[int, ...] = ()  # lengths of the documents within which queries stay, if they are causal otherwise
    # the same hooks with captured tensors that ascend passed through the given function, for who profits from knowing
    with_sorted: Callable[[Callable[[torch.Tensor], torch.Tensor]], Hooks] | None = None


@dataclass(frozen=True)
class Problem:
    """A cell with its tensors. q, k, v are [batch, heads, length, head_dim] in the cell's layout."""

    cell: Cell
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hooks: Hooks
    pairs: int  # unmasked (query, key) pairs of one head
    block_pairs: int  # pairs in the 128 x 128 blocks that hold an unmasked one


# ---- variants -------------------------------------------------------------------------------------------------------


def causal(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    """Keys up to the query's own position."""
    return kv_idx <= q_idx


def build_full(cell: Cell, device: str) -> Hooks:
    return Hooks(is_builtin=True)


def build_causal(cell: Cell, device: str) -> Hooks:
    return Hooks(mask_mod=causal, is_causal=True, is_builtin=True)


def build_softcap(cell: Cell, device: str) -> Hooks:
    cap = 20.0

    def softcap(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return cap * torch.tanh(score / cap)

    return Hooks(softcap, causal, is_causal=True, softcap=cap, is_builtin=True)


def build_alibi(cell: Cell, device: str) -> Hooks:
    heads = torch.arange(1, cell.num_q_heads + 1, device=device)
    slopes = torch.exp2(-8.0 * heads / cell.num_q_heads)

    def alibi(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + slopes[h] * (kv_idx - q_idx)

    return Hooks(alibi, causal, is_causal=True)


def build_window(cell: Cell, device: str) -> Hooks:
    window = 1024 if device == "cuda" else 256

    def sliding_window(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)

    return Hooks(mask_mod=sliding_window, is_causal=True, window_left=window, is_builtin=True)


def build_document(cell: Cell, device: str) -> Hooks:
    ids = document_ids(cell.length).to(device)

    def with_sorted(declare: Callable[[torch.Tensor], torch.Tensor]) -> Hooks:
        doc = declare(ids)

        def document_causal(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            return (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx)

        return Hooks(mask_mod=document_causal, is_causal=True, documents=tuple(torch.bincount(ids).tolist()))

    return replace(with_sorted(lambda t: t), with_sorted=with_sorted)


def build_sink(cell: Cell, device: str) -> Hooks:
    sink = torch.linspace(-1.0, 2.0, cell.num_q_heads, device=device)
    return Hooks(mask_mod=causal, sink=sink, is_causal=True)


def build_relative_bias(cell: Cell, device: str) -> Hooks:
    far = 127
    table = torch.randn(cell.num_q_heads, far + 1, generator=torch.Generator().manual_seed(2)).to(device)

    def relative_bias(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + table[h, torch.clamp(q_idx - kv_idx, 0, far)]

    return Hooks(relative_bias, causal, is_causal=True)


def build_key_bias(cell: Cell, device: str) -> Hooks:
    bias = torch.randn(cell.num_q_heads, cell.length, generator=torch.Generator().manual_seed(3)).to(device)

    def key_bias(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + bias[h, kv_idx]

    return Hooks(key_bias, causal, is_causal=True)


def build_dense_bias(cell: Cell, device: str) -> Hooks:
    bias = torch.randn(cell.num_q_heads, cell.length, cell.length, device=device, dtype=getattr(torch, cell.dtype))

    def dense_bias(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + bias[h, q_idx, kv_idx]

    return Hooks(dense_bias, causal, is_causal=True)


VARIANTS: dict[str, Callable[[Cell, str], Hooks]] = {
    "full": build_full,
    "causal": build_causal,
    "softcap": build_softcap,  # cap 20, causal
    "alibi": build_alibi,  # causal
    "window": build_window,  # 1024 tokens on cuda, 256 on the CPU
    "document": build_document,  # causal inside documents of mixed lengths
    "sink": build_sink,  # one learned logit per head, causal
    "relative_bias": build_relative_bias,  # T5-like: a table indexed by clipped distance, causal
    "key_bias": build_key_bias,  # one number per head and key, causal
    "dense_bias": build_dense_bias,  # one number per head, query and key, causal
}


def document_ids(length: int) -> torch.Tensor:
    """Ascending document number of each position, int32 [length]."""
    sizes = [max(1, round(fraction * length)) for fraction in DOCUMENT_FRACTIONS[:-1]]
    sizes.append(length - sum(sizes))
    numbers = torch.arange(len(sizes), dtype=torch.int32)
    return torch.repeat_interleave(numbers, torch.tensor(sizes))


# ---- problems -------------------------------------------------------------------------------------------------------


@dataclass
class ProblemSet:
    """Problems of cells that differ in the variant only; they share q, k and v."""

    device: str
    seed: int = 0
    _tensors: dict[Cell, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _problems: dict[Cell, Problem] = field(default_factory=dict)

    def problem(self, cell: Cell) -> Problem:
        """Tensors, hooks and work of a cell; the same object every time."""
        if cell not in self._problems:
            if cell.shape not in self._tensors:
                self._tensors[cell.shape] = make_tensors(cell, self.device, self.seed)
            q, *kv = self._tensors[cell.shape]
            k, v = (t[:, :, : cell.kv_length] for t in kv)
            hooks = VARIANTS[cell.variant](cell, self.device)
            pairs, block_pairs = count_cell(cell, self.device)
            self._problems[cell] = Problem(cell, q, k, v, hooks, pairs, block_pairs)
        return self._problems[cell]


def make_tensors(cell: Cell, device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal random q, k, v as [batch, heads, length, head_dim] views of the cell's layout."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(heads: int) -> torch.Tensor:
        sizes = (cell.batch, cell.length, heads) if cell.layout == "bshd" else (cell.batch, heads, cell.length)
        t = torch.randn(*sizes, cell.head_dim, generator=generator, device=device).to(getattr(torch, cell.dtype))
        return t.transpose(1, 2) if cell.layout == "bshd" else t

    return make(cell.num_q_heads), make(cell.num_kv_heads), make(cell.num_kv_heads)


def same_area(cell: Cell, device: str) -> Cell:
    """Plain attention of the same queries over so many keys that it visits the area of a variant, to whole blocks."""
    return replace(cell, variant="full", num_keys=keys_of_area(count_cell(cell, device)[1], cell.length))


def keys_of_area(block_pairs: int, length: int) -> int:
    """So many keys, to whole blocks, that ``length`` queries over all of them visit an area."""
    return max(1, round(block_pairs / length / BLOCK)) * BLOCK


@cache
def count_cell(cell: Cell, device: str) -> tuple[int, int]:
    """count_pairs of a cell, with hooks for one head: no mask reads its number, and captured tensors may be large."""
    if cell.num_keys:
        return (cell.length * cell.num_keys,) * 2
    one_head = replace(cell, num_q_heads=1, num_kv_heads=1)
    return count_pairs(VARIANTS[cell.variant](one_head, device).mask_mod, cell.length, device)


def count_pairs(mask_mod: Callable[..., torch.Tensor] | None, length: int, device: str) -> tuple[int, int]:
    """Unmasked pairs of one head, and pairs in the 128 x 128 blocks that hold one. The mask ignores b and h."""
    if mask_mod is None:
        return length * length, length * length
    zero = torch.zeros((), dtype=torch.int64, device=device)
    columns = torch.arange(length, device=device)
    pairs, areas = zero.clone(), zero.clone()
    for start in range(0, length, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, length), device=device)
        kept = mask_mod(zero, zero, rows[:, None], columns[None, :]).expand(len(rows), length)
        pairs += kept.sum()
        columns_hit = F.pad(kept.any(0), (0, -length % BLOCK)).view(-1, BLOCK).any(1)
        widths = torch.clamp(length - torch.arange(len(columns_hit), device=device) * BLOCK, max=BLOCK)
        areas += (columns_hit * widths).sum() * len(rows)
    return int(pairs), int(areas)
