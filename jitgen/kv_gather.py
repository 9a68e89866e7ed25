"""Rows of q, k and v as the transforms of a variant leave them, in contiguous memory: for kernels that read no others."""

from __future__ import annotations

import torch

from jitgen.checks import dtype_name
from jitgen.errors import UnsupportedDtype
from jitgen.families import check_pages
from jitgen.ir import walk
from jitgen.kv_checks import check_row_captures
from jitgen.kv_launch import Stream, prepare_rows
from jitgen.kv_spec import FLOATS
from jitgen.kv_tokens import Tokens
from jitgen.program import Program, RowProgram

Tensor = torch.Tensor


def transform_dense(
    program: Program, values: list[object], q: Tensor, k: Tensor, v: Tensor, q_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense q, k and v after the variant's transforms; those without one are returned as they are.

    Shapes:  q [batch, num_q_heads, q_len, head_dim], k and v [batch or 1, num_kv_heads, kv_len, head_dim]; returns the same,
             laid out with heads inside positions.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, CompileError.
    Cost:    compiles once for each transform and dtype; reads and writes each transformed tensor once, in its dtype.
    """
    rows = program.rows
    assert rows is not None
    check_pages(program, "dense")
    batch = q.shape[0]
    if _reads_request(rows.k) or _reads_request(rows.v):  # else one k and v for the whole batch are transformed once
        k, v = k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)
    found = [
        t if p.is_empty else _transformed(program, values, p, name, t, first)
        for name, p, t, first in (("q", rows.q, q, q_offset), ("k", rows.k, k, 0), ("v", rows.v, v, 0))
    ]
    return found[0], found[1], found[2]


def _reads_request(p: RowProgram) -> bool:
    return any(n.op == "index" and n.attr == "b" for n in walk(*p.roots()))


def _transformed(program: Program, values: list[object], p: RowProgram, name: str, x: Tensor, first: int) -> Tensor:
    """Each request is a page of as many rows as it has."""
    batch, heads, length, dim = x.shape
    written = torch.empty(batch * length, heads, dim, dtype=x.dtype, device=x.device)
    if written.numel():
        if dtype_name(x.dtype) not in FLOATS:
            raise UnsupportedDtype(
                f"{name} has dtype {dtype_name(x.dtype)}, and {name}_transform takes {', '.join(FLOATS)}. Leave the transform "
                "out, or dequantise before the call."
            )
        source = (x if x.stride(3) == 1 or dim == 1 else x.contiguous()).transpose(1, 2)
        check_row_captures(program.slots, values, [(p, source)])
        stream = Stream.gathered(name, source, written, p)
        numbers = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
        tokens = Tokens(
            count=batch * length,
            q_indptr=numbers * length,
            lengths=torch.full_like(numbers[:batch], first),
            batch=batch,
            pages=numbers[:batch],
            page_size=length,
            num_pages=batch,
            list_stride=1,
        )
        call = prepare_rows([stream], "from_pages", tokens, x.device, program)
        assert call is not None
        call.run(tokens.addresses(), [(source.data_ptr(), written.data_ptr(), 0, 1.0)], values)
    return written.view(batch, length, heads, dim).transpose(1, 2)
