"""From ``module:name`` or ``path.py:name`` to the variant that it names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

from jitgen.errors import JitgenError, VariantError
from jitgen.norms import OnlineNorm
from jitgen.variant import HOOKS, Variant, hooks_of

MAX_LISTED = 8  # names of a module that an error lists


def load_variant(target: str) -> Variant:
    """The variant that ``target`` names; a relative module is looked for in the current directory too.

    Errors:  VariantError when there is no such module or name, when importing it fails, or when the name is no variant.
    """
    where, _, name = target.rpartition(":")
    module = load_module(where)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise VariantError(f"{where} has no {name!r}. {suggestion(module, name)}")
        found = getattr(found, part)
    return Variant.of(found)


def load_module(where: str) -> ModuleType:
    """Import a module by its name or by the path of its file."""
    is_path = where.endswith(".py") or "/" in where
    path = Path(where)
    if is_path and not path.is_file():
        raise VariantError(f"{where} is not a file. Write TARGET as module:name or path.py:name.")
    folder = str(path.resolve().parent if is_path else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return module_of_file(path) if is_path else importlib.import_module(where)
    except JitgenError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(error.name + ".")):
            raise VariantError(f"there is no module {where!r}, here or in this Python's packages.") from None
        raise VariantError(f"importing {where} failed: {described(error)}.") from error
    except SystemExit as stop:
        raise VariantError(
            f"importing {where} ended the program ({described(stop)}). "
            "Put what is not for importing under if __name__ == '__main__'."
        ) from stop
    except Exception as error:
        raise VariantError(f"importing {where} failed: {described(error)}.") from error


def module_of_file(path: Path) -> ModuleType:
    """Import a file under a name that hides no module: a user's file may be called like one."""
    name = f"shown_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise VariantError(f"{path} is not a Python file. Give a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def described(error: BaseException) -> str:
    """An error with the place where it was raised, or which does not parse."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def suggestion(module: ModuleType, name: str) -> str:
    """What the user probably meant, or what could be shown."""
    names = [key for key, value in vars(module).items() if is_showable(value, module)]
    close = difflib.get_close_matches(name, names, 1)
    if close:
        return f"Did you mean {close[0]}?"
    if not names:
        return "It defines no variant at its top level: what is made inside a function cannot be named."
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"It has {', '.join(names[:MAX_LISTED])}{more}."


def is_showable(value: object, module: ModuleType) -> bool:
    """Whether a module's value is a variant that the module itself defines."""
    if isinstance(value, Variant):
        return True
    if isinstance(value, type):
        has_hooks = any(callable(getattr(value, hook, None)) for hook in HOOKS)
        return value.__module__ == module.__name__ and (has_hooks or issubclass(value, OnlineNorm))
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    try:
        hooks_of(value)
    except VariantError:
        return False
    return True
