"""Variant: the hooks that define an attention variant, and the table of what they were traced into."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from jitgen.errors import VariantError
from jitgen.hooks import Trace, trace_hooks
from jitgen.norms import OnlineNorm
from jitgen.program import Program
from jitgen.signatures import HOOKS, POSITIONAL, check_hook, name_of, signature_of
from jitgen.trace import MAX_FUNCTIONS, keep_trace

_KIND_OF_COUNT = {len(POSITIONAL[kind]): kind for kind in ("score_mod", "mask_mod")}

_traces: dict[tuple[object, ...], list[Trace]] = {}


class Traced:
    """What a variant means now: its program and the present values of its captures, by slot."""

    __slots__ = ("_values", "program")

    def __init__(self, program: Program, values: list[object]) -> None:
        self.program, self._values = program, values

    def values(self) -> list[object]:
        return self._values


class Variant:
    """An attention variant: any subset of the hooks below. Immutable; also a decorator for a function or a class.

    score_mod         (score, b, h, q_idx, kv_idx) -> float     on every logit, after scale
    mask_mod          (b, h, q_idx, kv_idx) -> bool             False excludes the key
    sink              tensor [num_q_heads], number or (b, h) -> float: a logit with weight and no value
    softmax           subclass or instance of OnlineNorm, in place of softmax
    output_transform  (o, lse, b, h, q_idx) -> row              on the finished row
    lse_transform     (lse, b, h, q_idx) -> float               on the finished logsumexp
    q_transform       (q, b, h, q_idx) -> row                   on rows of q, before q . k: a jitgen.Rope, norms, biases
    k_transform       (k, b, kv_h, kv_idx) -> row               on rows of k, each time they are read
    v_transform       (v, b, kv_h, kv_idx) -> row               as k_transform, of v
    q_index           'absolute' or 'local': what q_idx counts; by default the entry point decides

    Hooks but those of rows get more by keyword-only parameters: q_len, kv_len and ctx_len of the request; q_off and q_tok, its
    first row and the present one among those of all requests; kv_off, its first key in ragged k (score_mod, mask_mod); kv_h,
    num_q_heads, num_kv_heads, scale. Hooks that see kv_idx, rows of k and v included, get page and kv_slot in a paged cache:
    the number of the key's page, and page * page_size + its place in that page.

    Hooks are traced here, so that what cannot be expressed is refused where it is defined.

    Errors:  VariantError, UnsupportedVariant (with the file and line of the hook).
    Cost:    about a millisecond a hook; nothing is compiled.
    """

    __slots__ = ("_bound", "_hooks", "_trace", "q_index")

    def __init__(
        self,
        definition: object = None,
        /,
        *,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        sink: object = None,
        softmax: type[OnlineNorm] | OnlineNorm | None = None,
        output_transform: Callable[..., Any] | None = None,
        lse_transform: Callable[..., Any] | None = None,
        q_transform: Callable[..., Any] | None = None,
        k_transform: Callable[..., Any] | None = None,
        v_transform: Callable[..., Any] | None = None,
        q_index: str | None = None,
    ) -> None:
        transforms = (q_transform, k_transform, v_transform)
        given = (score_mod, mask_mod, sink, _instance(softmax), output_transform, lse_transform, *transforms)
        if definition is not None:
            if any(hook is not None for hook in given):
                raise VariantError("a definition and separate hooks were both given. Use one of the two.")
            given, own_q_index = hooks_of(definition)
            q_index = q_index or own_q_index
        self._set(given, {}, q_index)
        if is_dynamo_compiling():  # Dynamo runs this: the call that is given the variant traces it
            return
        try:
            self.trace()
        except NameError:
            pass  # a global that the module defines further down: the call will find it, or say the same

    def _set(self, hooks: tuple[Any, ...], bound: Mapping[str, object], q_index: str | None) -> None:
        check_q_index(q_index)
        object.__setattr__(self, "_hooks", hooks)
        object.__setattr__(self, "_bound", dict(bound))
        object.__setattr__(self, "q_index", q_index)
        object.__setattr__(self, "_trace", None)  # the last that held: its check is quicker than a look-up

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Variant is immutable: make a new one instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the hooks and bound values, and trace when they are first used."""
        return Variant.made_of, (self._hooks, self._bound, self.q_index)

    def __copy__(self) -> Variant:
        return self

    @classmethod
    def of(cls, definition: object) -> Variant:
        """A Variant as it is, or the one that a function, class or object with hooks defines."""
        if isinstance(definition, cls):
            return definition
        hooks, q_index = hooks_of(definition)
        return cls.made_of(hooks, {}, q_index)

    @classmethod
    def made_of(cls, hooks: tuple[Any, ...], bound: Mapping[str, object], q_index: str | None) -> Variant:
        """The variant of hooks in the order of HOOKS, which are traced when it is first used."""
        self = cls.__new__(cls)
        self._set(hooks, bound, q_index)
        return self

    @property
    def parts(self) -> tuple[tuple[Any, ...], Mapping[str, object]]:
        """Hooks in the order of HOOKS, and bound values."""
        return self._hooks, self._bound

    def __getattr__(self, name: str) -> Any:
        if name in POSITIONAL:
            return self._hooks[HOOKS.index(name)]
        raise AttributeError(f"Variant has no attribute {name!r}")

    def __repr__(self) -> str:
        present = [f"{k}={_described(v)}" for k, v in zip(HOOKS, self._hooks, strict=True) if v is not None]
        return f"Variant({', '.join(present)})"

    def trace(self) -> Traced:
        """The program of the hooks with the values they capture now; traces again only if a guard fails."""
        return Traced(*self.resolve())

    def resolve(self) -> tuple[Program, list[object]]:
        """The program of the hooks and the values they capture now, as ``trace`` gives them."""
        trace = self._trace
        values = None if trace is None else trace.check(*self._hooks, self._bound)
        if values is None:
            trace, values = _find(self._hooks, self._bound)
            object.__setattr__(self, "_trace", trace)
        return trace.program, values

    def bind(self, **values: object) -> Variant:
        """The same variant with captured values replaced by name; values of the same type trace nothing again.

        Errors:  VariantError if no hook captures a value of that name.
        """
        new = Variant.made_of(self._hooks, {**self._bound, **values}, self.q_index)
        names = _find(new._hooks, new._bound)[0].names
        unknown = [name for name in values if name not in names]
        if unknown:
            captured = sorted(names - {name_of(hook) for hook in self._hooks if callable(hook)})
            shown = ", ".join(captured) or "nothing"
            raise VariantError(f"bind got '{unknown[0]}', which no hook captures. Captured: {shown}.")
        return new


