"""Stand-ins for functions and objects that a hook captures: what is read through them is a capture too."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from jitgen.guards import Path
from jitgen.location import refuse

if TYPE_CHECKING:  # a Protocol costs half a millisecond to define

    class Wrapper(Protocol):
        """The part of captures.Captures that the stand-ins need."""

        def wrap(self, value: Any, path: Path, name: str) -> Any: ...
        def rebuild(self, fn: types.FunctionType, path: Path) -> Callable[..., Any]: ...


class FunctionProxy:
    """A captured Python function, rebuilt when it is first called."""

    def __init__(self, captures: Wrapper, fn: types.FunctionType, path: Path) -> None:
        self._captures, self._fn, self._path = captures, fn, path
        self._rebuilt: Callable[..., Any] | None = None
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._rebuilt is None:
            self._rebuilt = self._captures.rebuild(self._fn, self._path)
        return self._rebuilt(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._captures.wrap(getattr(self._fn, name), self._path.attr(name), name)


class ObjectProxy:
    """A captured object, class or module of the user's: attributes become captures, methods are rebuilt."""

    __slots__ = ("_jg_captures", "_jg_object", "_jg_path")

    def __init__(self, captures: Wrapper, obj: Any, path: Path) -> None:
        for name, value in (("_jg_captures", captures), ("_jg_object", obj), ("_jg_path", path)):
            object.__setattr__(self, name, value)

    def _wrap(self, value: Any, path: Path, name: str) -> Any:
        return self._jg_captures.wrap(value, path, name)

    @property
    def __class__(self) -> Any:  # isinstance() and self.__class__.x see the user's class
        return self._wrap(type(self._jg_object), self._jg_path.type, "cls")

    def __getattr__(self, name: str) -> Any:
        obj, path = self._jg_object, self._jg_path
        if isinstance(obj, (type, types.ModuleType)):
            return self._wrap(getattr(obj, name), path.attr(name), name)
        if isinstance(obj, torch.nn.Module):
            for table in ("_parameters", "_buffers", "_modules"):
                if name in obj.__dict__[table]:
                    return self._wrap(obj.__dict__[table][name], path.attr(table).item(name), name)
        if name in getattr(obj, "__dict__", ()):
            return self._wrap(obj.__dict__[name], path.attr(name), name)
        return self._class_attribute(name)

    def _class_attribute(self, name: str) -> Any:
        """An attribute found on the class: descriptors are rebuilt and bound to this stand-in."""
        obj, path = self._jg_object, self._jg_path
        found = inspect.getattr_static(type(obj), name, None)
        there = path.type.attr(name)
        if isinstance(found, property):
            return self._wrap(found.fget, there.attr("fget"), name)(self)
        if isinstance(found, functools.cached_property):
            return self._wrap(found.func, there.attr("func"), name)(self)
        if isinstance(found, types.FunctionType):
            return functools.partial(self._wrap(found, there, name), self)
        return self._wrap(getattr(obj, name), path.attr(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse(
            f"a hook assigns attribute '{name}' of a {type(self._jg_object).__name__}. Hooks are pure: use a local variable."
        )

    def _special(self, name: str, *args: Any) -> Any:
        if inspect.getattr_static(type(self._jg_object), name, None) is None:
            raise TypeError(f"{type(self._jg_object).__name__} object has no {name}")
        return self._class_attribute(name)(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._jg_object, type):
            return self._jg_object(*args, **kwargs)
        name = "forward" if isinstance(self._jg_object, torch.nn.Module) else "__call__"
        return self._class_attribute(name)(*args, **kwargs)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(self._jg_object, (torch.nn.ModuleList, torch.nn.ParameterList)) and isinstance(item, int):
            return getattr(self, str(item % len(self._jg_object)))
        return self._special("__getitem__", item)

    def __len__(self) -> int:
        return int(self._special("__len__"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._special("__iter__"))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._jg_object)

    def __bool__(self) -> bool:
        return True

    def __index__(self) -> NoReturn:
        refuse(f"a number is needed, got a {type(self._jg_object).__name__}. Capture a Python number or a tensor.")
