"""Whether an output deserves a figure: sampled rows against float64, everything against a contender that passed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jitgen.bench.workloads import Problem

# Largest relative error of a row (2-norm over head_dim). Right kernels stay at a fifth of this (e4m3, whose weights keep
# four bits: at half): the weights are rounded to the dtype once before the second product.
TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2, "float8_e4m3fn": 6e-2}
SAMPLED_ROWS = 24


@dataclass(frozen=True)
class Deviation:
    """Largest error of an output: of a row relative to its norm, and of an element."""

    relative: float
    absolute: float


WORST = Deviation(math.inf, math.inf)


def reference_rows(problem: Problem, rows: torch.Tensor, batches: list[int]) -> torch.Tensor:
    """Attention of a few query rows, computed by torch in float64 straight from the definition.

    Shapes:  rows int64 [n]; returns float64 [len(batches), num_q_heads, n, head_dim].
    """
    q, k, v, device = problem.q, problem.k, problem.v, problem.q.device
    group = q.shape[1] // k.shape[1]
    hooks = problem.hooks
    h = torch.arange(q.shape[1], device=device)[:, None, None]
    q_idx, kv_idx = rows[None, :, None], torch.arange(k.shape[2], device=device)[None, None, :]
    outputs = []
    for batch in batches:
        b = torch.tensor(batch, device=device)
        keys, values = (t[batch].double().repeat_interleave(group, 0) for t in (k, v))
        logits = q[batch][:, rows].double() @ keys.transpose(1, 2) * q.shape[3] ** -0.5
        if hooks.score_mod is not None:
            logits = hooks.score_mod(logits, b, h, q_idx, kv_idx)
        if hooks.mask_mod is not None:
            logits = logits.masked_fill(~hooks.mask_mod(b, h, q_idx, kv_idx), -torch.inf)
        if hooks.sink is not None:
            logits = torch.cat([logits, hooks.sink.double()[:, None, None].expand(-1, len(rows), 1)], -1)
        weights = torch.nan_to_num(logits.softmax(-1), nan=0.0)  # a row without keys
        outputs.append(weights[..., : k.shape[2]] @ values)
    return torch.stack(outputs)


def sample_rows(length: int, device: torch.device) -> torch.Tensor:
    """First and last rows, and rows spread over the rest at no fixed stride."""
    spread = torch.randint(0, length, (SAMPLED_ROWS,), generator=torch.Generator().manual_seed(3))
    edges = torch.tensor([0, 1, length // 2, length - 2, length - 1]).clamp(min=0)
    return torch.unique(torch.cat([spread, edges])).to(device)


def deviation(got: torch.Tensor, want: torch.Tensor) -> Deviation:
    """Compare two outputs; NaN anywhere gives infinity."""
    difference = (got.to(want.dtype) - want).abs()
    scale = want.norm(dim=-1)
    # a row whose values cancel out has no meaningful relative error: take at least a hundredth of the typical scale
    floor = scale.mean() * 1e-2 + 1e-30
    relative = (difference.norm(dim=-1) / torch.maximum(scale, floor)).max()
    found = Deviation(float(relative), float(difference.max()))
    return WORST if math.isnan(found.relative) or math.isnan(found.absolute) else found


class Checker:
    """Checks the outputs of all contenders for one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rows = sample_rows(problem.cell.length, problem.q.device)
        self.batches = sorted({0, problem.cell.batch - 1})
        self.reference = reference_rows(problem, self.rows, self.batches)
        self.trusted: torch.Tensor | None = None  # output of the first contender that passed
        self.trusted_name = ""

    def check(self, name: str, output: torch.Tensor) -> tuple[Deviation, str]:
        """Error of an output, and why it is refused; an empty reason means that it is right."""
        want_shape = (*self.problem.q.shape[:3], self.problem.v.shape[3])
        if tuple(output.shape) != want_shape:
            return WORST, f"wrong output: shape {tuple(output.shape)}, expected {want_shape}"
        limit = TOLERANCE[self.problem.cell.dtype]
        found = deviation(output[self.batches][:, :, self.rows], self.reference)
        if not found.relative <= limit:
            return found, f"wrong output: a row is {found.relative:.2g} of its norm off float64, limit {limit:g}"
        if self.trusted is None:
            self.trusted, self.trusted_name = output.clone(), name
            return found, ""
        for batch in range(output.shape[0]):  # one at a time: float32 copies of long sequences are large
            apart = deviation(output[batch].float(), self.trusted[batch].float())
            if not apart.relative <= 2 * limit:
                why = f"wrong output: batch {batch} has a row {apart.relative:.2g} of its norm off {self.trusted_name}"
                return apart, why
        return found, ""


def poison(problem: Problem) -> None:
    """Leave NaN where the output of a problem will be."""
    shape = (*problem.q.shape[:3], problem.v.shape[3])
    poison_memory(shape, problem.q.dtype, problem.q.device)


def poison_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in the memory that the allocator hands out next: an unwritten output must not be a right one's copy."""
    both = [torch.full(tuple(shape), math.nan, dtype=dtype, device=device) for _ in range(2)]
    del both


class OutputChecker:
    """Relative errors of the outputs of one cell's contenders after each other."""

    def __init__(self, rows: torch.Tensor | slice) -> None:
        self._rows = rows
        self._form: tuple[torch.Size, torch.dtype, torch.device] | None = None

    def first(self, call: Callable[[], torch.Tensor], want: torch.Tensor) -> float:
        """Error of a contender's first call."""
        if self._form is not None:
            poison_memory(*self._form)
        output = call()
        self._form = output.shape, output.dtype, output.device
        return self._error(output, want)

    def replayed(self, call: Callable[[], torch.Tensor], want: torch.Tensor) -> float:
        """Error of a call that writes to the same memory each time, as a captured graph does."""
        call().fill_(math.nan)
        return self._error(call(), want)

    def _error(self, output: torch.Tensor, want: torch.Tensor) -> float:
        return deviation(output[self._rows].to(want.dtype), want).relative