def check_q_index(q_index: object) -> None:
    """What q_idx counts is one of the conventions, or left to the entry point."""
    if not (q_index is None or (isinstance(q_index, str) and q_index in ("local", "absolute"))):
        raise VariantError(f"q_index={q_index!r} is not a convention. Use 'local' or 'absolute'.")


class Tracker:
    """The trace of one variant, checked at every call without being looked up: what a plan holds.

    ``check()`` returns the captured values as they are now, or None if a hook or its captures ask for another trace: then
    ``retrace()`` makes that, and returns the values.

    Cost:    a fraction of a microsecond when nothing has changed.
    """

    __slots__ = ("_bound", "_hooks", "check", "trace")

    def __init__(self, variant: Variant) -> None:
        self._hooks, self._bound = variant._hooks, variant._bound
        self.retrace()

    def retrace(self) -> list[object]:
        self.trace, values = _find(self._hooks, self._bound)
        # fails too for a function that was reloaded in place
        self.check: Callable[[], list[object] | None] = functools.partial(self.trace.check, *self._hooks, self._bound)
        return values


def _described(hook: object) -> str:
    return name_of(hook) if callable(hook) else type(hook).__name__


def _instance(norm: object) -> OnlineNorm | None:
    """The norm itself, or one made of its class."""
    if isinstance(norm, type) and issubclass(norm, OnlineNorm):
        try:
            return norm()
        except TypeError as e:
            raise VariantError(
                f"softmax is the class {norm.__name__}, which needs arguments ({e}). Pass an instance."
            ) from None
    if norm is not None and not isinstance(norm, OnlineNorm):
        raise VariantError(f"softmax is {norm!r} of type {type(norm).__name__}, expected a subclass of jitgen.OnlineNorm.")
    return norm


