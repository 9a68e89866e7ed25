"""Attention of ragged queries over ragged keys and values."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Options, Scale
from jitgen.compat.flashinfer._inputs import Planned, check_indptr, check_tables, rows_known, split_of
from jitgen.compat.flashinfer._options import (
    as_dtype,
    attention_dtypes,
    check_changes,
    check_multi_item,
    check_no_extras,
    check_scale_factors,
    known_options,
    rows_first,
)
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.errors import UnsupportedOption

Dtype = str | torch.dtype | None

# options of workspace_size() from custom_mask on, in FlashInfer's order
RAGGED_OPTIONS = (
    "custom_mask", "packed_custom_mask", "causal", "pos_encoding_mode", "use_fp16_qk_reduction", "window_left",
    "logits_soft_cap", "sm_scale", "rope_scale", "rope_theta", "q_data_type", "kv_data_type", "o_data_type", "prefix_len_ptr",
    "token_pos_in_items_ptr", "token_pos_in_items_len", "max_item_len_ptr", "fixed_split_size", "disable_split_kv", "seq_lens",
    "seq_lens_q", "max_token_per_sequence", "max_sequence_kv", "v_indptr", "o_indptr", "uniform_q_len",
)  # fmt: skip


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attention of ragged queries over ragged keys and values.

    Differs from FlashInfer as BatchPrefillWithPagedKVCacheWrapper does; q_scale, k_scale and v_scale are honoured for every
    dtype. Note FlashInfer's order of plan()'s options: window_left and logits_soft_cap come before sm_scale here, after it in
    the paged wrapper.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
        jit_kwargs: object = None,
        variant_owns_mask: bool = False,
    ) -> None:
        check_changes(variant_owns_mask=variant_owns_mask)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args or jit_kwargs)
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr_buf, kv_indptr_buf
        self._custom_mask_buf, self._mask_indptr_buf = custom_mask_buf, mask_indptr_buf
        if use_cuda_graph:
            self._check_buffers("qo_indptr_buf", "kv_indptr_buf")

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: object = None,
        seq_lens_q: object = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """Prepare run() for these requests.

        Shapes:  qo_indptr, kv_indptr [batch + 1], on the host or the device; masks as in the paged wrapper.
        Units:   fixed_split_size counts keys; window_left counts keys before the query's own.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    copies the tables; waits for the device only with a custom mask.
        """
        check_multi_item(prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr)
        check_tables(qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        for name, value in (("v_indptr", v_indptr), ("o_indptr", o_indptr)):
            if value is not None:
                raise UnsupportedOption(f"{name} was given: values and outputs lie as keys and queries do. Leave it out.")
        q_dtype, _, o_dtype = attention_dtypes(q_data_type, kv_data_type, o_data_type)
        batch_size = kv_indptr.shape[0] - 1
        check_indptr(qo_indptr, batch_size)
        self._check_batch(batch_size, self._qo_indptr_buf)
        kv_start = self._held("kv_indptr", kv_indptr, self._kv_indptr_buf)
        bits = self._mask(custom_mask, packed_custom_mask, qo_indptr, kv_indptr.diff())
        options = Options(
            0 if causal else None, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta, *bits
        )
        batch = Batch(
            self._q_indptr(qo_indptr), self._held("kv_len", kv_start.diff()), kv_start, None, 0,
            *split_of(fixed_split_size, disable_split_kv, 1),
        )  # fmt: skip
        heads = Heads(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, q_dtype, o_dtype)
        self._adopt(Planned(batch, heads, options, rows_known(qo_indptr)))

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        o_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: object = None,
    ) -> Any:
        """Attention of the planned requests.

        Shapes:  q [total_q, num_q_heads, head_dim_qk]; k, v [total_kv, num_kv_heads, head_dim] (NHD) or [num_kv_heads,
                 total_kv, head_dim] (HND); returns [total_q, num_q_heads, head_dim_vo] and, with return_lse, float32
                 [total_q, num_q_heads].
        Units:   lse as in the paged wrapper; the output is divided by o_scale; sinks are natural logits.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError before plan().
        """
        check_no_extras(args)
        check_scale_factors(kv_cache_sf)
        if o_scale is not None:
            v_scale = (1.0 if v_scale is None else v_scale) / o_scale
        k, v = rows_first(k, self._kv_layout), rows_first(v, self._kv_layout)
        return self._run(q, (k, v), {}, (q_scale, k_scale, v_scale), sinks, (out, lse), return_lse, lse_base, lse_layout)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        k, v = rows_first(k, self._kv_layout), rows_first(v, self._kv_layout)
        return self._attend(q, (k, v), options, return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *by_position: Any,
        **options: Any,
    ) -> tuple[int, int]:
        """Bytes that a plan for these requests allocates: (partial results, tables). The workspaces passed in are not used.

        Cost:    waits for the device if qo_indptr is there.
        """
        options = known_options("workspace_size()", RAGGED_OPTIONS, by_position, options)
        dtype = as_dtype(options.get("q_data_type", "float16"), "q_data_type")
        heads = Heads(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, dtype, dtype)
        return self._workspace_bytes(qo_indptr.shape[0] - 1, int(qo_indptr[-1]), heads, "ragged")
