"""What users' calls raise on purpose is a JitgenError: one except clause catches all of it, and no bug."""

from __future__ import annotations

import ast
import inspect

import pytest
from test_layering import MODULES, ROOT, layer_of

from jitgen import errors

PLAIN = {"ValueError", "TypeError", "RuntimeError", "KeyError", "NotImplementedError"}
# what is meant for whoever extends jitgen, not for users
INTERNAL = {("compat.flashinfer._logits_ops", "NotImplementedError")}
CALLS = [name for name in MODULES if name and layer_of(name) in ("calls", "compat")]


@pytest.mark.parametrize("name", CALLS)
def test_calls_raise_errors_of_the_project(name):
    raised = [
        (node.exc.func.id, node.lineno)
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    ]
    wrong = [f"{MODULES[name].relative_to(ROOT)}:{line}: {error}" for error, line in raised
             if error in PLAIN and (name, error) not in INTERNAL]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_every_error_is_also_what_python_would_raise():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.JitgenError)]
    assert len(classes) > 15
    assert [c.__name__ for c in classes if len(c.__bases__) == 1] == ["JitgenError"]
