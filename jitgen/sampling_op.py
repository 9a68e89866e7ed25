"""The operators that torch.compile sees in place of the sampling calls.

A graph holds tensors and numbers. What a call is given, processors and what they capture included, is taken apart while Dynamo
traces, as hooks of attention are (op.py): tensors and numbers that vary become inputs of the operator, and the graph holds the
number of the recipe for the rest.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.comptime import comptime

from jitgen import recipes, sampling, sampling_speculative
from jitgen.graph_breaks import disabled
from jitgen.graphs import functions
from jitgen.guards import Path
from jitgen.lifted import CAN_LIFT, lift_here, made, register
from jitgen.sampling_hooks import ProcessorTrace, trace_of
from jitgen.sampling_processors import Penalties
from jitgen.sampling_speculative import Verified

Tensor = torch.Tensor
_CALLS = (sampling.sample, sampling.softmax, sampling.renorm, sampling.mask_logits, sampling.process_logits)
NAMES = {f"{f.__module__}.{f.__qualname__}": tuple(inspect.signature(f).parameters) for f in _CALLS}
VERIFY = f"{sampling_speculative.speculative_verify.__module__}.{sampling_speculative.speculative_verify.__qualname__}"
VERIFY_NAMES = tuple(inspect.signature(sampling_speculative.speculative_verify).parameters)
_SAMPLE, _SOFTMAX = next(iter(NAMES)), list(NAMES)[1]
_DRAWS = torch.Tag.nondeterministic_seeded  # two calls are not one, though their arguments are the same
_OPTIONS = Path(None, "root", "options")


@torch.library.custom_op("jitgen::sampling", mutates_args=("out", "valid", "status", "moved"), tags=(_DRAWS,))
def sampling_op(
    call: str,
    x: Tensor,
    out: Tensor,
    valid: Tensor | None,
    status: Tensor | None,
    moved: Tensor | None,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    handle: int,
) -> None:
    """One of the calls of jitgen.sampling. moved: offsets that the call advances; tensors and ints: its other arguments."""
    given = _arguments(handle, tensors, ints, status, moved)
    if valid is None:
        functions[call](x, out=out, **given)
    else:
        valid.copy_(functions[call](x, out=out, return_valid=True, **given)[1])


@sampling_op.register_fake
def _(*args: Any) -> None:
    return None


@torch.library.custom_op("jitgen::speculative_verify", mutates_args=("status", "moved"), tags=(_DRAWS,))
def verify_op(
    draft_probs: Tensor | None,
    draft_ids: Tensor,
    target_probs: Tensor,
    status: Tensor | None,
    moved: Tensor | None,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    handle: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A call of jitgen.speculative_verify; for the arguments see sampling_op."""
    given = _arguments(handle, tensors, ints, status, moved)
    ids, accepted, emitted, path = functions[VERIFY](draft_probs, draft_ids, target_probs, **given)
    return ids, accepted, emitted, path


