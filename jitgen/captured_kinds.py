"""What kinds of things hooks capture: what belongs to libraries, what holds values of the user's, what no trace can follow."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import dis
import functools
import os
import pickle
import random
import sys
import types
import weakref
from typing import Any

import torch

from jitgen.errors import UnsupportedVariant
from jitgen.location import refuse
from jitgen.symbols import Traced

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # stand for one another
CONSTANTS = (str, bytes, torch.dtype, torch.device, torch.Size, slice, range, type(Ellipsis), complex, torch.layout)
SEQUENCES = (list, tuple, collections.deque, array.array, bytearray)
MAPPINGS = (dict, types.MappingProxyType)
_PACKAGES = ("torch", "numpy", "jitgen", "triton")
_FOLLOWED = (
    "torch.nn.attention",
    "jitgen.masks",
    "jitgen.block_sparse",
    "jitgen.serving_masks",
    "jitgen.sampling_processors",
    "jitgen.flex",
    "jitgen.bench",
    "jitgen.compat",
    "jitgen.demo",
    "jitgen.prebuild_variants",
)  # library functions that call the user's: and_masks and the like
# Classes of the standard library whose attributes, or items, are the user's.
_HOLDERS = frozenset(
    ("types.SimpleNamespace", "argparse.Namespace", "collections.UserDict", "collections.UserList", "collections.ChainMap",
     "_thread._local")
)  # fmt: skip
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep


@functools.lru_cache(maxsize=1024)
def is_library(module: object) -> bool:
    """Whether functions of a module are called as they are: the standard library, torch, NumPy."""
    name = str(module)
    top = name.split(".")[0]
    if name.startswith(_FOLLOWED) or top == "__main__":
        return False
    return top in _PACKAGES or (top in sys.stdlib_module_names and _is_pythons_own(top))


def _is_pythons_own(name: str) -> bool:
    """Whether a module with a name of the standard library is that: a user's may be called so too, such as ``test``."""
    module = sys.modules.get(name)
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if place is None or not place.endswith((".py", ".pyc", name)):
        return True  # built in, frozen, or an extension
    return place.startswith(_STANDARD_LIBRARY) and "-packages" not in place[len(_STANDARD_LIBRARY) :]


def check_lasting(value: Any, name: str) -> None:
    """What a hook reads through a value is found again at each call.

    Errors:  UnsupportedVariant: otherwise it would be what it was when the hook was traced, for ever.
    """
    if isinstance(value, weakref.ref) or type(value) in weakref.ProxyTypes:
        refuse(f"'{name}' is a weak reference, whose object no trace keeps. Capture the object, or what is read of it.")
    if isinstance(value, contextvars.ContextVar):
        refuse(f"'{name}' is a context variable, which a kernel cannot look up. Capture its value: {name}.get().")
    if isinstance(value, ctypes._SimpleCData):
        refuse(f"'{name}' is a {type(value).__name__} of ctypes. Capture its value: {name}.value.")
    owner = value.__self__ if isinstance(value, types.BuiltinFunctionType | types.MethodType) else value
    if value is random or isinstance(owner, random.Random) or _is_of_numpys_random(value) or _is_of_numpys_random(owner):
        refuse(f"'{name}' draws random numbers, which would be drawn once, when the hook is traced. Draw outside.")


def _is_of_numpys_random(value: Any) -> bool:
    """Whether this is NumPy's module of random numbers, or one of its generators."""
    name = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
    return name == "numpy.random" or name.startswith("numpy.random.")


def numpy_state() -> bytes | None:
    """The state of NumPy's global generator, which differs after a draw; None where no program has imported it."""
    numpy_random = sys.modules.get("numpy.random")
    return None if numpy_random is None else pickle.dumps(numpy_random.get_state(legacy=False))


def is_opaque(value: Any) -> bool:
    """Library objects that hold nothing of the user's: torch functions, modules such as math, classes such as list."""
    if isinstance(value, types.ModuleType):
        return is_library(value.__name__)
    if isinstance(value, type):
        return is_library(value.__module__)
    kind = type(value)
    if isinstance(value, torch.nn.Module) or f"{kind.__module__}.{kind.__qualname__}" in _HOLDERS:
        return False
    return isinstance(value, Traced) or is_library(kind.__module__)


def wrapped_at(value: Any) -> str | None:
    """Attribute that holds the plain Python function behind a wrapper that cannot itself be traced."""
    if isinstance(value, torch.jit.ScriptFunction):
        raise UnsupportedVariant(f"'{value.name}' is a TorchScript function, expected a Python function. Pass the original.")
    if isinstance(getattr(value, "__dict__", None), dict):
        for name in ("_torchdynamo_orig_callable", "_orig_mod"):
            if name in value.__dict__ or name in value.__dict__.get("_modules", {}):
                return name
    if isinstance(value, types.FunctionType):
        in_library = is_library(value.__globals__.get("__name__"))
        return "__wrapped__" if in_library and hasattr(value, "__wrapped__") else None
    return "__wrapped__" if isinstance(value, functools._lru_cache_wrapper) else None


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Names that a code object, or a function nested in it, reads from its globals."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return frozenset(names)
