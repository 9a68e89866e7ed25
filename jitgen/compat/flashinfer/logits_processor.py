"""``flashinfer.logits_processor``: pipelines of logit processors, run as one sampling kernel where they end in a token.

What differs: a pipe of built-in processors is one kernel whatever rules there are, and seed and offset may be given to the
call beside generator. Built-in steps that compile=False leaves apart are one kernel each. To have a function of one's own
fused as well, give it to jitgen.sample as ``processor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jitgen.compat.flashinfer._logits_compile import Compiler, FusionRule, ValidityCheck, compile_pipeline
from jitgen.compat.flashinfer._logits_ops import (
    BuiltInOp,
    CompileError,
    LegalizationError,
    LogitsSampleOp,
    LogitsTopKOp,
    MinPOp,
    Op,
    ParameterizedOp,
    ProbsSampleOp,
    ProbsTopKOp,
    SoftmaxOp,
    TaggedTensor,
    TemperatureOp,
    TensorType,
    TopPOp,
)

__all__ = [
    "CompileError",
    "Compiler",
    "FusionRule",
    "LegalizationError",
    "LogitsPipe",
    "LogitsProcessor",
    "MinP",
    "Op",
    "ParameterizedOp",
    "Sample",
    "Softmax",
    "TaggedTensor",
    "Temperature",
    "TensorType",
    "TopK",
    "TopP",
    "compile_pipeline",
    "legalize_processors",
]

INPUTS = (TensorType.LOGITS, TensorType.PROBS)


class LogitsProcessor:
    """A step of a pipe; parameters given here are those of calls that do not give them.

    A processor of the user's own says by ``legalize`` which Ops it stands for, by the type of what it is given.
    """

    ops: tuple[type[BuiltInOp], ...] = ()  # of a built-in processor, by what they take

    def __init__(self, **params: Any) -> None:
        self.params = params

    def legalize(self, input_type: TensorType) -> list[Op]:
        """The steps that this processor stands for.

        Errors:  LegalizationError if it does not take this type.
        """
        for op in self.ops:
            if op.IN is input_type:
                return [op(**self.params)]
        raise LegalizationError(f"{self!r} does not take {input_type.value}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.params.items())})"


class Temperature(LogitsProcessor):
    """Divides logits by ``temperature``."""

    ops = (TemperatureOp,)


class Softmax(LogitsProcessor):
    """Logits to probabilities."""

    ops = (SoftmaxOp,)

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(**params)


class TopK(LogitsProcessor):
    """Keeps the ``top_k`` largest. With joint_topk_topp a TopP after it counts from the whole distribution."""

    ops = (LogitsTopKOp, ProbsTopKOp)

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **params)


class TopP(LogitsProcessor):
    """Keeps the smallest set whose mass reaches ``top_p``."""

    ops = (TopPOp,)


class MinP(LogitsProcessor):
    """Keeps what has at least ``min_p`` times the largest probability."""

    ops = (MinPOp,)


class Sample(LogitsProcessor):
    """Draws a token; ends the pipe."""

    ops = (LogitsSampleOp, ProbsSampleOp)

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(**params)


def legalize_processors(processors: Sequence[LogitsProcessor], initial_type: TensorType = TensorType.LOGITS) -> list[Op]:
    """The steps that processors stand for, given tensors of initial_type.

    Errors:  LegalizationError.
    """
    if not processors:
        raise LegalizationError("a LogitsPipe needs at least one processor, for example [Softmax(), TopP(), Sample()].")
    ops: list[Op] = []
    kind = initial_type
    for i, processor in enumerate(processors):
        _check_processor(i, processor)
        try:
            steps = processor.legalize(kind)
        except ValueError as error:
            hint = " Put Softmax() before it." if kind is TensorType.LOGITS else ""
            raise LegalizationError(f"processor {i}: {error}.{hint}") from error
        if not steps:
            raise LegalizationError(f"processor {i} is {processor!r}, whose legalize() gave no step. Return at least one Op.")
        ops += steps
        kind = steps[-1].OUT  # type: ignore[assignment]
    return ops


class LogitsPipe:
    """Processors applied in order: ``pipe(x, temperature=..., top_k=..., top_p=..., min_p=..., generator=..., seed=...)``.

    Errors:  CompileError, LegalizationError (both ValueErrors) when the steps do not fit together or a parameter is missing.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        self.processors = list(processors)
        self._initial_type = input_type or _first_type(self.processors)
        self.ops = legalize_processors(self.processors, self._initial_type)
        self.compiled_ops: list[Op] | None = None
        if compile:
            self.compile(custom_fusion_rules, custom_validity_checks)

    @property
    def initial_type(self) -> TensorType:
        """What the pipe takes."""
        return self._initial_type

    def compile(
        self,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        """Join steps into kernels, after the rules and checks given.

        Errors:  CompileError.
        """
        self.compiled_ops = compile_pipeline(self.ops, custom_fusion_rules, custom_validity_checks)

    def __call__(self, x: torch.Tensor | TaggedTensor, **kwargs: Any) -> torch.Tensor:
        """Run the pipe: tokens if it ends in Sample, else probabilities or logits."""
        tensor = x if isinstance(x, TaggedTensor) else TaggedTensor(x, self._initial_type)
        for op in self.ops if self.compiled_ops is None else self.compiled_ops:
            tensor = op(tensor, **kwargs)
        return tensor.data

    def __repr__(self) -> str:
        return f"LogitsPipe({' -> '.join(map(repr, self.processors))})"


def _check_processor(i: int, processor: object) -> None:
    if not isinstance(processor, LogitsProcessor):
        raise LegalizationError(
            f"processor {i} is {processor!r}, expected one of Temperature, Softmax, TopK, TopP, MinP, Sample, or a subclass of "
            "LogitsProcessor."
        )


def _first_type(processors: Sequence[LogitsProcessor]) -> TensorType:
    """What the first processor takes."""
    if not processors:
        return TensorType.LOGITS
    _check_processor(0, processors[0])
    takes = []
    for kind in INPUTS:
        try:
            processors[0].legalize(kind)
        except ValueError:
            continue
        takes.append(kind)
    if len(takes) != 1:
        what = "both logits and probabilities" if takes else "neither logits nor probabilities"
        raise LegalizationError(f"processor 0 is {processors[0]!r}, which takes {what}. Say by input_type what the pipe gets.")
    return takes[0]
