"""Records: frozen dataclasses that cost nothing to define.

dataclass(frozen=True) compiles half a dozen functions for every class, about 0.5 ms each time a process imports it; a
process that finds its kernels on disk has less than 20 ms in all. Records share their methods. What reads dataclasses
(fields, replace, is_dataclass) works as ever: it finds fields that are made when they are first asked for.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any


class _Fields:
    """Stands for ``__dataclass_fields__`` of a record until it is read."""

    def __get__(self, instance: object, owner: type) -> dict[str, Any]:
        made = type(owner.__name__, (), {"__annotations__": dict(owner.__annotations__), **owner._specified})  # type: ignore[attr-defined]
        fields = dataclasses.dataclass(init=False, repr=False, eq=False)(made).__dataclass_fields__
        owner.__dataclass_fields__ = fields  # type: ignore[attr-defined]
        return fields


def _init(self: Any, *args: Any, **given: Any) -> None:
    names = self.__match_args__
    if len(args) > len(names):
        raise TypeError(f"{type(self).__name__} takes {len(names)} values, got {len(args)}")
    values = {**self._defaults, **dict(zip(names, args, strict=False)), **given}
    if len(values) != len(names) or not self._names.issuperset(given) or not given.keys().isdisjoint(names[: len(args)]):
        _explain(type(self).__name__, names, args, given, values)
    self.__dict__.update(values)


def _explain(what: str, names: tuple[str, ...], args: tuple[Any, ...], given: dict[str, Any], values: dict[str, Any]) -> None:
    for name in given:
        if name not in names:
            raise TypeError(f"{what} has no field {name!r}")
        if name in names[: len(args)]:
            raise TypeError(f"{what} got two values for {name!r}")
    raise TypeError(f"{what} lacks {', '.join(name for name in names if name not in values)}")


def _refuse_set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple([self.__dict__[name] for name in self._compare])


def _eq(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in self.__match_args__)})"


def _record(cls: type | None = None, *, eq: bool = True) -> Any:
    """Class decorator: like dataclass(frozen=True, eq=eq), for classes that inherit no fields and have no default factories."""
    if cls is None:
        return lambda decorated: _record(decorated, eq=eq)
    made: Any = cls
    made.__match_args__ = names = tuple(cls.__annotations__)
    made._names = frozenset(names)
    made._specified = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
    made._defaults, compared = {}, []
    for name in names:
        default = made._specified.get(name, dataclasses.MISSING)
        is_field = isinstance(default, dataclasses.Field)
        if not is_field or default.compare is not False:
            compared.append(name)
        default = default.default if is_field else default
        if default is not dataclasses.MISSING:
            made._defaults[name] = default
            setattr(made, name, default)
        elif is_field:
            delattr(made, name)
    made._compare = tuple(compared)
    made.__dataclass_fields__ = _Fields()
    made.__init__, made.__repr__, made.__setattr__, made.__delattr__ = _init, _repr, _refuse_set, _refuse_delete
    if eq:
        made.__eq__, made.__hash__ = _eq, _hash
    return made


if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    record = _record
