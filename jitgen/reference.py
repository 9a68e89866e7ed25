"""The oracle: attention evaluated with torch in float64 from the same expressions that kernels are generated from.

It holds the whole matrix of logits, so its cost is quadratic in memory: for tests and for comparing, not for use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jitgen.errors import VariantError
from jitgen.evaluate import evaluate
from jitgen.ir import Expr
from jitgen.norm_parts import finish_row, run_keys, run_parts
from jitgen.program import NormProgram, Program, RowProgram, all_roots, check_sink, reads_pages
from jitgen.rotary import Rope

Tensor = torch.Tensor
Pages = tuple[Tensor, int]  # page numbers [batch, pages of a request], and the keys of a page


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: object = None,
    *,
    score_mod: object = None,
    mask_mod: object = None,
    sink: object = None,
    scale: float | None = None,
    q_index: str | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    page_table: Tensor | None = None,
    page_size: int = 1,
    kv_split: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What jitgen.attention computes, by definition and in float64.

    ``kv_split``: an OnlineNorm is run on so many keys at a time, and the parts are joined by its merge, as plans may do it. The
    result is the same; softmax is not concerned. ``page_table``: for hooks that read kv_slot or page, the pages that k and v
    were taken from, of ``page_size`` keys.

    Shapes:  as jitgen.attention; page_table [batch, ceil(kv_len / page_size)] or more columns; the results have ``dtype``.
    Units:   as jitgen.attention.
    Errors:  VariantError, UnsupportedVariant.
    Cost:    batch * num_q_heads * q_len * kv_len numbers of 8 bytes, a few times over.
    """
    from jitgen.api import resolve_hooks
    from jitgen.variant import check_q_index

    program, values, own = resolve_hooks(variant, score_mod, mask_mod, sink)  # type: ignore[arg-type]
    check_q_index(q_index)
    check_sink(program, values, q.shape[1])
    local = (q_index or own or "absolute") == "local"
    offset = 0 if local else k.shape[2] - q.shape[2]
    pages = None if page_table is None else (page_table, page_size)
    options = {"scale": scale, "q_offset": offset, "dtype": dtype, "pages": pages, "kv_split": kv_split}
    out, lse = run_program(program, values, q, k, v, **options)  # type: ignore[arg-type]
    if not return_lse:
        return out
    if lse is None:
        raise VariantError("the logsumexp was asked for, but the variant's OnlineNorm has none. Give it a method lse(state).")
    return out, lse


