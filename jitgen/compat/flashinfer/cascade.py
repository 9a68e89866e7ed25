"""Keys shared by several requests, and merging of attention states: flashinfer.cascade."""

from __future__ import annotations

from typing import Any

import torch

from jitgen.compat.flashinfer._cascade import CascadePlans
from jitgen.compat.flashinfer._hooks import Place
from jitgen.compat.flashinfer._merge import merge_state, merge_state_in_place, merge_states
from jitgen.compat.flashinfer._prefill_paged import BatchPrefillWithPagedKVCacheWrapper
from jitgen.compat.flashinfer._shared_prefix import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)
from jitgen.errors import ShapeMismatch

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class MultiLevelCascadeAttentionWrapper:
    """Attention over keys shared at several levels: level 0 by the largest groups of requests, the last by none.

    Each level is a batch of groups, whose rows are those of all its requests. All levels are attended in one plan, and merged
    once. Differs from FlashInfer: windows, ALiBi and ROPE_LLAMA count positions in the whole context of a request, across
    levels; keys of a level follow those of the levels above it; causal holds at every level. ROPE_LLAMA takes a plan per level.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ) -> None:
        arrays = (
            qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr,
        )  # fmt: skip
        if use_cuda_graph and any(a is None or len(a) != num_levels for a in arrays):
            raise ShapeMismatch(
                f"use_cuda_graph=True needs {num_levels} buffers in each of the four lists, one for each level."
            )
        buffers = zip(*arrays, strict=True) if use_cuda_graph else [(None,) * 4] * num_levels  # type: ignore[arg-type]
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph, *b) for b in buffers
        ]
        self._kv_layout = kv_layout
        self._plans = CascadePlans(self._levels[0].device, use_cuda_graph)
        self._places: dict[int, list[Place]] = {}  # by rows of q

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() keeps the addresses of its buffers."""
        return self._levels[0].is_cuda_graph_enabled

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: Any = None) -> None:
        """Take another workspace; it is checked and not used."""
        for level in self._levels:
            level.reset_workspace_buffer(float_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Prepare run(): the arguments are lists with one entry for each level, else as in the paged prefill wrapper.

        The same rows of q are divided at every level by its qo_indptr.
        """
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        if any(len(a) != len(self._levels) for a in arrays):
            raise ShapeMismatch(f"plan() got lists of {', '.join(str(len(a)) for a in arrays)} levels, the wrapper has "
                                f"{len(self._levels)}.")  # fmt: skip
        for i, (level, *tables) in enumerate(zip(self._levels, *arrays, strict=True)):
            level.plan(
                *tables, num_qo_heads, num_kv_heads, head_dim, page_size, causal=causal and i == len(self._levels) - 1,
                pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale, window_left=window_left,
                logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta,
                q_data_type=q_data_type, kv_data_type=kv_data_type,
            )  # fmt: skip
        planned = [level._plan_of() for level in self._levels]
        if not planned[-1].options.rotates:
            self._plans.adopt([p.batch for p in planned], planned[-1].heads, planned[-1].options)
            return
        if not self.is_cuda_graph_enabled:
            self._places.clear()
            return
        for num_rows, places in self._places.items():  # at their addresses: a graph may read them
            for old, new in zip(places, self._place(num_rows), strict=True):
                old.row_position.copy_(new.row_position)
                old.kv_base.copy_(new.kv_base)
        for level in self._levels:
            level.replan()

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: Cache) -> torch.Tensor:
        """Attention of the planned requests over the keys of all levels.

        Shapes:  q [total_q, num_q_heads, head_dim]; paged_kv_cache as in the paged prefill wrapper; returns like q.
        """
        if not self._levels[-1]._plan_of().options.rotates:
            return self._plans.run(q, paged_kv_cache, self._kv_layout)
        if q.shape[0] not in self._places:
            self._places[q.shape[0]] = self._place(q.shape[0])
        places = self._places[q.shape[0]]
        states = [level.run_placed(q, paged_kv_cache, p) for level, p in zip(self._levels, places, strict=True)]
        values, logs = zip(*states, strict=True)
        return merge_states(torch.stack(values, 1), torch.stack(logs, 1))[0]

    forward = run

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Does nothing: strides are launch arguments."""

    def _place(self, num_rows: int) -> list[Place]:
        """Where the rows and keys of each level stand in the whole contexts."""
        row = torch.arange(num_rows, device=self._levels[0].device, dtype=torch.int32)
        base = torch.zeros_like(row)  # keys above the level, by row
        batches = [level._plan_of().batch for level in self._levels]
        bases = []
        for batch in batches:
            first_row = batch.q_indptr[:-1].long().clamp(max=max(num_rows - 1, 0))
            bases.append(base[first_row])
            request = (torch.searchsorted(batch.q_indptr, row, right=True) - 1).clamp(0, max(batch.size - 1, 0))
            base = base + batch.kv_len[request]
        last = batches[-1]
        request = (torch.searchsorted(last.q_indptr, row, right=True) - 1).clamp(0, max(last.size - 1, 0))
        position = (base - last.q_indptr[request + 1] + row).int()
        return [Place(position, batch.q_indptr, kv_base) for batch, kv_base in zip(batches, bases, strict=True)]
