"""What a plan of the shim holds, and the checks of what is given to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jitgen.compat.flashinfer._batch import Batch, Heads
from jitgen.compat.flashinfer._hooks import Options
from jitgen.compat.flashinfer._options import check_dtype
from jitgen.compat.flashinfer.quantization import byte_offsets, pack_segments
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDtype


@dataclass(frozen=True)
class Planned:
    """What a plan() leaves for run()."""

    batch: Batch
    heads: Heads
    options: Options
    num_rows: int | None  # rows of q, where the host knows them


def split_of(fixed_split_size: int | None, disable_split_kv: bool, page_size: int) -> tuple[str, int | None]:
    """How keys are split between CTAs: FlashInfer's two options as jitgen's split and kv_split; its size counts pages."""
    if disable_split_kv:
        return "none", None
    if fixed_split_size is not None and fixed_split_size > 0:
        return "fixed", fixed_split_size * page_size
    return "balanced", None


def fill(name: str, buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copy to the beginning of a buffer that may be longer; copying a buffer to itself does nothing."""
    if value.shape[0] > buffer.shape[0]:
        raise ShapeMismatch(
            f"{name} has {value.shape[0]} entries, its CUDA graph buffer has {buffer.shape[0]}. Make the buffer as large as "
            "the largest plan."
        )
    if value is not buffer:
        buffer[: value.shape[0]].copy_(value, non_blocking=True)


def result(given: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, q: torch.Tensor, name: str) -> torch.Tensor:
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
        check_dtype(name, t, heads.q_dtype if name == "q" else heads.kv_dtype or heads.q_dtype)
        if t.device != batch.kv_len.device:
            raise ShapeMismatch(f"{name} is on {t.device}, the plan is on {batch.kv_len.device}. All must be on one device.")
    if q.dim() != 3 or q.shape[1:] != (heads.num_q, heads.dim_qk):
        raise ShapeMismatch(f"q has shape {tuple(q.shape)}, the plan says [rows, {heads.num_q}, {heads.dim_qk}].")
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


def check_tables(**tables: object) -> None:
    """What a plan is made from are tensors of integers."""
    for name, t in tables.items():
        if not isinstance(t, torch.Tensor):
            raise InvalidType(f"{name} is a {type(t).__name__}, expected a torch.Tensor of int32 or int64.")
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise UnsupportedDtype(f"{name} has dtype {t.dtype}, expected int32 or int64.")


def check_indptr(indptr: torch.Tensor, batch: int, name: str = "qo_indptr") -> None:
    """The bounds of rows, or of page lists, are those of the same requests."""
    if indptr.dim() != 1 or indptr.shape[0] != batch + 1:
        raise ShapeMismatch(f"{name} has shape {tuple(indptr.shape)}, expected [{batch + 1}], one more than requests.")


def rows_known(qo_indptr: torch.Tensor) -> int | None:
    """Number of query rows where it costs no wait."""
    return int(qo_indptr[-1]) if qo_indptr.device.type == "cpu" else None
