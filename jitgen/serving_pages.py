"""The forms that a paged cache, or ragged keys and values, may have: how they are addressed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jitgen.checks import check_is_tensor
from jitgen.errors import InvalidType, ShapeMismatch

Tensor = torch.Tensor
KV_LAYOUTS = ("NHD", "HND")
LATENT_ROTATED = 64  # last elements of a row of a cache for latent attention
CACHE_FORMS = (
    "a pair of [pages, page_size, num_kv_heads, head_dim] or one [pages, 2, page_size, num_kv_heads, head_dim] with "
    'kv_layout="NHD", page_size and num_kv_heads the other way round with "HND"'
)


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """How k and v are addressed: everything about a cache, or about ragged k and v, but where its memory begins."""

    num_pages: int  # rows of k when ragged
    page_size: int  # 0 when ragged
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    strides: tuple[int, ...]  # k: page, row, head; v: page, row, head
    v_offset: int  # bytes from the memory of k to that of v where both are one tensor


def cache_place(cache: object, kv_layout: str) -> KeyPlace:
    """Addressing of a paged cache.

    Errors:  ShapeMismatch, UnsupportedDtype; InvalidType for anything that is no cache.
    """
    if not isinstance(kv_layout, str) or kv_layout not in KV_LAYOUTS:
        raise ShapeMismatch(f"kv_layout={kv_layout!r} is not a layout. Use 'NHD' or 'HND'.")
    k, v, offset = _split_cache(cache)
    rows, heads = (1, 2) if kv_layout == "NHD" else (2, 1)
    for axis, what in ((0, "pages"), (rows, "page_size"), (heads, "num_kv_heads")):
        if k.shape[axis] != v.shape[axis]:
            raise ShapeMismatch(f"the k cache has {what} {k.shape[axis]}, the v cache {v.shape[axis]}. Both must match.")
    if k.shape[rows] == 0:
        raise ShapeMismatch(f"the kv cache has pages of 0 keys (shape {tuple(k.shape)}), expected {CACHE_FORMS}.")
    check_rows(k, v)
    return KeyPlace(
        num_pages=k.shape[0],
        page_size=k.shape[rows],
        num_kv_heads=k.shape[heads],
        head_dim=k.shape[3],
        head_dim_v=v.shape[3],
        strides=tuple(t.stride(axis) for t in (k, v) for axis in (0, rows, heads)),
        v_offset=offset,
    )


def _split_cache(cache: object) -> tuple[Tensor, Tensor, int]:
    """K and V of a cache as tensors of rank 4, and the bytes between them where they are one tensor."""
    if isinstance(cache, Tensor):
        check_not_nested("the kv cache", cache)
        if cache.dim() != 5 or cache.shape[1] != 2:
            raise ShapeMismatch(f"the kv cache has shape {tuple(cache.shape)}, expected {CACHE_FORMS}.")
        return cache[:, 0], cache[:, 1], cache.stride(1) * cache.element_size()
    if not isinstance(cache, tuple | list) or len(cache) != 2 or not all(isinstance(t, Tensor) for t in cache):
        raise InvalidType(f"the kv cache is a {type(cache).__name__}, expected {CACHE_FORMS}.")
    for name, t in zip("kv", cache, strict=True):
        check_not_nested(f"the {name} cache", t)
        if t.dim() != 4:
            raise ShapeMismatch(f"the {name} cache has shape {tuple(t.shape)}, expected {CACHE_FORMS}.")
    return cache[0], cache[1], 0


def latent_parts(cache: object) -> tuple[Tensor, Tensor] | None:
    """The compressed part [pages, page_size, 512] and the rotated one [pages, page_size, 64] of a cache for latent attention,
    given as a pair or as one tensor of 576; None for any other form."""
    if isinstance(cache, Tensor) and cache.dim() == 3:
        return cache[..., :-LATENT_ROTATED], cache[..., -LATENT_ROTATED:]
    if isinstance(cache, tuple | list) and len(cache) == 2 and all(isinstance(t, Tensor) and t.dim() == 3 for t in cache):
        return cache[0], cache[1]
    return None


def latent_place(parts: tuple[Tensor, Tensor], is_joined: bool, on_host: bool) -> KeyPlace:
    """Addressing of such a cache. ``is_joined``: both parts are one tensor. The CPU kernel reads whole rows as keys, and their
    first elements as values; CUDA kernels read the parts.

    Errors:  ShapeMismatch.
    """
    ckv, kpe = parts
    if ckv.shape[:2] != kpe.shape[:2] or ckv.shape[1] == 0:
        raise ShapeMismatch(
            f"the cache has parts of shapes {tuple(ckv.shape)} and {tuple(kpe.shape)}, expected [pages, page_size, 512] and "
            f"[pages, page_size, {LATENT_ROTATED}], or one tensor [pages, page_size, 576]."
        )
    check_rows(ckv, kpe)
    strides = tuple(s for t in parts for s in (t.stride(0), t.stride(1), 0))
    size = ckv.shape[2]
    offset = 0 if on_host or not is_joined else size * ckv.element_size()
    return KeyPlace(ckv.shape[0], ckv.shape[1], 1, size + kpe.shape[2], size, strides, offset)


def join_latent(cache: object) -> object:
    """A cache whose rows are whole, as the CPU kernel needs them: itself, or a copy of its two parts."""
    parts = None if isinstance(cache, Tensor) else latent_parts(cache)
    fits = parts is not None and parts[0].shape[:2] == parts[1].shape[:2]
    return torch.cat(parts, -1) if fits else cache  # type: ignore[arg-type]


def ragged_place(k: Tensor, v: Tensor) -> KeyPlace:
    """Addressing of ragged k and v.

    Errors:  ShapeMismatch.
    """
    for name, t in (("k", k), ("v", v)):
        check_is_tensor(**{name: t})
        check_not_nested(name, t)
        if t.dim() != 3:
            raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected [total_kv, num_kv_heads, head_dim].")
    for axis, what in ((0, "rows"), (1, "heads")):
        if k.shape[axis] != v.shape[axis]:
            raise ShapeMismatch(f"v has {v.shape[axis]} {what}, k has {k.shape[axis]} (axis {axis}). Both must match.")
    check_rows(k, v)
    strides = (0, k.stride(0), k.stride(1), 0, v.stride(0), v.stride(1))
    return KeyPlace(k.shape[0], 0, k.shape[1], k.shape[2], v.shape[2], strides, 0)


def check_not_nested(name: str, t: Tensor) -> None:
    """Rows of all requests are one tensor, and pages too."""
    if t.is_nested:
        raise ShapeMismatch(f"{name} is a nested tensor, expected the rows of all requests in one: values() of a jagged one.")


def check_rows(k: Tensor, v: Tensor) -> None:
    """Keys and values have contiguous rows: caches are too large to be copied on the way."""
    for name, t in (("k", k), ("v", v)):
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ShapeMismatch(
                f"{name} has strides {tuple(t.stride())}, expected unit stride along head_dim, the last axis. Store it so."
            )
