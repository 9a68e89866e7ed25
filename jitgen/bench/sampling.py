"""Suite sampling: tokens and renormalised rows at the vocabulary of current models, beside sorting in torch and FlashInfer.

An operation is timed only after its output was found right: tokens inside of the support that float64 computes, rows equal to
the reference's. Peers are given the same probabilities or logits; FlashInfer takes float32 only, so bf16 cells leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import time_right
from jitgen.bench.method import Call, Samples
from jitgen.bench.report import SuiteReport, Table

VOCAB = 128_256
TOP_K, TOP_P, MIN_P = 40, 0.9, 0.1
BATCHES = {"cuda": (1, 16, 128, 512), "cpu": (1, 16)}
CONTENDERS = ("jitgen", "torch", "flashinfer")
PEER_NAMES = CONTENDERS[1:]
BORDER = 1e-4  # of mass: tokens this close to top_p may be kept or not


@dataclass(frozen=True)
class SamplingCell:
    """One operation on one batch."""

    op: str
    dtype: str
    batch: int
    vocab: int = VOCAB

    @property
    def label(self) -> str:
        return f"{self.op} {self.dtype} {self.batch}x{self.vocab}"


@dataclass(frozen=True)
class Op:
    """An operation: its filters, and how each contender does it. ``kind`` is 'logits', 'probs' or 'renorm'."""

    kind: str
    filters: dict[str, Any]

    @property
    def writes(self) -> bool:
        return self.kind == "renorm"


OPS = {
    "sample": Op("logits", {}),
    "top_p": Op("probs", {"top_p": TOP_P}),
    "top_k": Op("probs", {"top_k": TOP_K}),
    "joint": Op("probs", {"top_k": TOP_K, "top_p": TOP_P, "order": "joint"}),
    "k_then_p": Op("probs", {"top_k": TOP_K, "top_p": TOP_P}),
    "min_p": Op("probs", {"min_p": MIN_P}),
    "renorm_top_p": Op("renorm", {"top_p": TOP_P}),
    "renorm_top_k": Op("renorm", {"top_k": TOP_K}),
}


def cells(config: BenchConfig) -> list[SamplingCell]:
    """All operations in float32, and what reads logits of bfloat16, at each batch."""
    batches = BATCHES[config.device]
    if config.quick:
        batches = batches[:1] if config.device == "cpu" else (1, 128)
    found = [SamplingCell(op, "fp32", batch) for batch in batches for op in OPS]
    return found + [SamplingCell("sample", "bf16", batch) for batch in batches]


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


# ---- reference ------------------------------------------------------------------------------------------------------


def keep_mask(probs: torch.Tensor, filters: dict[str, Any], slack: float = 0.0) -> torch.Tensor:
    """Tokens that the filters keep, by sorting; with ``slack`` also those that near."""
    keep = torch.ones_like(probs, dtype=torch.bool)
    base = probs
    if "top_k" in filters:
        keep &= probs >= probs.topk(filters["top_k"], dim=-1).values[..., -1:]
        if filters.get("order") != "joint":
            base = torch.where(keep, probs, 0.0)
            base = base / base.sum(-1, keepdim=True)
    if "top_p" in filters:
        ordered, order = base.sort(-1, descending=True)
        above = ordered.cumsum(-1) - ordered
        keep &= torch.zeros_like(keep).scatter(-1, order, above < filters["top_p"] + slack)
    if "min_p" in filters:
        keep &= probs >= (filters["min_p"] - slack) * probs.amax(-1, keepdim=True)
    return keep


def check(cell: SamplingCell, x: torch.Tensor, output: torch.Tensor) -> str:
    """Why an output is wrong; empty if it is right. A few rows stand for all."""
    op, rows = OPS[cell.op], torch.arange(min(4, cell.batch), device=x.device)
    probs = x[rows].double()
    probs = probs.softmax(-1) if op.kind == "logits" else probs / probs.sum(-1, keepdim=True)
    if op.writes:
        keep = keep_mask(probs, op.filters)
        want = torch.where(keep, probs, 0.0)
        apart = float((output[rows].double() - want / want.sum(-1, keepdim=True)).abs().sum(-1).max())
        return "" if apart < BORDER else f"wrong output: a row is {apart:.2g} of its mass off float64"
    tokens = output.flatten()[rows].long()
    if bool(((tokens < 0) | (tokens >= cell.vocab)).any()):
        return f"wrong output: tokens {tokens.tolist()} of a vocabulary of {cell.vocab}"
    inside = keep_mask(probs, op.filters, BORDER).gather(-1, tokens[:, None])
    return "" if bool(inside.all()) else f"wrong output: tokens {tokens.tolist()} lie outside of the filtered support"


# ---- contenders -----------------------------------------------------------------------------------------------------


def prepare_jitgen(cell: SamplingCell, x: torch.Tensor) -> Call:
    """jitgen.sample and jitgen.renorm."""
    import jitgen

    op = OPS[cell.op]
    if op.writes:
        return lambda: jitgen.renorm(x, **op.filters)
    seeds, offsets = torch.arange(cell.batch, device=x.device), torch.zeros(cell.batch, dtype=torch.int64, device=x.device)
    from_logits = op.kind == "logits"
    return lambda: jitgen.sample(x, from_logits=from_logits, seed=seeds, offset=offsets, advance=True, **op.filters)


def prepare_torch(cell: SamplingCell, x: torch.Tensor) -> Call:
    """Sorting, a cumulative sum, and multinomial."""
    op = OPS[cell.op]

    def call() -> torch.Tensor:
        probs = x.float().softmax(-1) if op.kind == "logits" else x
        if op.filters:
            probs = torch.where(keep_mask(probs, op.filters), probs, 0.0)
        return probs / probs.sum(-1, keepdim=True) if op.writes else torch.multinomial(probs, 1)

    return call


def prepare_flashinfer(cell: SamplingCell, x: torch.Tensor) -> Call:
    """flashinfer.sampling.

    Errors:  ImportError where it is not installed; NotImplementedError for what it does not take.
    """
    from flashinfer import sampling

    if x.device.type != "cuda" or x.dtype != torch.float32:
        raise NotImplementedError("takes float32 on cuda only")
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "sample": lambda: sampling.sampling_from_logits(x),
        "top_p": lambda: sampling.top_p_sampling_from_probs(x, TOP_P),
        "top_k": lambda: sampling.top_k_sampling_from_probs(x, TOP_K),
        "joint": lambda: sampling.top_k_top_p_sampling_from_probs(x, TOP_K, TOP_P, filter_apply_order="joint"),
        "k_then_p": lambda: sampling.top_k_top_p_sampling_from_probs(x, TOP_K, TOP_P, filter_apply_order="top_k_first"),
        "min_p": lambda: sampling.min_p_sampling_from_probs(x, MIN_P),
        "renorm_top_p": lambda: sampling.top_p_renorm_probs(x, TOP_P),
        "renorm_top_k": lambda: sampling.top_k_renorm_probs(x, TOP_K),
    }
    return calls[cell.op]


PREPARE = {"jitgen": prepare_jitgen, "torch": prepare_torch, "flashinfer": prepare_flashinfer}


# ---- running --------------------------------------------------------------------------------------------------------


def make_rows(cell: SamplingCell, config: BenchConfig) -> torch.Tensor:
    """Normal logits, or their softmax."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(cell.batch, cell.vocab, generator=generator).to(config.device)
    x = x if OPS[cell.op].kind == "logits" else x.softmax(-1)
    return x.to(torch.bfloat16) if cell.dtype == "bf16" else x


