"""Rotary position embedding: flashinfer.rope, over jitgen.rope: one kernel a call, arithmetic in float32."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer._rope_quantize import mla_rope_quantize_fp8, rope_quantize_fp8  # noqa: F401
from jitgen.errors import ShapeMismatch, UnsupportedDtype
from jitgen.rotary import rope

Pair = tuple[torch.Tensor, torch.Tensor]
Where = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """Rotate the rows of ragged q and k; row i of request b has position ``offsets[b] + i``.

    Shapes:  q [nnz, num_q_heads, head_dim]; k [nnz, num_kv_heads, head_dim]; indptr [batch + 1]; offsets [batch]; returns
             both, rotated. Elements from rotary_dim on (default head_dim) pass through.
    Units:   pair i turns by ``position / rope_scale * rope_theta ** (-2 i / rotary_dim)`` radians; a pair is (i, i +
             rotary_dim / 2), or with interleave (2 i, 2 i + 1).
    Errors:  ShapeMismatch.
    """
    return rotate_both(q, k, (indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """As apply_rope, written back to q and k."""
    rotate_both(q, k, (indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta, in_place=True)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """As apply_rope, with the position of each row in pos_ids [nnz]."""
    return rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """As apply_rope_pos_ids, written back to q and k."""
    rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, in_place=True)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """As apply_rope, with the frequencies of Llama 3.1.

    Units:   a frequency f becomes ``(1 - s) f / rope_scale + s f``, where s rises from 0 to 1 while old_context_len holds
             between low_freq_factor and high_freq_factor turns of f.
    """
    smooth = (low_freq_factor, high_freq_factor, old_context_len)
    return rotate_both(q, k, (indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta, smooth)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """As apply_llama31_rope, written back to q and k."""
    smooth = (low_freq_factor, high_freq_factor, old_context_len)
    rotate_both(q, k, (indptr, offsets), rotary_dim, interleave, rope_scale, rope_theta, smooth, in_place=True)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """As apply_llama31_rope, with the position of each row in pos_ids [nnz]."""
    smooth = (low_freq_factor, high_freq_factor, old_context_len)
    return rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, smooth)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """As apply_llama31_rope_pos_ids, written back to q and k."""
    smooth = (low_freq_factor, high_freq_factor, old_context_len)
    rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, smooth, in_place=True)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Pair:
    """Rotate q and k by cosines and sines from a table.

    Shapes:  positions [nnz]; query [nnz, num_q_heads * head_size]; key [nnz, num_kv_heads * head_size]; cos_sin_cache float32
             [max_position, rotary_dim], first the cosines, then the sines; returns both, rotated.
    Units:   is_neox: a pair is (i, i + rotary_dim / 2), else (2 i, 2 i + 1).
    Errors:  UnsupportedDtype if the table is not float32; ShapeMismatch.
    """
    q, k = heads_of(query, key, head_size, cos_sin_cache)
    rotated = rope(q, k, positions, interleave=not is_neox, cos_sin=cos_sin_cache)
    return rotated[0].view(query.shape), rotated[1].view(key.shape)  # type: ignore[union-attr]


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """As apply_rope_with_cos_sin_cache, written back to query and key."""
    q, k = heads_of(query, key, head_size, cos_sin_cache)
    rope(q, k, positions, interleave=not is_neox, cos_sin=cos_sin_cache, out=(q, k))


# ---- what they are made of ------------------------------------------------------------------------------------------------


def rotate_both(
    q: torch.Tensor,
    k: torch.Tensor,
    where: Where,
    rotary_dim: int | None,
    interleave: bool,
    scale: float,
    theta: float,
    smooth: tuple[float, float, int] | None = None,
    in_place: bool = False,
) -> Pair:
    """q and k [nnz, heads, head_dim] rotated; ``where``: positions, or the bounds and first positions of requests."""
    rows = q.shape[0] if isinstance(where, tuple) else where.shape[0]
    if k.shape[0] != q.shape[0] or rows != q.shape[0]:
        raise ShapeMismatch(f"q has {q.shape[0]} rows, k has {k.shape[0]}, there are {rows} positions. All must match.")
    return rope(
        q, k, where, theta=theta, scale=scale, rotary_dim=rotary_dim, interleave=interleave, llama31=smooth,
        out=(q, k) if in_place else None,
    )  # type: ignore[return-value]  # fmt: skip


def heads_of(query: torch.Tensor, key: torch.Tensor, head_size: int, table: torch.Tensor) -> Pair:
    """query and key [nnz, heads * head_size] as views [nnz, heads, head_size]."""
    if table.dtype != torch.float32:
        raise UnsupportedDtype(f"cos_sin_cache has dtype {table.dtype}, expected float32: keep it with .float().")
    for name, t in (("query", query), ("key", key)):
        if t.dim() != 2 or t.shape[1] % head_size:
            raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected [nnz, heads * {head_size}].")
    return query.unflatten(1, (-1, head_size)), key.unflatten(1, (-1, head_size))


def positions_of(indptr: torch.Tensor, offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    """Position of each of ``nnz`` ragged rows: its index in its request plus the request's offset.

    Shapes:  indptr [batch + 1]; offsets [batch]; returns int64 [nnz], 0 for rows of no request.
    """
    row = torch.arange(nnz, device=indptr.device)
    if offsets.numel() == 0:
        return torch.zeros_like(row)
    request = torch.searchsorted(indptr.long(), row, right=True) - 1
    inside = (request >= 0) & (row < indptr[-1])
    request = torch.where(inside, request, 0)
    return torch.where(inside, row - indptr[request] + offsets[request], 0)
