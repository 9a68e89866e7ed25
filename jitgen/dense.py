"""A call of dense attention: validate, find the kernel, launch."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import torch

from jitgen import runtime
from jitgen.abi import DENSE_ARGS, pack_format
from jitgen.checks import check_choices, check_grad, check_memory, check_scale, check_tensors, dtype_name, is_differentiating
from jitgen.errors import ShapeMismatch, VariantError
from jitgen.families import choose_spec, padded_head_dims
from jitgen.fp8 import negated, output_dtype, workspace_bytes
from jitgen.layouts import check_out, expanded_stride, finished, is_row_aligned, needs_adapting, pad_columns, stride_like
from jitgen.program import Program, direct_indices, uses_index
from jitgen.recall import RecentCall, capture_words
from jitgen.records import record
from jitgen.streams import call_on, stream_of

if TYPE_CHECKING:
    from jitgen.dense_split import SplitCall

try:  # what code that torch.compile generates calls: half the time of torch.empty_strided
    from torch._C._dynamo.guards import _empty_strided_cpu as empty_on_cpu
except ImportError:

    def empty_on_cpu(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor."""
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


MAX_PREPARED_CALLS = 4096  # shapes remembered; decode meets a new length at every step, so the table must not grow forever
# struct Args in two parts: what differs from call to call, then from `batch` on what shapes and strides determine
_pack_pointers = struct.Struct(pack_format(DENSE_ARGS[:8])).pack
_pack_shapes = struct.Struct(pack_format(DENSE_ARGS[8:])).pack

# name, and the dimensions with a least size and the index they are read with
CapturedTensor = tuple[str, tuple[tuple[int, int, str], ...]]


@record
class PreparedCall:
    """Everything about a call that depends on shapes, strides and dtypes only."""

    program: Program  # keeps id(program) in the table's key valid
    kernel: runtime.CompiledKernel
    numbers: tuple[int | float, ...]  # the fields of struct Args from `batch` to the strides
    shapes: bytes  # the same, packed
    o_shape: tuple[int, ...]
    o_stride: tuple[int, ...]
    is_empty: bool  # the output has no elements
    captures: tuple[CapturedTensor | None, ...]  # None: a scalar
    cuda_index: int | None
    out_like_q: bool  # the output is laid out as torch.empty_like(q) would be, in its dtype
    out_dtype: torch.dtype
    workspace_bytes: int
    has_tensors: bool  # some capture is a tensor, so sizes and devices must be checked at each call
    split: SplitCall | None  # by the decode kernel, whose ``kernel`` this is then


_prepared: dict[tuple[object, ...], PreparedCall] = {}
_recent: dict[tuple[object, ...], RecentCall] = {}  # by all that is no tensor


