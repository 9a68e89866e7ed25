"""Tracing a jitgen.OnlineNorm, and whether its merge does what cutting requests along their keys relies on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch

from jitgen import ir
from jitgen.captures import Captures
from jitgen.errors import VariantError
from jitgen.guards import Path
from jitgen.ir import Expr, walk
from jitgen.location import definition_of, refuse
from jitgen.norm_parts import Part, finish_row, join, run_keys
from jitgen.norms import OnlineNorm
from jitgen.program import NormProgram
from jitgen.signatures import code_of, shown
from jitgen.symbols import Sym
from jitgen.trace import Tracer

Convert = Callable[[object, str, str, "CodeType | None"], Expr]


class NormTracer:
    """Traces one norm. ``convert`` turns what a method returns into an expression of a type."""

    def __init__(self, tracer: Tracer, captures: Captures, norm: OnlineNorm, convert: Convert) -> None:
        self._tracer, self._norm, self._convert = tracer, norm, convert
        root = Path(None, "root", "softmax")
        self._proxy = captures.wrap(norm, root, "softmax")
        self._names, self._starts = _state_of(norm)
        tracer.guards.add("equal", root.attr("state"), norm.state)
        tracer.guards.add("equal", root.attr("order"), norm.order)

    def program(self) -> NormProgram:
        """All methods of the norm."""
        weight, rescale, *next_state = self._update()
        self._tracer.row_axis = "d"
        try:
            finalize = self._value("finalize", Sym(ir.index("o")))
        finally:
            self._tracer.row_axis = None
        lse = self._value("lse") if _overrides(self._norm, "lse") else None
        merge = self._merge() if _overrides(self._norm, "merge") else ()
        order = self._norm.order
        return NormProgram(self._names, self._starts, weight, rescale, tuple(next_state), finalize, lse, order, merge)

    def _label(self, method: str) -> tuple[str, CodeType | None]:
        return f"{type(self._norm).__name__}.{method}", code_of(getattr(self._norm, method))

    def _states(self, prefix: str = "") -> dict[str, Sym]:
        return {n: Sym(ir.state(prefix + n)) for n in self._names}

    def _update(self) -> tuple[Expr, ...]:
        label, code = self._label("update")

        def finish(returned: object) -> tuple[Expr, ...]:
            if not (isinstance(returned, tuple) and len(returned) == 3):
                refuse(f"{label} returned {shown(returned)}, expected (weight, factor, state).", at=definition_of(code))
            weight, factor, state = returned
            return self._floats(label, code, (weight, factor, *self._values_of(label, code, state)))

        return self._tracer.run(label, code, lambda: self._proxy.update(Sym(ir.index("score")), self._states()), finish)

    def _merge(self) -> tuple[Expr, ...]:
        label, code = self._label("merge")

        def finish(returned: object) -> tuple[Expr, ...]:
            if not (isinstance(returned, tuple) and len(returned) == 3):
                refuse(f"{label} returned {shown(returned)}, expected (state, scale_a, scale_b).", at=definition_of(code))
            state, scale_a, scale_b = returned
            return self._floats(label, code, (*self._values_of(label, code, state), scale_a, scale_b))

        roots = self._tracer.run(label, code, lambda: self._proxy.merge(self._states("a."), self._states("b.")), finish)
        reductions = [n.op for n in walk(*roots) if n.op.startswith("row_")]
        if reductions:
            refuse(
                f"{label} uses {reductions[0]}, and it is given two states and no row. Reduce in update, and keep the result "
                "in the state.",
                at=definition_of(code),
            )
        return roots

    def _value(self, method: str, *first: Sym) -> Expr:
        label, code = self._label(method)

        def finish(returned: object) -> tuple[Expr, ...]:
            return self._floats(label, code, (returned,))

        (root,) = self._tracer.run(label, code, lambda: getattr(self._proxy, method)(*first, self._states()), finish)
        return root

    def _floats(self, label: str, code: CodeType | None, values: Sequence[object]) -> tuple[Expr, ...]:
        return tuple(self._convert(v, "f32", label, code) for v in values)

    def _values_of(self, label: str, code: CodeType | None, state: object) -> list[object]:
        """The values of a state that a method returned, in the order of their names."""
        if not isinstance(state, Mapping) or set(state) != set(self._names):
            found = sorted(state) if isinstance(state, Mapping) else shown(state)
            refuse(f"{label} returned the state {found}, expected a dict of {sorted(self._names)}.", at=definition_of(code))
        return [state[n] for n in self._names]


def _overrides(norm: OnlineNorm, method: str) -> bool:
    return getattr(type(norm), method) is not getattr(OnlineNorm, method)


def _state_of(norm: OnlineNorm) -> tuple[tuple[str, ...], tuple[float, ...]]:
    what = type(norm).__name__
    if norm.order not in ("any", "forward", "reverse"):
        raise VariantError(f"{what}.order is {norm.order!r}, expected 'any', 'forward' or 'reverse'.")
    if not isinstance(norm.state, Mapping):
        raise VariantError(f"{what}.state is {norm.state!r}, expected a dict of names and start values.")
    for name, start in norm.state.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise VariantError(f"{what}.state has the name {name!r}, expected an identifier.")
        if isinstance(start, bool) or not isinstance(start, (int, float)):
            raise VariantError(f"{what}.state[{name!r}] starts from {start!r}, expected a number.")
    return tuple(norm.state), tuple(float(v) for v in norm.state.values())


# ---- what merge must do -----------------------------------------------------------------------------------------------------

KEYS, PART = 11, 4  # of the rows that are tried
TOLERANCE = 1e-6  # in float64; a wrong merge is off by far more


def check_merge(norm: NormProgram, values: Sequence[Any], user: object) -> None:
    """Rows of a few keys come out the same in parts as in one run, whichever way the parts are joined.

    A norm that reads captured tensors is not tried: they may be on a GPU, and for more rows than there are here.

    Errors:  VariantError.
    Cost:    some milliseconds, of norms with merge only.
    """
    if not norm.merges or any(n.op == "load" for n in walk(*norm.roots())):
        return
    keys = torch.arange(KEYS, dtype=torch.float64, device="cpu")
    logits = torch.stack([3 * torch.cos(1.7 * keys + row) for row in range(5)])
    logits[1, :PART] = logits[2, PART:] = logits[3] = -torch.inf  # parts without a key, and a row without any
    logits, v = logits[None, None], torch.stack((torch.cos(2.3 * keys), torch.sin(keys)), -1)[None, None]

    def of(*columns: slice) -> Part:
        parts = [run_keys(norm, values, logits[..., c], v[..., c, :], {}) for c in columns]
        return parts[0] if len(parts) == 1 else join(norm, values, parts)

    first, second, third = (slice(at, min(at + PART, KEYS)) for at in range(0, KEYS, PART))
    forward = norm.order != "reverse"
    in_order = [first, second, third] if forward else [third, second, first]
    whole = of(slice(0, KEYS))
    ways = {
        "in parts": of(*in_order),
        "in parts, the later two joined first": join(norm, values, [of(in_order[0]), of(*in_order[1:])]),
    }
    if not norm.has_order:
        ways["in parts, from the last to the first (its order is 'any')"] = of(*in_order[::-1])
    label = f"{type(user).__name__ if isinstance(user, OnlineNorm) else getattr(user, '__name__', user)}.merge"
    for way, part in ways.items():
        _compare(label, way, finish_row(norm, values, *whole, {}), finish_row(norm, values, *part, {}))


def _compare(label: str, way: str, whole: tuple[Any, ...], merged: tuple[Any, ...]) -> None:
    for what, want, got in zip(("output", "logsumexp"), whole, merged, strict=True):
        if want is None:
            continue
        wrong = ~torch.isclose(got, want, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0][2])
            hint = " A part that saw no key has the start state, and must change nothing." if row in (1, 2, 3) else ""
            if hint and bool(got[wrong][0].isnan()):
                hint += " nan comes of -inf minus -inf: all logits of a part may be hidden, in update too."
            raise VariantError(
                f"{label} does not join parts: a row of {KEYS} logits has the {what} {float(want[wrong][0]):.6g} in one run of "
                f"update, and {float(got[wrong][0]):.6g} {way}. All keys of a are visited before those of b.{hint}"
            )
