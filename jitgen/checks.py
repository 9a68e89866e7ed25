"""Validation of the inputs of attention: every error names the tensor, the size, what was expected and the remedy.

Runs once per combination of shapes, strides and dtypes; the result is remembered by the caller.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from jitgen.emit_ranges import POSITION_LIMIT
from jitgen.errors import GradNotSupported, InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError
from jitgen.spec import CPU_DTYPES, CUDA_DTYPES, FP8_DTYPE, MAX_CPU_HEAD_DIM, MLA_DIMS

INT32 = torch.iinfo(torch.int32)
HAS_LEVEL = hasattr(forward_ad, "_current_level")  # private: another torch may not have it


def narrowed(t: torch.Tensor) -> torch.Tensor:
    """Integers as int32. Those that do not fit become the largest or the smallest, which no check lets pass: cut to their low
    bits they could be any valid number."""
    if t.dtype is torch.int64:
        t = t.clamp(INT32.min, INT32.max)
    return t if t.dtype is torch.int32 else t.to(torch.int32)


def as_int32(t: torch.Tensor) -> torch.Tensor:
    """``narrowed``, in contiguous memory: the tensor itself where that is so already."""
    return narrowed(t).contiguous()


def plain_int(value: Any) -> Any:
    """What is an integer, as NumPy's are, as an int; anything else as it is, for the checks to name."""
    if not hasattr(type(value), "__index__") or isinstance(value, bool | torch.Tensor):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array of NumPy that has more than one element
        return value


def check_is_tensor(**values: object) -> None:
    """Arguments are tensors."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidType(f"{name} is a {type(value).__name__}, expected a torch.Tensor.")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q [batch, num_q_heads, q_len, head_dim], k and v [batch, num_kv_heads, kv_len, head_dim(_v)]."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_is_tensor(**{name: t})
        if t.is_nested:
            raise ShapeMismatch(
                f"{name} is a nested tensor, expected a dense one. Give its values to jitgen.ragged_attention, or pad it with "
                "torch.nested.to_padded_tensor."
            )
        if t.dim() != 4:
            raise ShapeMismatch(
                f"{name} has {t.dim()} dimensions (shape {tuple(t.shape)}), expected 4: [batch, heads, length, head_dim]. "
                "Add the missing axis with unsqueeze."
            )
    check_devices(q, k, v)
    check_dtypes(q, k, v)
    check_sizes(q, k, v)


def check_devices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """All on one device, and of a kind that has kernels."""
    if q.device.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(
            f"q is on {q.device}, expected a cpu or cuda tensor. Move the inputs with .to('cpu') or .to('cuda')."
        )
    for name, t in (("k", k), ("v", v)):
        if t.device != q.device:
            raise UnsupportedDevice(
                f"{name} is on {t.device}, q is on {q.device}. All must be on one device: {name}.to(q.device)."
            )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.layout != torch.strided:
            raise UnsupportedDevice(f"{name} has layout {t.layout}, expected torch.strided. Convert it with .to_dense().")


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One dtype for q, k and v, and one the target computes in."""
    allowed = CPU_DTYPES if q.device.type == "cpu" else CUDA_DTYPES
    name = dtype_name(q.dtype)
    if name not in (*allowed, FP8_DTYPE):
        raise UnsupportedDtype(
            f"q has dtype {name}, expected {' or '.join(allowed)} on {q.device.type}. Convert with .to(torch.{allowed[-2]})."
        )
    for other, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise UnsupportedDtype(
                f"{other} has dtype {dtype_name(t.dtype)}, q has {name}. Both must match: {other}.to(q.dtype)."
            )


