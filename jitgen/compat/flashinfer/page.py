"""Writing to a paged KV cache: flashinfer.page, over jitgen.append."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer._options import LAYOUTS, check_choice, split_cache
from jitgen.errors import ShapeMismatch
from jitgen.kv_append import append


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Number of keys of each request.

    Shapes:  kv_indptr [batch + 1] pages; kv_last_page_len [batch]; returns [batch] in the dtype of kv_last_page_len.
    Units:   max(pages - 1, 0) * page_size + kv_last_page_len; a request without pages has no key.
    """
    # without pages this is not above 0, as no last page holds more than page_size keys
    lengths = torch.add(kv_last_page_len - page_size, kv_indptr.diff(), alpha=page_size)
    return lengths.clamp_(min=0).to(kv_last_page_len.dtype)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each new token, for append_paged_kv_cache.

    Token j of request b has position ``j - append_indptr[b + 1] + seq_lens[b]``: the new tokens are the last ones. Rows from
    append_indptr[-1] on belong to no request: batch index -1, position 0, and append_paged_kv_cache skips them.

    Shapes:  append_indptr [batch + 1]; seq_lens [batch], new tokens included; returns two int32 [nnz], written to the tensors
             given if any.
    Cost:    torch operations, no wait.
    """
    row = torch.arange(nnz, device=append_indptr.device, dtype=append_indptr.dtype)
    request = torch.searchsorted(append_indptr, row, right=True) - 1
    inside = (row < append_indptr[-1]) & (request >= 0)
    request = torch.where(inside, request, 0)
    if seq_lens.numel():
        position = torch.where(inside, row - append_indptr[request + 1] + seq_lens[request], 0)
    else:
        position = torch.zeros_like(row)
    request = torch.where(inside, request, -1)
    return into(batch_indices, request), into(positions, position)


def into(target: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """``values`` as int32, in ``target`` if there is one."""
    return values.int() if target is None else target.copy_(values)


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write the keys and values of new tokens to their places in a paged cache.

    A token with a negative batch index or position is skipped. The page lists must already hold the pages of the new tokens.
    What does not fit an 8-bit cache saturates.

    Shapes:  append_key, append_value [nnz, num_kv_heads, head_dim]; batch_indices, positions [nnz]; paged_kv_cache a pair of
             4-D tensors or one 5-D tensor; kv_indices, kv_indptr, kv_last_page_len as in the wrappers' plan().
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
    Cost:    one kernel, no wait; capturable.
    """
    check_choice("kv_layout", kv_layout, LAYOUTS)
    caches = split_cache(paged_kv_cache, kv_layout)
    for name, new, cache in zip(("append_key", "append_value"), (append_key, append_value), caches, strict=True):
        check_rows(name, new, cache, positions)
    append(caches, append_key, append_value, (kv_indptr, kv_indices), positions, batch_indices)


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Write the compressed keys and their RoPE part of new tokens to their places in a paged MLA cache.

    Shapes:  append_ckv [nnz, 512]; append_kpe [nnz, 64]; ckv_cache [pages, page_size, 512]; kpe_cache [pages, page_size, 64];
             the rest, errors and cost as append_paged_kv_cache.
    """
    for name, new, cache in (("append_ckv", append_ckv, ckv_cache), ("append_kpe", append_kpe, kpe_cache)):
        check_rows(name, new, cache, positions)
    append((ckv_cache, kpe_cache), append_ckv, append_kpe, (kv_indptr, kv_indices), positions, batch_indices)


def check_rows(name: str, new: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> None:
    """Rows of new tokens fit the rows of a cache, and there is one position for each."""
    if new.shape[1:] != cache.shape[2:]:
        raise ShapeMismatch(f"{name} has rows {tuple(new.shape[1:])}, the cache has {tuple(cache.shape[2:])}. Both must match.")
    if positions.shape[0] != new.shape[0]:
        raise ShapeMismatch(f"{name} has {new.shape[0]} tokens, positions has {positions.shape[0]}. Both must match.")
