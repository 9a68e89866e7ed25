"""Running a hook on stand-ins, once per way through its Python control flow.

A condition on a traced value forks: the hook is run again with the other answer, and the results are joined by ``where``.
A condition already settled on the current way does not fork. Hooks therefore may use if, and, or, not, chained
comparisons, min, max and ternaries as if the indices were numbers.
"""

from __future__ import annotations

import linecache
import threading
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from jitgen import ir, ops_torch
from jitgen.captured_kinds import numpy_state
from jitgen.errors import JitgenError, UnsupportedVariant
from jitgen.guards import Guards, Path, is_printable
from jitgen.ir import Expr
from jitgen.ir_ops import OPS
from jitgen.location import definition_of, raised_at, refuse
from jitgen.symbols import active

__all__ = ["MAX_FUNCTIONS", "MAX_NODES", "MAX_PATHS", "MAX_TRACES", "Tracer", "keep_trace", "ops_torch", "trace_lock"]

MAX_PATHS = 64
MAX_NODES = 4096
MAX_TRACES = 64  # kept for one set of functions: their captures may have that many forms before the oldest is dropped
MAX_FUNCTIONS = 4096  # sets of functions with traces: those of code that is made anew again and again must not add up
trace_lock = threading.RLock()


def keep_trace(table: dict[Any, list[Any]], key: object, trace: object) -> None:
    """Note a trace among those of a set of functions."""
    with trace_lock:
        if key not in table and len(table) >= MAX_FUNCTIONS:
            table.clear()
        kept = table.setdefault(key, [])
        kept.append(trace)
        del kept[:-MAX_TRACES]


Results = tuple[Expr, ...]
Decision = tuple[Expr, bool]


RANDOM_FUNCTIONS = frozenset(("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"))


