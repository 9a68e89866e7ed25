"""8-bit inputs and their scales: what jitgen.attention does with them before a kernel is chosen.

Scales are hooks like any others: those of q and k are factors of the score that the variant's own score_mod receives, that of
v a factor of the output row that its output_transform receives. They are launch arguments, and a new value compiles nothing.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial

import torch

from jitgen import ir
from jitgen.errors import ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.guards import layout_of
from jitgen.ir import Expr
from jitgen.program import Program, Slot
from jitgen.spec import FP8_OUT_DTYPES, Tiles

Scale = float | torch.Tensor | None

FP8 = torch.float8_e4m3fn
OUT_DTYPES = tuple(getattr(torch, name) for name in FP8_OUT_DTYPES)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SCALED_PROGRAMS = 256

_scaled: dict[tuple[object, ...], tuple[Program, Program]] = {}  # the first keeps the id in the key valid


def output_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """dtype of the output for inputs of ``dtype``: theirs, or for 8-bit inputs bfloat16 unless float16 is wanted."""
    if dtype != FP8:
        if wanted not in (None, dtype):
            raise UnsupportedDtype(f"out_dtype is {wanted}, q has {dtype}. It is a choice for torch.float8_e4m3fn inputs only.")
        return dtype
    if wanted is not None and wanted not in OUT_DTYPES:
        raise UnsupportedDtype(f"out_dtype is {wanted}, expected {' or '.join(map(str, OUT_DTYPES))} for {FP8} inputs.")
    return wanted or OUT_DTYPES[0]


def negated(q: torch.Tensor) -> torch.Tensor:
    """-q; torch has no negation of 8-bit floats."""
    return (q.view(torch.uint8) ^ 0x80).view(FP8) if q.dtype == FP8 else -q


def workspace_bytes(tiles: Tiles, shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Size of the transposed copy of v [batch, num_kv_heads, kv_len, head_dim], with counters; heads of stride 0 share one."""
    copies = (shape[0] if strides[0] else 1) * (shape[1] if strides[1] else 1)
    return copies * (-(-shape[2] // tiles.tile_kv) * tiles.tile_kv * shape[3] + 4) + 4


# ---- scales ---------------------------------------------------------------------------------------------------------------


def with_scales(
    program: Program, values: list[object], q: torch.Tensor, k: torch.Tensor, scales: tuple[Scale, Scale, Scale]
) -> tuple[Program, list[object]]:
    """The program and captured values of a call whose q, k and v are to be multiplied by ``scales``.

    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice.
    """
    given = []
    for name, scale in zip("qkv", scales, strict=True):
        if scale is not None:
            head, heads = ("h", q.shape[1]) if name == "q" else ("kv_h", k.shape[1])
            value = checked_scale(f"scale_{name}", scale, q.shape[0], heads, q.device)
            given.append((name, value, slot_of(f"scale_{name}", value), indices_of(value, head)))
    key = (id(program), *((name, slot, indices) for name, _, slot, indices in given))
    found = _scaled.get(key)
    if found is None:
        if len(_scaled) >= MAX_SCALED_PROGRAMS:
            _scaled.clear()
        found = _scaled[key] = (program, scaled_program(program, {name: (slot, at) for name, _, slot, at in given}))
    return found[1], [*values, *(value for _, value, _, _ in given)]


def checked_scale(name: str, scale: float | torch.Tensor, batch: int, heads: int, device: torch.device) -> float | torch.Tensor:
    """A number as it is, a tensor of one scale without axes, of one a head as [heads], or [batch, heads]."""
    if not isinstance(scale, torch.Tensor):
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise UnsupportedDtype(f"{name} is a {type(scale).__name__}, expected a number or a tensor.")
        return float(scale)
    if scale.dtype not in SCALE_DTYPES:
        raise UnsupportedDtype(f"{name} has dtype {scale.dtype}, expected torch.float32. Convert it: {name}.float().")
    if scale.device != device:
        raise UnsupportedDevice(f"{name} is on {scale.device}, q is on {device}. Move it: {name}.to(q.device).")
    if scale.dim() <= 1 and scale.numel() == 1:
        return scale.reshape(())
    if tuple(scale.shape) not in ((heads,), (batch, heads)):
        raise ShapeMismatch(
            f"{name} has shape {tuple(scale.shape)}, expected one value, ({heads},) for one a head, or ({batch}, {heads}) for "
            "one a request and head."
        )
    return scale


def slot_of(name: str, value: float | torch.Tensor) -> Slot:
    """Signature of a scale."""
    if not isinstance(value, torch.Tensor):
        return Slot("scalar", "f32", name=name)
    return Slot("tensor", str(value.dtype).removeprefix("torch."), value.dim(), layout_of(value), name=name)


def indices_of(value: float | torch.Tensor, head: str) -> tuple[str, ...]:
    """What a scale is read with."""
    return ("b", head)[2 - value.dim() :] if isinstance(value, torch.Tensor) else ()


def scaled_program(program: Program, scales: dict[str, tuple[Slot, tuple[str, ...]]]) -> Program:
    """``program`` on scaled q, k and v; the scales take the slots after its own."""
    factors: dict[str, Expr] = {}
    for number, (name, (slot, indices)) in enumerate(scales.items(), start=len(program.slots)):
        is_number = slot.kind == "scalar"
        factors[name] = ir.scalar(number, "f32") if is_number else ir.load(number, "f32", tuple(map(ir.index, indices)))
    changes: dict[str, object] = {"slots": program.slots + tuple(slot for slot, _ in scales.values())}
    of_score = [factors[name] for name in "qk" if name in factors]
    if of_score:
        changes["score"] = multiplied(program.score, ir.index("score"), functools.reduce(partial(ir.make, "mul"), of_score))
    if "v" in factors:
        changes["output"] = multiplied(program.output, ir.index("o"), factors["v"])
    return replace(program, **changes)


def multiplied(root: Expr | None, leaf: Expr, factor: Expr) -> Expr:
    """A hook that receives ``leaf`` times ``factor``; without a hook, the product."""
    product = ir.make("mul", leaf, factor)
    return product if root is None else ir.rebuild(root, lambda n: product if n is leaf else None)
