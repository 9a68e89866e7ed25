"""What a hook captures, as stand-ins: closures, globals, defaults, partials, attributes of objects and modules.

Operator overloading cannot tell a captured ``w`` from a literal ``1024``. A hook is therefore not called itself: it is
rebuilt from its code with stand-ins in its cells and in the globals it reads, and so are the functions it calls. Each
stand-in knows the path by which the value is read again on later calls.
"""

from __future__ import annotations

import builtins
import enum
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jitgen import ir
from jitgen.captured_kinds import (
    CONSTANTS,
    MAPPINGS,
    PLAIN_TENSORS,
    SEQUENCES,
    check_lasting,
    global_names,
    is_library,
    is_opaque,
    wrapped_at,
)
from jitgen.gather import SymTensor
from jitgen.guards import Path, layout_of
from jitgen.ir import INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN
from jitgen.location import refuse
from jitgen.program import ELEMENT_TO_IR, Slot
from jitgen.proxies import FunctionProxy, ObjectProxy
from jitgen.symbols import Sym
from jitgen.trace import Tracer

MAX_RANK = 4


class SortedTensor(torch.Tensor):
    """A tensor declared ascending by jitgen.sorted; everything computed from it is a plain tensor again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    plain: torch.Tensor  # the same memory: what a graph of torch.compile takes, which refuses subclasses (trackers.py)

    @classmethod
    def of(cls, t: torch.Tensor) -> SortedTensor:
        """A view of a tensor that ascends."""
        made = t.as_subclass(cls)
        made.plain = t.as_subclass(torch.Tensor)
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return SortedTensor.of, (self.plain,)

    def __deepcopy__(self, memo: dict[int, Any]) -> SortedTensor:
        if id(self) not in memo:
            memo[id(self)] = SortedTensor.of(self.as_subclass(torch.Tensor).clone())
        return memo[id(self)]  # type: ignore[no-any-return]


class AttributeDict(dict[Any, Any]):
    """Stands for a dict of the user's whose items are attributes too, as configurations often are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Capture:
    """One captured value, in the order in which the trace met it."""

    def __init__(
        self,
        slot: int,
        path: Path,
        name: str,
        kind: str,
        dtype: str,
        tracer: Tracer,
        *,
        tensor: Any = None,
        layout: str = "",
        is_sorted: bool = False,
    ) -> None:
        self.slot, self.path, self.name, self.kind, self.dtype = slot, path, name, kind, dtype
        self.tracer, self.tensor, self.layout, self.is_sorted = tracer, tensor, layout, is_sorted

    def guard_size(self, dim: int) -> int:
        size = int(self.tensor.shape[dim])
        self.tracer.guards.add("size", self.path, (dim, size))
        return size

    def mark_sorted(self) -> None:
        self.is_sorted = True

    def as_slot(self) -> Slot:
        return Slot(self.kind, self.dtype, len(self.layout), self.layout, self.is_sorted, self.name)