class _NoRandomNumbers(TorchFunctionMode):
    """Refuses numbers that would be drawn once, while the hook is traced. Stand-ins see no function without one among its
    arguments."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM_FUNCTIONS:
            refuse(f"torch.{func.__name__} would be drawn once, when the hook is traced. Draw outside, and index the tensor.")
        return func(*args, **(kwargs or {}))


class Tracer:
    """State of one trace: captures seen, guards taken, decisions of the current path."""

    def __init__(self) -> None:
        self.guards = Guards()
        self.scalar_paths: dict[int, Path] = {}
        self.scalar_values: dict[int, bool | int | float] = {}
        self.row_axis: str | None = None
        self.rotations: list[object] | None = None  # those used, where a hook may rotate its row
        self.hook = "hook"
        self.code: Any = None
        self._prefix: list[Decision] = []
        self._path: list[Decision] = []
        self._known: dict[Expr, bool] = {}
        self._num_paths = 0
        self._num_ops = 0

    # ---- what the stand-ins ask (symbols.TraceState) ----
    def count_op(self) -> None:
        self._num_ops += 1
        if self._num_ops > MAX_NODES:
            refuse(
                f"{self.hook} traced more than {MAX_NODES} operations. Shorten its loops, or precompute a tensor and index it."
            )

    def concrete(self, value: Expr) -> bool | int | float | None:
        """Present value of an expression of captured scalars alone (guarded), or None."""
        number = self._evaluate(value)
        if number is not None:
            for node in ir.walk(value):
                if node.op == "scalar":
                    slot = int(str(node.attr))
                    self.guards.add("equal", self.scalar_paths[slot], self.scalar_values[slot])
        return number

    def decide(self, condition: Expr) -> bool:
        if condition.is_const:
            return bool(condition.attr)
        number = self._evaluate(condition)
        if number is not None:
            if not is_printable(condition):
                return bool(self.concrete(condition))
            self.guards.conditions.setdefault(condition, bool(number))
            return bool(number)
        known = self._known.get(condition)
        return known if known is not None else self._fork(condition)

    def _evaluate(self, root: Expr) -> Any:
        """Value of an expression of captured scalars and constants alone; None of any other."""
        if root.deps:
            return None
        found: dict[Expr, Any] = {}
        for e in ir.walk(root):
            found[e] = self._value_of(e, [found[a] for a in e.args])
        return found[root]

    def _value_of(self, e: Expr, args: list[Any]) -> Any:
        if e.op == "const":
            return e.attr
        if e.op == "scalar":
            return self.scalar_values[int(str(e.attr))]
        if e.op in ("index", "state", "load") or any(a is None for a in args):
            return None
        if e.op == "lin":
            constant, coefficients = e.attr  # type: ignore[misc]
            return constant + sum(c * a for c, a in zip(coefficients, args, strict=True))
        if e.op == "cast":
            return float(args[0]) if e.dtype == "f32" else int(args[0])
        if e.op == "where":
            return args[1] if args[0] else args[2]
        fold = OPS[e.op].fold
        return None if fold is None else fold(*args)

    # ---- control flow ----
    def _fork(self, condition: Expr) -> bool:
        at = len(self._path)
        answer = self._prefix[at][1] if at < len(self._prefix) else True
        self._path.append((condition, answer))
        self._learn(condition, answer)
        return answer

    def _learn(self, condition: Expr, answer: bool) -> None:
        """Record what an answer settles: its negation, and the parts of a true 'and' or a false 'or'."""
        self._known[condition] = answer
        self._known[ir.make("not", condition)] = not answer
        if condition.op == ("and" if answer else "or"):
            for part in condition.args:
                self._learn(part, answer)
        if condition.op == "not":
            self._known[condition.args[0]] = not answer
        if answer and condition.op == "lt":
            self._known[ir.make("le", *condition.args)] = True

    def run(self, hook: str, code: Any, call: Callable[[], object], finish: Callable[[object], Results]) -> Results:
        """Trace ``call`` along every path; ``finish`` turns what it returns into expressions.

        Errors:  UnsupportedVariant with the user's line.
        """
        self.hook, self.code, self._num_paths = hook, code, 0
        previous, active.state = active.state, self
        before = numpy_state()
        try:
            results = self._explore([], call, finish)
            if numpy_state() == before:
                has_drawn = False
            else:  # perhaps by another thread: then the hook gives the same once more
                has_drawn = any(a is not b for a, b in zip(results, self._explore([], call, finish), strict=True))
        finally:
            active.state = previous
        if has_drawn:
            refuse(f"{hook} draws random numbers of NumPy, once, when it is traced. Draw outside.", at=definition_of(code))
        if sum(1 for _ in ir.walk(*results)) > MAX_NODES:
            refuse(f"{hook} has more than {MAX_NODES} IR nodes. Precompute a tensor and index it.", at=definition_of(code))
        return results

    def _explore(self, prefix: list[Decision], call: Callable[[], object], finish: Callable[[object], Results]) -> Results:
        results, path = self._run_path(prefix, call, finish)
        for i in reversed(range(len(prefix), len(path))):
            condition = path[i][0]
            others = self._explore([*path[:i], (condition, False)], call, finish)
            results = tuple(ir.make("where", condition, a, b) for a, b in zip(results, others, strict=True))
        return results

    def _run_path(
        self, prefix: list[Decision], call: Callable[[], object], finish: Callable[[object], Results]
    ) -> tuple[Results, list[Decision]]:
        self._num_paths += 1
        if self._num_paths > MAX_PATHS:
            refuse(
                f"{self.hook} traced {self._num_paths} control-flow paths, limit {MAX_PATHS}. "
                "Replace independent 'if's by torch.where(cond, a, b).",
                at=definition_of(self.code),
            )
        self._prefix, self._path, self._known, self._num_ops = prefix, [], {}, 0
        value = self._call_user(call)
        return finish(value), self._path

    def _call_user(self, call: Callable[[], object]) -> object:
        """Run the hook. NOTE: location.user_frame finds the end of the user's frames by this function's name."""
        try:
            with _NoRandomNumbers():
                return call()
        except UnsupportedVariant as e:
            if e.file is not None:
                raise
            refuse(e.message, at=definition_of(self.code))  # of a capture: no line of the hook was running
        except (JitgenError, NameError):
            raise  # an undefined name is the user's own error, and may be defined later
        except Exception as e:
            error, place = e, raised_at(e.__traceback__)
        way = "".join(f" {'' if answer else 'not '}{condition}," for condition, answer in self._path).rstrip(",")
        if isinstance(error, AssertionError) and way:
            message = (
                f"{self.hook} asserts on values known only in the kernel:{way}. Remove the assert, or mask with torch.where."
            )
        else:
            when = f" when{way}" if way else ""
            message = f"{self.hook} raised {type(error).__name__}{when}: {error}. {_remedy(error, place)}"
        refuse(message, at=place if place[0] is not None else definition_of(self.code))


def _remedy(error: Exception, place: tuple[str | None, int | None]) -> str:
    file, line = place
    source = linecache.getline(file, line) if file is not None and line is not None else ""
    if "infer dtype of Sym" in str(error) or ("no len()" in str(error) and "tensor(" in source):
        return "torch.tensor cannot hold a traced value: use the value itself, or torch.stack of several."
    if isinstance(error, RecursionError):
        return "Recursion that depends on a traced value never ends; write a static loop."
    return "Hooks are traced with stand-ins for tensors; write them with torch ops on scalars."
