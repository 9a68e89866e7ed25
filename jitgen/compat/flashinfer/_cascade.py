"""Attention over the keys of several levels in one plan: what the cascade wrapper of the shim runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import MAX_PLANS, Batch, Heads, power_of_two
from jitgen.compat.flashinfer._hooks import Options, hooks_for, softmax_scale
from jitgen.serving import paged_attention
from jitgen.serving_cascade import Cascade, CascadeLevel
from jitgen.serving_plan import Plan

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class CascadePlans:
    """The jitgen plans of a cascade wrapper: one for each size and mask that it was called with.

    Under CUDA graphs all of them are updated with each new batch, whose tensors keep their addresses.
    """

    def __init__(self, device: torch.device, in_graphs: bool) -> None:
        self._device, self._in_graphs = device, in_graphs
        self._held: dict[tuple[object, ...], Plan] = {}
        self._cascade: Cascade | None = None
        self._tensors: tuple[object, ...] = ()
        self._now: dict[int, Plan] = {}  # by rows of q: updated for the present batch
        self._heads: Heads | None = None
        self._options = Options()
        self._page_size = 0

    def adopt(self, batches: Sequence[Batch], heads: Heads, options: Options) -> None:
        """Take the levels of a new batch; level 0 comes first."""
        tensors = tuple(t.data_ptr() for b in batches for t in (b.q_indptr, b.kv_len, b.kv_start, b.pages))  # type: ignore[union-attr]
        if not self._in_graphs or self._cascade is None or tensors != self._tensors:
            self._cascade = Cascade([CascadeLevel(b.q_indptr, b.page_table, b.kv_len) for b in batches])
            self._tensors = tensors
        self._heads, self._options, self._page_size = heads, options, batches[0].page_size
        self._now.clear()
        if self._in_graphs:
            for plan in self._held.values():
                plan.update(self._cascade)

    def run(self, q: torch.Tensor, kv: Cache, layout: str) -> torch.Tensor:
        """Attention of the rows of q over the keys of all levels."""
        assert self._heads is not None and self._cascade is not None
        plan = self._now.get(q.shape[0])
        if plan is None:
            plan = self._now[q.shape[0]] = self._plan_for(q.shape[0])
        scale = softmax_scale(self._options, self._heads.dim_qk)
        result: Any = paged_attention(q, kv, self._cascade, plan, scale=scale, kv_layout=layout)
        return result

    def _plan_for(self, rows: int) -> Plan:
        heads, options, cascade = self._heads, self._options, self._cascade
        assert heads is not None and cascade is not None
        groups = max(level.size for level in cascade.levels)
        sizes = (groups, max(rows, 1)) if self._in_graphs else (power_of_two(groups), power_of_two(rows))
        what = (options.right, options.window_left, options.logits_soft_cap, options.pos_encoding_mode, heads, self._page_size)
        plan = self._held.get((what, sizes))
        if plan is not None and plan.lists is cascade and self._in_graphs:
            return plan
        if plan is None:
            hooks = hooks_for(options, heads.num_q, heads.num_kv, self._device)
            if not self._in_graphs and len(self._held) >= MAX_PLANS:
                del self._held[next(iter(self._held))]
            plan = self._held[what, sizes] = Plan(
                *sizes, heads.num_q, heads.num_kv, heads.dim_qk, head_dim_v=heads.dim_vo, dtype=heads.q_dtype,
                kv_dtype=heads.kv_dtype,
                variant=hooks.variant(), page_size=self._page_size, levels=max(len(cascade.levels), 2), device=self._device,
            )  # fmt: skip
        return plan.update(cascade)
