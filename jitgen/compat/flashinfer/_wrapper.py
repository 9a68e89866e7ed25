"""What the attention wrappers of the shim have in common: buffers, the plan they hold, and the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch, attend, rotated
from jitgen.compat.flashinfer._hooks import Options, Scale, check_sinks, hooks_for, softmax_scale
from jitgen.compat.flashinfer._options import LAYOUTS, check_backend, check_choice, check_dtype, check_workspace
from jitgen.compat.flashinfer.quantization import byte_offsets, pack_segments
from jitgen.errors import ShapeMismatch, UnsupportedDtype, VariantError
from jitgen.variant import Variant


@dataclass(frozen=True)
class Heads:
    """Head counts, head dims and dtypes of a plan."""

    num_q: int
    num_kv: int
    dim_qk: int
    dim_vo: int
    q_dtype: torch.dtype
    o_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.num_kv < 1 or self.num_q % self.num_kv:
            raise ShapeMismatch(
                f"num_qo_heads is {self.num_q}, num_kv_heads is {self.num_kv}: the first must be a multiple of the second."
            )


@dataclass(frozen=True)
class Planned:
    """What a plan() leaves for run()."""

    batch: Batch
    heads: Heads
    options: Options
    num_rows: int | None  # rows of q, where the host knows them


class Wrapper:
    """Base of the wrappers: holds the buffers of CUDA graphs and the last plan, and calls attention."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        backend: str = "auto",
        jit_args: object = None,
    ) -> None:
        check_choice("kv_layout", kv_layout, LAYOUTS)
        check_backend(backend, jit_args)
        self.device = check_workspace(float_workspace_buffer)
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._float_workspace_buffer = float_workspace_buffer
        self._planned: Planned | None = None
        self._variant: tuple[tuple[object, ...], Variant] | None = None
        self._own: dict[str, torch.Tensor] = {}  # buffers of a CUDA graph that the user did not give

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() keeps the addresses of its buffers, for CUDA graphs that hold a run()."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; they are checked and not used."""
        if check_workspace(float_workspace_buffer) != self.device:
            raise ShapeMismatch(f"float_workspace_buffer is on {float_workspace_buffer.device}, the wrapper is on {self.device}.")
        if int_workspace_buffer is not None:
            check_workspace(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    # ---- buffers ----
    def _held(self, name: str, value: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """``value`` on the device as int32; under CUDA graphs at an address that stays, in ``buffer`` if the user gave one."""
        if not self._use_cuda_graph:
            return value.to(self.device, torch.int32, non_blocking=True)
        if buffer is not None:
            fill(name, buffer, value)
            if buffer.dtype == torch.int32:
                return buffer
            value = buffer
        own = self._own.get(name)
        if own is None:
            own = self._own[name] = torch.zeros(value.shape[0], dtype=torch.int32, device=self.device)
        fill(name, own, value)
        return own

    def _check_batch(self, batch: int, fixed: torch.Tensor | None) -> None:
        """Under CUDA graphs the number of requests is that of the buffers."""
        if self._use_cuda_graph and fixed is not None and batch != fixed.shape[0] - 1:
            raise ShapeMismatch(
                f"the plan has {batch} requests, the buffers of this CUDA graph wrapper are for {fixed.shape[0] - 1}. "
                "Pad the batch with requests of no key, or make a wrapper for this size."
            )

    # ---- the call ----
    def _plan_of(self) -> Planned:
        if self._planned is None:
            raise VariantError(f"{type(self).__name__}.run() came before plan(). Call plan() first.")
        return self._planned

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: Options,
        *,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Check a call against the plan, run it, and return out or (out, lse)."""
        planned = self._plan_of()
        batch, heads = planned.batch, planned.heads
        check_inputs(planned, q, k, v)
        check_sinks(sinks, heads.num_q, q.device)
        out = result(out, (q.shape[0], heads.num_q, heads.dim_vo), heads.o_dtype, q, "out")
        if return_lse or lse is not None:
            lse = result(lse, (q.shape[0], heads.num_q), torch.float32, q, "lse")
        variant = self._variant_for(options, (q_scale, k_scale, v_scale), sinks)
        if options.rotates:
            batch, q, k, v = rotated(batch, q, k, v, options.rope, options.place)
        scale = softmax_scale(options, heads.dim_qk, q_scale, k_scale)
        target = out if out.dtype == q.dtype else torch.empty_like(out, dtype=q.dtype)
        if batch.size and q.shape[0]:
            attend(batch, variant, q, k, v, scale, target, lse)
        if target is not out:
            out.copy_(target)
        return (out, lse) if return_lse else out

    def _variant_for(self, options: Options, scales: tuple[Scale, ...], sinks: torch.Tensor | None) -> Variant:
        """The variant of a call; the last one is kept, as layers of a model call alike."""
        key = (options, *scales, sinks)
        if self._variant is not None and all(map(same, self._variant[0], key)):
            return self._variant[1]
        heads = self._plan_of().heads
        variant = hooks_for(options, heads.num_q, heads.num_kv, self.device, *scales).variant(sinks)
        self._variant = (key, variant)
        return variant


def same(a: object, b: object) -> bool:
    """One object, or equal numbers."""
    return a is b or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b)


def fill(name: str, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copy to the beginning of a buffer that may be longer; copying a buffer to itself does nothing."""
    if value.shape[0] > buffer.shape[0]:
        raise ShapeMismatch(
            f"{name} has {value.shape[0]} entries, its CUDA graph buffer has {buffer.shape[0]}. Make the buffer as large as the "
            "largest plan."
        )
    if value is not buffer:
        buffer[: value.shape[0]].copy_(value, non_blocking=True)


def result(
    given: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, q: torch.Tensor, name: str
) -> torch.Tensor:
    """The tensor given for a result, checked, or a new one; rows that belong to no request are not written."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=q.device)
    if tuple(given.shape) != shape or given.device != q.device:
        raise ShapeMismatch(f"{name} has shape {tuple(given.shape)} on {given.device}, expected {shape} on {q.device}.")
    if given.dtype != dtype:
        raise UnsupportedDtype(f"{name} has dtype {given.dtype}, expected {dtype}. Plan with o_data_type, or convert it.")
    return given


def check_inputs(planned: Planned, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q, keys and values are what was planned; k and v are [rows, heads, dim] or [pages, page_size, heads, dim]."""
    heads, batch = planned.heads, planned.batch
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, t, heads.q_dtype)
        if t.device != batch.kv_len.device:
            raise ShapeMismatch(f"{name} is on {t.device}, the plan is on {batch.kv_len.device}. All must be on one device.")
    if q.dim() != 3 or q.shape[1:] != (heads.num_q, heads.dim_qk):
        raise ShapeMismatch(f"q has shape {tuple(q.shape)}, the plan says [rows, {heads.num_q}, {heads.dim_qk}].")
    if planned.num_rows is not None and q.shape[0] < planned.num_rows:
        raise ShapeMismatch(f"q has {q.shape[0]} rows, the plan has {planned.num_rows}. Plan again for these rows.")
    page = () if batch.pages is None else (batch.page_size,)
    for name, t, dim in (("k", k, heads.dim_qk), ("v", v, heads.dim_vo)):
        want = (*page, heads.num_kv, dim)
        if tuple(t.shape[1:]) != want:
            raise ShapeMismatch(
                f"{name} has shape {tuple(t.shape)} (as NHD), the plan says [{'pages' if page else 'rows'}, "
                f"{', '.join(map(str, want))}]."
            )
    if k.shape[0] != v.shape[0]:
        raise ShapeMismatch(f"v has {v.shape[0]} {'pages' if page else 'rows'}, k has {k.shape[0]}. Both must match.")


def mask_bits(
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    q_len: torch.Tensor,
    kv_len: torch.Tensor,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Packed bits of a custom mask and the first byte of each request, or None without a mask.

    Shapes:  custom_mask bool, for each request [q_len, kv_len], flattened and joined; packed_custom_mask uint8, the bits of
             each request from a whole byte on, little-endian; returns uint8 [bytes] and int32 [batch + 1] on ``device``.
    Errors:  ShapeMismatch if the size is not that of the batch.
    Cost:    waits for the device once if the lengths are there.
    """
    if custom_mask is None and packed_custom_mask is None:
        return None
    counts = q_len.long() * kv_len.to(q_len.device).long()
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    start = byte_offsets(indptr)
    num_bits, num_bytes = torch.stack((indptr[-1], start[-1])).tolist()
    if packed_custom_mask is not None:
        if packed_custom_mask.numel() != num_bytes or packed_custom_mask.dtype != torch.uint8:
            raise ShapeMismatch(
                f"packed_custom_mask has {packed_custom_mask.numel()} elements of {packed_custom_mask.dtype}, expected "
                f"{num_bytes} of uint8: q_len * kv_len bits for each request, from a whole byte on, as "
                "segment_packbits(mask, indptr, bitorder='little') packs them."
            )
        return packed_custom_mask.to(device), start.to(device, torch.int32)
    assert custom_mask is not None
    if custom_mask.numel() != num_bits:
        raise ShapeMismatch(
            f"custom_mask has {custom_mask.numel()} elements, expected {num_bits}: q_len * kv_len for each request, flattened "
            "and joined."
        )
    mask, indptr, start = (t.to(device) for t in (custom_mask, indptr, start))
    return pack_segments(mask, indptr, start, num_bytes, "little"), start.int()
