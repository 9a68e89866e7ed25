"""Signatures of hooks: what each kind is called with, and the functions that users may give for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

from jitgen.errors import VariantError
from jitgen.records import record

CONTEXT = (
    "q_len", "kv_len", "ctx_len", "q_off", "q_tok", "kv_off", "kv_slot", "page", "kv_h", "num_q_heads", "num_kv_heads", "scale",
)  # fmt: skip
POSITIONAL: dict[str, tuple[str, ...]] = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
    "sink": ("b", "h"),
    "softmax": (),
    "output_transform": ("o", "lse", "b", "h", "q_idx"),
    "lse_transform": ("lse", "b", "h", "q_idx"),
    "q_transform": ("q", "b", "h", "q_idx"),
    "k_transform": ("k", "b", "kv_h", "kv_idx"),
    "v_transform": ("v", "b", "kv_h", "kv_idx"),
}
HOOKS = tuple(POSITIONAL)
ROW_TRANSFORMS = HOOKS[-3:]
TAKERS_OF_BLOCKS = {"BlockMask": "flex_attention", "BlockSparse": "block_sparse_attention"}


@record
class Signature:
    """How a hook may be called."""

    required: int  # positional parameters without default
    accepted: int
    context: tuple[str, ...]  # keyword-only parameters without default


MAX_SIGNATURES = 4096  # remembered: code that is made anew again and again must not add up
_signatures: dict[CodeType, Signature] = {}  # of functions that only their code tells apart


def signature_of(hook: Any) -> Signature:
    """Signature of a function, method, partial, callable object or module."""
    if type(hook) is not FunctionType or hook.__defaults__ or hook.__kwdefaults__ or hook.__dict__:
        return _read_signature(hook)
    found = _signatures.get(hook.__code__)
    if found is None:
        if len(_signatures) >= MAX_SIGNATURES:
            _signatures.clear()
        found = _signatures[hook.__code__] = _read_signature(hook)
    return found


def _read_signature(hook: Any) -> Signature:
    target = hook.forward if isinstance(hook, torch.nn.Module) else hook
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError) as e:
        raise VariantError(f"{name_of(hook)} has no signature that Python can tell ({e}). Wrap it into a function.") from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(1 for p in positional if p.default is p.empty)
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keywords = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
    return Signature(required, 64 if any_number else len(positional), keywords)


def check_hook(kind: str, hook: Any) -> Signature:
    """Signature of a hook, which must fit its kind.

    Errors:  VariantError naming the hook, the parameters expected and those found.
    """
    if not callable(hook):
        what, remedy = shown(hook), ""
        if isinstance(hook, torch.Tensor):
            remedy = " Index it in one, as in mask[q_idx, kv_idx]."
        elif (name := type(hook).__name__) in TAKERS_OF_BLOCKS:  # which take many lines to print
            what = f"a {name}"
            remedy = f" Give its mask_mod, or the {name} to jitgen.{TAKERS_OF_BLOCKS[name]}."
        raise VariantError(f"{kind} is {what}, expected a function ({', '.join(POSITIONAL[kind])}).{remedy}")
    found, wanted = signature_of(hook), POSITIONAL[kind]
    if not found.required <= len(wanted) <= found.accepted:
        raise VariantError(
            f"{kind} '{name_of(hook)}' takes {found.required} positional parameters, expected {len(wanted)}: "
            f"({', '.join(wanted)}). Further context is asked for by keyword-only parameters."
        )
    unknown = [name for name in found.context if name not in CONTEXT]
    if unknown:
        raise VariantError(
            f"{kind} '{name_of(hook)}' asks for keyword-only '{unknown[0]}', expected one of {', '.join(CONTEXT)}. "
            "Give it a default, or capture the value."
        )
    of_key = dict.fromkeys(("kv_off", "kv_slot", "page"), "kv_idx")
    for name, position in {"q_tok": "q_idx", **of_key}.items():
        if name in found.context and position not in wanted:
            raise VariantError(f"{kind} '{name_of(hook)}' asks for {name}, and it is given no {position}. Capture the value.")
    return found


def name_of(hook: Any) -> str:
    """What the user calls a hook."""
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return str(getattr(hook, "__name__", type(hook).__name__))


def code_of(hook: Any) -> CodeType | None:
    """Code object behind a hook, for its file and line."""
    while hasattr(hook, "func"):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    if not hasattr(hook, "__code__") and not isinstance(hook, type):
        method = "forward" if isinstance(hook, torch.nn.Module) else "__call__"
        hook = getattr(type(hook), method, hook)
    return getattr(hook, "__code__", None)


def shown(value: object) -> str:
    """A value as a message names it."""
    return (
        f"{value!r} of type {type(value).__name__}"
        if not isinstance(value, torch.Tensor)
        else f"a tensor of shape {tuple(value.shape)}"
    )


# ---- functions that are no hooks of a variant: logit processors, transforms of appended rows --------------------------


def trace_key(function: Any) -> object:
    """What tells sets of traces apart: the code of a function, the type of anything else."""
    if isinstance(function, functools.partial):
        return (functools.partial, trace_key(function.func))
    return function.__code__ if isinstance(function, FunctionType) else type(function)


def check_parameters(what: str, function: Any, parameters: Sequence[str]) -> None:
    """``function`` takes these positional parameters and no context.

    Errors:  VariantError.
    """
    listed = ", ".join(parameters)
    if not callable(function):
        raise VariantError(f"{what} is {function!r} of type {type(function).__name__}, expected a function ({listed}).")
    found = signature_of(function)
    if not found.required <= len(parameters) <= found.accepted or found.context:
        raise VariantError(
            f"{what} '{name_of(function)}' takes {found.required} positional parameters"
            f"{' and keyword-only ' + found.context[0] if found.context else ''}, expected {len(parameters)}: ({listed}). "
            "Capture what else it needs."
        )
