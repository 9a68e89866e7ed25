"""What Dynamo knows of the hooks of a call, turned into inputs of its graph and recipes; see recipes.py.

Dynamo represents every value of a traced function by a VariableTracker. ``lift`` walks those of the hooks: tensors and
numbers that vary become inputs, so that the graph orders them after what it writes to them; all else is a constant that
Dynamo has guarded. Of an object (``self`` of a module) only the attributes count that the hooks read, which a trace of the
hooks tells, so that layers of one class share a graph.

NOTE: trackers are no public interface of torch. All use of them is in this file, and whatever it does not recognise ends in
CannotLift, for which the caller leaves the graph.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo import variables
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.variables.functions import (
    BaseUserFunctionVariable,
    FunctoolsPartialVariable,
    NestedUserFunctionVariable,
    UserFunctionVariable,
    UserMethodVariable,
)

from jitgen import recipes
from jitgen.captured_kinds import PLAIN_TENSORS, is_library, is_opaque
from jitgen.errors import JitgenError
from jitgen.guards import Path
from jitgen.recipes import Leaves, Recipe
from jitgen.signatures import HOOKS
from jitgen.variant import Variant, hooks_of, trace_of

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
            if kind not in PLAIN_TENSORS:  # jitgen.sorted's among others, which no graph takes
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


def reads_of(paths: Sequence[Path]) -> Reads:
    """Paths as nested tables, from their roots on."""
    found: Reads = {}
    for path in paths:
        steps, at = [], path
        while at is not None:
            steps.append((at.kind, at.key))
            at = at.parent  # type: ignore[assignment]
        if any(kind == "type" for kind, _ in steps):
            continue  # what belongs to the class is there for its shells too
        table = found
        for step in reversed(steps):
            table = table if step[0] == "number" else table.setdefault(step, {})
    return found


def lift(
    tx: Any, names: Sequence[str], trace_of_call: Callable[[dict[str, Any]], Any]
) -> tuple[dict[str, Recipe], Lift]:
    """Recipes of the locals ``names`` of the function being traced, and the trackers of the inputs they need.

    ``trace_of_call`` gives the trace of the hooks among examples of these locals, whose paths say where the values lie that
    matter. What the recipes make must have the same trace.

    Errors:  CannotLift.
    """
    trackers = {name: _local(tx, name) for name in names}
    first = Lift(tx, None)
    examples = _made({name: first.recipe(tracker) for name, tracker in trackers.items()}, first)
    try:
        trace = trace_of_call(examples)
    except (JitgenError, NameError) as e:  # raised again by the call, outside of the graph
        raise CannotLift(f"hooks that fail ({e})") from e
    second = Lift(tx, _with_definition(reads_of(trace.paths), examples.get("variant")))
    found = {name: second.hook(name, tracker) for name, tracker in trackers.items()}
    if trace_of_call(_made(found, second)) is not trace:
        raise CannotLift("hooks that mean something else when they are made anew")
    return found, second


def _made(arguments: Mapping[str, Recipe], lifted: Lift) -> dict[str, Any]:
    leaves = lifted.examples()
    return {name: recipe(leaves) for name, recipe in arguments.items()}


def _with_definition(reads: Reads, definition: object) -> Reads:
    """What is read of a definition that is no Variant: a hook itself, or an object whose methods or attributes are hooks."""
    if definition is None or isinstance(definition, Variant | type):
        return reads
    own: Reads = {}
    for (_, kind), read in reads.items():
        if getattr(definition, str(kind), None) is None:
            own |= read
        elif str(kind) in vars(definition):
            own[("attr", kind)] = read
        else:
            own |= read.get(("attr", "__self__"), {})
    return {**reads, ("root", "variant"): own}


def trace_of_attention(examples: dict[str, Any]) -> Any:
    """The trace of the hooks of a call of attention."""
    definition = examples["variant"]
    if isinstance(examples["score_mod"], Variant):  # as jitgen.flex_attention takes one
        definition = examples["score_mod"]
    if isinstance(definition, Variant):
        return trace_of(*definition.parts)
    if definition is not None:
        return trace_of(hooks_of(definition)[0], {})
    return trace_of(tuple([examples.get(kind) for kind in HOOKS]), {})


def _local(tx: Any, name: str) -> Tracker:
    tracker = tx.symbolic_locals[name]
    if isinstance(tracker, variables.CellVariable):
        return tx.output.side_effects.load_cell(tracker)
    return tracker


def lift_here(
    context: Any, names: Sequence[str], trace_of_call: Callable[[dict[str, Any]], Any],
    register: Callable[[dict[str, Recipe]], int],
) -> None:  # fmt: skip
    """Fill the list ``found`` of the function that Dynamo traces with a handle and lists of the tensors and ints that the
    recipes under it take; with -1 where they cannot be had. ``context`` is what comptime gives.
    """
    tx = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    found = tx.symbolic_locals["found"].items
    try:
        arguments, lifted = lift(tx, names, trace_of_call)
    except RestartAnalysis:  # how Dynamo begins anew with something it has learnt
        raise
    except Exception:  # also of another torch, with other trackers
        found.append(variables.ConstantVariable.create(-1))
        return
    found.append(variables.ConstantVariable.create(register(arguments)))
    found.extend(variables.ListVariable(list(trackers)) for trackers in (lifted.tensors, lifted.ints))
