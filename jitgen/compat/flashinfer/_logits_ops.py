"""Typed steps of a logits pipe, alone or several as one sampling kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from jitgen import sampling
from jitgen.compat.flashinfer.sampling import NO_TOKEN, per_row, tokens_like
from jitgen.errors import UnsupportedOption


class LegalizationError(UnsupportedOption, ValueError):
    """A processor does not take what the one before it yields."""


class CompileError(UnsupportedOption, ValueError):
    """The steps of a pipe do not fit together."""


class TensorType(Enum):
    """What a tensor in a pipe holds."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "indices"


@dataclass(frozen=True)
class TaggedTensor:
    """A tensor and what it holds; torch functions see the tensor."""

    data: torch.Tensor
    type: TensorType

    @staticmethod
    def logits(t: torch.Tensor) -> TaggedTensor:
        """Logits."""
        return TaggedTensor(t, TensorType.LOGITS)

    @staticmethod
    def probs(t: torch.Tensor) -> TaggedTensor:
        """Probabilities."""
        return TaggedTensor(t, TensorType.PROBS)

    @staticmethod
    def indices(t: torch.Tensor) -> TaggedTensor:
        """Tokens."""
        return TaggedTensor(t, TensorType.INDICES)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.data.dtype

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Size of the tensor."""
        return self.data.size() if dim is None else self.data.size(dim)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        return func(*(a.data if isinstance(a, TaggedTensor) else a for a in args), **(kwargs or {}))


# ---- steps ----------------------------------------------------------------------------------------------------------


class Op:
    """A step from tensors of type IN to tensors of type OUT; a subclass says which, and what it does when called."""

    IN: TensorType | None = None
    OUT: TensorType | None = None

    def __init__(self) -> None:
        if self.IN is None or self.OUT is None:
            raise CompileError(f"{type(self).__name__} has no IN or no OUT. Set both to a TensorType.")

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Apply the step."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does when called.")

    def _validate_input_type(self, tensor: TaggedTensor) -> TensorType:
        if tensor.type is not self.IN:
            raise CompileError(f"{self!r} was given {tensor.type.value}. Tag the input as what it is.")
        return self.OUT  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.IN.value} -> {self.OUT.value})"  # type: ignore[union-attr]


class ParameterizedOp(Op):
    """A step with parameters, given when it is made or when the pipe is called."""

    def __init__(self, **default_params: Any) -> None:
        super().__init__()
        self.default_params = default_params

    def _get_param(self, name: str, kwargs: dict[str, Any], required: bool = True) -> Any:
        value = kwargs.pop(name) if name in kwargs else self.default_params.get(name)
        if value is None and required:
            raise CompileError(f"the pipe needs {name}, and the call does not give it. Pass {name}=...")
        return value


class BuiltInOp(ParameterizedOp):
    """A step that jitgen's kernels have; ``parameter`` names what the call gives it."""

    parameter: str | None = None

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Apply this step alone."""
        return FusedOp([self])(tensor, **kwargs)


class TemperatureOp(BuiltInOp):
    """Logits divided by ``temperature``."""

    IN, OUT, parameter = TensorType.LOGITS, TensorType.LOGITS, "temperature"


class SoftmaxOp(BuiltInOp):
    """Logits to probabilities."""

    IN, OUT = TensorType.LOGITS, TensorType.PROBS


class LogitsTopKOp(BuiltInOp):
    """All but the ``top_k`` largest logits at -inf."""

    IN, OUT, parameter = TensorType.LOGITS, TensorType.LOGITS, "top_k"


class ProbsTopKOp(BuiltInOp):
    """All but the ``top_k`` largest probabilities at 0."""

    IN, OUT, parameter = TensorType.PROBS, TensorType.PROBS, "top_k"


class TopPOp(BuiltInOp):
    """All but the smallest set whose mass reaches ``top_p`` at 0."""

    IN, OUT, parameter = TensorType.PROBS, TensorType.PROBS, "top_p"


class MinPOp(BuiltInOp):
    """What has less than ``min_p`` times the largest probability at 0."""

    IN, OUT, parameter = TensorType.PROBS, TensorType.PROBS, "min_p"


class LogitsSampleOp(BuiltInOp):
    """Tokens drawn from logits."""

    IN, OUT = TensorType.LOGITS, TensorType.INDICES


class ProbsSampleOp(BuiltInOp):
    """Tokens drawn from probabilities."""

    IN, OUT = TensorType.PROBS, TensorType.INDICES


class FusedOp(Op):
    """Built-in steps in a row, run as one kernel.

    Errors:  CompileError where one kernel cannot do them in this order.
    """

    def __init__(self, steps: Sequence[BuiltInOp]) -> None:
        self.steps = list(steps)
        self.IN, self.OUT = steps[0].IN, steps[-1].OUT
        super().__init__()
        self.parameters = [step.parameter for step in steps if step.parameter]
        if len(set(self.parameters)) < len(self.parameters) or "temperature" in self.parameters[1:]:
            raise CompileError(f"one kernel cannot do {steps}: it takes each parameter once, and temperature first.")

    @property
    def order(self) -> str:
        """Top-k after top-p keeps what both keep of the whole, which is the joint order."""
        k, p = (self.parameters.index(name) if name in self.parameters else -1 for name in ("top_k", "top_p"))
        is_joint = any(step.default_params.get("joint_topk_topp") for step in self.steps)
        return "joint" if is_joint or 0 <= p < k else "top_k_first"

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Apply the steps."""
        out, x = self._validate_input_type(tensor), tensor.data
        values = {step.parameter: step._get_param(step.parameter, kwargs) for step in self.steps if step.parameter}
        if out is TensorType.INDICES:
            return TaggedTensor(self._draw(x, values, kwargs), out)
        temperature = values.pop("temperature", None)
        if out is TensorType.LOGITS:
            x = x if temperature is None else sampling.process_logits(x, temperature=temperature)
            return TaggedTensor(sampling.mask_logits(x, top_k=values["top_k"]) if values else x, out)
        if self.IN is TensorType.LOGITS:
            x = sampling.softmax(x, temperature=temperature)
        return TaggedTensor(sampling.renorm(x, order=self.order, **values) if values else x, out)

    def _draw(self, x: torch.Tensor, values: dict[str, Any], kwargs: dict[str, Any]) -> torch.Tensor:
        draw = self.steps[-1]
        indices, generator, seed, offset = (
            draw._get_param(name, kwargs, required=False) for name in ("indices", "generator", "seed", "offset")
        )
        batch = x.shape[0] if indices is None else indices.shape[0]
        return sampling.sample(
            x, from_logits=self.IN is TensorType.LOGITS, order=self.order, indices=indices, generator=generator,
            seed=per_row(seed, batch, x.device), offset=per_row(offset, batch, x.device, True), bad_token=NO_TOKEN,
            out=tokens_like(indices), **values,
        )  # type: ignore[return-value]  # fmt: skip
