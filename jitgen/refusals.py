"""What a hook may not do with a traced value, said in its own words: the line, the value, and how to write it instead."""

from __future__ import annotations

import re
from typing import Any

from jitgen.ir import Expr
from jitgen.location import line_of, refuse, user_frame


def describe(expr: Expr) -> str:
    """Short words for a value in a message: what it depends on."""
    deps = ", ".join(sorted(expr.deps - {"row"}))
    return f"an expression of {deps}" if deps else "an expression of captured values"


_TORCH_NAME = {"pow": "**", "fabs": "abs", "log2": "torch.log2"}


def refuse_number(expr: Expr, wanted: str) -> None:
    """Refuse to make a plain number of a value that only the kernel knows."""
    frame = user_frame()
    source = line_of(frame) if frame is not None else ""
    called = re.search(r"\bmath\.(\w+)\s*\(", source)
    if called is not None and wanted == "float()":
        name = called.group(1)
        refuse(f"math.{name} needs a number but got {describe(expr)}. Use {_TORCH_NAME.get(name, 'torch.' + name)}.")
    if "range(" in source and wanted == "an integer":
        deps = ", ".join(sorted(expr.deps))
        refuse(f"loop bound depends on {deps}: {source}. Use a captured int, or select entries with torch.where.")
    instead = {"float()": "x.float()", "int()": "x.int() or x.to(torch.int32)"}.get(wanted, "a captured tensor, or torch.where")
    refuse(f"Python needs {wanted} of {describe(expr)}, which is known only in the kernel: {source}. Use {instead}.")


_REMEDIES = {
    "cumsum": "Precompute it as a tensor and index it: c[b, h, q_idx].",
    "cumprod": "Precompute it as a tensor and index it: c[b, h, q_idx].",
    "matmul (@)": "A score sees one (query, key) pair; use torch.dot of two captured rows of static length.",
    "softmax": "Replace softmax with softmax=OnlineNorm subclass.",
    "gather": "Index the captured tensor: t[i, j].",
    "index_select": "Index the captured tensor: t[i, j].",
    "take": "Index the captured tensor: t[i, j].",
    "item": "The value is known only in the kernel; keep it as it is.",
    "rand_like": "A hook must be pure; make the random tensor outside and index it.",
}


def refuse_op(name: str) -> Any:
    """Refuse a torch operation that has no IR form."""
    short = name.rsplit(".", 1)[-1]
    if short.endswith("_") and not short.startswith("_"):
        refuse(f"in-place op {name} on a traced value. Hooks are pure: write x = x.{short[:-1]}(...).")
    remedy = _REMEDIES.get(short, "Write it with elementwise torch ops, or precompute a tensor and index it.")
    refuse(f"unsupported op {name} on a traced value. {remedy}")
