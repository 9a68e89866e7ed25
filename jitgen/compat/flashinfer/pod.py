"""Prefill and decode in one call: flashinfer.pod."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from jitgen.compat.flashinfer._hooks import Scale
from jitgen.compat.flashinfer._inputs import Planned
from jitgen.compat.flashinfer._options import check_no_extras
from jitgen.compat.flashinfer._prefill_paged import BatchPrefillWithPagedKVCacheWrapper
from jitgen.compat.flashinfer._single import single_prefill_with_kv_cache
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.compat.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from jitgen.compat.flashinfer.jit import gen_pod_module  # noqa: F401
from jitgen.errors import ShapeMismatch, UnsupportedOption, VariantError

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class PODWithPagedKVCacheWrapper:
    """Prefill of one request with its keys at hand, and decode of others over a paged cache.

    Differs from FlashInfer: the two parts read different storage, so they are two launches here; to have one launch for both,
    append the prefill's keys to the cache and use BatchPODWithPagedKVCacheWrapper, or one paged prefill plan. The logsumexps
    are returned when asked for. Options of decode come from plan(); those of run() that end in _d must not differ.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        jit_args: object = None,
    ) -> None:
        self._decode = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, True, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer, jit_args=jit_args,
        )  # fmt: skip
        self._kv_layout = kv_layout

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() keeps the addresses of its buffers."""
        return self._decode.is_cuda_graph_enabled

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; they are checked and not used."""
        self._decode.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Prepare the decode part, as BatchDecodeWithPagedKVCacheWrapper.plan()."""
        self._decode.plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, q_data_type=q_data_type, kv_data_type=kv_data_type,
            data_type=data_type, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: torch.Tensor | None = None,
        packed_custom_mask_d: torch.Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: float | None = None,
        window_left_d: int = -1,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
    ) -> tuple[Any, Any]:
        """Attention of both parts.

        Shapes:  q_p, k_p, v_p and the _p options as in single_prefill_with_kv_cache; q_d and paged_kv_cache_d as in
                 BatchDecodeWithPagedKVCacheWrapper.run; returns the output of each, or (out, lse) where its return_lse is set.
        Errors:  UnsupportedOption for options of decode that contradict plan(), or a custom mask for decode.
        """
        check_no_extras(args)
        if custom_mask_d is not None or packed_custom_mask_d is not None:
            raise UnsupportedOption(
                "a custom mask for decode was given. Use a paged prefill plan with a mask for every request."
            )
        planned = self._decode._plan_of().options
        if kv_layout_d not in ("NHD", self._kv_layout):
            raise UnsupportedOption(f"run() got kv_layout_d={kv_layout_d!r}, the wrapper was made for {self._kv_layout!r}.")
        given = (pos_encoding_mode_d, sm_scale_d, window_left_d, rope_scale_d, rope_theta_d)
        absent = ("NONE", None, -1, None, None)
        kept = (planned.pos_encoding_mode, planned.sm_scale, planned.window_left, planned.rope_scale, planned.rope_theta)
        for value, nothing, plan in zip(given, absent, kept, strict=True):
            if value != nothing and value != plan:
                raise UnsupportedOption(
                    f"run() got {value!r} for decode, plan() {plan!r}. Plan with it: run() takes it from there."
                )
        prefill = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p,
            kv_layout=kv_layout_p, pos_encoding_mode=pos_encoding_mode_p, sm_scale=sm_scale_p, window_left=window_left_p,
            rope_scale=rope_scale_p, rope_theta=rope_theta_p, return_lse=return_lse_p,
        )  # fmt: skip
        decode = self._decode.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d
        )
        return prefill, decode

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""


class BatchPODWithPagedKVCacheWrapper:
    """Prefill of some requests and decode of others, over a paged cache.

    Where both parts are given the same cache and the prefill has no custom mask, all requests go into one plan and one launch;
    else each part has its own. Differs from FlashInfer: q_scale, k_scale and v_scale hold for both parts.
    """

    is_cuda_graph_enabled = False

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._mixed = Wrapper(float_workspace_buffer, kv_layout)
        self._tables: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None = None

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Prepare run() for these requests; the tables of each part are those of the paged prefill wrapper.

        Cost:    copies the tables; no wait for the device.
        """
        self._tables = (
            (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p),
            (qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d),
        )
        self._shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        dtype = q_data_type if data_type is None else data_type
        self._options = {
            "pos_encoding_mode": pos_encoding_mode, "window_left": window_left, "q_data_type": dtype,
            "kv_data_type": kv_data_type, "sm_scale": sm_scale, "rope_scale": rope_scale, "rope_theta": rope_theta,
        }  # fmt: skip
        for part, tables in zip((self._prefill, self._decode), self._tables, strict=True):
            part.plan(*tables, *self._shape, **self._options)  # type: ignore[arg-type]
        self._mixed_for: tuple[bool, int, int] | None = None

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: Cache,
        q_d: torch.Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple[Any, Any]:
        """Attention of both parts.

        Shapes:  q_p, q_d [rows, num_q_heads, head_dim]; returns the output of each or, with return_lse, (out, lse) of each.
        Cost:    the first call after plan() with other rows or another causal_p plans once more; a custom mask plans each time.
        """
        if self._tables is None:
            raise VariantError("BatchPODWithPagedKVCacheWrapper.run() came before plan(). Call plan() first.")
        options = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "return_lse": return_lse}
        if custom_mask_p is None and packed_custom_mask_p is None and same_cache(paged_kv_cache_p, paged_kv_cache_d):
            return self._run_mixed(q_p, q_d, paged_kv_cache_p, causal_p, (q_scale, k_scale, v_scale), return_lse)
        self._prefill.plan(
            *self._tables[0], *self._shape, causal=causal_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p,
            **self._options,
        )  # type: ignore[arg-type]  # fmt: skip
        return self._prefill.run(q_p, paged_kv_cache_p, **options), self._decode.run(q_d, paged_kv_cache_d, **options)

    def _run_mixed(
        self,
        q_p: torch.Tensor,
        q_d: torch.Tensor,
        cache: Cache,
        causal: bool,
        scales: tuple[Scale, Scale, Scale],
        return_lse: bool,
    ) -> tuple[Any, Any]:
        """Both parts as one batch."""
        rows = q_p.shape[0]
        for name, q, part in (("q_p", q_p, self._prefill), ("q_d", q_d, self._decode)):
            planned_rows = part._plan_of().num_rows
            if planned_rows is not None and q.shape[0] < planned_rows:
                raise ShapeMismatch(f"{name} has {q.shape[0]} rows, the plan has {planned_rows}. Plan again for these rows.")
        wanted = (causal, rows, q_d.shape[0])
        if self._mixed_for != wanted:
            self._mixed._adopt(self._mixed_plan(*wanted))
            self._mixed_for = wanted
        planned = self._mixed._plan_of()
        found = self._mixed._attend(torch.cat((q_p, q_d)), cache, planned.options, scales=scales, return_lse=return_lse)
        if return_lse:
            return tuple(t[:rows] for t in found), tuple(t[rows:] for t in found)
        return found[:rows], found[rows:]

    def _mixed_plan(self, causal: bool, rows_p: int, rows_d: int) -> Planned:
        """The requests of prefill, then one without keys for rows that belong to none, then those of decode."""
        prefill, decode = self._prefill._plan_of(), self._decode._plan_of()
        p, d = prefill.batch, decode.batch
        assert p.pages is not None and d.pages is not None
        none = torch.zeros(1, dtype=torch.int32, device=p.kv_len.device)
        batch = replace(
            p,
            q_indptr=torch.cat((p.q_indptr, d.q_indptr + rows_p)),
            kv_len=torch.cat((p.kv_len, none, d.kv_len)),
            kv_start=torch.cat((p.kv_start, d.kv_start + p.pages.shape[0])),
            pages=torch.cat((p.pages, d.pages)),
        )
        options = decode.options  # those of plan(): prefill's may be of a run() with a mask
        if causal:
            sees_all = torch.arange(batch.size, device=none.device) >= p.size
            options = replace(options, right=0, sees_all=sees_all)
        return Planned(batch, prefill.heads, options, rows_p + rows_d)

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""


def same_cache(a: Cache, b: Cache) -> bool:
    """Whether two caches are the same memory, seen in the same way."""
    parts = [c if isinstance(c, (tuple, list)) else (c,) for c in (a, b)]
    if len(parts[0]) != len(parts[1]):
        return False
    return all(x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
               for x, y in zip(*parts, strict=True))  # fmt: skip