def run(
    program: Program,
    values: list[object],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    local: bool = False,
    want_lse: bool = False,
    out: torch.Tensor | None = None,
    family: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch ``program`` on validated or remembered inputs; returns (out, lse or None)."""
    if want_lse and program.norm is not None and program.norm.lse is None:
        raise VariantError("the logsumexp was asked for, but the variant's OnlineNorm has none. Give it a method lse(state).")
    if scale is not None and not (type(scale) is float and 0 < scale < math.inf):
        check_scale(scale)
        if scale <= 0 and q.is_cuda and not uses_index(program, "scale"):
            # CUDA kernels take the maximum of q . k before they scale it
            q, scale = (negated(q), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    options = (program, scale, local, family, out_dtype)
    try:
        recent = _recent.get(options)
    except TypeError:  # of what has no hash, as a list has none
        check_choices(family, out_dtype)
        raise
    again = recent is not None and not is_differentiating() and recent.is_like(q, k, v, values)
    if again:
        call = recent.call  # type: ignore[union-attr]
    else:
        check_grad(q, k, v)
        if q.is_neg() or k.is_neg() or v.is_neg():  # as the imaginary part of a conjugate is: the sign is not in memory yet
            q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
        check_memory(q=q, k=k, v=v)
        found = find_call(q, k, v, options)
        if found is None:
            wanted = output_dtype(q.dtype, out_dtype)
            return run_adapted(program, values, q, k, v, scale, local, want_lse, out, family, wanted)
        call = found
    if call.cuda_index is not None and (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:
        q, k, v = (t.clone() if t.data_ptr() & 15 else t for t in (q, k, v))
        return run(
            program, values, q, k, v,
            scale=scale, local=local, want_lse=want_lse, out=out, family=family, out_dtype=out_dtype,
        )  # fmt: skip
    if out is None:
        if call.cuda_index is None:
            out = empty_on_cpu(call.o_shape, call.o_stride, call.out_dtype)
        elif call.out_like_q:
            out = torch.empty_like(q)
        else:
            out = torch.empty_strided(call.o_shape, call.o_stride, dtype=call.out_dtype, device=q.device)
        shapes = call.shapes
    else:
        check_out(out, call.o_shape, q, call.out_dtype)
        shapes = _pack_shapes(*call.numbers[:-4], *out.stride())
    lse = torch.empty(call.o_shape[:3], dtype=torch.float32, device=q.device) if want_lse else None
    if call.is_empty:
        return out, lse
    workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=q.device) if call.workspace_bytes else None
    pointers = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
    )  # fmt: skip
    if not (pointers[0] and pointers[1] and pointers[2]):
        check_memory(q=q, k=k, v=v)
    words = values
    if call.has_tensors:
        words = recent.words(values) if again else capture_words(call, values, q.device)  # type: ignore[union-attr]
    if not again:
        remember(recent, options, call, (q, k, v, values, words))
    tail = call.kernel.pack_tail(words) if words else b""
    if call.split is None:
        launch(call.kernel, call.cuda_index, pointers, shapes + tail)
    else:
        call.split.start(pointers[:3], out, lse, tail, values)
    return out, lse


def find_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: tuple[object, ...]) -> PreparedCall | None:
    """The call for these tensors, checked and prepared at their first; None for tensors that the kernel cannot read."""
    program, scale, local, family, out_dtype = options
    try:
        key = (*options, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
               q.device, k.device, v.device)  # fmt: skip
    except (AttributeError, RuntimeError):
        check_tensors(q, k, v)  # says which one is no tensor, or of another layout
        raise
    call = _prepared.get(key)
    if call is None:
        check_tensors(q, k, v)
        if needs_adapting(q, k, v):
            return None
        call = prepare(program, q, k, v, scale, local, family, output_dtype(q.dtype, out_dtype))  # type: ignore[arg-type]
        if len(_prepared) >= MAX_PREPARED_CALLS:
            _prepared.clear()
        _prepared[key] = call
    return call


def remember(recent: RecentCall | None, options: tuple[object, ...], call: PreparedCall, given: tuple[object, ...]) -> None:
    """Note a call that was right as the last one with its options; ``given``: what RecentCall.come_again takes."""
    noted = RecentCall(call)
    if recent is not None and recent.call is call:
        noted.come_again(*given)  # type: ignore[arg-type]
    elif len(_recent) >= MAX_PREPARED_CALLS:
        _recent.clear()
    _recent[options] = noted


def launch(kernel: runtime.CompiledKernel, cuda_index: int | None, pointers: tuple[int, ...], rest: bytes) -> None:
    """Start the kernel, on the current stream; ``rest`` is struct Args from `batch` on."""
    threads = torch.get_num_threads() if cuda_index is None else 0
    packed = _pack_pointers(*pointers, stream_of(cuda_index), threads) + rest
    code = call_on(cuda_index, kernel.launch, packed)
    if code == runtime.CANNOT_COPY:  # nothing was launched
        kernel = kernel.that_loads()
        code = call_on(cuda_index, kernel.launch, packed)
    if code:
        kernel.raise_error(code)


def prepare(
    program: Program,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    local: bool,
    family: str | None,
    out_dtype: torch.dtype,
) -> PreparedCall:
    """Choose and load the kernel, and everything else that stays the same for these shapes."""
    batch, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    q_offset = 0 if local else kv_len - q_len
    if q_offset < 0 and uses_index(program, "q_idx"):
        raise ShapeMismatch(
            f"q_len {q_len} is larger than kv_len {kv_len}, and the variant reads q_idx, which counts from kv_len - q_len. "
            "Pass q_index='local' to count query rows from 0."
        )
    named = "" if out_dtype == q.dtype else dtype_name(out_dtype)
    dims, dtype = (head_dim, head_dim_v), dtype_name(q.dtype)
    o_shape = (batch, num_q_heads, q_len, head_dim_v)
    o_stride = stride_like(q, o_shape)
    factor = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    split = find_split(program, q, k, v, o_stride, factor, local) if family is None and q.device.type == "cuda" else None
    if split is None:
        spec = choose_spec(program, dtype, dims, q.device, q_len=q_len, family=family, out_dtype=named)
        kernel = runtime.get_kernel(spec)
    else:
        kernel = split.kernel
    k_stride, v_stride = expanded_stride(k, batch), expanded_stride(v, batch)
    sizes = {"b": batch, "h": num_q_heads, "kv_h": num_kv_heads, "q_idx": q_len + max(q_offset, 0), "kv_idx": kv_len}
    sizes |= {"d": head_dim_v, "any": 1}
    strides = (*q.stride(), *k_stride, *v_stride, *o_stride)
    indices = direct_indices(program)
    numbers = (batch, num_q_heads, num_kv_heads, q_len, kv_len, q_offset, factor, *strides)
    return PreparedCall(
        program=program,
        kernel=kernel,
        numbers=numbers,
        shapes=_pack_shapes(*numbers),
        o_shape=o_shape,
        o_stride=o_stride,
        is_empty=0 in o_shape,
        captures=tuple(
            None if slot.kind == "scalar" else (slot.name, tuple((d, sizes[name], name) for j, d, name in indices if i == j))
            for i, slot in enumerate(program.slots)
        ),
        cuda_index=q.device.index if q.device.type == "cuda" else None,
        out_like_q=q.is_contiguous() and tuple(q.shape) == o_shape and o_stride == q.stride() and out_dtype == q.dtype,
        out_dtype=out_dtype,
        workspace_bytes=0 if split or spec.family != "sm90_fp8" else workspace_bytes(spec.tiles, v.shape, v_stride),
        has_tensors=any(slot.kind == "tensor" for slot in program.slots),
        split=split,
    )


def find_split(
    program: Program, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o_stride: tuple[int, ...], scale: float, local: bool
) -> SplitCall | None:
    """The call with the keys cut among the CTAs, where that is faster."""
    from jitgen.dense_split import split_call  # of no use on a CPU

    return split_call(program, q, k, v, o_stride, scale, local)


def run_adapted(
    program: Program,
    values: list[object],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    local: bool,
    want_lse: bool,
    out: torch.Tensor | None,
    family: str | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run on copies the kernel can read; zero columns beyond head_dim change no logit and are cut off the output."""
    head_dim, head_dim_v = padded_head_dims(q.shape[3], v.shape[3], dtype_name(q.dtype))
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if (program.output is not None or uses_index(program, "head_dim_v")) and head_dim_v != v.shape[3]:
        raise ShapeMismatch(
            f"v has head_dim {v.shape[3]}, and this variant transforms output rows, which needs the head_dim_v of a cuda "
            f"kernel, here {head_dim_v}. Pad v yourself, or apply the transform outside."
        )
    copies = [
        pad_columns(t, width) if t.shape[3] != width else t if is_row_aligned(t) else t.contiguous()
        for t, width in ((q, head_dim), (k, head_dim), (v, head_dim_v))
    ]
    result, lse = run(program, values, *copies, scale=scale, local=local, want_lse=want_lse, family=family, out_dtype=out_dtype)
    return finished(result[..., : v.shape[3]], out, q, out_dtype), lse
