"""Attention of mixed batches with one plan: flashinfer.attention."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Options, Scale
from jitgen.compat.flashinfer._inputs import Planned, check_indptr, check_tables, rows_known
from jitgen.compat.flashinfer._options import attention_dtypes, check_backend, check_scale_factors
from jitgen.compat.flashinfer._prefill_paged import BatchPrefillWithPagedKVCacheWrapper
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.compat.flashinfer.jit import gen_batch_attention_module  # noqa: F401
from jitgen.errors import InvalidType, UnsupportedOption

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype | None
# what FlashInfer compiles into its wrapper with sinks, in the order of the constructor
COMPILED_IN = (
    "pos_encoding_mode", "use_fp16_qk_reduction", "q_data_type", "kv_data_type", "head_dim_qk", "head_dim_vo", "window_left",
)  # fmt: skip


class BatchAttention(Wrapper):
    """Attention of ragged queries over a paged KV cache, given lengths instead of last page lengths.

    Differs from FlashInfer: plan() neither waits nor copies back, and no workspace is allocated by convention. It is the
    paged prefill wrapper with other arguments; run() always returns the logsumexp too.
    """

    def __init__(self, kv_layout: str = "NHD", device: str | torch.device = "cuda") -> None:
        super().__init__(torch.empty(0, dtype=torch.uint8, device=device), kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype = torch.bfloat16,
        kv_data_type: Dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Prepare run() for these requests.

        Shapes:  qo_indptr, kv_indptr [batch + 1]; kv_indices [kv_indptr[-1]] pages; kv_len_arr [batch] keys.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    copies the tables; no wait for the device.
        """
        check_profiler(use_profiler)
        check_tables(qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr)
        q_dtype, kv_dtype, o_dtype = attention_dtypes(q_data_type, kv_data_type, None, stored=True)
        check_indptr(qo_indptr, kv_len_arr.shape[0])
        check_indptr(kv_indptr, kv_len_arr.shape[0], "kv_indptr")
        batch = Batch(
            self._held("qo_indptr", qo_indptr), self._held("kv_len", kv_len_arr), self._held("kv_indptr", kv_indptr),
            self._held("kv_indices", kv_indices), page_size,
        )  # fmt: skip
        options = Options(0 if causal else None, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale)
        heads = Heads(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, q_dtype, o_dtype, kv_dtype)
        self._adopt(Planned(batch, heads, options, rows_known(qo_indptr)))

    def run(
        self,
        q: torch.Tensor,
        kv_cache: Cache,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned requests; a positive logits_soft_cap takes the place of the planned one.

        Shapes:  q [total_q, num_q_heads, head_dim_qk]; kv_cache a pair of 4-D tensors or one 5-D tensor; returns [total_q,
                 num_q_heads, head_dim_vo] and float32 [total_q, num_q_heads].
        Units:   lse is a logarithm of base 2.
        """
        check_profiler(profiler_buffer is not None)
        check_scale_factors(kv_cache_sf)
        options = self._override(logits_soft_cap=logits_soft_cap) if logits_soft_cap > 0 else self._plan_of().options
        return self._attend(q, kv_cache, options, scales=(None, k_scale, v_scale), out=out, lse=lse, return_lse=True)  # type: ignore[no-any-return]


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The paged prefill wrapper with sinks as first extra argument of run().

    Differs from FlashInfer: nothing is compiled in the constructor; its dtypes, head dims and window are those of plan().
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
        *compiled_in: Any,
        **also_compiled_in: Any,
    ) -> None:
        check_backend(backend)
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
            paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf,
        )  # fmt: skip
        for name in also_compiled_in.keys() - set(COMPILED_IN):
            raise InvalidType(f"{type(self).__name__} takes no argument {name!r}, expected one of {', '.join(COMPILED_IN)}.")
        if len(compiled_in) > len(COMPILED_IN):
            raise InvalidType(f"got {len(compiled_in)} arguments after backend, expected at most {len(COMPILED_IN)}.")

    def run(  # type: ignore[override]
        self, q: torch.Tensor, paged_kv_cache: Cache, *args: Any, sinks: torch.Tensor | None = None, **options: Any
    ) -> Any:
        """As the paged prefill wrapper; ``args`` are the sinks, float32 [num_q_heads], and optionally the softmax scale."""
        if len(args) > 2 or (args and sinks is not None):
            raise UnsupportedOption(f"run() got {len(args)} extra arguments, expected the sinks and the softmax scale, once.")
        sinks = args[0] if args else sinks
        changes = {"sm_scale": float(args[1])} if len(args) == 2 else {}
        return self._run_changed(changes, q, paged_kv_cache, sinks=sinks, **options)

    run_return_lse = functools.partialmethod(run, return_lse=True)


def check_profiler(wanted: bool) -> None:
    """FlashInfer's in-kernel profiler is refused."""
    if wanted:
        raise UnsupportedOption(
            "use_profiler: jitgen's kernels have no profiler of their own. Use Nsight Compute or torch.profiler."
        )
