"""Every exception jitgen raises on purpose.

A message says: what failed: got X, expected Y (where). Remedy. Values and names are always in it.
Errors about an input also derive from the built-in class a user would expect to catch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class JitgenError(Exception):
    """Base of all errors of jitgen."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, whatever its class asks for to be made: errors of worker processes are pickled on their way."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[JitgenError], args: tuple[Any, ...], facts: dict[str, Any]) -> JitgenError:
    made = kind.__new__(kind, *args)
    made.__dict__.update(facts)
    return made


class InvalidValue(JitgenError, ValueError):
    """An option has a value that the call does not take."""


class InvalidType(JitgenError, TypeError):
    """An argument is of a Python type that the call does not take."""


class ShapeMismatch(JitgenError, ValueError):
    """Sizes, strides or head counts of the inputs do not fit together."""


class PlanMismatch(JitgenError, ValueError):
    """A serving call, or the lengths it is given, are not what its plan was made for."""


class UnsupportedDtype(JitgenError, TypeError):
    """A tensor has a dtype that no kernel takes."""


class UnsupportedDevice(JitgenError, ValueError):
    """A tensor is on a device that has no kernels, or the inputs are on different devices."""


class VariantError(JitgenError, ValueError):
    """A variant is put together wrongly: a hook with the wrong arguments, hooks that exclude each other."""


class UnsupportedVariant(JitgenError, NotImplementedError):
    """A user's function does what a kernel cannot; found while tracing it.

    `file` and `line` name the place in the user's source; they are None where Python does not know it.
    """

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.message = message
        self.file = file
        self.line = line
        super().__init__(message if file is None else f"{file}:{line}: {message}")


class UnsupportedOption(JitgenError, NotImplementedError):
    """An option of another library's interface that jitgen's shim for it does not take; names what to use instead."""


class GradNotSupported(JitgenError, NotImplementedError):
    """A gradient was asked for; jitgen is for inference."""


class EnvError(JitgenError, ValueError):
    """An environment variable has a value that is not allowed."""


class CacheError(JitgenError, OSError):
    """The cache cannot be used as it is, and going on would be unsafe or wrong."""


class CacheWarning(UserWarning):
    """The cache got around a problem that the user may want to know of: a damaged entry, a store it cannot write."""


class KernelNotPrebuilt(JitgenError, LookupError):
    """JITGEN_MODE=frozen, and neither a prebuilt layer nor the user store holds the kernel.

    `manifest` is the text that, added to a manifest, makes 'jitgen prebuild' build it; it also ends the message.
    """

    def __init__(self, message: str, *, manifest: str = "") -> None:
        self.manifest = manifest
        super().__init__(f"{message} Add to the manifest:\n\n{manifest}" if manifest else message)


class ManifestError(JitgenError, ValueError):
    """A manifest of kernels to prebuild says something that is not allowed."""


class BundleError(JitgenError, ValueError):
    """A bundle is damaged, unsafe to unpack, or cannot be packed."""


class ToolchainMissing(JitgenError, RuntimeError):
    """A program, header or library needed for compiling is not on this machine.

    `what` names the missing piece and where it was looked for, `remedy` says what to install.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}. {remedy}")


class CompileError(JitgenError, RuntimeError):
    """The compiler refused a generated source.

    `log` is the complete compiler output, `source` the file that was compiled (both kept), `lines` the first
    lines of the output that say what is wrong.
    """

    def __init__(self, what: str, *, log: Path | None = None, source: Path | None = None, lines: tuple[str, ...] = ()) -> None:
        self.what = what
        self.log = log
        self.source = source
        self.lines = lines
        first = "".join(f"\n  {line}" for line in lines)
        kept = f"\nfull log and source: {log.parent}" if log is not None else ""
        super().__init__(f"compiling {what} failed{':' if lines else '.'}{first}{kept}")

    def moved(self, old: Path, new: Path) -> CompileError:
        """The same error after its directory was renamed."""
        log, source = (new / path.relative_to(old) if path else None for path in (self.log, self.source))
        lines = tuple(line.replace(str(old), str(new)) for line in self.lines)
        return CompileError(self.what, log=log, source=source, lines=lines)


class TemplatesMissing(JitgenError, RuntimeError):
    """The kernel templates are neither in the installed package nor beside it."""

    def __init__(self, searched: tuple[Path, ...]) -> None:
        self.searched = searched
        places = ", ".join(str(path) for path in searched)
        super().__init__(f"kernel_templates not found in {places}. Reinstall jitgen: pip install --force-reinstall jitgen")


class LaunchError(JitgenError, RuntimeError):
    """A compiled kernel was loaded but could not be started, or reported an error code."""
