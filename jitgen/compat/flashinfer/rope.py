"""Rotary position embedding: flashinfer.rope.

These are torch operations until jitgen has a kernel for them: correct, capturable in a CUDA graph, without a wait for the
device. Angles, sines and products are float32, whatever the dtype of q and k.
"""

from __future__ import annotations

import math

import torch

from jitgen.errors import ShapeMismatch, UnsupportedDtype

Pair = tuple[torch.Tensor, torch.Tensor]


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
    return rotate_both(q, k, positions_of(indptr, offsets, q.shape[0]), rotary_dim, interleave, rope_scale, rope_theta)


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
    write_back(q, k, apply_rope(q, k, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta))


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
    write_back(q, k, rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta))


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
    return rotate_both(q, k, positions_of(indptr, offsets, q.shape[0]), rotary_dim, interleave, rope_scale, rope_theta, smooth)


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
    positions = positions_of(indptr, offsets, q.shape[0])
    write_back(q, k, rotate_both(q, k, positions, rotary_dim, interleave, rope_scale, rope_theta, smooth))


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
    write_back(q, k, rotate_both(q, k, pos_ids, rotary_dim, interleave, rope_scale, rope_theta, smooth))


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
    if cos_sin_cache.dtype != torch.float32:
        raise UnsupportedDtype(f"cos_sin_cache has dtype {cos_sin_cache.dtype}, expected float32: keep it with .float().")
    for name, t in (("query", query), ("key", key)):
        if t.dim() != 2 or t.shape[1] % head_size:
            raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected [nnz, heads * {head_size}].")
    cos, sin = cos_sin_cache[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    rotated = (rotate(t.view(t.shape[0], -1, head_size), cos, sin, not is_neox) for t in (query, key))
    q, k = (new.reshape(t.shape) for new, t in zip(rotated, (query, key), strict=True))
    return q, k


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """As apply_rope_with_cos_sin_cache, written back to query and key."""
    write_back(query, key, apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox))


# ---- what they are made of ------------------------------------------------------------------------------------------------


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


def frequencies(
    rotary_dim: int, theta: float, scale: float, smooth: tuple[float, float, int] | None, device: torch.device
) -> torch.Tensor:
    """Radians by which each pair turns from one position to the next, float32 [rotary_dim / 2]."""
    # float64: an error of a frequency is multiplied by the position
    plain = theta ** (-torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float64) / rotary_dim)
    if smooth is None:
        return (plain / scale).float()
    low, high, length = smooth
    turns = plain * length / (2 * math.pi)
    s = ((turns - low) / (high - low)).clamp(0, 1)
    return ((1 - s) * plain / scale + s * plain).float()


def rotate_both(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    rotary_dim: int | None,
    interleave: bool,
    scale: float,
    theta: float,
    smooth: tuple[float, float, int] | None = None,
) -> Pair:
    """Rotated copies of q and k [nnz, heads, head_dim]."""
    if positions.shape != q.shape[:1] or k.shape[0] != q.shape[0]:
        raise ShapeMismatch(
            f"q has {q.shape[0]} rows, k has {k.shape[0]}, positions have shape {tuple(positions.shape)}. All must match."
        )
    cos, sin = cos_sin(positions, q.shape[-1] if rotary_dim is None else rotary_dim, scale, theta, smooth)
    return rotate(q, cos, sin, interleave), rotate(k, cos, sin, interleave)


def cos_sin(
    positions: torch.Tensor, rotary_dim: int, scale: float, theta: float, smooth: tuple[float, float, int] | None = None
) -> Pair:
    """Cosine and sine of each position and pair, float32 [nnz, 1, rotary_dim / 2]."""
    angles = positions[:, None, None].float() * frequencies(rotary_dim, theta, scale, smooth, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    """A copy of x [..., head_dim] with the pairs of its first elements turned; the rest passes through."""
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ShapeMismatch(f"rotary_dim is {2 * half}, the heads have {x.shape[-1]} elements. It may not be larger.")
    turned = x[..., : 2 * half].float()
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleave else (turned[..., :half], turned[..., half:])
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleave else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def write_back(q: torch.Tensor, k: torch.Tensor, rotated: Pair) -> None:
    """Overwrite q and k."""
    q.copy_(rotated[0])
    k.copy_(rotated[1])
