"""Values as Dynamo knows them, turned into inputs of its graph and recipes (recipes.py).

Dynamo represents every value of a traced function by a VariableTracker. Tensors and numbers that vary become inputs, so that
the graph orders them after what it writes to them; all else is a constant that Dynamo has guarded.

NOTE: trackers are no public interface of torch. All use of them is in this file, and whatever it does not recognise ends in
CannotLift, for which the caller leaves the graph (lifting.py).
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._dynamo import variables
from torch._dynamo.variables.functions import (
    BaseUserFunctionVariable,
    FunctoolsPartialVariable,
    NestedUserFunctionVariable,
    UserFunctionVariable,
    UserMethodVariable,
)

from jitgen import recipes
from jitgen.captured_kinds import PLAIN_TENSORS, is_library, is_opaque
from jitgen.captures import SortedTensor
from jitgen.recipes import Leaves, Recipe
from jitgen.signatures import HOOKS
from jitgen.variant import Variant

Tracker = Any
Reads = dict[tuple[str, object], Any]  # attributes and items that are read, nested
_FUNCTIONS = (UserFunctionVariable, NestedUserFunctionVariable)
_OF_SIGNATURE = {"__signature__", "__wrapped__"}  # attributes of functions that say what may be given to them, and no more
_TABLES = ("_parameters", "_buffers", "_modules")


class CannotLift(Exception):
    """A value that no graph can carry; the text says which."""


class Lift:
    """One walk over the trackers of a call; ``reads`` None takes objects as they are."""

    def __init__(self, tx: Any, reads: Reads | None) -> None:
        self._tx, self._reads = tx, reads
        self.tensors: list[Tracker] = []
        self.ints: list[Tracker] = []

    def recipe(self, tracker: Tracker, reads: Reads | None = None) -> Recipe:
        """How the value of a tracker is made again."""
        tracker = tracker.realize()
        if isinstance(tracker, variables.TensorVariable):
            kind = tracker.python_type()
            if kind is SortedTensor:
                return recipes.ascending(_add(self.tensors, self._get(tracker, "plain")))
            if kind not in PLAIN_TENSORS:  # other subclasses, which no graph takes
                raise CannotLift(f"a captured {kind.__name__}")
            if tracker.as_proxy().node.meta["example_value"].requires_grad:  # captured tensors are taken as values
                tracker = self._get(tracker, "detach").call_function(self._tx, [], {})
            return recipes.tensor(_add(self.tensors, tracker))
        if isinstance(tracker, variables.SymNodeVariable):
            if tracker.python_type() is float:
                return recipes.real(_add(self.tensors, self._as_tensor(tracker)))
            if tracker.python_type() is int:
                return recipes.integer(_add(self.ints, tracker))
            raise CannotLift(f"a captured {tracker.python_type().__name__} that depends on sizes")
        if isinstance(tracker, BaseUserFunctionVariable):
            return self._function(tracker, reads or {})
        if isinstance(tracker, FunctoolsPartialVariable):
            at = reads or {}
            func = self.recipe(tracker.func, at.get(("attr", "func")))
            args, keywords = at.get(("attr", "args"), {}), at.get(("attr", "keywords"), {})
            return recipes.partial_call(func, self._items(tuple, tracker.args, args), self._entries(tracker.keywords, keywords))
        if isinstance(tracker, variables.ListVariable | variables.TupleVariable) and tracker.python_type() in (list, tuple):
            return self._items(tracker.python_type(), tracker.items, reads or {})
        if isinstance(tracker, variables.ConstDictVariable) and tracker.python_type() is dict:
            return self._entries(tracker.keys_as_python_constant(), reads or {})
        if isinstance(tracker, variables.UserDefinedObjectVariable):
            return self._object(tracker, reads or {})
        return recipes.constant(_constant_of(tracker))

    def _as_tensor(self, number: Tracker) -> Tracker:
        """A float that may differ from call to call, as operators take it."""
        options = {"dtype": self._build(torch.float64), "device": self._build(torch.device("cpu"))}
        return self._build(torch.scalar_tensor).call_function(self._tx, [number], options)

    def _items(self, kind: type, items: Any, reads: Reads) -> Recipe:
        return recipes.sequence(kind, [self.recipe(x, reads.get(("item", i))) for i, x in enumerate(items)])

    def _entries(self, items: Mapping[Any, Tracker], reads: Reads) -> Recipe:
        return recipes.mapping({key: self.recipe(x, reads.get(("item", key))) for key, x in items.items()})

    # ---- functions ----
    def _function(self, tracker: Tracker, reads: Reads) -> Recipe:
        if isinstance(tracker, UserMethodVariable):
            owner = self.recipe(tracker.obj, reads.get(("attr", "__self__")))
            return recipes.method(recipes.constant(tracker.fn), owner)
        if type(tracker) not in _FUNCTIONS:
            raise CannotLift(f"a function of the kind {type(tracker).__name__}")
        code = tracker.get_code()
        if isinstance(tracker, UserFunctionVariable):
            if is_library(tracker.fn.__globals__.get("__name__")):
                return recipes.constant(tracker.fn)
            attributes = dict(tracker.fn.__dict__)
            if not attributes.keys() <= _OF_SIGNATURE:
                raise CannotLift(f"the function '{code.co_name}', which has attributes of its own")
            scope = tracker.fn.__globals__
            defaults, kwdefaults, closure = (
                None if getattr(tracker.fn, name) is None else self._get(tracker, name)
                for name in ("__defaults__", "__kwdefaults__", "__closure__")
            )
        else:
            scope, defaults, kwdefaults, closure = tracker.f_globals, tracker.defaults, tracker.kwdefaults, tracker.closure
            attributes = {}
        cells = [] if closure is None else [self._contents(cell) for cell in closure.items]
        at = reads.get(("attr", "__closure__"), {})
        inside = [at.get(("item", i), {}).get(("attr", "cell_contents")) for i in range(len(cells))]
        return recipes.function(
            code, scope, self._optional(defaults, reads, "__defaults__"), self._optional(kwdefaults, reads, "__kwdefaults__"),
            [self.recipe(cell, read) for cell, read in zip(cells, inside, strict=True)], attributes,
        )  # fmt: skip

    def _optional(self, tracker: Tracker | None, reads: Reads, name: str) -> Recipe:
        return recipes.constant(None) if tracker is None else self.recipe(tracker, reads.get(("attr", name)))

    def _contents(self, cell: Tracker) -> Tracker:
        cell = cell.realize()
        if isinstance(cell, variables.CellVariable):
            return self._tx.output.side_effects.load_cell(cell)
        return self._get(cell, "cell_contents")

    def _get(self, tracker: Tracker, name: str) -> Tracker:
        """An attribute, as ``getattr`` in the traced code would have it."""
        read, arguments = self._build(getattr), [tracker, self._build(name)]
        return read.call_function(self._tx, arguments, {}).realize()

    def _build(self, value: object) -> Tracker:
        return variables.VariableTracker.build(self._tx, value)

    # ---- objects ----
    def _object(self, tracker: Tracker, reads: Reads) -> Recipe:
        cls = type(tracker.value)
        if cls is Variant:
            return self._variant(tracker)
        made_here = getattr(tracker, "source", None) is None
        if issubclass(cls, int | float):  # jitgen.static
            return self._static(tracker, made_here)
        if cls is types.MethodType:  # one that an attribute holds
            func, owner = (self._get(tracker, name) for name in ("__func__", "__self__"))
            return recipes.method(self.recipe(func), self.recipe(owner, reads.get(("attr", "__self__"))))
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            fields = [self.recipe(self._get(tracker, name), reads.get(("item", i))) for i, name in enumerate(cls._fields)]
            return recipes.sequence(cls._make, fields)  # type: ignore[attr-defined]
        if is_opaque(tracker.value) or issubclass(cls, enum.Enum):
            if made_here:
                raise CannotLift(f"a {cls.__name__} made in the compiled function")
            _guard_identity(tracker)
            return recipes.constant(tracker.value)
        if self._reads is None and not made_here:
            return recipes.constant(tracker.value)
        if self._reads is None:  # no object yet: all that it has been given so far
            names: Any = self._tx.output.side_effects.store_attr_mutations.get(tracker, {})
            return recipes.shell(cls, {name: self._attribute(tracker, name, {}) for name in names})
        read = {str(name): at for (kind, name), at in reads.items() if kind == "attr"}
        if isinstance(tracker.value, torch.nn.Module):
            read = {table: {} for table in _TABLES} | read
        return recipes.shell(cls, {name: self._attribute(tracker, name, at) for name, at in read.items()})

    def _static(self, tracker: Tracker, made_here: bool) -> Recipe:
        if made_here:
            return recipes.constant(_constant_of(tracker))
        _guard_identity(tracker)
        return recipes.constant(tracker.value)

    def _attribute(self, tracker: Tracker, name: str, reads: Reads) -> Recipe:
        if name in _TABLES and isinstance(tracker.value, torch.nn.Module):
            entries = {key: (self._get(tracker, key), at) for (_, key), at in reads.items()}
            return recipes.mapping({key: self.recipe(value, at) for key, (value, at) in entries.items()})
        return self.recipe(self._get(tracker, name), reads)

    def _variant(self, tracker: Tracker) -> Recipe:
        hooks, bound, q_index = (self._get(tracker, name) for name in ("_hooks", "_bound", "q_index"))
        made = [self.recipe(x, self._root(kind)) for kind, x in zip(HOOKS, hooks.items, strict=True)]
        values = self.recipe(bound, self._root("bound"))
        convention = _constant_of(q_index)

        def build(leaves: Leaves) -> Variant:
            return Variant.made_of(tuple([hook(leaves) for hook in made]), values(leaves), convention)

        return build

    def hook(self, kind: str, tracker: Tracker) -> Recipe:
        """The same for an argument of the call, of which a trace knows what is read."""
        return self.recipe(tracker, self._root(kind))

    def _root(self, kind: str) -> Reads:
        return {} if self._reads is None else self._reads.get(("root", kind), {})

    # ---- what stands for the inputs while the hooks are traced ----
    def examples(self) -> Leaves:
        """Values like those that the graph will pass."""
        ints = [int(x.sym_num.node.hint) if x.sym_num.node.has_hint() else 1 for x in self.ints]
        return Leaves([_example(x) for x in self.tensors], ints)


def _add(found: list[Tracker], tracker: Tracker) -> int:
    found.append(tracker)
    return len(found) - 1


def _example(tracker: Tracker) -> torch.Tensor:
    fake = tracker.as_proxy().node.meta["example_value"]
    if fake.dim() == 0:  # whose value is read on the host
        return torch.zeros((), dtype=fake.dtype, device=fake.device)
    sizes, strides = ([_hint(x) for x in xs] for xs in (fake.shape, fake.stride()))
    return torch.empty_strided(sizes, strides, dtype=fake.dtype, device="meta")


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2


def _constant_of(tracker: Tracker) -> Any:
    tracker = tracker.realize()
    if isinstance(tracker, variables.ConstantVariable):
        return tracker.value
    for name in ("value", "fn"):  # modules, classes and functions of torch, builtins
        value = getattr(tracker, name, None)
        if isinstance(value, type | types.ModuleType) or (callable(value) and is_library(getattr(value, "__module__", None))):
            return value
    try:
        return tracker.as_python_constant()
    except Exception as e:
        raise CannotLift(f"a value that Dynamo knows as {type(tracker).__name__}") from e


def _guard_identity(tracker: Tracker) -> None:
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(tracker.source.make_guard(GuardBuilder.ID_MATCH))


def local(tx: Any, name: str) -> Tracker:
    """A local of the function that Dynamo traces."""
    tracker = tx.symbolic_locals[name]
    if isinstance(tracker, variables.CellVariable):
        return tx.output.side_effects.load_cell(tracker)
    return tracker


def constant_tracker(value: object) -> Tracker:
    """A number, as Dynamo would have it of the traced code."""
    return variables.ConstantVariable.create(value)


def list_tracker(trackers: Sequence[Tracker]) -> Tracker:
    """The same for a list."""
    return variables.ListVariable(list(trackers))
