"""``flashinfer.logits_processor``: pipelines of logit processors, run as one sampling kernel where they end in a token.

What differs: nothing is compiled when a pipe is made, and fusion needs no rules; custom rules and validity checks are refused.
A processor of the user's own is a Python function: give it to jitgen.sample as ``processor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from jitgen import sampling
from jitgen.compat.flashinfer.sampling import NO_TOKEN, per_row
from jitgen.errors import UnsupportedOption


class TensorType(Enum):
    """What a tensor in a pipe holds."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "indices"


@dataclass(frozen=True)
class TaggedTensor:
    """A tensor and what it holds."""

    data: torch.Tensor
    type: TensorType

    @classmethod
    def logits(cls, data: torch.Tensor) -> TaggedTensor:
        """Logits."""
        return cls(data, TensorType.LOGITS)

    @classmethod
    def probs(cls, data: torch.Tensor) -> TaggedTensor:
        """Probabilities."""
        return cls(data, TensorType.PROBS)


class LogitsProcessor:
    """A step of a pipe; ``parameter`` names the keyword of the call that it reads."""

    parameter: str | None = None
    takes: tuple[TensorType, ...] = (TensorType.LOGITS, TensorType.PROBS)

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


class Temperature(LogitsProcessor):
    """Divides logits by ``temperature``."""

    parameter, takes = "temperature", (TensorType.LOGITS,)


class Softmax(LogitsProcessor):
    """Logits to probabilities."""

    takes = (TensorType.LOGITS,)

    def __init__(self, enable_pdl: bool | None = None, **options: Any) -> None:
        super().__init__(**options)


class TopK(LogitsProcessor):
    """Keeps the ``top_k`` largest. With joint_topk_topp a TopP after it counts from the whole distribution."""

    parameter = "top_k"

    def __init__(self, joint_topk_topp: bool = False, **options: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **options)


class TopP(LogitsProcessor):
    """Keeps the smallest set whose mass reaches ``top_p``."""

    parameter, takes = "top_p", (TensorType.PROBS,)


class MinP(LogitsProcessor):
    """Keeps what has at least ``min_p`` times the largest probability."""

    parameter, takes = "min_p", (TensorType.PROBS,)


class Sample(LogitsProcessor):
    """Draws a token; ends the pipe."""

    def __init__(self, deterministic: bool = True, **options: Any) -> None:
        super().__init__(**options)


@dataclass
class _Plan:
    """What the steps of a pipe ask for together."""

    start: TensorType
    kind: TensorType
    steps: list[str] = field(default_factory=list)  # parameters of the filters, in order
    is_joint: bool = False
    has_temperature: bool = False

    @property
    def order(self) -> str:
        """Top-k after top-p keeps what both keep of the whole, which is the joint order."""
        later = "top_k" in self.steps and "top_p" in self.steps and self.steps.index("top_p") < self.steps.index("top_k")
        return "joint" if self.is_joint or later else "top_k_first"


class LogitsPipe:
    """Steps applied in order: ``pipe(x, temperature=..., top_k=..., top_p=..., min_p=..., generator=..., seed=...)``.

    Errors:  UnsupportedOption when the steps do not fit together or a parameter is missing.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: object = None,
        custom_validity_checks: object = None,
    ) -> None:
        if custom_fusion_rules or custom_validity_checks:
            raise UnsupportedOption(
                "custom_fusion_rules and custom_validity_checks are not supported: every pipe is one kernel already. "
                "Write what is special about yours as a function (logit, token, row) for jitgen.sample(processor=...)."
            )
        if not processors:
            raise UnsupportedOption("a LogitsPipe needs at least one processor, for example [Softmax(), TopP(), Sample()].")
        self.processors = list(processors)
        for i, step in enumerate(self.processors):
            if not isinstance(step, LogitsProcessor):
                raise UnsupportedOption(
                    f"processor {i} is {step!r}, expected one of Temperature, Softmax, TopK, TopP, MinP, Sample."
                )
        self.input_type = input_type
        self._plan(input_type or self._first_type())

    def _first_type(self) -> TensorType:
        takes = self.processors[0].takes
        followed = any(isinstance(p, (Temperature, Softmax)) for p in self.processors)
        return TensorType.LOGITS if len(takes) == 2 and followed else takes[-1] if len(takes) == 1 else TensorType.PROBS

    def _plan(self, start: TensorType) -> _Plan:
        plan = _Plan(start, start)
        for i, step in enumerate(self.processors):
            if plan.kind not in step.takes:
                raise UnsupportedOption(
                    f"processor {i} is {step!r}, which does not take {plan.kind.value}. Put Softmax() before it."
                )
            if isinstance(step, Softmax):
                plan.kind = TensorType.PROBS
            elif isinstance(step, Sample):
                plan.kind = TensorType.INDICES
            elif isinstance(step, Temperature):
                if plan.has_temperature or plan.steps:
                    raise UnsupportedOption(f"processor {i} is {step!r}, expected it once and before the filters.")
                plan.has_temperature = True
            elif step.parameter in plan.steps:
                raise UnsupportedOption(f"processor {i} is {step!r}, of which there is one already.")
            else:
                plan.steps.append(str(step.parameter))
                plan.is_joint |= bool(step.options.get("joint_topk_topp"))
        return plan

    def __repr__(self) -> str:
        return f"LogitsPipe({' -> '.join(map(repr, self.processors))})"

    def __call__(self, x: torch.Tensor | TaggedTensor, **parameters: Any) -> torch.Tensor:
        """Run the pipe: tokens if it ends in Sample, else probabilities or logits."""
        given = x.type if isinstance(x, TaggedTensor) else self.input_type or self._first_type()
        data = x.data if isinstance(x, TaggedTensor) else x
        plan = self._plan(given)
        filters = {name: self._parameter(name, parameters) for name in plan.steps}
        temperature = self._parameter("temperature", parameters) if plan.has_temperature else None
        from_logits = plan.start is TensorType.LOGITS
        if plan.kind is TensorType.INDICES:
            indices = parameters.get("indices")
            batch = data.shape[0] if indices is None else indices.shape[0]
            return sampling.sample(
                data, from_logits=from_logits, temperature=temperature, order=plan.order, indices=indices,
                generator=parameters.get("generator"), seed=per_row(parameters.get("seed"), batch, data.device),
                offset=per_row(parameters.get("offset"), batch, data.device, True), bad_token=NO_TOKEN, **filters,
            )  # type: ignore[return-value]  # fmt: skip
        if plan.kind is TensorType.LOGITS:
            out = sampling.process_logits(data, temperature=temperature) if plan.has_temperature else data
            return sampling.mask_logits(out, top_k=filters["top_k"]) if filters else out
        probs = sampling.softmax(data, temperature=temperature) if from_logits else data
        return sampling.renorm(probs, order=plan.order, **filters) if filters else probs

    @staticmethod
    def _parameter(name: str, parameters: dict[str, Any]) -> Any:
        if parameters.get(name) is None:
            raise UnsupportedOption(f"the pipe needs {name}, and the call does not give it. Pass {name}=...")
        return parameters[name]
