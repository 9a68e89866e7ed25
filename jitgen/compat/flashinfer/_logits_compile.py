"""From the steps of a logits pipe to those that run: checks, rules of the user's, and one kernel for built-in neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from jitgen.compat.flashinfer._logits_ops import BuiltInOp, CompileError, FusedOp, Op, SoftmaxOp


class FusionRule(NamedTuple):
    """Steps of the types ``pattern`` that pass ``guard`` become build(steps); rules of higher ``prio`` are tried first."""

    pattern: tuple[type, ...]
    guard: Callable[[list[Op]], bool]
    build: Callable[[list[Op]], Op]
    prio: int = 0


ValidityCheck = Callable[[list[Op]], None]


class Compiler:
    """Checks that steps fit, applies the rules given, and makes one kernel of what is built in and adjacent."""

    def __init__(self) -> None:
        self.fusion_rules: list[FusionRule] = []
        self.validity_checks: list[ValidityCheck] = [_check_one_softmax]

    def register_fusion_rule(self, rule: FusionRule) -> None:
        """Add a rule."""
        self.fusion_rules = sorted([*self.fusion_rules, rule], key=lambda r: -r.prio)

    def register_validity_check(self, check: ValidityCheck) -> None:
        """Add a check, which raises where it finds a fault."""
        self.validity_checks.append(check)

    def compile(self, ops: Sequence[Op]) -> list[Op]:
        """Steps to run for these.

        Errors:  CompileError.
        """
        if not ops:
            raise CompileError("a pipe needs at least one step.")
        for i, (before, op) in enumerate(pairwise(ops), 1):
            if before.OUT is not op.IN:
                raise CompileError(f"step {i} is {op!r}, and the step before it yields {before.OUT.value}.")  # type: ignore[union-attr]
        found = list(ops)
        for check in self.validity_checks:
            check(found)
        return _join(self._apply_rules(found))

    def _apply_rules(self, ops: list[Op]) -> list[Op]:
        i = 0
        while i < len(ops):
            for rule in self.fusion_rules:
                window = ops[i : i + len(rule.pattern)]
                fits = len(window) == len(rule.pattern) and all(map(isinstance, window, rule.pattern))
                if fits and rule.guard(window):
                    ops[i : i + len(window)] = [rule.build(window)]
                    i = max(i - 2, -1)  # the new step may fit one before it
                    break
            i += 1
        return ops


def compile_pipeline(
    ops: Sequence[Op],
    custom_fusion_rules: Sequence[FusionRule] | None = None,
    custom_validity_checks: Sequence[ValidityCheck] | None = None,
) -> list[Op]:
    """Steps to run for these, after the rules and checks given.

    Errors:  CompileError.
    """
    compiler = Compiler()
    for rule in custom_fusion_rules or ():
        compiler.register_fusion_rule(rule)
    for check in custom_validity_checks or ():
        compiler.register_validity_check(check)
    return compiler.compile(ops)


def _check_one_softmax(ops: Sequence[Op]) -> None:
    steps = [op for op in ops if isinstance(op, SoftmaxOp)]
    if len(steps) > 1:
        raise CompileError(f"a pipe has {len(steps)} Softmax steps, expected one at most.")


def _join(ops: Sequence[Op]) -> list[Op]:
    """Runs of built-in steps as one each, as far as a kernel can do them."""
    joined: list[Op] = []
    for op in ops:
        if isinstance(op, BuiltInOp):
            before = joined[-1] if joined else None
            try:
                op = FusedOp([*before.steps, op]) if isinstance(before, FusedOp) else FusedOp([op])
            except CompileError:
                op = FusedOp([op])  # type: ignore[list-item]
            else:
                if isinstance(before, FusedOp):
                    joined.pop()
        joined.append(op)
    return joined
