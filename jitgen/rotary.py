"""Rotary position embedding: jitgen.rope for rows of q and k, jitgen.Rope for transforms of rows."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.compiler import is_compiling

from jitgen import ir
from jitgen.checks import check_is_tensor, is_traced
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError
from jitgen.ir import Expr
from jitgen.symbols import Sym, active, as_operand

Tensor = torch.Tensor
Llama31 = tuple[float, float, int]
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TWO_PI = 2.0 * math.pi


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotation of pairs of elements of a row by angles that grow with the position.

    In a transform of ``jitgen.append``, and in the q_transform and k_transform of a variant, ``rope(k, pos)`` is the rotated
    row. Make one and keep it: another object is another transform, which is traced again (and compiles nothing).

    theta, scale  pair i turns by ``position / scale * theta ** (-2 i / rotary_dim)`` radians
    rotary_dim    leading elements that are rotated, default the whole row; the others pass through
    interleave    a pair is (2 i, 2 i + 1), else (i, i + rotary_dim / 2)
    llama31       (low_freq_factor, high_freq_factor, old_context_len): a frequency f becomes ``(1 - s) f / scale + s f``,
                  where s rises from 0 to 1 while old_context_len holds between low and high turns of f
    cos_sin       [max_position, rotary_dim], cosines and then sines, in place of theta, scale and llama31; positions beyond
                  its ends are taken for the ends

    Errors:  ShapeMismatch, UnsupportedDtype, VariantError.
    """

    theta: float = 1e4
    scale: float = 1.0
    rotary_dim: int | None = None
    interleave: bool = False
    llama31: Llama31 | None = None
    cos_sin: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cos_sin is not None:
            _check_table(self.cos_sin, self.rotary_dim)
            object.__setattr__(self, "rotary_dim", self.cos_sin.shape[1])
        for name in ("theta", "scale"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise VariantError(f"{name} is {value!r}, expected a number above 0.")
        if not isinstance(self.interleave, bool):
            raise InvalidType(f"interleave is {self.interleave!r} of type {type(self.interleave).__name__}, expected a bool.")
        if self.llama31 is not None and not isinstance(self.llama31, tuple | list):
            raise InvalidType(f"llama31 is {self.llama31!r}, expected (low_freq_factor, high_freq_factor, old_context_len).")
        if self.llama31 is not None and not (len(self.llama31) == 3 and 0 < self.llama31[0] < self.llama31[1]):
            raise VariantError(
                f"llama31 is {self.llama31!r}, expected (low_freq_factor, high_freq_factor, old_context_len), the first below "
                "the second."
            )
        dim = self.rotary_dim
        if dim is not None and (not isinstance(dim, int) or dim < 2 or dim % 2):
            raise ShapeMismatch(f"rotary_dim is {dim!r}, expected an even number from 2 on.")

    def __call__(self, x: Any, pos: Any) -> Any:
        """The rotated row, in a transform that is being traced."""
        tracer = active.state
        rotations = getattr(tracer, "rotations", None)
        if rotations is None:
            raise VariantError(
                "a jitgen.Rope was called outside of a transform of rows, as jitgen.append and variants have. Rotate tensors "
                "with jitgen.rope(q, k, ...)."
            )
        row, position = as_operand(x), as_operand(pos)
        if not isinstance(row, Expr) or not isinstance(position, Expr) or not position.is_int:
            raise VariantError("a jitgen.Rope takes a row and an integer position: rope(k, pos).")
        if position.deps & {"o", "x", "d", "row"}:
            raise VariantError("the position of a jitgen.Rope depends on elements of the row. It must be one number for a row.")
        rotations.append(self)
        return Sym(ir.rotated(row, position))

    def dim_of(self, head_dim: int) -> int:
        """Elements that are rotated of a row of ``head_dim``."""
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if dim > head_dim or dim % 2:
            raise ShapeMismatch(f"rotary_dim is {dim}, the rows have {head_dim} elements. It must be even and not larger.")
        return dim

    @property
    def kind(self) -> tuple[object, ...]:
        """What of it is compiled in."""
        return self.rotary_dim, self.interleave, "" if self.cos_sin is None else str(self.cos_sin.dtype)

    def frequencies(self, dim: int) -> list[float]:
        """Radians by which each pair turns from one position to the next."""
        return _frequencies(self.theta, self.scale, self.llama31, dim)

    def speeds(self, dim: int) -> tuple[float, ...]:
        """Turns of each pair from one position to the next, each as two floats that add up to it."""
        return _speeds(self.theta, self.scale, self.llama31, dim)


def _frequencies(theta: float, scale: float, llama31: Llama31 | None, dim: int) -> list[float]:
    found: list[float] = []
    for i in range(0, dim, 2):
        plain = theta ** (-i / dim)
        speed = plain / scale
        if llama31 is not None:
            low, high, length = llama31
            s = min(max((plain * length / _TWO_PI - low) / (high - low), 0.0), 1.0)
            speed = (1.0 - s) * plain / scale + s * plain
        found.append(speed)
    return found


@lru_cache(maxsize=256)
def _speeds(theta: float, scale: float, llama31: Llama31 | None, dim: int) -> tuple[float, ...]:
    found: list[float] = []
    for speed in _frequencies(theta, scale, llama31, dim):
        first = _to_float32(speed / _TWO_PI)
        found += (first, _to_float32(speed / _TWO_PI - first))
    return tuple(found)


def _to_float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]  # type: ignore[no-any-return]


