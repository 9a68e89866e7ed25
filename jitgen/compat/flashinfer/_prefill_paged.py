"""Attention of ragged queries over a paged cache."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Options, Place, Scale
from jitgen.compat.flashinfer._inputs import Planned, check_indptr, check_tables, rows_known, split_of
from jitgen.compat.flashinfer._options import (
    as_dtype,
    attention_dtypes,
    check_changes,
    check_multi_item,
    check_no_extras,
    check_scale_factors,
    known_options,
)
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.compat.flashinfer.page import get_seq_lens

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype | None

# options of workspace_size() from custom_mask on, in FlashInfer's order
PAGED_OPTIONS = (
    "custom_mask", "packed_custom_mask", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "sm_scale", "window_left",
    "logits_soft_cap", "rope_scale", "rope_theta", "q_data_type", "kv_data_type", "o_data_type", "prefix_len_ptr",
    "token_pos_in_items_ptr", "token_pos_in_items_len", "max_item_len_ptr", "seq_lens", "seq_lens_q", "block_tables",
    "max_token_per_sequence", "max_sequence_kv", "fixed_split_size", "disable_split_kv", "uniform_q_len",
)  # fmt: skip


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    """Attention of ragged queries over a paged KV cache; prefill, append and decode may be mixed.

    Differs from FlashInfer: plan() reads nothing back to the host, but for a custom mask whose size it checks;
    float_workspace_buffer is checked and not used; sinks work; run(window_left=...) overrides the plan; a fully masked row is
    0 with logsumexp -inf; a batch of 0 requests gives empty results; v_scale costs no second kernel; multi-item scoring is
    refused. ``use_fp16_qk_reduction``, ``non_blocking``, ``enable_pdl``, ``block_tables``, ``seq_lens``, ``seq_lens_q``,
    ``max_token_per_sequence``, ``max_sequence_kv`` and ``uniform_q_len`` are hints without effect. ROPE_LLAMA
    reads the pages into a rotated copy on every call: rotate keys when they are appended instead.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
        jit_kwargs: object = None,
        variant_owns_mask: bool = False,
    ) -> None:
        check_changes(variant_owns_mask=variant_owns_mask)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args or jit_kwargs)
        self._qo_indptr_buf = qo_indptr_buf
        self._paged_kv_indptr_buf = paged_kv_indptr_buf
        self._paged_kv_indices_buf = paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf
        self._custom_mask_buf, self._mask_indptr_buf = custom_mask_buf, mask_indptr_buf
        if use_cuda_graph:
            self._check_buffers("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: object = None,
        seq_lens_q: object = None,
        block_tables: object = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Prepare run() for these requests.

        Shapes:  qo_indptr, paged_kv_indptr [batch + 1]; paged_kv_indices [paged_kv_indptr[-1]]; paged_kv_last_page_len
                 [batch]; on the host or the device. custom_mask bool, q_len * kv_len for each request, joined;
                 packed_custom_mask the same as little-endian bits, each request from a whole byte on.
        Units:   fixed_split_size counts pages; window_left counts keys before the query's own.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    copies the tables; waits for the device only with a custom mask.
        """
        check_multi_item(prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr)
        check_tables(
            qo_indptr=qo_indptr, paged_kv_indptr=paged_kv_indptr, paged_kv_indices=paged_kv_indices,
            paged_kv_last_page_len=paged_kv_last_page_len,
        )  # fmt: skip
        q_dtype, kv_dtype, o_dtype = attention_dtypes(q_data_type, kv_data_type, o_data_type, stored=True)
        check_indptr(qo_indptr, paged_kv_last_page_len.shape[0])
        self._check_batch(paged_kv_last_page_len.shape[0], self._qo_indptr_buf)
        bounds, pages = self._paged_tables(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        kv_len = get_seq_lens(bounds, self._paged_kv_last_page_len_buf, page_size)
        bits = self._mask(custom_mask, packed_custom_mask, qo_indptr, kv_len)
        options = Options(
            0 if causal else None, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta, *bits
        )
        batch = Batch(
            self._q_indptr(qo_indptr), self._held("kv_len", kv_len), bounds, pages, page_size,
            *split_of(fixed_split_size, disable_split_kv, page_size),
        )  # fmt: skip
        heads = Heads(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, q_dtype, o_dtype, kv_dtype)
        self._adopt(Planned(batch, heads, options, rows_known(qo_indptr)))

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: object = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attention of the planned requests.

        Shapes:  q [total_q, num_q_heads, head_dim_qk]; paged_kv_cache a pair of 4-D tensors or one 5-D tensor; returns
                 [total_q, num_q_heads, head_dim_vo] and, with return_lse, float32 [total_q, num_q_heads]. Rows of q beyond the
                 last request are not written, unless o_data_type is not q_data_type.
        Units:   lse is a logarithm of base 2, with lse_base="ln" a natural one; lse_layout="HN" transposes it. sinks are
                 natural logits, float32 [num_q_heads].
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError before plan().
        """
        check_no_extras(args)
        return self._run_changed(
            {}, q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse, return_lse=return_lse,
            lse_base=lse_base, lse_layout=lse_layout, window_left=window_left, sinks=sinks, kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor, use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )  # fmt: skip

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def _run_changed(
        self,
        changes: dict[str, Any],
        q: torch.Tensor,
        paged_kv_cache: Cache,
        *,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: object = None,
        **others: object,
    ) -> Any:
        """run() with ``changes`` to the planned options; ``others`` change the result and are refused."""
        check_scale_factors(kv_cache_sf)
        check_changes(**others)
        if window_left is not None:
            changes = {**changes, "window_left": window_left}
        return self._run(
            q, paged_kv_cache, changes, (q_scale, k_scale, v_scale), sinks, (out, lse), return_lse, lse_base, lse_layout
        )

    def run_placed(self, q: torch.Tensor, paged_kv_cache: Cache, place: Place | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and logsumexp when the requests are pieces of longer contexts."""
        options = self._plan_of().options if place is None else self._override(place=place)
        out, lse = self._attend(q, paged_kv_cache, options, return_lse=True)
        return out, lse

    def replan(self) -> None:
        """Under CUDA graphs: plan once more, as tensors that masks read have changed."""
        planned = self._plan_of()
        self._plans.renew(planned.batch, planned.num_rows)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """As run(), with options in place of the planned ones; a custom mask stays."""
        options = self._replaced(causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        return self._attend(q, paged_kv_cache, options, scales=(None, k_scale, v_scale), return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        *by_position: Any,
        **options: Any,
    ) -> tuple[int, int]:
        """Bytes that a plan for these requests allocates: (partial results, tables). The workspaces passed in are not used.

        Cost:    waits for the device if qo_indptr is there.
        """
        options = known_options("workspace_size()", PAGED_OPTIONS, by_position, options)
        dtype = as_dtype(options.get("q_data_type", "float16"), "q_data_type")
        heads = Heads(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, dtype, dtype)
        return self._workspace_bytes(qo_indptr.shape[0] - 1, int(qo_indptr[-1]), heads, "paged")
