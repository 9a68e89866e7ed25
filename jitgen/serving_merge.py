"""Merging attention over parts of the keys: results with their logsumexps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.compiler import is_dynamo_compiling

from jitgen import runtime
from jitgen.checks import check_is_tensor, dtype_name
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.families import cuda_spec
from jitgen.streams import cuda_index, start, stream_of
from jitgen.target import detect_cuda
from jitgen.variant import Variant

Tensor = torch.Tensor
BASES = {"e": 1.0, 2: math.log(2.0)}  # what turns a logsumexp of that base into a natural one
LANES = 32  # of a warp, which takes a row of a head: head dims are a multiple
MAX_HEAD_DIM = 512


def merge_states(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor], *, base: str | int = "e"
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over each of several parts of them.

    A part that saw no key has logsumexp -inf and is left out, whatever its output holds. For softmax only: parts of a row under
    a jitgen.OnlineNorm are joined by its own merge, in plans (``split``, ``levels``).

    Shapes:  outs [rows, states, heads, head_dim_v]; lses [rows, states, heads] float32; or both lists of states, without that
             axis; returns [rows, heads, head_dim_v] in outs's dtype and [rows, heads] float32.
    Units:   logsumexps of base 'e', as jitgen returns them, or 2, as FlashInfer does; the result has the same base.
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype, UnsupportedDevice.
    Cost:    one kernel for 16-bit outputs on a GPU, compiled once for a dtype and head dim; else a few torch operations.
             float32 throughout.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    _check(outs, lses, base, 4)
    if outs.device != lses.device:
        raise _apart(outs=outs, lses=lses)
    if outs.shape[1] and _has_kernel(outs, lses):
        return _join(outs[:, 0], lses[:, 0], outs[:, 1:], lses[:, 1:], base)
    weights = lses * BASES[base]
    merged = weights.logsumexp(1)
    empty = merged == -math.inf
    weights = torch.exp(weights - torch.where(empty, 0.0, merged)[:, None])
    kept = torch.where((weights > 0)[..., None], outs.float(), 0.0)
    return (kept * weights[..., None]).sum(1).to(outs.dtype), merged / BASES[base]


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, base: str | int = "e") -> tuple[Tensor, Tensor]:
    """Attention over the keys of two parts, as ``merge_states``.

    Shapes:  out_a, out_b [rows, heads, head_dim_v]; lse_a, lse_b [rows, heads] float32; returns the same.
    Units:   as merge_states.
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype, UnsupportedDevice.
    Cost:    as merge_states.
    """
    check_is_tensor(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ShapeMismatch(
            f"the parts have outputs of shapes {tuple(out_a.shape)} and {tuple(out_b.shape)}, logsumexps of shapes "
            f"{tuple(lse_a.shape)} and {tuple(lse_b.shape)}. They must match."
        )
    _check(out_a, lse_a, base, 3)
    if (out_a.dtype, out_a.layout, lse_a.dtype, lse_a.layout) != (out_b.dtype, out_b.layout, lse_b.dtype, lse_b.layout):
        _check(out_b, lse_b, base, 3)
    if not out_a.device == lse_a.device == out_b.device == lse_b.device:
        raise _apart(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.dtype == out_b.dtype and _has_kernel(out_a, lse_a) and _has_kernel(out_b, lse_b):
        return _join(out_a, lse_a, out_b[:, None], lse_b[:, None], base)
    return merge_states(torch.stack([out_a, out_b], 1), torch.stack([lse_a, lse_b], 1), base=base)


def _stacked(name: str, states: Tensor | Sequence[Tensor]) -> Tensor:
    """The states along axis 1."""
    if isinstance(states, Tensor):
        return states
    if not isinstance(states, tuple | list):
        raise InvalidType(f"{name} is a {type(states).__name__}, expected a torch.Tensor or a list of them.")
    for i, t in enumerate(states):
        check_is_tensor(**{f"{name}[{i}]": t})
    shapes = [tuple(t.shape) for t in states]
    if not shapes or not shapes[0] or any(s != shapes[0] for s in shapes):
        raise ShapeMismatch(f"{name} has states of shapes {shapes}, expected one state at least, and all alike.")
    if any(t.device != states[0].device for t in states):
        raise _apart(**{f"{name}[{i}]": t for i, t in enumerate(states)})
    return torch.stack(tuple(states), 1)


def _apart(**states: Tensor) -> UnsupportedDevice:
    """The error for states of which not all are on the first one's device: those of other GPUs are not fetched."""
    (first, device), *others = ((name, t.device) for name, t in states.items())
    name, found = next(other for other in others if other[1] != device)
    return UnsupportedDevice(f"{name} is on {found}, {first} is on {device}. Move it there: {name}.to({str(device)!r}).")


