"""The requests of a plan, and attention over them: where the wrappers of the shim meet jitgen's own interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import jitgen
from jitgen.compat.flashinfer._hooks import Place
from jitgen.compat.flashinfer.rope import cos_sin, positions_of, rotate
from jitgen.variant import Variant


@dataclass(frozen=True)
class Batch:
    """Where each request's rows and keys are. Everything is on the device; nothing of it is read by the host.

    Shapes:  q_indptr int32 [batch + 1] rows of q; kv_len int32 [batch]; kv_start int32 [batch + 1]: first row of k when
             ragged, first entry of pages when paged; pages int32 page numbers, None when ragged.
    """

    q_indptr: torch.Tensor
    kv_len: torch.Tensor
    kv_start: torch.Tensor
    pages: torch.Tensor | None
    page_size: int
    split: str = "balanced"
    kv_split: int | None = None

    @property
    def size(self) -> int:
        return self.kv_len.shape[0]


def attend(
    batch: Batch,
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Attention of a batch, one request after the other with the dense kernels, written to ``out`` and ``lse``.

    Shapes:  q [total_q, num_q_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim(_v)] or, paged, [pages, page_size,
             num_kv_heads, head_dim(_v)]; out [total_q, num_q_heads, head_dim_v]; lse float32 [total_q, num_q_heads].
    """
    q_ends, kv_lens, starts = batch.q_indptr.tolist(), batch.kv_len.tolist(), batch.kv_start.tolist()
    for b in range(batch.size):
        rows = slice(q_ends[b], q_ends[b + 1])
        if rows.start == rows.stop:
            continue
        if kv_lens[b] == 0:
            out[rows] = 0
            if lse is not None:
                lse[rows] = -torch.inf
            continue
        keys, values = k, v
        if batch.pages is not None:
            listed = batch.pages[starts[b] : starts[b + 1]].long()
            keys, values = (t[listed].flatten(0, 1)[: kv_lens[b]] for t in (k, v))
        else:
            keys, values = (t[starts[b] : starts[b] + kv_lens[b]] for t in (k, v))
        q1, k1, v1 = (t.transpose(0, 1).unsqueeze(0) for t in (q[rows], keys, values))
        o1, l1 = jitgen.attention(q1, k1, v1, for_request(variant, b), scale=scale, return_lse=True)
        out[rows] = o1[0].transpose(0, 1)
        if lse is not None:
            lse[rows] = l1[0].T


def for_request(variant: Variant, request: int) -> Variant:
    mask, score = variant.mask_mod, variant.score_mod

    def mask_mod(b, h, q_idx, kv_idx, *, kv_len, ctx_len):
        return mask(request, h, q_idx, kv_idx, kv_len=kv_len, ctx_len=ctx_len)

    def score_mod(s, b, h, q_idx, kv_idx, *, ctx_len, kv_h):
        return score(s, request, h, q_idx, kv_idx, ctx_len=ctx_len, kv_h=kv_h)

    return Variant(
        mask_mod=mask_mod if mask is not None else None,
        score_mod=score_mod if score is not None else None,
        sink=variant.sink,
        output_transform=variant.output_transform,
        lse_transform=variant.lse_transform,
        q_index=variant.q_index,
    )


# ---- rotation before attention --------------------------------------------------------------------------------------------


def row_positions(batch: Batch, num_rows: int) -> torch.Tensor:
    """Position of each row of q in its request: the last rows stand at the last keys. int64 [num_rows]."""
    return positions_of(batch.q_indptr, batch.kv_len - batch.q_indptr.diff(), num_rows)


def rotated(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: tuple[float, float], place: Place | None = None
) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k turned to their positions, and the batch that they are read with.

    A paged cache is read into a copy whose pages lie in the order of the page lists: a page may stand at different positions
    in two requests.

    Cost:    copies q and the keys, of a paged cache the values too; no wait for the device.
    """
    scale, theta = rope
    head_dim = q.shape[-1]
    rows, base = (row_positions(batch, q.shape[0]), torch.zeros_like(batch.kv_len))
    if place is not None:
        rows, base = place.row_position[: q.shape[0]], place.kv_base
    q = rotate(q, *cos_sin(rows, head_dim, scale, theta), interleave=False)
    if batch.pages is None:
        positions = positions_of(batch.kv_start, base, k.shape[0])
        return batch, q, rotate(k, *cos_sin(positions, head_dim, scale, theta), interleave=False), v
    listed = batch.pages.long().clamp(0, max(k.shape[0] - 1, 0))  # a buffer may end in entries that were never set
    entry = torch.arange(listed.shape[0], device=listed.device)
    request = (torch.searchsorted(batch.kv_start.long(), entry, right=True) - 1).clamp(0, batch.size - 1)
    first = base[request] + (entry - batch.kv_start[request]) * batch.page_size
    positions = first[:, None] + torch.arange(batch.page_size, device=first.device)
    cos, sin = cos_sin(positions.flatten(), head_dim, scale, theta)
    keys = rotate(k[listed].flatten(0, 1), cos, sin, interleave=False).view(-1, *k.shape[1:])
    pages = torch.arange(listed.shape[0], device=listed.device, dtype=torch.int32)
    moved = Batch(batch.q_indptr, batch.kv_len, batch.kv_start, pages, batch.page_size, batch.split, batch.kv_split)
    return moved, q, keys, v[listed]
