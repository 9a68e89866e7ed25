"""Logit processors that everyone needs, written as any user's: token bitmasks and penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jitgen.checks import check_is_tensor
from jitgen.errors import InvalidType, InvalidValue, ShapeMismatch, UnsupportedDtype
from jitgen.sampling_hooks import Processor

COUNT_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Penalties:
    """Penalties on tokens that were seen: a logit processor that is fused into the sampling kernel.

    ``counts`` says how often each token is in the output so far; ``prompt`` marks tokens of the prompt, which repetition
    penalises as well. In this order: a seen token's logit is divided by ``repetition`` if positive, else multiplied by it;
    then ``frequency`` times the count is subtracted; then ``presence``, if the count is not 0.

    Shapes:  counts [batch, vocab] uint8, int16, int32 or int64 (the smaller, the less is read); prompt [batch, vocab] bool;
             each penalty a number or a tensor [batch] of float32.
    """

    counts: torch.Tensor
    prompt: torch.Tensor | None = None
    repetition: float | torch.Tensor = 1.0
    frequency: float | torch.Tensor = 0.0
    presence: float | torch.Tensor = 0.0

    def __post_init__(self) -> None:
        check_is_tensor(counts=self.counts)
        if self.counts.dim() != 2:
            raise ShapeMismatch(f"counts has shape {tuple(self.counts.shape)}, expected [batch, vocab].")
        if self.counts.dtype not in COUNT_DTYPES:
            raise UnsupportedDtype(f"counts has dtype {str(self.counts.dtype)[6:]}, expected an integer type such as int32.")
        if self.prompt is not None:
            check_is_tensor(prompt=self.prompt)
        if self.prompt is not None and self.prompt.dtype != torch.bool:
            raise UnsupportedDtype(f"prompt has dtype {str(self.prompt.dtype)[6:]}, expected bool. Compare it with 0.")
        for name in ("repetition", "frequency", "presence"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected a number or a tensor [batch].")
            if name == "repetition" and not value > 0:
                raise InvalidValue(f"repetition is {value!r}, expected a number above 0: logits are divided by it. 1 is none.")
            if math.isnan(value):
                raise InvalidValue(f"{name} is {value!r}, expected a number. 0 is none.")
            object.__setattr__(self, name, float(value))

    def processor(self) -> Processor:
        """The penalties as a function (logit, token, row) -> logit."""
        counts, prompt = self.counts, self.prompt
        repetition, frequency, presence = map(per_row, (self.repetition, self.frequency, self.presence))
        if prompt is None:

            def penalise(logit: Any, token: Any, row: Any) -> Any:
                count = counts[row, token]
                factor = repetition(row)
                logit = torch.where(count > 0, torch.where(logit > 0, logit / factor, logit * factor), logit)
                return logit - frequency(row) * count - torch.where(count > 0, presence(row), 0.0)

            return penalise

        def penalise_with_prompt(logit: Any, token: Any, row: Any) -> Any:
            count = counts[row, token]
            factor = repetition(row)
            seen = (count > 0) | prompt[row, token]
            logit = torch.where(seen, torch.where(logit > 0, logit / factor, logit * factor), logit)
            return logit - frequency(row) * count - torch.where(count > 0, presence(row), 0.0)

        return penalise_with_prompt


def per_row(value: float | torch.Tensor) -> Callable[[Any], Any]:
    """A parameter as a function of the row."""
    if isinstance(value, torch.Tensor):
        return lambda row: value[row]
    return lambda row: value


def bitmask_processor(bitmask: torch.Tensor, vocab: int) -> Processor:
    """Tokens whose bit is 0 get -inf; bit i of word w is token 32 w + i, as grammar engines write it.

    Shapes:  bitmask [batch, ceil(vocab / 32)] int32.
    """
    check_is_tensor(bitmask=bitmask)
    words = (vocab + 31) // 32
    if bitmask.dim() != 2 or bitmask.shape[1] < words:
        raise ShapeMismatch(f"bitmask has shape {tuple(bitmask.shape)}, expected [batch, {words}]: a bit for each token.")
    if bitmask.dtype != torch.int32:
        raise UnsupportedDtype(f"bitmask has dtype {str(bitmask.dtype)[6:]}, expected int32.")

    def allow(logit: Any, token: Any, row: Any) -> Any:
        return torch.where((bitmask[row, token // 32] >> (token % 32)) & 1 != 0, logit, -torch.inf)

    return allow


def processors_of(
    vocab: int,
    penalties: Penalties | None,
    processor: Processor | Sequence[Processor] | None,
    bitmask: torch.Tensor | None,
) -> tuple[Processor, ...]:
    """All processors of a call in their order: penalties, the user's, bitmask."""
    if penalties is not None and not isinstance(penalties, Penalties):
        raise InvalidType(f"penalties is {penalties!r} of type {type(penalties).__name__}, expected a jitgen.Penalties.")
    found: list[Processor] = [] if penalties is None else [penalties.processor()]
    if processor is not None:
        found += list(processor) if isinstance(processor, (list, tuple)) else [processor]
    if bitmask is not None:
        found.append(bitmask_processor(bitmask, vocab))
    return tuple(found)
