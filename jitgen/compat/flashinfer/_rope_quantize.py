"""Rotation and conversion to 8-bit floats at once: flashinfer.rope.rope_quantize_fp8."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer._options import check_choice
from jitgen.errors import ShapeMismatch, UnsupportedDtype, VariantError
from jitgen.kv_launch import RowsCall, Stream, prepare_rows
from jitgen.kv_tokens import Tokens, form_of, low_bits, new_rows
from jitgen.rotary import Rope

Rows = torch.Tensor | None
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
NAMES = ("q_rope", "k_rope", "q_nope", "k_nope")
MAX_CALLS = 256
_calls: dict[tuple[object, ...], RowsCall | None] = {}


def rope_quantize_fp8(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: Rows,
    k_nope: Rows,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Rows = None,
    k_rope_out: Rows = None,
    q_nope_out: Rows = None,
    k_nope_out: Rows = None,
    enable_pdl: bool = False,
    backend: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate q_rope and k_rope, and write all four times their scale as 8-bit floats, saturated, in one kernel.

    Shapes:  q_rope [nnz, num_q_heads, rope_dim]; k_rope [nnz, num_kv_heads, rope_dim] or [nnz, rope_dim]; q_nope, k_nope the
             same with other dims, or None; cos_sin_cache float32 [max_position, rope_dim]; pos_ids [nnz]; returns the four,
             an empty tensor for None.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption, VariantError.
    """
    check_choice("backend", backend, ("cuda",))
    given, outs = (q_rope, k_rope, q_nope, k_nope), (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    dtype = quantize_dtype or next((t.dtype for t in outs if t is not None), torch.float8_e4m3fn)
    if dtype not in DTYPES:
        raise UnsupportedDtype(f"quantize_dtype is {dtype}, expected torch.float8_e4m3fn or torch.float8_e5m2.")
    for name, scale in (("quant_scale_q", quant_scale_q), ("quant_scale_kv", quant_scale_kv)):
        if not scale > 0:
            raise VariantError(f"{name} is {scale!r}, expected a number above 0.")
    results = tuple(_result(*named, dtype, q_rope.device) for named in zip(NAMES, given, outs, strict=True))
    table = cos_sin_cache.data_ptr()
    key = (is_neox, table, low_bits(*given, *results), *[form_of(t) for t in (*given, *results, cos_sin_cache, pos_ids)])
    if key not in _calls:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        _calls[key] = _prepare(given, results, cos_sin_cache, pos_ids, is_neox)
    call = _calls[key]
    if call is not None:
        scales = (1.0 / quant_scale_q, 1.0 / quant_scale_kv) * 2
        streams = [
            (x.data_ptr(), out.data_ptr(), 0, scale)
            for x, out, scale in zip(given, results, scales, strict=True)
            if x is not None and x.numel()
        ]
        indices = pos_ids if pos_ids.is_contiguous() else pos_ids.contiguous()
        call.run((indices.data_ptr(), 0, 0, 0, 0, 0, 0), streams, ())
    return results  # type: ignore[return-value]


mla_rope_quantize_fp8 = rope_quantize_fp8


def _result(name: str, x: Rows, out: Rows, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if x is None:
        return torch.empty(0, dtype=dtype, device=device)
    if out is None:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.shape != x.shape or out.dtype != dtype or out.device != x.device or out.stride(-1) != 1:
        raise ShapeMismatch(
            f"{name}_out has shape {tuple(out.shape)}, dtype {out.dtype} on {out.device}, expected {tuple(x.shape)}, {dtype} "
            f"on {x.device}, with unit stride along the last axis."
        )
    return out


def _prepare(
    given: tuple[Rows, ...], results: tuple[torch.Tensor, ...], table: torch.Tensor, pos_ids: torch.Tensor, is_neox: bool
) -> RowsCall | None:
    turn = Rope(cos_sin=table, interleave=not is_neox)
    streams = []
    for name, x, out in zip(NAMES, given, results, strict=True):
        if x is None or not x.numel():
            continue
        rows = new_rows(name, x)
        if rows.shape[0] != pos_ids.shape[0]:
            raise ShapeMismatch(f"{name} has {rows.shape[0]} rows, there are {pos_ids.shape[0]} positions. Both must match.")
        s = Stream.in_rows(name, rows, out.view(rows.shape) if out.is_contiguous() else out, turn)
        s.rope, s.scale = turn if name.endswith("rope") else None, "given"
        streams.append(s)
    device = given[0].device  # type: ignore[union-attr]
    return prepare_rows(streams, "rows", Tokens.at((pos_ids,), pos_ids.shape[0], device), device)
