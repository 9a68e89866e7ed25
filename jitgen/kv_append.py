"""Appending the keys and values of new tokens to a paged cache: transformed, rotated, quantised and written by one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch.compiler import is_compiling

from jitgen.checks import check_is_tensor, dtype_name, is_traced
from jitgen.errors import ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError
from jitgen.kv_checks import caches_of, check_bounds, check_cache, check_captures, check_reads
from jitgen.kv_hooks import Transform, TransformTrace, resolve_transform
from jitgen.kv_launch import RowsCall, Stream, prepare_rows
from jitgen.kv_spec import BYTES
from jitgen.kv_tokens import Tokens, form_of, low_bits, new_rows, token_indices
from jitgen.serving_lists import PageTable

Tensor = torch.Tensor
Scales = float | Tensor


def append(
    kv: Tensor | tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    page_table: PageTable | Tensor | tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    batch_indices: Tensor | None = None,
    *,
    q_indptr: Tensor | None = None,
    kv_len: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    transform: Transform | None = None,
    scales: tuple[Scales, Scales] | None = None,
    kv_layout: str = "NHD",
) -> None:
    """Write the keys and values of new tokens to their places in a paged cache, in one kernel.

    The place of a token is given in one of three ways; a negative index skips it. Pages must have been allocated.
      page_table, positions, batch_indices   position and request of each token
      page_table, q_indptr, kv_len           as in Plan.update: the tokens ``q_indptr[b]`` to ``q_indptr[b + 1]`` are the last
                                             of the ``kv_len[b]`` of request b
      slot_mapping                           ``page * page_size + offset`` of each token

    transform   a function ``(k, v, b, kv_h, pos) -> (k, v)`` of rows, traced and fused: bias, qk-norm, a jitgen.Rope. Captured
                rows run along the head dim, ``.sum()``, ``.mean()`` and ``.rms()`` are over it; captured values are launch
                arguments. With slot_mapping, ``b`` and ``pos`` are what batch_indices and positions say
    scales      for k and v, of a cache of 8-bit elements: what is written is the row divided by the scale, saturated. A number
                or a tensor of one element; one for each head [num_kv_heads]; or [pages, page_size, num_kv_heads] or [slots,
                num_kv_heads], into which the kernel writes the scale of each row, its largest magnitude over that of the type

    Shapes:  k, v [num_tokens, num_kv_heads, head_dim], float32, bfloat16 or float16; kv a pair of [pages, page_size,
             num_kv_heads, head_dim] or one [pages, 2, page_size, num_kv_heads, head_dim], "HND" with page_size and
             num_kv_heads the other way round; or without the axis of heads: k [num_tokens, 512], v [num_tokens, 64] and a
             pair of [pages, page_size, 512] and [pages, page_size, 64] for MLA, which may be slices of one tensor of 576.
             Elements of the cache: float32, bfloat16, float16, float8_e4m3fn, float8_e5m2, int8. Any strides but unit stride
             along the head dim; indices int32 or int64; scales float32.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, VariantError, UnsupportedVariant, CompileError. A place that is
             not there is a LaunchError on the CPU; on a GPU such a token is skipped.
    Cost:    compiles once for each transform and combination of dtypes; reads the rows and writes the cache once. Inside
             torch.compile the call is one operator, whatever the transform captures there.
    """
    if is_compiling() and is_traced(k):
        from jitgen.kv_op import call_append

        indices = [positions, batch_indices, q_indptr, kv_len, slot_mapping]
        return call_append(kv, k, v, page_table, indices, transform, scales, kv_layout)
    trace, values = resolve_transform(transform)
    caches = kv if isinstance(kv, tuple | list) else (kv,)
    table = page_table if isinstance(page_table, PageTable | None) else PageTable.of(page_table)
    lists = (None, None) if table is None else (table.indptr, table.pages)
    indices = (positions, batch_indices, slot_mapping, q_indptr, kv_len)
    if scales is not None and not (isinstance(scales, tuple | list) and len(scales) == 2):
        raise VariantError(f"scales is {scales!r}, expected a pair (k_scale, v_scale).")
    by_slot = [s if isinstance(s, Tensor) else None for s in scales or ()]
    captured = [value for value in values if isinstance(value, Tensor)]
    try:
        key = (id(trace), kv_layout, scales is None, low_bits(k, v, *caches),
               *[form_of(t) for t in (k, v, *indices, *lists, *by_slot, *captured, *caches)])  # fmt: skip
    except AttributeError:
        _check_kinds(kv, k, v, kv_layout, indices)  # says which one is no tensor
        raise
    try:
        found = _calls.get(key)
    except TypeError:  # of what has no hash
        caches_of(kv, kv_layout)
        raise
    if found is None or isinstance(kv, Tensor) != found.is_joined:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        found = _prepare(kv, k, v, table, indices, trace, values, scales, kv_layout)
        _calls[key] = found
    if found.call is None:
        return
    if q_indptr is not None and k.device.type == "cpu":
        check_bounds("k", q_indptr, k.shape[0])
    if not found.as_given:  # copies, for the time of the launch
        tokens = _tokens(k.shape[0], table, *indices, k.device)
        addresses = tokens.addresses()
    else:
        addresses = tuple([0 if t is None else t.data_ptr() for t in (*indices, *lists)])
    k_out = caches[0].data_ptr()
    places = (k_out, k_out + found.v_offset if found.is_joined else caches[1].data_ptr())
    rows = []
    for i, x in enumerate((k, v)):
        scale = None if scales is None else scales[i]
        where, number = (scale.data_ptr(), 1.0) if isinstance(scale, Tensor) else (0, _number("kv"[i], scale))
        rows.append((x.data_ptr(), places[i], where, number))
    found.call.run(addresses, rows, values)


MAX_CALLS = 1024  # prepared, by everything but addresses and values


@dataclass(frozen=True, slots=True)
class PreparedAppend:
    """A checked call."""

    call: RowsCall | None  # None without tokens
    as_given: bool  # indices are used where they are
    is_joined: bool  # the cache is one tensor
    v_offset: int  # bytes from the memory of k to that of v, then


_calls: dict[tuple[object, ...], PreparedAppend] = {}


def _check_kinds(kv: object, k: Tensor, v: Tensor, kv_layout: str, indices: Sequence[object]) -> None:
    caches_of(kv, kv_layout)
    new_rows("k", k)
    new_rows("v", v)
    names = ("positions", "batch_indices", "slot_mapping", "q_indptr", "kv_len")
    check_is_tensor(**{name: t for name, t in zip(names, indices, strict=True) if t is not None})


def _prepare(
    kv: object,
    k: Tensor,
    v: Tensor,
    table: PageTable | None,
    indices: tuple[Tensor | None, ...],
    trace: TransformTrace,
    values: list[object],
    scales: tuple[Scales, Scales] | None,
    kv_layout: str,
) -> PreparedAppend:
    """Check what shapes, strides, dtypes and devices can be wrong about, and load the kernel."""
    rows = new_rows("k", k), new_rows("v", v)
    caches = caches_of(kv, kv_layout)
    for name, x, cache in zip("kv", rows, caches, strict=True):
        check_cache(name, x, cache, rows[0])
    tokens = _tokens(k.shape[0], table, *indices, k.device)
    tokens.num_pages, tokens.page_size = caches[0].shape[:2]
    check_reads(trace, tokens)
    check_captures(trace, values, rows)
    streams = []
    for i, (name, x, cache) in enumerate(zip("kv", rows, caches, strict=True)):
        program = (trace.k, trace.v)[i]
        s = Stream(name, x, cache, cache.data_ptr(), cache.stride()[:3], program.rope, program)
        _set_scale(s, None if scales is None else scales[i], tokens.num_pages * tokens.page_size)
        streams.append(s)
    call = prepare_rows(streams, "pages" if tokens.slot_mapping is None else "slots", tokens, k.device, trace)
    used = (tokens.positions, tokens.batch_indices, tokens.slot_mapping, tokens.q_indptr, tokens.lengths)
    as_given = all(a is b for a, b in zip(used, indices, strict=True))
    return PreparedAppend(call, as_given, isinstance(kv, Tensor), caches[1].data_ptr() - caches[0].data_ptr())


def _tokens(
    count: int,
    table: PageTable | None,
    positions: Tensor | None,
    batch_indices: Tensor | None,
    slot_mapping: Tensor | None,
    q_indptr: Tensor | None,
    kv_len: Tensor | None,
    device: torch.device,
) -> Tokens:
    """The indices of a call, checked."""
    tokens = Tokens(count)
    if (q_indptr is None) != (kv_len is None):
        raise ShapeMismatch("q_indptr and kv_len belong together, one was given without the other.")
    if q_indptr is not None and (positions is not None or batch_indices is not None):
        raise ShapeMismatch("q_indptr and kv_len say positions and requests, and positions or batch_indices were given too.")
    if q_indptr is not None:
        tokens.of_requests("kv_len", q_indptr, kv_len, True, device)  # type: ignore[arg-type]
    for name in ("positions", "batch_indices", "slot_mapping"):
        t = {"positions": positions, "batch_indices": batch_indices, "slot_mapping": slot_mapping}[name]
        if t is not None:
            setattr(tokens, name, token_indices(name, t, count, device))
    if slot_mapping is not None:
        if table is not None:
            raise ShapeMismatch("page_table and slot_mapping were both given; each says where tokens go. Leave one out.")
        return tokens
    if table is None or (q_indptr is None and (positions is None or batch_indices is None)):
        raise ShapeMismatch(
            "nothing says where the tokens go. Give slot_mapping, or page_table with positions and batch_indices, or "
            "page_table with q_indptr and kv_len."
        )
    if table.device != device:
        raise UnsupportedDevice(f"the page table is on {table.device}, k is on {device}. Move it there.")
    if q_indptr is not None and tokens.batch > table.batch:
        raise ShapeMismatch(f"kv_len has {tokens.batch} requests, the page table {table.batch}. Both must match.")
    tokens.batch = tokens.batch if q_indptr is not None else table.batch
    tokens.list_start, tokens.pages, tokens.list_stride = table.indptr, table.pages, table.list_stride
    return tokens


def _number(name: str, scale: float | None) -> float:
    """A scale given as a number."""
    if scale is None:
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 < scale < math.inf:
        raise VariantError(f"the scale of {name} is {scale!r}, expected a finite number above 0.")
    return float(scale)


def _set_scale(s: Stream, scale: Scales | None, num_slots: int) -> None:
    """How the rows of a stream are scaled."""
    is_bytes = dtype_name(s.written.dtype) in BYTES
    if scale is None:
        if s.written.dtype == torch.int8:
            raise VariantError(f"the {s.name} cache is int8 and there is no scale for it. Give scales=(k_scale, v_scale).")
        return
    if not is_bytes:
        raise VariantError(
            f"scales were given, and the {s.name} cache is {dtype_name(s.written.dtype)}, which is not scaled. Leave them out, "
            f"or make the cache one of {', '.join(BYTES)}."
        )
    s.scale = "given"
    if not isinstance(scale, Tensor):
        s.scale_value = _number(s.name, scale)
        return
    heads = s.x.shape[1]
    forms = {(): (0, 0), (1,): (0, 0), (heads,): (0, 1)}
    stored = {(num_slots, heads), (s.written.shape[0], s.written.shape[1], heads)}
    if scale.dtype != torch.float32:
        raise UnsupportedDtype(f"the scale of {s.name} has dtype {dtype_name(scale.dtype)}, expected float32.")
    if scale.device != s.x.device:
        raise UnsupportedDevice(f"the scale of {s.name} is on {scale.device}, k is on {s.x.device}. Move it there.")
    shape = tuple(scale.shape)
    if shape not in forms and shape not in stored:
        raise ShapeMismatch(
            f"the scale of {s.name} has shape {shape}, expected [], [{heads}] for each head, or [{num_slots}, {heads}] or "
            f"{[*s.written.shape[:2], heads]} for each slot and head."
        )
    if not scale.is_contiguous():
        raise ShapeMismatch(f"the scale of {s.name} has strides {scale.stride()}, expected a contiguous tensor.")
    s.scale_address = scale.data_ptr()
    s.scale_strides = forms.get(shape, (heads, 1))
    if shape not in forms:
        s.scale = "stored"