class Captures:
    """Stand-ins for everything reachable from the hooks of one trace."""

    def __init__(self, tracer: Tracer, bound: Mapping[str, object] | None = None) -> None:
        self.tracer = tracer
        self.found: list[Capture] = []
        self.names: set[str] = set()  # everything that can be bound by name
        self._bound = bound or {}
        self._by_path: dict[Path, object] = {}

    def wrap(self, value: Any, path: Path, name: str) -> Any:
        """The stand-in for a value reached by ``path``; ``name`` is what the user calls it."""
        self.names.add(name)
        if name in self._bound and path.parent != _BOUND:
            value, path = self._bound[name], _BOUND.item(name)
        if path not in self._by_path:
            self._by_path[path] = self._wrap(value, path, name)
        return self._by_path[path]

    def _wrap(self, value: Any, path: Path, name: str) -> Any:
        add = self.tracer.guards.add
        kind = type(value)
        if kind is int or kind is float:
            return self._scalar(value, path, name)
        if value is None or value is NotImplemented:
            add("is", path, value)
            return value
        check_lasting(value, name)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path, name)
        if isinstance(value, enum.Enum) or kind is type(len) or kind is type(torch.add):
            add("is", path, value)
            return value
        if isinstance(value, (bool, int, float, *CONSTANTS)):  # int and float subclasses: jitgen.static
            add("equal", path, value)
            return value
        if type(value).__module__ == "numpy":
            return self._numpy(value, path, name)
        if isinstance(value, (*SEQUENCES, *MAPPINGS, set, frozenset)):
            return self._container(value, path, name)
        return self._callable_or_object(value, path, name)

    # ---- numbers and tensors ----
    def _capture(self, path: Path, name: str, kind: str, dtype: str, **extra: Any) -> Capture:
        capture = Capture(len(self.found), path, name, kind, dtype, self.tracer, **extra)
        self.found.append(capture)
        return capture

    def _scalar(self, value: bool | int | float, path: Path, name: str) -> Sym:
        if isinstance(value, bool):
            dtype = "bool"
        elif isinstance(value, float):
            dtype = "f32"
        elif INT64_MIN <= value <= INT64_MAX:
            dtype = "i32" if INT32_MIN <= value <= INT32_MAX else "i64"
        else:
            refuse(f"captured int '{name}' is {value}, which does not fit 64 bits. Use a float or a smaller number.")
        self.tracer.guards.add(dtype, path)
        slot = self._capture(path, name, "scalar", dtype).slot
        self.tracer.scalar_paths[slot], self.tracer.scalar_values[slot] = path, value
        return Sym(ir.scalar(slot, dtype))

    def _tensor(self, t: torch.Tensor, path: Path, name: str) -> Sym | SymTensor:
        add = self.tracer.guards.add
        element = str(t.dtype).removeprefix("torch.")
        if element not in ELEMENT_TO_IR:
            refuse(
                f"captured tensor '{name}' has dtype {t.dtype}, expected one of {', '.join(ELEMENT_TO_IR)}. Convert it first."
            )
        if t.layout is not torch.strided or t.is_complex():
            refuse(f"captured tensor '{name}' has layout {t.layout}, expected strided. Use t.to_dense().")
        if t.dim() > MAX_RANK:
            refuse(
                f"captured tensor '{name}' has rank {t.dim()}, limit {MAX_RANK}. Fold axes with t.flatten() or index outside."
            )
        add("dtype", path, t.dtype)
        kind = type(t)
        add("one of", path, PLAIN_TENSORS if kind in PLAIN_TENSORS else (kind,))
        if t.dim() == 0 and not t.is_cuda:
            add("cpu_scalar", path, True)
            return self._scalar(t.item(), path.number, name)
        layout = layout_of(t)
        plain = t.is_contiguous()
        add("contiguous" if plain else "layout", path, t.dim() if plain else layout)
        is_sorted = isinstance(t, SortedTensor)
        return SymTensor.whole(
            self._capture(path, name, "tensor", element, tensor=t, layout=layout, is_sorted=is_sorted)
        )._settled()

    def _numpy(self, value: Any, path: Path, name: str) -> Any:
        if getattr(value, "shape", None) != ():
            refuse(
                f"captured NumPy array '{name}' of shape {getattr(value, 'shape', '?')}. "
                "Capture torch.from_numpy(array) instead."
            )
        self.tracer.guards.add("type", path, type(value))
        number = value.item()
        if isinstance(number, bool):
            self.tracer.guards.add("equal", path.number, number)
            return number
        return self._scalar(number, path.number, name)

    def _container(self, value: Any, path: Path, name: str) -> Any:
        add = self.tracer.guards.add
        add("type", path, type(value))
        if isinstance(value, (set, frozenset)):
            add("equal", path, value)
            return value
        if isinstance(value, MAPPINGS):
            add("keys", path, tuple(value))
            items = {k: self.wrap(v, path.item(k), f"{name}_{k}") for k, v in value.items()}
            return AttributeDict(items) if hasattr(type(value), "__getattr__") else items
        add("length", path, len(value))
        items = [self.wrap(v, path.item(i), f"{name}_{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items

    # ---- functions and objects ----
    def _callable_or_object(self, value: Any, path: Path, name: str) -> Any:
        add = self.tracer.guards.add
        inner = wrapped_at(value)
        if inner is not None:
            add("type", path, type(value))
            return self.wrap(getattr(value, inner), path.attr(inner), name)
        if isinstance(value, types.FunctionType):
            if is_library(value.__globals__.get("__name__")):
                add("is", path, value)
                return value
            add("code", path, value.__code__)
            return FunctionProxy(self, value, path)
        if isinstance(value, types.MethodType):
            add("type", path, types.MethodType)
            owner = self.wrap(value.__self__, path.attr("__self__"), name)
            return functools.partial(self.wrap(value.__func__, path.attr("__func__"), name), owner)
        if isinstance(value, functools.partial):
            return self._partial(value, path, name)
        if is_opaque(value):
            add("is", path, value)
            return value
        add(
            "is" if isinstance(value, (type, types.ModuleType)) else "type",
            path,
            value if isinstance(value, (type, types.ModuleType)) else type(value),
        )
        return ObjectProxy(self, value, path)

    def _partial(self, value: functools.partial[Any], path: Path, name: str) -> functools.partial[Any]:
        self.tracer.guards.add("type", path, functools.partial)
        self.tracer.guards.add("length", path.attr("args"), len(value.args))
        self.tracer.guards.add("keys", path.attr("keywords"), tuple(value.keywords))
        args = [self.wrap(a, path.attr("args").item(i), f"{name}_{i}") for i, a in enumerate(value.args)]
        keywords = {k: self.wrap(v, path.attr("keywords").item(k), k) for k, v in value.keywords.items()}
        return functools.partial(self.wrap(value.func, path.attr("func"), name), *args, **keywords)

    def rebuild(self, fn: types.FunctionType, path: Path) -> Callable[..., Any]:
        """A function like ``fn`` whose cells, globals and defaults are stand-ins."""
        code = fn.__code__
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            refuse(f"'{fn.__name__}' is a generator or coroutine, expected a plain function. Return the value instead.")
        cells = []
        for i, (name, cell) in enumerate(zip(code.co_freevars, fn.__closure__ or (), strict=True)):
            try:
                value = cell.cell_contents
            except ValueError as e:
                raise NameError(f"'{name}' is used by '{fn.__name__}' before it is defined") from e
            inside = path.attr("__closure__").item(i).attr("cell_contents")
            cells.append(types.CellType(value if name == "__class__" else self.wrap(value, inside, name)))
        scope: dict[str, Any] = {"__builtins__": builtins, "__name__": fn.__globals__.get("__name__")}
        for name in sorted(global_names(code)):
            if name in fn.__globals__:
                scope[name] = self.wrap(fn.__globals__[name], path.attr("__globals__").item(name), name)
        defaults = self._defaults(fn, path)
        copy = types.FunctionType(code, scope, fn.__name__, defaults, tuple(cells))
        if fn.__kwdefaults__:
            kw = path.attr("__kwdefaults__")
            copy.__kwdefaults__ = {k: self.wrap(v, kw.item(k), k) for k, v in fn.__kwdefaults__.items()}
        return copy

    def _defaults(self, fn: types.FunctionType, path: Path) -> tuple[Any, ...] | None:
        if not fn.__defaults__:
            return None
        first = fn.__code__.co_argcount - len(fn.__defaults__)
        names = fn.__code__.co_varnames[first:]
        at = path.attr("__defaults__")
        return tuple(self.wrap(v, at.item(i), names[i]) for i, v in enumerate(fn.__defaults__))


_BOUND = Path(None, "root", "bound")
