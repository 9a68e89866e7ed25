"""Attention of one query row a request: flashinfer.decode."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Options, Scale
from jitgen.compat.flashinfer._inputs import Planned, check_tables, split_of
from jitgen.compat.flashinfer._options import (
    attention_dtypes,
    check_changes,
    check_no_extras,
    check_scale_factors,
    known_options,
    named_options,
)
from jitgen.compat.flashinfer._single import single_decode_with_kv_cache  # noqa: F401
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.compat.flashinfer.jit import gen_batch_decode_module, gen_single_decode_module  # noqa: F401
from jitgen.compat.flashinfer.page import get_seq_lens
from jitgen.errors import ShapeMismatch

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# the order in which FlashInfer took the options of plan() by position
PLAN_OPTIONS = (
    "pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "o_data_type", "data_type",
    "sm_scale", "rope_scale", "rope_theta", "non_blocking", "block_tables", "seq_lens", "fixed_split_size", "disable_split_kv",
    "q_len_per_req",
)  # fmt: skip


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Attention of one query row (or a few) for each request, over a paged KV cache.

    Differs from FlashInfer: plan() reads nothing back to the host; float_workspace_buffer is checked and not used; sinks work;
    run(window_left=...) overrides the plan; a batch of 0 requests gives empty results; v_scale costs no second kernel.
    ``use_tensor_cores``, ``non_blocking``, ``enable_pdl``, ``block_tables`` and ``seq_lens`` are hints without effect.
    ROPE_LLAMA rotates keys as they are read; with more than 32 query rows for a KV head, or a head dim that is no multiple of
    16, it reads the pages into a rotated copy on every call: rotate keys when they are appended instead.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: object = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._rows: torch.Tensor | None = None  # first row of each request; the same for every batch of one size
        self._rows_each = 1
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        if use_cuda_graph:
            self._check_buffers("paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")

    @property
    def resolved_backend(self) -> str:
        """'fa2'; every backend that is accepted means jitgen's own kernels."""
        return "fa2"

    @property
    def use_tensor_cores(self) -> bool:
        """As given; kernels use tensor cores in any case."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated: Any,
        **options: Any,
    ) -> None:
        """Prepare run() for these requests: pos_encoding_mode="NONE", window_left=-1, window_right=0, logits_soft_cap=None,
        q_data_type="float16", kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False,
        q_len_per_req=1. By position they are deprecated.

        Shapes:  indptr [batch + 1], indices [indptr[-1]], last_page_len [batch], on the host or the device.
        Units:   fixed_split_size counts pages.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    copies the tables; no wait for the device.
        """
        if deprecated:
            warnings.warn("plan(): pass options by name.", DeprecationWarning, stacklevel=2)
            options = named_options("plan()", PLAN_OPTIONS, deprecated, options)
        self._plan(indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim), page_size, **options)

    begin_forward = plan

    def _plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        heads: tuple[int, int, int],
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = None,
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: object = None,
        seq_lens: object = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        check_tables(indptr=indptr, indices=indices, last_page_len=last_page_len)
        num_q, num_kv, dim = heads
        q_dtype, kv_dtype, o_dtype = attention_dtypes(q_data_type, kv_data_type, o_data_type, data_type, stored=True)
        right = None if window_right < 0 or (window_right == 0 and q_len_per_req == 1) else window_right
        planned = Options(right, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        batch_size = last_page_len.shape[0]
        self._check_batch(batch_size, self._paged_kv_indptr_buf)
        pages = self._paged_tables(indptr, indices, last_page_len)
        if self._rows is None or self._rows.shape[0] != batch_size + 1 or self._rows_each != q_len_per_req:
            self._rows_each = q_len_per_req
            self._rows = torch.arange(batch_size + 1, dtype=torch.int32, device=self.device) * q_len_per_req
        kv_len = get_seq_lens(pages[0], self._paged_kv_last_page_len_buf, page_size)
        batch = Batch(
            self._held("qo_indptr", self._rows), self._held("kv_len", kv_len), *pages, page_size,
            *split_of(fixed_split_size, disable_split_kv, page_size), q_len_per_req,
        )  # fmt: skip
        rows = batch_size * q_len_per_req
        self._adopt(Planned(batch, Heads(num_q, num_kv, dim, dim, q_dtype, o_dtype, kv_dtype), planned, rows))

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
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: object = None,
    ) -> Any:
        """Attention of the planned requests.

        Shapes:  q [batch * q_len_per_req, num_q_heads, head_dim]; paged_kv_cache a pair of 4-D tensors or one 5-D tensor;
                 returns [rows, num_q_heads, head_dim] and, with return_lse, float32 [rows, num_q_heads].
        Units:   lse is a logarithm of base 2; sinks are natural logits, float32 [num_q_heads].
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError before plan().
        """
        check_no_extras(args)
        check_scale_factors(kv_cache_sf)
        check_changes(skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        planned = self._plan_of()
        if q_len_per_req is not None and q_len_per_req * planned.batch.size != planned.num_rows:
            raise ShapeMismatch(f"run() got q_len_per_req={q_len_per_req}, the plan has {planned.num_rows} rows for "
                                f"{planned.batch.size} requests. Plan with it.")  # fmt: skip
        options = planned.options if window_left is None else self._override(window_left=window_left)
        return self._attend(
            q, paged_kv_cache, options, scales=(q_scale, k_scale, v_scale), sinks=sinks, out=out, lse=lse, return_lse=return_lse
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
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
        """As run(), with options in place of the planned ones."""
        options = self._override(
            window_left=window_left, logits_soft_cap=logits_soft_cap, pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale,
            rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self._attend(q, paged_kv_cache, options, scales=(q_scale, k_scale, v_scale), return_lse=return_lse)

    forward_return_lse = functools.partialmethod(forward, return_lse=True)

    def workspace_size(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *by_position: Any,
        **options: Any,
    ) -> tuple[int, int]:
        """Bytes that a plan for these requests allocates: (partial results, tables). The workspaces passed in are not used.

        Takes the options of plan() but non_blocking and window_right, by position too.
        """
        names = tuple(name for name in PLAN_OPTIONS if name != "non_blocking")
        options = known_options("workspace_size()", names, by_position, options)
        rows = last_page_len.shape[0] * options.get("q_len_per_req", 1)
        dtypes = attention_dtypes(
            *(options.get(name) for name in ("q_data_type", "kv_data_type", "o_data_type", "data_type")), stored=True
        )
        heads = Heads(num_qo_heads, num_kv_heads, head_dim, head_dim, dtypes[0], dtypes[2])
        return self._workspace_bytes(last_page_len.shape[0], rows, heads, "paged")


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """BatchDecodeWithPagedKVCacheWrapper for CUDA graphs: run() may be captured, plan() again before each replay."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: str | torch.dtype | None = None,
    kv_data_type: str | torch.dtype | None = None,
    data_type: str | torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """plan() as serving engines bind it to a wrapper: under CUDA graphs the wrapper's buffers already hold the tables.

    global_override_indptr_cpu, a host copy of indptr, is not needed: nothing is planned on the host.
    """
    if self.is_cuda_graph_enabled:
        indptr, indices, last_page_len = (
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf,
        )  # fmt: skip
    self._plan(
        indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim), page_size,
        pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap, q_data_type=q_data_type,
        kv_data_type=kv_data_type, data_type=data_type, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv, q_len_per_req=q_len_per_req,
    )  # fmt: skip
