"""Small pieces of C++ text: literals, identifiers, operator precedence, element types."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jitgen.ir import INT32_MAX, INT32_MIN

# Precedence of C++ operators as far as generated text uses them; higher binds tighter.
ATOM, UNARY, PRODUCT, SUM, SHIFT, RELATION, EQUALITY, BITAND, BITXOR, BITOR, TERNARY = (
    100,
    90,
    80,
    70,
    60,
    50,
    45,
    40,
    38,
    36,
    10,
)

ELEMENT_CTYPE = {
    "bool": "bool", "uint8": "unsigned char", "int8": "signed char", "int16": "short", "int32": "int",
    "int64": "long long", "float16": "jg::half16", "bfloat16": "jg::bf16_16", "float32": "float", "float64": "double",
}  # fmt: skip

_RESERVED = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl const constexpr continue
    decltype default delete do double else enum explicit export extern false float for friend goto if inline int long
    mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register return short
    signed sizeof static struct switch template this throw true try typedef typeid typename union unsigned using virtual
    void volatile wchar_t while xor xor_eq args head row col span state jg""".split()
)


@dataclass(frozen=True)
class Term:
    """An expression as C++ text, with the precedence of its outermost operator and its C++ type."""

    text: str
    prec: int = ATOM
    ctype: str = "float"

    def at(self, prec: int) -> str:
        """The text, in parentheses if an operator of precedence ``prec`` around it would bind tighter."""
        return self.text if self.prec >= prec else f"({self.text})"


def float_literal(value: float) -> str:
    """C++ literal of type float."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = repr(float(value))
    return (text if "." in text or "e" in text else text + ".0") + "f"


def int_literal(value: int) -> str:
    """C++ literal of type int where it fits, else long long."""
    if value == INT32_MIN:
        return "(-2147483647 - 1)"
    if INT32_MIN < value <= INT32_MAX:
        return str(value)
    return "(-9223372036854775807LL - 1)" if value == -(2**63) else f"{value}LL"


def literal(value: bool | int | float) -> Term:
    """C++ literal of a Python number."""
    if isinstance(value, bool):
        return Term("true" if value else "false", ATOM, "bool")
    if isinstance(value, int):
        ctype = "int" if INT32_MIN <= value <= INT32_MAX else "long long"
        return Term(int_literal(value), UNARY if value < 0 else ATOM, ctype)
    negative = math.copysign(1.0, value) < 0 and not math.isnan(value)
    return Term(float_literal(value), UNARY if negative else ATOM, "float")


def identifier(name: str) -> str:
    """A C++ identifier that resembles ``name``; empty if nothing of it can be kept."""
    text = re.sub(r"\W|[^\x00-\x7f]", "_", name).strip("_")
    text = re.sub(r"__+", "_", text)
    if not text or text[0].isdigit():
        text = f"v{text}" if text else ""
    return f"{text}_" if text in _RESERVED else text


def unique(name: str, taken: set[str]) -> str:
    """``name``, or name2, name3, … if it is taken; the result is added to ``taken``."""
    candidate, count = name, 1
    while candidate in taken or candidate in _RESERVED:
        count += 1
        candidate = f"{name}{count}"
    taken.add(candidate)
    return candidate
