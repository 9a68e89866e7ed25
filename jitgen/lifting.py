"""The hooks of a call that Dynamo traces, taken apart: what they capture as inputs of the graph, and recipes for the rest.

Of an object (``self`` of a module) only the attributes count that the hooks read, which a trace of the hooks tells, so that
layers of one class share a graph. Importing this fails with a torch whose Dynamo has other names; see lifted.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.exc import RestartAnalysis

from jitgen.errors import JitgenError
from jitgen.guards import Path
from jitgen.recipes import Recipe
from jitgen.signatures import HOOKS
from jitgen.trackers import CannotLift, Lift, Reads, constant_tracker, list_tracker, local
from jitgen.variant import Variant, hooks_of, trace_of


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
    trackers = {name: local(tx, name) for name in names}
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
        found.append(constant_tracker(-1))
        return
    found.append(constant_tracker(register(arguments)))
    found.extend(list_tracker(trackers) for trackers in (lifted.tensors, lifted.ints))