def check_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Batch, heads, lengths and head dims fit together."""
    for axis, what in ((0, "batch"), (1, "num_kv_heads"), (2, "kv_len")):
        if k.shape[axis] != v.shape[axis]:
            raise ShapeMismatch(f"v has {what} {v.shape[axis]}, k has {k.shape[axis]} (axis {axis}). Both must match.")
    if k.shape[0] != q.shape[0] and k.shape[0] != 1:
        raise ShapeMismatch(f"k has batch {k.shape[0]}, q has {q.shape[0]} (axis 0). Both must match, or k and v have batch 1.")
    for name, t in (("q", q), ("k and v", k)):
        if t.shape[2] > POSITION_LIMIT:
            raise ShapeMismatch(f"length of {name} is {t.shape[2]} (axis 2), expected at most {POSITION_LIMIT}. Cut it.")
    if k.shape[3] != q.shape[3]:
        raise ShapeMismatch(f"k has head_dim {k.shape[3]}, q has {q.shape[3]} (axis 3). Both must match.")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ShapeMismatch(
            f"q has {q.shape[1]} heads, k and v have {k.shape[1]} (axis 1). The number of query heads must be a "
            "positive multiple of the number of key/value heads."
        )
    for name, size in (("q and k have head_dim", q.shape[3]), ("v has head_dim", v.shape[3])):
        if size % 8 or not 8 <= size <= MAX_CPU_HEAD_DIM:
            pad = f"Pad it with zeros: torch.nn.functional.pad(x, (0, {-size % 8})), which changes no logit if scale is given."
            fits = 0 < size <= MAX_CPU_HEAD_DIM
            why = "Latent attention is of plans: see jitgen.Plan." if size == MLA_DIMS[0] else "Is the last axis the head dim?"
            remedy = pad if fits else f"No kernel of dense attention has others. {why}"
            raise ShapeMismatch(f"{name} {size} (axis 3), expected a multiple of 8 from 8 to {MAX_CPU_HEAD_DIM}. {remedy}")


def check_memory(**tensors: torch.Tensor) -> None:
    """Tensors have values at an address: those of FakeTensorMode have shapes only, those of torch.func and of subclasses that
    wrap others have them elsewhere, and a kernel would be given address 0. Negative views have others than their memory."""
    for name, t in () if is_dynamo_compiling() else tensors.items():
        if t.is_neg():  # as the imaginary part of a conjugate is
            raise UnsupportedDevice(f"{name} is a view that negates what it shows (is_neg()). Copy it with .resolve_neg().")
        if isinstance(t, FakeTensor):
            raise UnsupportedDevice(
                f"{name} is a FakeTensor, which has no values. To have shapes or a graph, make the call inside torch.compile "
                "or torch.export, as jitgen.flex_attention for dense attention."
            )
        if t.is_meta or t.is_nested or t.layout != torch.strided or t.numel() == 0 or address_of(t):
            continue  # or other checks say what is wrong
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise UnsupportedDevice(
                f"{name} is a tensor of torch.func (vmap, jvp, functionalize), and calls of jitgen are not transformed by it. "
                "Call outside of it; for vmap, make the mapped axis a part of the batch."
            )
        raise UnsupportedDevice(
            f"{name} is a {type(t).__name__} without memory of its own. Give the plain tensor in it, such as .to_local() of a "
            "DTensor."
        )


def address_of(t: torch.Tensor) -> int:
    """Where the memory of a tensor begins; 0 without any."""
    if type(t) is FakeTensor:
        return 0
    try:
        return t.data_ptr()
    except RuntimeError:  # of a tensor without storage
        return 0


def check_scale(scale: object) -> None:
    """What logits are multiplied by is a finite number, or None for the default."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise VariantError(
            f"scale is {scale!r} of type {type(scale).__name__}, expected a finite number or None. Convert it with float(), or "
            "multiply in a score_mod what differs from call to call."
        )


def first_of(t: torch.Tensor) -> str:
    """The first numbers of a vector, in a message."""
    values = t[:8].tolist()
    return f"{values}" if t.shape[0] <= 8 else f"{str(values)[:-1]}, ...]"


def check_choices(family: object, out_dtype: object) -> None:
    """What is chosen by a name, or by a dtype, is one."""
    if family is not None and not isinstance(family, str):
        raise VariantError(f"family is {family!r} of type {type(family).__name__}, expected a name or None. Leave it out.")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise InvalidType(f"out_dtype is {out_dtype!r} of type {type(out_dtype).__name__}, expected one like torch.bfloat16.")


def is_traced(t: object) -> bool:
    """Whether a call with this tensor is being traced, where is_compiling() says so: it does while any thread compiles."""
    return is_dynamo_compiling() or type(t) not in (torch.Tensor, torch.nn.Parameter)


def is_differentiating() -> bool:
    """Whether forward-mode differentiation may be on, so that tensors must be asked for their tangents."""
    return not HAS_LEVEL or forward_ad._current_level >= 0


def check_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse inputs whose gradient somebody will ask for."""
    try:
        wanted = q.requires_grad or k.requires_grad or v.requires_grad
    except AttributeError:
        check_tensors(q, k, v)  # says which one is no tensor
        raise
    if wanted and torch.is_grad_enabled():
        raise GradNotSupported(
            "an input requires grad, and jitgen computes no gradients. Call under torch.no_grad() or torch.inference_mode(), "
            "or detach the inputs; train with torch.nn.attention.flex_attention, which takes the same score_mod and mask_mod."
        )
    if is_differentiating() and any(forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v)):
        raise GradNotSupported(
            "an input has a tangent of forward-mode differentiation, and jitgen computes no derivatives. Give its primal: "
            "torch.autograd.forward_ad.unpack_dual(x).primal."
        )


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")
