"""Evaluating expressions with torch: the meaning of the IR, one line an operation.

Integers are int64 and floats have the dtype that the caller's leaves have, normally float64, so this is what kernels are
measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from jitgen.ir import Expr, walk
from jitgen.ir_ops import PAGE_OPS

Tensor = torch.Tensor


def evaluate(
    root: Expr, values: Sequence[Any], leaves: Mapping[str, Tensor], *, keep: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Value of ``root``.

    ``values`` are the captures by slot, ``leaves`` the indices and states by name, and page numbers and slots of keys where
    these are read; shapes broadcast. Reductions run along the
    last axis; of a row of logits, only the elements in ``keep`` count, and ``reverse`` is the order of a running sum.
    """
    dtype, device = _context(leaves)
    done: dict[Expr, Tensor] = {}
    for node in walk(root):
        args = [done[a] for a in node.args]
        if node.op == "const":
            done[node] = torch.tensor(node.attr, dtype=_torch_dtype(node, dtype), device=device)
        elif node.op in ("index", "state"):
            done[node] = leaves[str(node.attr)]
        elif node.op in PAGE_OPS:
            done[node] = leaves[node.op]
        elif node.op == "scalar":
            done[node] = torch.tensor(values[int(str(node.attr))], dtype=_torch_dtype(node, dtype), device=device)
        elif node.op == "load":
            element = gather(values[int(str(node.attr))], args)
            done[node] = element.to(_torch_dtype(node, dtype))
        elif node.op == "lin":
            constant, coefficients = node.attr  # type: ignore[misc]
            done[node] = sum((c * a for c, a in zip(coefficients, args, strict=True)), torch.tensor(constant, device=device))
        elif node.op == "cast":
            done[node] = _cast(args[0], node, dtype)
        elif node.op in _ROWS:
            done[node] = _ROWS[node.op](args[0], keep, reverse)
        else:
            done[node] = _OPS[node.op](*args)
    return done[root]


def gather(source: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Elements of a captured tensor; a negative index counts from the end, and one outside is clamped."""
    places = []
    for size, index in zip(source.shape, indices, strict=True):
        wrapped = torch.where(index < 0, index + size, index)
        places.append(wrapped.clamp(0, max(size - 1, 0)).long())
    return source.as_subclass(torch.Tensor)[tuple(places)] if places else source


def _context(leaves: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    floats = [t.dtype for t in leaves.values() if t.is_floating_point()]
    first = next(iter(leaves.values()), torch.tensor(0, device="cpu"))
    return (floats[0] if floats else torch.float64), first.device


def _torch_dtype(node: Expr, dtype: torch.dtype) -> torch.dtype:
    return {"bool": torch.bool, "i32": torch.int64, "i64": torch.int64}.get(node.dtype, dtype)


def _cast(x: Tensor, node: Expr, dtype: torch.dtype) -> Tensor:
    if node.dtype == "bool":
        return x != 0
    return (x.trunc() if x.is_floating_point() and node.is_int else x).to(_torch_dtype(node, dtype))


def _nonzero(d: Tensor) -> Tensor:
    """A divisor without zeros: an integer divided by zero is 0 in kernels, and torch would raise."""
    return torch.where(d == 0, torch.ones_like(d), d)


def _floordiv(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point():
        return torch.floor(a / b)
    return torch.where(b == 0, torch.zeros_like(a), torch.div(a, _nonzero(b), rounding_mode="floor"))


def _mod(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point():
        return torch.remainder(a, b)
    return torch.where(b == 0, torch.zeros_like(a), torch.remainder(a, _nonzero(b)))


def _popcount(x: Tensor) -> Tensor:
    return sum(((x >> bit) & 1 for bit in range(64)), torch.zeros_like(x))


def _as_int(x: Tensor) -> Tensor:
    return x.long() if x.dtype == torch.bool else x


def _arithmetic(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Operations that count bools."""
    return lambda *args: f(*map(_as_int, args))


_OPS: dict[str, Callable[..., Tensor]] = {
    "add": _arithmetic(torch.add), "sub": _arithmetic(torch.sub), "mul": _arithmetic(torch.mul), "truediv": torch.div,
    "floordiv": _floordiv, "mod": _mod, "neg": _arithmetic(torch.neg), "abs": _arithmetic(torch.abs),
    "min": _arithmetic(torch.minimum), "max": _arithmetic(torch.maximum), "pow": torch.pow, "sign": _arithmetic(torch.sign),
    "relu": _arithmetic(torch.relu), "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
    "bitand": _arithmetic(torch.bitwise_and), "bitor": _arithmetic(torch.bitwise_or), "bitxor": _arithmetic(torch.bitwise_xor),
    "bitnot": _arithmetic(torch.bitwise_not), "shl": lambda a, b: _as_int(a) << (_as_int(b) & 63),
    "shr": lambda a, b: _as_int(a) >> (_as_int(b) & 63), "popcount": _popcount, "where": torch.where,
    "isfinite": torch.isfinite, "isnan": torch.isnan, "isinf": torch.isinf,
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "log1p": torch.log1p, "tanh": torch.tanh,
    "tanh_approx": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "logsigmoid": lambda x: -torch.logaddexp(-x, torch.zeros_like(x)),
    "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc,
}  # fmt: skip


def _counted(x: Tensor, keep: Tensor | None, neutral: float) -> Tensor:
    return x if keep is None else torch.where(keep, x, torch.full_like(x, neutral))


def _row_max(x: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
    row = _counted(x, keep, -torch.inf)
    return row.amax(-1, keepdim=True) if row.shape[-1] else row.new_full((*row.shape[:-1], 1), -torch.inf)


def _row_cumsum(x: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
    row = _counted(x, keep, 0.0)
    return row.flip(-1).cumsum(-1).flip(-1) if reverse else row.cumsum(-1)


_ROWS: dict[str, Callable[[Tensor, Tensor | None, bool], Tensor]] = {
    "row_max": _row_max,
    "row_sum": lambda x, keep, reverse: _counted(x, keep, 0.0).sum(-1, keepdim=True),
    "row_cumsum": _row_cumsum,
    "d_sum": lambda x, keep, reverse: x.sum(-1, keepdim=True),
}
