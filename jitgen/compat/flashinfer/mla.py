"""Absorbed multi-head latent attention over a paged cache: flashinfer.mla."""

from __future__ import annotations

from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Hooks, Options, check_sinks, hooks_for
from jitgen.compat.flashinfer._inputs import Planned, check_indptr, check_tables, rows_known
from jitgen.compat.flashinfer._options import attention_dtypes, check_dtype
from jitgen.compat.flashinfer._wrapper import Wrapper
from jitgen.compat.flashinfer.attention import check_profiler
from jitgen.compat.flashinfer.jit import gen_batch_mla_module  # noqa: F401
from jitgen.errors import ShapeMismatch, UnsupportedOption
from jitgen.spec import MLA_DIMS
from jitgen.variant import Variant

Dtype = str | torch.dtype
REMEDY = "Multiply q, sm_scale or the output by it."
MAX_VARIANTS = 256  # layers may have their own sinks


class BatchMLAPagedAttentionWrapper(Wrapper):
    """Attention of ragged queries over a paged cache of compressed keys, whose rows are the values too.

    Differs from FlashInfer: plan() neither waits nor copies back. q_nope and q_pe that are slices of one tensor
    [rows, heads, 576] are read where they are, others joined in a copy.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph, backend)
        self._qo_indptr_buf = qo_indptr
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._kv_len_arr_buf = kv_indptr, kv_indices, kv_len_arr
        if use_cuda_graph:
            self._check_buffers("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "kv_len_arr_buf")
        self._variants: dict[tuple[int, int], tuple[Options, torch.Tensor | None, Hooks, Variant]] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Dtype,
        kv_data_type: Dtype,
        use_profiler: bool = False,
        **options: Any,
    ) -> None:
        """Prepare run() for these requests.

        Shapes:  qo_indptr, kv_indptr [batch + 1]; kv_indices [kv_indptr[-1]] pages; kv_len_arr [batch] keys.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    copies the tables; no wait for the device.
        """
        check_profiler(use_profiler)
        check_tables(qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr)
        check_options("plan", options)
        if (head_dim_ckv + head_dim_kpe, head_dim_ckv) != MLA_DIMS:
            raise ShapeMismatch(f"head_dim_ckv is {head_dim_ckv}, head_dim_kpe {head_dim_kpe}, expected 512 and 64.")
        q_dtype, _, o_dtype = attention_dtypes(q_data_type, kv_data_type, None)
        for name, indptr in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
            check_indptr(indptr, kv_len_arr.shape[0], name)
        self._check_batch(kv_len_arr.shape[0], self._qo_indptr_buf)
        batch = Batch(
            self._held("qo_indptr", qo_indptr, self._qo_indptr_buf), self._held("kv_len", kv_len_arr, self._kv_len_arr_buf),
            self._held("kv_indptr", kv_indptr, self._paged_kv_indptr_buf),
            self._held("kv_indices", kv_indices, self._paged_kv_indices_buf), page_size,
        )  # fmt: skip
        heads = Heads(num_heads, 1, *MLA_DIMS, q_dtype, o_dtype)
        planned = Options(0 if causal else None, sm_scale=sm_scale)
        self._adopt(Planned(batch, heads, planned, rows_known(qo_indptr)))

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | torch.Tensor | None = None,
        ckv_scale_arr: torch.Tensor | None = None,
        kpe_scale: float | torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Attention of the planned requests.

        Shapes:  q_nope [total_q, num_heads, 512]; q_pe [total_q, num_heads, 64]; ckv_cache [pages, page_size, 512]; kpe_cache
                 [pages, page_size, 64]; returns [total_q, num_heads, 512] and, with return_lse, float32 [total_q, num_heads].
        Units:   lse is a logarithm of base 2, or e with return_lse_base_on_e.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        """
        check_profiler(profiler_buffer is not None)
        check_options("run", options)
        if kv_len is not None or page_table is not None:
            raise UnsupportedOption("kv_len and page_table belong to the cutlass back end. Give them to plan().")
        for name, value in (("o_scale", o_scale), ("ckv_scale", ckv_scale), ("kpe_scale", kpe_scale)):
            if value is not None and (isinstance(value, torch.Tensor) or value != 1.0):  # a tensor is not waited for
                raise UnsupportedOption(f"{name} is {given_as(value)}, and latent caches have no scales here. {REMEDY}")
        if ckv_scale_arr is not None:
            raise UnsupportedOption(f"ckv_scale_arr was given, and latent caches have no scales here. {REMEDY}")
        planned = self._plan_of()
        heads, batch = planned.heads, planned.batch
        check_latent("q_nope", q_nope, (heads.num_q, 512), heads.q_dtype)
        check_latent("q_pe", q_pe, (heads.num_q, 64), heads.q_dtype)
        for name, cache, dim in (("ckv_cache", ckv_cache, 512), ("kpe_cache", kpe_cache, 64)):
            check_latent(name, cache, (batch.page_size, dim), heads.q_dtype)
        if planned.num_rows is not None and q_nope.shape[0] < planned.num_rows:
            raise ShapeMismatch(
                f"q_nope has {q_nope.shape[0]} rows, the plan has {planned.num_rows}. Plan again for these rows."
            )
        asked = self._override(natural_lse=True) if return_lse_base_on_e else planned.options
        found = self._variants.get((id(asked), id(sinks)))
        if found is None or found[0] is not asked or found[1] is not sinks:
            check_sinks(sinks, heads.num_q, q_nope.device)
            hooks = hooks_for(asked, heads.num_q, 1, self.device)
            if len(self._variants) >= MAX_VARIANTS:
                self._variants.clear()
            found = self._variants[id(asked), id(sinks)] = (asked, sinks, hooks, hooks.variant(sinks))
        q, cache, scale = join_rows(q_nope, q_pe), join_cache(ckv_cache, kpe_cache), float(asked.sm_scale)  # type: ignore[arg-type]
        return self._plans.attend(batch, heads, *found[2:], q, cache, "NHD", scale, out, lse, return_lse)


