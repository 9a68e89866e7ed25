"""Tile classes of a variant for jitgen show: counts of every head, and the picture of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jitgen.errors import JitgenError
from jitgen.evaluate import evaluate
from jitgen.mask_tiles import CLASS_NAMES, classify, host_copy
from jitgen.program import Program
from jitgen.reference import index_leaves
from jitgen.show_mask import MaskMap, sample_positions
from jitgen.show_sizes import Sizes
from jitgen.spec import Tiles


@dataclass(frozen=True)
class Tiling:
    """Classes of all tiles, or why there are none.

    Shapes:  kinds uint8 [num_q_heads, q_tiles, kv_tiles].
    """

    kinds: torch.Tensor | None
    problem: str = ""

    def counts(self, head: int | None = None) -> dict[str, int]:
        """Number of tiles of each class, of all heads or of one."""
        if self.kinds is None:
            return {}
        chosen = self.kinds if head is None else self.kinds[head]
        found = torch.bincount(chosen.flatten().long(), minlength=len(CLASS_NAMES)).tolist()
        return dict(zip(CLASS_NAMES, found, strict=True))

    def as_data(self) -> dict[str, object]:
        if self.kinds is None:
            return {"problem": self.problem}
        per_head = [self.counts(h) for h in range(len(self.kinds))]
        return {**self.counts(), "per_head": per_head}


def tiling_of(program: Program, values: Sequence[Any], tiles: Tiles, sizes: Sizes) -> Tiling:
    """Classify with the tiles of a kernel; a machine that cannot compile yields the reason."""
    try:
        kinds = classify(
            program,
            values,
            q_len=sizes.q_len,
            kv_len=sizes.kv_len,
            tile_q=tiles.tile_q,
            tile_kv=tiles.tile_kv,
            num_q_heads=sizes.num_q_heads,
            num_kv_heads=sizes.num_kv_heads,
            b=sizes.request,
            q_offset=sizes.q_offset,
        )
    except JitgenError as error:
        return Tiling(None, str(error))
    return Tiling(kinds)


def mask_map(program: Program, values: Sequence[Any], tiles: Tiles, sizes: Sizes, kinds: torch.Tensor) -> MaskMap:
    """The mask of the head to draw, evaluated at positions spread over it."""
    kept = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    rows, columns = sample_positions(sizes.q_len), sample_positions(sizes.kv_len)
    if program.mask is not None:
        lengths = (sizes.q_len, sizes.kv_len, sizes.q_offset)
        cpu = torch.device("cpu")
        leaves = index_leaves(1, sizes.num_q_heads, sizes.num_kv_heads, *lengths, 1.0, torch.float64, cpu)
        leaves["q_idx"] = (rows + sizes.q_offset).view(1, 1, -1, 1)
        leaves["kv_idx"] = columns.view(1, 1, 1, -1)
        leaves["b"] = torch.tensor(sizes.request)
        leaves |= {name: leaves[name][:, sizes.head : sizes.head + 1] for name in ("h", "kv_h")}
        on_cpu = [host_copy(v) if isinstance(v, torch.Tensor) else v for v in values]
        kept = evaluate(program.mask, on_cpu, leaves)
    return MaskMap(
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        tile_q=tiles.tile_q,
        tile_kv=tiles.tile_kv,
        classes=kinds[sizes.head],
        kept=kept.expand(1, 1, len(rows), len(columns))[0, 0],
    )