def _check_table(table: Tensor, rotary_dim: int | None) -> None:
    if not isinstance(table, Tensor):
        raise InvalidType(f"cos_sin is a {type(table).__name__}, expected a torch.Tensor [max_position, rotary_dim].")
    if table.dim() != 2 or table.shape[0] == 0 or (rotary_dim is not None and table.shape[1] != rotary_dim):
        wanted = "rotary_dim" if rotary_dim is None else rotary_dim
        raise ShapeMismatch(f"cos_sin has shape {tuple(table.shape)}, expected [max_position, {wanted}].")
    if table.dtype not in TABLE_DTYPES:
        raise UnsupportedDtype(f"cos_sin has dtype {table.dtype}, expected float32, bfloat16 or float16.")
    if table.stride(1) != 1:
        raise ShapeMismatch(f"cos_sin has strides {table.stride()}, expected unit stride along its rows. Use .contiguous().")


@lru_cache(maxsize=64)
def _rope_of(*parameters: Any) -> Rope:
    return Rope(*parameters)


def rope(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor | tuple[Tensor, Tensor],
    *,
    theta: float = 1e4,
    scale: float = 1.0,
    rotary_dim: int | None = None,
    interleave: bool = False,
    llama31: Llama31 | None = None,
    cos_sin: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the rows of q and k by their positions, in one kernel; see jitgen.Rope for the parameters.

    positions     [num_tokens], or a pair (q_indptr [batch + 1], first [batch]): row i of request b has position first[b] + i,
                  rows of no request are left alone
    out           where to write (q, k); the same tensors rotate in place

    Shapes:  q [num_tokens, num_q_heads, head_dim], k [num_tokens, num_kv_heads, head_dim_k] or None, float32, bfloat16 or
             float16, any strides but unit stride along the head dim; returns both in their dtypes. Indices int32 or int64.
    Units:   angles in radians, exact to about 1e-6 at any position; arithmetic is float32.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, GradNotSupported, CompileError.
    Cost:    compiles once for each combination of dtypes, head dims and kinds of rotation; reads and writes memory once. Inside
             torch.compile the call is one operator.
    Source:  RoFormer (Su et al. 2021).
    """
    if is_compiling() and is_traced(q):
        from jitgen.kv_op import call_rope

        return call_rope(q, k, positions, (theta, scale, rotary_dim, interleave, llama31), cos_sin, out)
    from jitgen.kv_tokens import form_of, low_bits

    targets = (None, None) if out is None else out
    where = positions if isinstance(positions, tuple | list) else (positions,)
    try:
        how: tuple[Any, ...] = (theta, scale, rotary_dim, interleave, llama31 and tuple(llama31))
        key = (how, low_bits(q, k, *targets), *[form_of(t) for t in (q, k, cos_sin, *targets, *where)])
        found = _calls.get(key)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _check_kinds(q, k, where, (theta, scale, rotary_dim, interleave, llama31, cos_sin), out)
        raise
    if found is None:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        turn = _rope_of(*how) if cos_sin is None else Rope(rotary_dim=rotary_dim, interleave=interleave, cos_sin=cos_sin)
        found = _calls[key] = _prepare(q, k, where, turn, targets)
    return _run(found, q, k, where, targets, cos_sin)


MAX_CALLS = 1024  # prepared, by everything but addresses and values
_calls: dict[tuple[object, ...], Any] = {}


def _check_kinds(q: object, k: object, where: Any, how: tuple[Any, ...], out: Any) -> None:
    """Say what is of the wrong kind."""
    check_is_tensor(q=q, **{} if k is None else {"k": k})
    check_is_tensor(**dict(zip(("positions",) if len(where) == 1 else ("q_indptr", "first"), where, strict=False)))
    Rope(*how)
    if out is not None and not (isinstance(out, tuple | list) and all(isinstance(t, Tensor | None) for t in out)):
        raise InvalidType(f"out is {type(out).__name__}, expected a pair of tensors (q, k).")


def _prepare(q: Tensor, k: Tensor | None, where: Any, turn: Rope, targets: Any) -> Any:
    """The checked call, and whether indices are used as they are given."""
    from jitgen.kv_launch import Stream, prepare_rows
    from jitgen.kv_tokens import Tokens, new_rows

    if len(targets) != 2:
        raise InvalidType(f"out has {len(targets)} entries, expected (q, k).")
    streams = []
    for name, x, target in (("q", q, targets[0]), ("k", k, targets[1])):
        if x is not None or name == "q":
            rows = new_rows(name, x)
            if target is not None:
                _check_target(name, target, x)
            written = (
                torch.empty_like(rows, memory_format=torch.contiguous_format) if target is None else target.view(rows.shape)
            )
            streams.append(Stream.in_rows(name, rows, written, turn))
        elif target is not None:
            raise InvalidType("out has a tensor for k, which is None.")
    for s in streams[1:]:
        if s.x.shape[0] != q.shape[0] or s.x.device != q.device:
            raise ShapeMismatch(
                f"k has {s.x.shape[0]} rows on {s.x.device}, q has {q.shape[0]} on {q.device}. Both must match."
            )
    tokens = Tokens.at(where, q.shape[0], q.device)
    used = (tokens.positions,) if len(where) == 1 else (tokens.q_indptr, tokens.lengths)
    return prepare_rows(streams, "rows", tokens, q.device), all(a is b for a, b in zip(used, where, strict=True))


def _run(
    prepared: Any, q: Tensor, k: Tensor | None, where: Any, targets: Any, cos_sin: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    call, as_given = prepared
    if len(where) == 2 and q.device.type == "cpu":
        from jitgen.kv_checks import check_bounds

        check_bounds("q", where[0], q.shape[0])
    results = []
    for x, target in zip((q, k), targets, strict=True):
        results.append(target if x is None or target is not None else torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if call is not None:
        from jitgen.kv_tokens import Tokens

        if not as_given:  # copies, for the time of the launch
            tokens = Tokens.at(where, q.shape[0], q.device)
            addresses = tokens.addresses()
        elif len(where) == 1:
            addresses = (where[0].data_ptr(), 0, 0, 0, 0, 0, 0)
        else:
            addresses = (0, 0, 0, where[0].data_ptr(), where[1].data_ptr(), 0, 0)
        rows = [(x.data_ptr(), r.data_ptr(), 0, 1.0) for x, r in zip((q, k), results, strict=True) if x is not None]  # type: ignore[union-attr]
        table = None if cos_sin is None else struct.pack("Pqq", cos_sin.data_ptr(), cos_sin.shape[0], cos_sin.stride(0))
        call.run(addresses, rows, (), table)  # the table of this call: prepared ones hold none
    return results[0], results[1]  # type: ignore[return-value]


def _check_target(name: str, target: Tensor, x: Tensor) -> None:
    from jitgen.layouts import check_own_rows

    if tuple(target.shape) != tuple(x.shape) or target.dtype != x.dtype:
        raise ShapeMismatch(
            f"out for {name} has shape {tuple(target.shape)} and dtype {target.dtype}, expected {tuple(x.shape)}, {x.dtype}."
        )
    if target.device != x.device:
        raise UnsupportedDevice(f"out for {name} is on {target.device}, {name} is on {x.device}. Both must be on one device.")
    if target.stride(-1) != 1 and target.shape[-1] > 1:
        raise ShapeMismatch(f"out for {name} has strides {target.stride()}, expected unit stride along the head dim.")
    check_own_rows(target, f"out for {name}")