def _check(outs: Tensor, lses: Tensor, base: str | int, rank: int) -> None:
    for name, t in (("outs", outs), ("lses", lses)):
        if t.layout is not torch.strided or t.is_nested:
            raise UnsupportedDevice(f"{name} has layout {t.layout}, expected torch.strided. Convert it with .to_dense().")
    if not isinstance(base, str | int) or base not in BASES:
        raise ShapeMismatch(f"base={base!r} is not a base of logsumexps. Use 'e' or 2.")
    if outs.dim() != rank or outs.shape[:-1] != lses.shape:
        axes = "rows, states, heads" if rank == 4 else "rows, heads"
        raise ShapeMismatch(
            f"outs has shape {tuple(outs.shape)}, lses {tuple(lses.shape)}, expected [{axes}, head_dim_v] and [{axes}]."
        )
    if not outs.is_floating_point():
        raise UnsupportedDtype(f"outs has dtype {str(outs.dtype).removeprefix('torch.')}, expected a floating point type.")
    if lses.dtype != torch.float32:
        raise UnsupportedDtype(f"lses has dtype {str(lses.dtype).removeprefix('torch.')}, expected float32.")


def _has_kernel(outs: Tensor, lses: Tensor) -> bool:
    """Whether the kernel takes these states: 16 bits on a GPU, and nobody who traces or wants gradients."""
    is_plain = type(outs) is Tensor and type(lses) is Tensor and outs.is_cuda and lses.device == outs.device
    if not is_plain or is_dynamo_compiling() or (torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)):
        return False
    dim = outs.shape[-1]
    return outs.dtype in (torch.bfloat16, torch.float16) and outs.stride(-1) == 1 and dim % LANES == 0 and dim <= MAX_HEAD_DIM


@lru_cache(maxsize=64)
def _kernel(dtype: torch.dtype, dim: int, index: int | None) -> runtime.CompiledKernel:
    """Remembered here: to trace, and to name, a kernel takes longer than to launch it."""
    plain, target = Variant().trace().program, detect_cuda(index)
    return runtime.get_kernel(cuda_spec(plain, dtype_name(dtype), (dim, dim), "merge_outs", target, layout="outs"))


def _join(first: Tensor, first_lse: Tensor, others: Tensor, other_lse: Tensor, base: str | int) -> tuple[Tensor, Tensor]:
    """The kernel's merge of a first state and those behind it.

    Shapes:  first [rows, heads, head_dim_v], others [rows, states - 1, heads, head_dim_v]; logsumexps too, without head_dim_v.
    """
    rows, heads, dim = first.shape
    out, lse = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (first, first_lse))  # new_empty is slow
    index = cuda_index(first.device)
    kernel = _kernel(first.dtype, dim, index)
    addresses = [t.data_ptr() for t in (first, first_lse, others, other_lse, out, lse)]
    strides = (*first.stride()[:2], *first_lse.stride(), *others.stride()[:3], *other_lse.stride())
    packed = kernel.pack(
        *addresses, stream_of(index), rows, heads, others.shape[1] + 1, *strides, BASES[base] / math.log(2.0)
    )  # fmt: skip
    start(kernel, index, packed)
    return out, lse