def run_program(
    program: Program,
    values: Sequence[Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    q_offset: int = 0,
    dtype: torch.dtype = torch.float64,
    pages: Pages | None = None,
    kv_split: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output and logsumexp (None if the norm has none) of a program on dense tensors. ``pages``: where k and v were."""
    batch, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    places = _places(program, pages, kv_len)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if program.rows is not None:
        q = transform_rows(program.rows.q, values, q, first=q_offset, dtype=dtype)
        k, v = (
            transform_rows(p, values, t.expand(batch, -1, -1, -1), dtype=dtype, places=places)
            for p, t in ((program.rows.k, k), (program.rows.v, v))
        )
    k, v = (t.to(dtype).expand(batch, -1, -1, -1).repeat_interleave(num_q_heads // num_kv_heads, 1) for t in (k, v))
    leaves = index_leaves(batch, num_q_heads, num_kv_heads, q_len, kv_len, q_offset, scale, dtype, q.device) | places
    shape = (batch, num_q_heads, q_len, kv_len)
    logits = scale * (q.to(dtype) @ k.mT)
    if program.score is not None:
        logits = evaluate(program.score, values, {**leaves, "score": logits}).to(dtype).expand(shape)
    if program.mask is not None:
        logits = torch.where(evaluate(program.mask, values, leaves), logits, logits.new_tensor(-math.inf))
    if program.norm is not None:
        out, lse = _normalise(program.norm, values, logits, v, leaves, kv_split)
    else:
        out, lse = _softmax(program.sink, values, logits, v, leaves)
    row = {
        **leaves,
        "o": out,
        "d": torch.arange(v.shape[3], device=q.device),
        "head_dim_v": torch.tensor(v.shape[3], device=q.device),
    }
    if lse is not None:
        row["lse"] = lse
    if program.output is not None:
        out = evaluate(program.output, values, row).to(dtype).expand(out.shape)
    if program.lse is not None:
        lse = evaluate(program.lse, values, row).to(dtype).expand(*shape[:3], 1)
    return out, None if lse is None else lse.squeeze(-1)


def _places(program: Program, pages: Pages | None, kv_len: int) -> dict[str, Tensor]:
    """Page and slot of each key, [batch, 1, 1, kv_len]; nothing without pages."""
    if pages is None:
        name = reads_pages(*all_roots(program))
        if name:
            raise VariantError(f"the variant reads {name}, and it is not known in which pages keys are. Give page_table=.")
        return {}
    table, size = pages
    key = torch.arange(kv_len, device=table.device)
    page = table[:, key // size].long()[:, None, None]
    return {"page": page, "kv_slot": page * size + key % size}


def transform_rows(
    program: RowProgram,
    values: Sequence[Any],
    x: Tensor,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float64,
    places: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Rows [batch, heads, length, head_dim] as a transform leaves them; ``first`` is the position of the first row, ``places``
    are pages and slots [batch, 1, 1, length]."""
    batch, heads, length, dim = x.shape
    leaves = {
        "b": torch.arange(batch, device=x.device).view(-1, 1, 1, 1),
        "kv_h": torch.arange(heads, device=x.device).view(1, -1, 1, 1),
        "q_idx": torch.arange(first, first + length, device=x.device).view(1, 1, -1, 1),
        "d": torch.arange(dim, device=x.device),
        "head_dim_v": torch.tensor(dim, device=x.device),
        "o": x.to(dtype),
        **{name: t.mT for name, t in (places or {}).items()},
    }

    def done(root: Expr | None) -> Tensor:
        return leaves["o"] if root is None else evaluate(root, values, leaves).to(dtype).expand(x.shape)

    leaves["o"] = done(program.before)
    if program.rope is not None:
        position = leaves["q_idx"] if program.position is None else evaluate(program.position, values, leaves)
        leaves["o"] = rotate(program.rope, leaves["o"], position)
    return done(program.after)


def rotate(rope: Rope, x: Tensor, position: Tensor) -> Tensor:
    """The rotated rows of x [..., head_dim]; positions broadcast to [..., 1]."""
    dim = rope.dim_of(x.shape[-1])
    if rope.cos_sin is not None:
        row = position.squeeze(-1).clamp(0, rope.cos_sin.shape[0] - 1).long()
        cos, sin = rope.cos_sin.to(x.device, x.dtype)[row].chunk(2, -1)
    else:
        angle = position.to(x.dtype) * torch.tensor(rope.frequencies(dim), dtype=x.dtype, device=x.device)
        cos, sin = angle.cos(), angle.sin()
    half = dim // 2
    pairs = (slice(0, dim, 2), slice(1, dim, 2)) if rope.interleave else (slice(0, half), slice(half, dim))
    one, other = (x[..., p] for p in pairs)
    turned = x.clone()
    turned[..., pairs[0]], turned[..., pairs[1]] = one * cos - other * sin, other * cos + one * sin
    return turned


def index_leaves(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    q_len: int,
    kv_len: int,
    q_offset: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Values of the index leaves, broadcastable to [batch, num_q_heads, q_len, kv_len]."""

    def along(axis: int, n: int, first: int = 0) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[axis] = n
        return torch.arange(first, first + n, device=device).view(shape)

    numbers = {
        "q_len": q_len,
        "kv_len": kv_len,
        "ctx_len": kv_len - q_len,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
    }
    b = along(0, batch)
    return {
        "b": b,
        "q_off": b * q_len,
        "q_first": b * q_len - q_offset,
        "kv_off": b * kv_len,
        "h": along(1, num_q_heads),
        "kv_h": along(1, num_q_heads) // (num_q_heads // num_kv_heads),
        "q_idx": along(2, q_len, q_offset),
        "kv_idx": along(3, kv_len),
        "scale": torch.tensor(scale, dtype=dtype, device=device),
        **{name: torch.tensor(n, device=device) for name, n in numbers.items()},
    }


def _softmax(
    sink: Expr | None, values: Sequence[Any], logits: Tensor, v: Tensor, leaves: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    lse = logits.logsumexp(-1, keepdim=True)
    if sink is not None:
        lse = torch.logaddexp(lse, evaluate(sink, values, leaves).to(logits.dtype).expand(lse.shape))
    weights = torch.where(lse == -math.inf, torch.zeros_like(logits), (logits - lse).exp())
    return weights @ v, lse


def _normalise(
    norm: NormProgram, values: Sequence[Any], logits: Tensor, v: Tensor, leaves: dict[str, Tensor], kv_split: int | None
) -> tuple[Tensor, Tensor | None]:
    """A softmax replacement, run on the whole row as one tile, or on parts of it."""
    if kv_split is None:
        o, state = run_keys(norm, values, logits, v, leaves)
    elif norm.merges:
        o, state = run_parts(norm, values, logits, v, leaves, kv_split)
    else:
        raise VariantError(f"kv_split={kv_split} was given, but the variant's OnlineNorm has no merge(a, b) to join parts.")
    return finish_row(norm, values, o, state, leaves)


def mask_of(
    program: Program,
    values: Sequence[Any],
    *,
    batch: int = 1,
    num_q_heads: int = 1,
    num_kv_heads: int | None = None,
    q_len: int,
    kv_len: int,
    q_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which keys a program keeps, as a bool tensor [batch, num_q_heads, q_len, kv_len]."""
    heads = num_kv_heads or num_q_heads
    leaves = index_leaves(batch, num_q_heads, heads, q_len, kv_len, q_offset, 1.0, torch.float64, torch.device(device))
    shape = (batch, num_q_heads, q_len, kv_len)
    if program.mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return evaluate(program.mask, values, leaves).expand(shape)