def hooks_of(definition: Any) -> tuple[tuple[Any, ...], str | None]:
    """Hooks and q_index of a function (its kind told by its number of parameters), a class, or an object with hooks."""
    if isinstance(definition, type):
        if issubclass(definition, OnlineNorm):
            return hooks_of(_instance(definition))
        try:
            definition = definition()
        except TypeError as e:
            raise VariantError(f"class {definition.__name__} needs arguments ({e}). Pass an instance of it.") from None
    if isinstance(definition, OnlineNorm):
        return tuple(definition if kind == "softmax" else None for kind in HOOKS), None
    if isinstance(definition, torch.Tensor):  # which has a softmax of its own
        raise VariantError(
            f"variant is a tensor of shape {tuple(definition.shape)}, expected a jitgen.Variant or a function. Index it in "
            "one: lambda b, h, q_idx, kv_idx: mask[q_idx, kv_idx]."
        )
    if hasattr(definition, "kv_num_blocks"):
        raise VariantError(
            "variant is a BlockMask, expected a jitgen.Variant or a function. Pass it as block_mask to jitgen.flex_attention."
        )
    found = {kind: getattr(definition, kind, None) for kind in HOOKS}
    if any(hook is not None for hook in found.values()):
        found["softmax"] = _instance(found["softmax"])
        return tuple(found.values()), getattr(definition, "q_index", None)
    if not callable(definition):
        raise VariantError(
            f"variant is {definition!r} of type {type(definition).__name__}, expected a jitgen.Variant, a score_mod or "
            f"mask_mod, or an object with one of {', '.join(HOOKS)}."
        )
    count = signature_of(definition).required
    kind = _KIND_OF_COUNT.get(count)
    if kind is None:
        raise VariantError(
            f"'{name_of(definition)}' takes {count} positional parameters, expected 5 for a score_mod "
            "(score, b, h, q_idx, kv_idx) or 4 for a mask_mod (b, h, q_idx, kv_idx)."
        )
    return tuple(definition if k == kind else None for k in HOOKS), None


# ---- the table of traces --------------------------------------------------------------------------------------------------


def resolve(score_mod: object = None, mask_mod: object = None, sink: object = None) -> tuple[Program, list[object]]:
    """Program and captured values of raw hooks.

    A function defined anew on each call, with the same code, is found without tracing: what is compared is its code and
    whatever of its captures the trace depended on.

    Errors:  VariantError, UnsupportedVariant.
    Cost:    about a microsecond when nothing has changed.
    """
    # a function is identified by its code, as in _identity: written out, because this runs on every call
    key = (
        None if score_mod is None else score_mod.__code__ if type(score_mod) is _FUNCTION else _identity(score_mod),
        None if mask_mod is None else mask_mod.__code__ if type(mask_mod) is _FUNCTION else _identity(mask_mod),
        None if sink is None else _identity(sink),
    )
    trace = _latest.get(key)
    if trace is not None:
        values = trace.check(score_mod, mask_mod, sink, *_NO_OTHERS, _NOTHING)
        if values is not None:
            return trace.program, values
    trace, values = _find((score_mod, mask_mod, sink, *_NO_OTHERS), _NOTHING)
    if len(_latest) >= MAX_FUNCTIONS:
        _latest.clear()
    _latest[key] = trace
    return trace.program, values


_latest: dict[tuple[object, ...], Trace] = {}  # of raw hooks, the last that held: its check is quicker than a look-up
_NOTHING: Mapping[str, object] = {}
_NO_OTHERS = (None,) * (len(HOOKS) - 3)
_FUNCTION = types.FunctionType


def trace_of(hooks: tuple[Any, ...], bound: Mapping[str, object]) -> Trace:
    """The trace that holds for hooks in the order of HOOKS."""
    return _find(hooks, bound)[0]


def _find(hooks: tuple[Any, ...], bound: Mapping[str, object]) -> tuple[Trace, list[object]]:
    """The trace that holds for the hooks as they are now, and the values they capture."""
    key = (*[_identity(hook) for hook in hooks], *bound)
    for trace in _traces.get(key, ()):
        values = trace.check(*hooks, bound)
        if values is not None:
            return trace, values
    return _new_trace(key, hooks, bound)


def _new_trace(key: tuple[object, ...], hooks: tuple[Any, ...], bound: Mapping[str, object]) -> tuple[Trace, list[object]]:
    for kind, hook in zip(HOOKS, hooks, strict=True):
        if isinstance(hook, Variant):
            raise VariantError(f"{kind} is a Variant. Pass it as variant, alone.")
        if hook is not None and kind not in ("sink", "softmax"):
            check_hook(kind, hook)
    trace = trace_hooks(hooks, bound)
    values = trace.check(*hooks, bound)
    if values is None:
        raise VariantError("a hook changed a value that it captures while it was traced. Hooks must be pure.")
    keep_trace(_traces, key, trace)
    return trace, values


def _identity(hook: Any) -> object:
    """What tells apart sets of traces: the code of a function, the type of anything else."""
    if hook is None:
        return None
    kind = type(hook)
    if kind is types.FunctionType:
        return hook.__code__
    if kind is types.MethodType:
        return hook.__func__.__code__ if hasattr(hook.__func__, "__code__") else kind
    if kind is functools.partial:
        return (kind, _identity(hook.func))
    return kind