def measure(cell: SamplingCell, config: BenchConfig) -> tuple[dict[str, Samples], dict[str, str]]:
    """Times of the contenders whose output is right, and why the others have none."""
    x = make_rows(cell, config)
    kept = {name: partial(PREPARE[name], cell, x) for name in CONTENDERS if config.keeps_peer(name)}
    return time_right(kept, lambda name, output: check(cell, x, output), config)


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    rows, data, notes, faults = [], [], {}, []
    for cell in cells(config):
        if not config.keeps(cell.label):
            continue
        found, absent = measure(cell, config)
        rows.append(table_row(cell, found))
        data.append({
            "cell": cell.label,
            "ms": {name: samples.to_json() for name, samples in found.items()},
            "absent": absent,
        })  # fmt: skip
        faults += [f"{cell.label}: {absent['jitgen']}"] if "jitgen" in absent else []
        notes |= {f"{name}: {why}": None for name, why in absent.items() if name != "jitgen"}
        config.say("  ".join(f"{text:>12}" if i else f"{text:<30}" for i, text in enumerate(rows[-1])))
    columns = ("cell", "jitgen\nus", "torch\nus", "flashinfer\nus", "over\ntorch", "over\nflashinfer", "read\nGB/s")
    table = Table(f"sampling on {config.device}", columns, tuple(rows))
    method = f"logits are normal; top_k {TOP_K}, top_p {TOP_P}, min_p {MIN_P}; read: bytes of the input over our time"
    return [SuiteReport("sampling", config.device, (table,), (method, *notes), {"results": data}, tuple(faults))]


def table_row(cell: SamplingCell, found: dict[str, Samples]) -> tuple[str, ...]:
    """Label, microseconds of each contender, our speed over each peer, bandwidth."""
    us = {name: samples.median * 1e3 for name, samples in found.items()}
    ours = us.get("jitgen")

    def shown(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    over = [us[name] / ours if ours and name in us else None for name in CONTENDERS[1:]]
    read = cell.batch * cell.vocab * (2 if cell.dtype == "bf16" else 4) / ours / 1e3 if ours else None
    return (cell.label, *(shown(us.get(name)) for name in CONTENDERS), *(shown(o, 2) for o in over), shown(read, 0))