def check_options(call: str, options: dict[str, Any]) -> None:
    """Options of other back ends, which FlashInfer 0.7 added; hints are ignored."""
    for name, value in options.items():
        if name != "enable_pdl" and value is not None and value is not False:
            raise UnsupportedOption(f"{name}={value!r} of {call}() is for other back ends and not supported. Leave it out.")


def given_as(value: object) -> str:
    """An argument in a message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def check_latent(name: str, t: torch.Tensor, inner: tuple[int, int], dtype: torch.dtype) -> None:
    """A part of q or of the cache is what was planned."""
    if t.dim() != 3 or tuple(t.shape[1:]) != inner:
        raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, the plan says [*, {inner[0]}, {inner[1]}].")
    check_dtype(name, t, dtype)


def are_neighbours(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are slices of one, along the last axis."""
    begins = first.data_ptr() + first.shape[-1] * first.element_size() == second.data_ptr()
    room = first.storage_offset() + first.shape[-1] == second.storage_offset()
    return begins and room and first.stride() == second.stride() and first.shape[:-1] == second.shape[:-1]


def join_rows(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two parts of rows as one tensor: the one that they are slices of, or a copy."""
    if first.shape[0] and are_neighbours(first, second):
        return first.as_strided((*first.shape[:-1], first.shape[-1] + second.shape[-1]), first.stride())
    return torch.cat((first, second), -1)


def join_cache(ckv: torch.Tensor, kpe: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A cache as one tensor where it is one, which spares the CPU a copy."""
    if are_neighbours(ckv, kpe):
        return ckv.as_strided((*ckv.shape[:-1], ckv.shape[-1] + kpe.shape[-1]), ckv.stride())
    return ckv, kpe