@verify_op.register_fake
def _(draft_probs: Tensor | None, draft_ids: Tensor, target_probs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, rows = target_probs.shape[:2]
    shapes = ((batch, rows), (batch,), (batch,), (batch, rows - 1))
    return tuple(target_probs.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _arguments(
    handle: int, tensors: Sequence[Tensor], ints: Sequence[int], status: Tensor | None, moved: Tensor | None
) -> dict[str, Any]:
    """The arguments of a call but the rows and results."""
    given = dict(made(handle, tensors, ints)["options"])
    for name, t in (("status", status), ("offset", moved)):
        if t is not None:
            given[name] = t
    return given


def call_op(name: str, *args: Any, **kwargs: Any) -> Any:
    """The operator of one of the calls, as traced code calls it."""
    if name == VERIFY:
        return call_verify(*args, **kwargs)
    options = {**dict(zip(NAMES[name], args, strict=False)), **kwargs}
    x = options.pop(NAMES[name][0])
    found: list[Any] = [] if _can_be_operator(x, options.get("generator")) else [-1]
    everything = dict(options)
    out, status, return_valid = options.pop("out", None), options.pop("status", None), options.pop("return_valid", False)
    moved = options.pop("offset") if options.get("advance") and isinstance(options.get("offset"), Tensor) else None
    if not found:
        comptime(lift_options)
    if not found:  # traced by running, as torch.export may
        found = as_given(options)
    if found[0] < 0:
        return disabled[name](x, **everything)
    handle, tensors, ints = found
    indices = options.get("indices")
    rows = x.shape[0] if indices is None else indices.shape[0]
    if out is None and name == _SAMPLE:
        out = torch.empty(rows, dtype=torch.int32, device=x.device)
    elif out is None:
        dtype = options.get("dtype", torch.float32) if name == _SOFTMAX else x.dtype
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    valid = torch.empty(rows, dtype=torch.bool, device=x.device) if return_valid else None
    sampling_op(name, x, out, valid, status, moved, tensors, ints, handle)
    return out if valid is None else (out, valid)


def call_verify(*args: Any, **kwargs: Any) -> Verified:
    """The operator of jitgen.speculative_verify, as traced code calls it."""
    options = {**dict(zip(VERIFY_NAMES, args, strict=False)), **kwargs}
    everything = dict(options)
    draft_probs, draft_ids, target_probs = options.pop("draft_probs"), options.pop("draft_ids"), options.pop("target_probs")
    found: list[Any] = [] if _can_be_operator(target_probs, options.get("generator")) else [-1]
    status = options.pop("status", None)
    moved = options.pop("offset") if options.get("advance") and isinstance(options.get("offset"), Tensor) else None
    if not found:
        comptime(lift_options)
    if not found:
        found = as_given(options)
    if found[0] < 0:
        return disabled[VERIFY](**everything)  # type: ignore[no-any-return]
    handle, tensors, ints = found
    ids, accepted, emitted, path = verify_op(draft_probs, draft_ids, target_probs, status, moved, tensors, ints, handle)
    return Verified(ids, accepted, emitted, path)


def _can_be_operator(x: Tensor, generator: object) -> bool:
    """A graph holds no generator, and where a gradient is asked for the call says that there is none."""
    return CAN_LIFT and generator is None and not (torch.is_grad_enabled() and x.requires_grad)


def lift_options(context: Any) -> None:
    """Dynamo runs this where it meets a call: handle and inputs for the local ``options`` go to the local list ``found``."""
    lift_here(context, ("options",), _trace_of_call, register)


def _trace_of_call(examples: dict[str, Any]) -> Any:
    options = examples["options"]
    processor = options.get("processor")
    is_one = not isinstance(processor, list | tuple)
    trace = None if processor is None else trace_of([processor] if is_one else list(processor))
    return _reads(trace, is_one, options.get("penalties") is not None)


@lru_cache(maxsize=256)
def _reads(trace: ProcessorTrace | None, is_one: bool, has_penalties: bool) -> SimpleNamespace:
    """What is read of the arguments of a call, as a trace of hooks says it."""
    paths = [] if trace is None else [_below_options(path, is_one) for path in trace.paths]
    if has_penalties:
        paths += [_OPTIONS.item("penalties").attr(field.name) for field in dataclasses.fields(Penalties)]
    return SimpleNamespace(paths=paths)


def _below_options(path: Path, is_one: bool) -> Path:
    """A path from a processor, whose name ends in its number, as one from the arguments of the call."""
    if path.parent is None:
        processor = _OPTIONS.item("processor")
        return processor if is_one else processor.item(int(str(path.key)[1:]))
    return Path(_below_options(path.parent, is_one), path.kind, path.key)


def as_given(options: dict[str, Any]) -> list[Any]:
    """Handle, tensors and ints of arguments that are values and not Dynamo's."""
    tensors: list[Tensor] = []

    def recipe(value: Any) -> recipes.Recipe:
        if isinstance(value, Tensor):
            tensors.append(value)
            return recipes.tensor(len(tensors) - 1)
        if isinstance(value, Penalties):
            return recipes.shell(Penalties, {name: recipe(x) for name, x in vars(value).items()})
        return recipes.constant(value)

    handle = register({"options": recipes.mapping({name: recipe(value) for name, value in options.items()})})
    return [handle, tensors, []]
