"""Attention where all requests of a batch share a prefix.

The prefix is in memory of its own, which no page of the cache can name, so this is no jitgen.Cascade: a plan for the prefix,
whose keys many CTAs share, a plan for the rest, and a merge.
"""

from __future__ import annotations

from typing import Any

import torch

from jitgen.compat.flashinfer._hooks import Options
from jitgen.compat.flashinfer._merge import merge_state
from jitgen.compat.flashinfer._prefill_paged import BatchPrefillWithPagedKVCacheWrapper
from jitgen.compat.flashinfer._single import HeldRequest, single_request
from jitgen.compat.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from jitgen.errors import VariantError

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode where all requests share a prefix: attention over the prefix and over each request's own keys, merged."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._prefix = HeldRequest(self._unique.device)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; they are checked and not used."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str | torch.dtype = "float16",
    ) -> None:
        """Prepare forward() for these requests; the tables are those of their own keys, as in the decode wrapper."""
        self._unique.plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            q_data_type=data_type,
        )  # fmt: skip

    plan = begin_forward

    def forward(self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: Cache) -> torch.Tensor:
        """Attention of one row of each request.

        Shapes:  q [batch, num_q_heads, head_dim]; k_shared, v_shared [prefix, num_kv_heads, head_dim] (NHD) or [num_kv_heads,
                 prefix, head_dim] (HND); unique_kv_cache as in the decode wrapper; returns like q.
        """
        shared = single_request(q, k_shared, v_shared, self._kv_layout, Options(), held=self._prefix)
        own = self._unique.run(q, unique_kv_cache, return_lse=True)
        return merge_state(*own, *shared)[0]

    run = forward

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Does nothing: strides are launch arguments."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill where all requests share a prefix: attention over the prefix and over each request's own keys, merged."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._prefix = HeldRequest(self._unique.device)
        self._kv_layout = kv_layout
        self._tables: tuple[Any, ...] | None = None

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; they are checked and not used."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Prepare forward() for these requests; the page tables are those of their own keys, the dtype is that of its q."""
        self._tables = (
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
            num_qo_heads, num_kv_heads, head_dim, page_size,
        )  # fmt: skip

    plan = begin_forward

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: Cache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Attention of the planned requests; causal among their own keys.

        Shapes:  q [total_q, num_q_heads, head_dim]; the rest as in the decode wrapper; returns like q.
        Units:   rope_scale and rope_theta have no effect: FlashInfer takes no position encoding here either.
        """
        if self._tables is None:
            raise VariantError("forward() came before begin_forward(). Call begin_forward() first.")
        self._unique.plan(*self._tables, causal=causal, sm_scale=sm_scale, q_data_type=q.dtype)
        options = Options(sm_scale=sm_scale)
        shared = single_request(q, k_shared, v_shared, self._kv_layout, options, held=self._prefix)
        own = self._unique.run(q, unique_kv_cache, return_lse=True)
        return merge_state(*own, *shared)[0]

    run = forward

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Does nothing: strides are launch arguments."""
