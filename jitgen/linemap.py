"""Where each generated line comes from: invisible marks put in by the template engine, turned into ``#line`` directives.

A template is marked while it is lexed, so a compiler error in generated text is reported at the template's own file and
line. The marks never reach the text that is hashed or compared with golden files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

# Private-use characters: they cannot occur in source text, and no compiler ever sees them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*):(\\d+){_CLOSE}")
_MARK_OR_TEXT = re.compile(f"{_MARK.pattern}|\\S")


class LineMarks(Extension):
    """Begins every literal line of a template with an invisible (template, line) mark."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for token in stream:
            if token.type != "data":
                yield token
                continue
            lines = token.value.split("\n")
            marked = (f"{_OPEN}{stream.name}:{token.lineno + k}{_CLOSE}{line}" for k, line in enumerate(lines))
            yield Token(token.lineno, "data", "\n".join(marked))


@dataclass(frozen=True)
class Rendered:
    """Generated text without marks, and the template position of each of its lines (None: inserted by a tag)."""

    text: str
    origins: tuple[tuple[str, int] | None, ...]


def strip_marks(marked: str) -> Rendered:
    """Separate text and origins; tidy what tags leave behind: trailing blanks and runs of empty lines."""
    lines: list[str] = []
    origins: list[tuple[str, int] | None] = []
    for raw in marked.split("\n"):
        line = _MARK.sub("", raw).rstrip()
        if not line and lines and not lines[-1]:
            continue
        lines.append(line)
        origins.append(_origin_of(raw))
    while lines and not lines[-1]:
        lines.pop()
        origins.pop()
    return Rendered("\n".join(lines) + "\n", tuple(origins))


def _origin_of(line: str) -> tuple[str, int] | None:
    """Template and line of the text that begins this output line: the last mark before the first visible character."""
    found = None
    for match in _MARK_OR_TEXT.finditer(line):
        if match.group(1) is None:
            break
        found = (match.group(1), int(match.group(2)))
    return found


def with_line_directives(rendered: Rendered, template_root: str) -> str:
    """Text with a ``#line`` wherever the origin does not simply continue the line before.

    Only below the last ``#include``: a ``#line`` in force at an include enters the compiler's dependency file under a name
    that does not exist, and ninja then rebuilds forever.
    """
    lines = rendered.text.split("\n")
    start = 1 + max((i for i, line in enumerate(lines) if line.startswith("#include")), default=-1)
    return "\n".join(_mapped(lines, rendered.origins, start, template_root))


def _mapped(lines: list[str], origins: tuple[tuple[str, int] | None, ...], start: int, root: str) -> Iterable[str]:
    expected: tuple[str, int] | None = None
    for i, line in enumerate(lines):
        origin = origins[i] if i < len(origins) else None
        continued = i > 0 and lines[i - 1].endswith("\\")
        if i >= start and origin is not None and origin != expected and line and not continued:
            yield f'#line {origin[1]} "{root}/{origin[0]}"'
            expected = origin
        yield line
        if expected is not None:
            expected = (expected[0], expected[1] + 1)
