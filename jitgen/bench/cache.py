"""Suite cache: rows of new tokens appended to a paged cache, rotated and quantised on the way, beside a copy and FlashInfer.

Bytes are those read and written once; the copy moves as many from one buffer to another. A call is timed only after what it
wrote was found equal to float64, but for the rounding of its type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import time_right
from jitgen.bench.method import Call, Samples
from jitgen.bench.report import SuiteReport, Table

HEADS, DIM, PAGE_SIZE = 8, 128, 16
TOKENS = {"cuda": (65_536, 1024, 64), "cpu": (1024, 64)}
CONTENDERS = ("jitgen", "copy", "flashinfer")
PEER_NAMES = CONTENDERS[1:]
# operation -> dtype of the cache, whether K is normalised and rotated; in place there is no cache
OPS = {
    "append": (torch.bfloat16, False, False),
    "append_rope": (torch.bfloat16, False, True),
    "append_norm_rope": (torch.bfloat16, True, True),
    "append_rope_fp8": (torch.float8_e4m3fn, False, True),
    "append_rope_fp8_rows": (torch.float8_e4m3fn, False, True),  # with a scale found for each row
    "append_norm_rope_fp8_rows": (torch.float8_e4m3fn, True, True),
    "rope": (None, False, True),
}
SCALE = 0.05


@dataclass(frozen=True)
class CacheCell:
    """One operation on one number of tokens."""

    op: str
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.op} {self.tokens}"


@dataclass
class Data:
    """New rows, their places, and a cache for each contender that writes one."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    indptr: torch.Tensor
    pages: torch.Tensor

    @property
    def slots(self) -> torch.Tensor:
        """Slot of each token: one request has them all."""
        token = self.positions.long()
        return self.pages.long()[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE


def cells(config: BenchConfig) -> list[CacheCell]:
    """Every operation at each number of tokens."""
    counts = TOKENS[config.device]
    return [CacheCell(op, n) for n in (counts[-1:] if config.quick else counts) for op in OPS]


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def make_data(cell: CacheCell, config: BenchConfig) -> Data:
    """Normal rows; pages in a random order."""
    generator, n = torch.Generator().manual_seed(config.seed), cell.tokens
    k, v = (torch.randn(n, HEADS, DIM, generator=generator).to(config.device, torch.bfloat16) for _ in range(2))
    pages = torch.randperm(n // PAGE_SIZE, generator=generator).to(config.device, torch.int32)
    index = torch.arange(n, dtype=torch.int32, device=config.device)
    indptr = torch.tensor([0, n // PAGE_SIZE], dtype=torch.int32, device=config.device)
    return Data(k, v, index, torch.zeros_like(index), indptr, pages)


def new_cache(cell: CacheCell, data: Data) -> torch.Tensor:
    dtype = OPS[cell.op][0] or torch.bfloat16
    return torch.zeros(cell.tokens // PAGE_SIZE, 2, PAGE_SIZE, HEADS, DIM, device=data.k.device).to(dtype)


def moved_bytes(cell: CacheCell) -> int:
    """Bytes read and written, indices and scales left out."""
    dtype, rows = OPS[cell.op][0], 2 * cell.tokens * HEADS * DIM
    return rows * (2 + (2 if dtype is None else dtype.itemsize))


# ---- contenders -----------------------------------------------------------------------------------------------------


def prepare_jitgen(cell: CacheCell, data: Data) -> Call:
    """jitgen.append with a transform, or jitgen.rope."""
    import jitgen

    dtype, has_norm, has_rope = OPS[cell.op]
    if dtype is None:
        out = torch.empty_like(data.k), torch.empty_like(data.v)
        return lambda: jitgen.rope(data.k, data.v, data.positions, out=out)
    cache, rope, eps = new_cache(cell, data), jitgen.Rope(), 1e-6
    weight = torch.ones(DIM, device=data.k.device, dtype=torch.bfloat16)

    def rotate(k: Any, v: Any, b: Any, kv_h: Any, pos: Any) -> Any:
        return rope(k, pos), v

    def normalise(k: Any, v: Any, b: Any, kv_h: Any, pos: Any) -> Any:
        return rope(k * torch.rsqrt((k * k).mean() + eps) * weight, pos), v

    scales: Any = None if dtype == torch.bfloat16 else (SCALE, SCALE)
    if cell.op.endswith("_rows"):
        scales = tuple(torch.empty(cell.tokens, HEADS, device=data.k.device) for _ in range(2))
    options = {"transform": (normalise if has_norm else rotate) if has_rope else None, "scales": scales}

    def call() -> tuple[torch.Tensor, Any]:
        jitgen.append(cache, data.k, data.v, (data.indptr, data.pages), data.positions, data.requests, **options)
        return cache, scales

    return call


def prepare_copy(cell: CacheCell, data: Data) -> Call:
    """As many bytes from one buffer to another; what is written is what the operation reads."""
    half = moved_bytes(cell) // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device=data.k.device) for _ in range(2))
    return lambda: target.copy_(source)


def prepare_flashinfer(cell: CacheCell, data: Data) -> Call:
    """flashinfer.append_paged_kv_cache, apply_rope_pos_ids.

    Errors:  ImportError where it is not installed; NotImplementedError for what it has no kernel for.
    """
    import flashinfer

    if data.k.device.type != "cuda" or cell.op not in ("append", "rope"):
        raise NotImplementedError("has no kernel for rotation and append at once, and none for the CPU")
    if cell.op == "rope":
        return lambda: flashinfer.apply_rope_pos_ids(data.k, data.v, data.positions)
    cache, last = new_cache(cell, data), torch.tensor([PAGE_SIZE], dtype=torch.int32, device=data.k.device)

    def call() -> tuple[torch.Tensor, Any]:
        flashinfer.append_paged_kv_cache(data.k, data.v, data.requests, data.positions, cache, data.pages, data.indptr, last)
        return cache, None

    return call


PREPARE = {"jitgen": prepare_jitgen, "copy": prepare_copy, "flashinfer": prepare_flashinfer}


# ---- reference ------------------------------------------------------------------------------------------------------


def reference(cell: CacheCell, data: Data, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operation makes of some tokens, in float64."""
    dtype, has_norm, has_rope = OPS[cell.op]
    k, v = data.k[rows].double(), data.v[rows].double()
    if has_norm:
        k = k * torch.rsqrt((k * k).mean(-1, keepdim=True) + 1e-6)
    if has_rope:
        k = _rotated(k, data.positions[rows])
        v = _rotated(v, data.positions[rows]) if dtype is None else v
    return k, v


def _rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angle = positions.double()[:, None, None] * 1e4 ** (-torch.arange(0, DIM, 2, device=x.device).double() / DIM)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def check(cell: CacheCell, data: Data, output: Any) -> str:
    """Why what was written is wrong; empty if it is right. Some tokens stand for all."""
    rows = torch.arange(0, cell.tokens, max(1, cell.tokens // 64), device=data.k.device)
    want = reference(cell, data, rows)
    if OPS[cell.op][0] is None:
        found = [x[rows].double() for x in output]
    else:
        cache, scales = output
        slots = data.slots[rows]
        found = [t.flatten(0, 1)[slots].double() for t in cache.unbind(1)]
        if scales is not None:
            kinds = [s[slots][..., None].double() if isinstance(s, torch.Tensor) else s for s in scales]
            found = [x * s for x, s in zip(found, kinds, strict=True)]
    limit = 2.0**-8 if OPS[cell.op][0] != torch.float8_e4m3fn else 2.0**-4
    apart = max(float(((x - y).abs() / y.abs().amax(-1, keepdim=True)).max()) for x, y in zip(found, want, strict=True))
    return "" if apart <= limit else f"wrong output: an element is {apart:.2g} of its row's largest off float64"


# ---- running --------------------------------------------------------------------------------------------------------


def measure(cell: CacheCell, config: BenchConfig) -> tuple[dict[str, Samples], dict[str, str]]:
    """Times of the contenders whose output is right, and why the others have none."""
    data = make_data(cell, config)
    kept = {name: partial(PREPARE[name], cell, data) for name in CONTENDERS if name == "copy" or config.keeps_peer(name)}
    return time_right(kept, lambda name, output: "" if name == "copy" else check(cell, data, output), config)


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
            "bytes": moved_bytes(cell),
            "ms": {name: samples.to_json() for name, samples in found.items()},
            "absent": absent,
        })  # fmt: skip
        faults += [f"{cell.label}: {absent['jitgen']}"] if "jitgen" in absent else []
        notes |= {f"{name}: {why}": None for name, why in absent.items() if name != "jitgen"}
        config.say("  ".join(f"{text:>12}" if i else f"{text:<30}" for i, text in enumerate(rows[-1])))
    columns = ("cell", "jitgen\nus", "copy\nus", "flashinfer\nus", "over\ncopy", "over\nflashinfer", "moved\nGB/s")
    table = Table(f"cache on {config.device}", columns, tuple(rows))
    method = f"bf16 rows of {HEADS} heads of {DIM}, pages of {PAGE_SIZE} in random order; copy: as many bytes"
    return [SuiteReport("cache", config.device, (table,), (method, *notes), {"results": data}, tuple(faults))]


def table_row(cell: CacheCell, found: dict[str, Samples]) -> tuple[str, ...]:
    """Label, microseconds of each contender, our speed over each peer, bandwidth."""
    us = {name: samples.median * 1e3 for name, samples in found.items()}
    ours = us.get("jitgen")

    def shown(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    over = [us[name] / ours if ours and name in us else None for name in CONTENDERS[1:]]
    moved = moved_bytes(cell) / ours / 1e3 if ours else None
    return (cell.label, *(shown(us.get(name)) for name in CONTENDERS), *(shown(o, 2) for o in over), shown(moved, 0))
