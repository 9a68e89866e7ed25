"""The host part of a CUDA source: what a C++ compiler without CUDA compiles, beside nvcc instead of inside it.

nvcc compiles a source twice, one pass after the other, and the host's pass through all of CUDA's headers takes as long as the
device's. Launchers need none of that. So they are compiled from the same text less its device code, at the same time as nvcc
makes the device code alone, with `jitgen/driver_runtime.h` in front in place of CUDA's headers:

    JITGEN_FN float f(...) { ... }       device functions and variables: nothing
    __global__ void k(Args args) {...}   static void k(Args args) {} JITGEN_KERNEL(k)
    k<<<grid, block>>>(args)             jg_runtime::configure(k, grid, block)(args)

All else stays, on its line: types, constants, functions of the host and of both sides, preprocessor directives. It is made for
the style of our templates and headers: a device function begins with one of MARKS, and no kernel is a template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

# What makes a declaration one of the device's, unless __host__ stands there too; a source's own macros of them do as well.
MARKS = frozenset(("JITGEN_FN", "JITGEN_MEMBER", "JITGEN_METHOD", "__device__", "__global__", "__shared__"))
_OPEN, _CLOSE = {"(": ")", "{": "}", "[": "]"}, frozenset(")}]")
_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<directive>(?<=\n)[ ]*\#(?:[^\n\\]|\\.)*)
      | (?P<code>\w+|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)+'|<<<|.)""",
    re.VERBOSE | re.DOTALL,
)
_MACRO = re.compile(r"(\s*#\s*define\s+(\w+)(\([^)]*\))?)(.*)", re.DOTALL)


def host_part(text: str) -> str:
    """The host's part of a source or header; every line that is kept has its number.

    Errors:  ValueError for a device declaration without an end, and for a kernel that is a template.
    """
    return _HostPart("\n" + text).text()[1:]


def host_headers(includes: Mapping[str, str]) -> dict[str, str]:
    """The host's part of each header."""
    return {path: _header_part(text) for path, text in includes.items()}


_header_part = cache(host_part)


class _HostPart:
    """One source, token by token."""

    def __init__(self, source: str) -> None:
        self.tokens = [(m.lastgroup, m.group()) for m in _TOKEN.finditer(source)]
        self.out: list[str] = []
        self.marks = set(MARKS)

    def text(self) -> str:
        """The source without device code."""
        at, begin, begin_out = 0, 0, 0  # where the present declaration begins: among the tokens, and in the output
        fresh = True
        while at < len(self.tokens):
            kind, token = self.tokens[at]
            if kind == "code" and fresh:
                begin, begin_out, fresh = at, len(self.out), False
            if kind == "code" and token in self.marks and not self._is_for_host(begin):
                end = self._end(at)
                del self.out[begin_out:]
                self.out.append(self._replaced(begin, end))
                at, fresh = end, True
                continue
            if token == "<<<":
                at = self._launch(at)
                continue
            self.out.append(self._directive(token) if kind == "directive" else token)
            fresh = fresh or kind == "directive" or (kind == "code" and token in ";{}")
            at += 1
        return "".join(self.out)

    def _is_for_host(self, begin: int) -> bool:
        """Whether the declaration says __host__ before its parameters or its body."""
        for kind, token in self.tokens[begin:]:
            if kind == "code" and (token == "__host__" or token in "({;="):
                return token == "__host__"
        return False

    def _close(self, at: int) -> int:
        """The token after the bracket that closes the one at `at`."""
        depth = 0
        for i in range(at, len(self.tokens)):
            kind, token = self.tokens[i]
            if kind == "code":
                depth += (token in _OPEN) - (token in _CLOSE)
                if depth == 0:
                    return i + 1
        raise ValueError(f"{self._shown(at)}: a bracket without its end")

    def _end(self, at: int) -> int:
        """The token after the end of a declaration: its semicolon, or its body."""
        while at < len(self.tokens):
            kind, token = self.tokens[at]
            if kind == "code" and token == ";":
                return at + 1
            if kind == "code" and token in _OPEN:
                at = self._close(at)
                if token == "{" and self._next_code(at) not in (",", "{", ";"):  # else: of a member's initial value
                    return at
                continue
            at += 1
        raise ValueError(f"{self._shown(at - 1)}: a device declaration without its end")

    def _next_code(self, at: int) -> str:
        return next((token for kind, token in self.tokens[at:] if kind == "code"), "")

    def _shown(self, at: int) -> str:
        return "".join(token for _, token in self.tokens[max(0, at - 20) : at + 20]).strip()

    def _replaced(self, begin: int, end: int) -> str:
        """What stands for a device declaration: its line breaks and #line directives; of a kernel, what its launch needs."""
        taken = self.tokens[begin:end]
        kept = "".join(token if _is_line(kind, token) else "\n" * token.count("\n") for kind, token in taken)
        body = next((i for i, part in enumerate(taken) if part == ("code", "{")), 0)
        head = [token for _, token in taken[:body]]
        if "__global__" not in head:
            return kept
        if "template" in head:
            raise ValueError(f"{self._shown(begin)}: a kernel that is a template has no name of its own")
        name, parameters = _signature("".join(head))
        return f"static void {name}({parameters}) {{}} JITGEN_KERNEL({name})" + kept

    def _directive(self, directive: str) -> str:
        """A macro that takes arguments and makes device code makes none; another of the device's is a mark from here on."""
        found = _MACRO.fullmatch(directive)
        words = set(re.findall(r"\w+", found.group(4))) if found else set()
        if self.marks.isdisjoint(words) or "__host__" in words:
            return directive
        if found.group(3) is None:
            self.marks.add(found.group(2))
            return directive
        return found.group(1) + "\\\n" * found.group(4).count("\n")

    def _launch(self, at: int) -> int:
        """Rewrites a launch, up to its arguments; the kernel's name has been put out."""
        end, depth = at + 1, 0
        while depth or [token for _, token in self.tokens[end : end + 3]] != [">", ">", ">"]:
            token = self.tokens[end][1]
            depth += (token in _OPEN) - (token in _CLOSE)
            end += 1
        self.out[-1] = f"jg_runtime::configure({self.out[-1]}, "
        self.out += [token for _, token in self.tokens[at + 1 : end]] + [")"]
        return end + 3


def _is_line(kind: str | None, token: str) -> bool:
    return kind == "directive" and token.lstrip().startswith("#line")


def _signature(head: str) -> tuple[str, str]:
    """Name and parameters of a kernel, from all that stands before its body."""
    found = re.search(r"(\w+)\s*\(([^()]*)\)\s*$", re.sub(r"//[^\n]*", "", head))
    if found is None:
        raise ValueError(f"{head.strip()}: not the head of a kernel")
    return found.group(1), " ".join(found.group(2).replace("__grid_constant__", "").split())
