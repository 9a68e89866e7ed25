"""What FlashInfer's attention options mean, as the hooks of a jitgen variant."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jitgen.compat.flashinfer._options import POSITIONS, check_choice
from jitgen.errors import ShapeMismatch
from jitgen.rotary import Rope
from jitgen.variant import Variant

READABLE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of scales that hooks read
Scale = float | torch.Tensor | None


@dataclass(frozen=True)
class Place:
    """Where the rows and keys of a batch stand when its requests are pieces of longer contexts."""

    row_position: torch.Tensor  # [total_q] place of each row in its whole context
    row_start: torch.Tensor  # [batch + 1] first row of each request
    kv_base: torch.Tensor  # [batch] place of a request's first key in the whole context


@dataclass(frozen=True)
class Options:
    """Options of attention that a plan keeps and a call may override."""

    right: int | None = None  # how many keys after its own position a query sees; 0: causal, None: all
    window_left: int = -1  # how many keys before its own position a query sees; -1: all
    logits_soft_cap: float | None = None
    pos_encoding_mode: str = "NONE"
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    bits: torch.Tensor | None = None  # custom mask, little-endian; it takes the place of `right`
    bits_start: torch.Tensor | None = None  # [batch + 1] first byte of each request
    place: Place | None = None
    sees_all: torch.Tensor | None = None  # bool [batch]: requests that `right` does not hold for
    natural_lse: bool = False  # logsumexps of base e

    def __post_init__(self) -> None:
        check_choice("pos_encoding_mode", self.pos_encoding_mode, POSITIONS)

    @property
    def cap(self) -> float | None:
        """The soft cap, if there is one; FlashInfer takes what is not above 0 for none."""
        return self.logits_soft_cap if (self.logits_soft_cap or 0) > 0 else None

    @property
    def rotates(self) -> bool:
        """Whether q and k are to be rotated before attention."""
        return self.pos_encoding_mode == "ROPE_LLAMA"

    @property
    def rope(self) -> tuple[float, float]:
        """Scale and theta of the rotation."""
        return (self.rope_scale or 1.0, self.rope_theta or 1e4)


class Hooks:
    """The hooks of FlashInfer's attention; attributes that are None are left out of the kernel.

    Logits are ``scale * q . k * q_scale * k_scale``, plus the ALiBi bias, then capped. Window and ALiBi read positions, which
    are those of the request unless the options place it in a longer context. ``row`` counts the query rows of a request from
    0, so that a request may have more rows than keys.
    """

    def __init__(self, options: Options, num_q_heads: int, device: torch.device) -> None:
        self.right = options.right if options.bits is None else None
        self.is_causal = self.right == 0
        self.window_left = options.window_left if options.window_left >= 0 else None
        self.bits, self.bits_start = options.bits, options.bits_start
        self.cap = options.cap
        self.slopes = alibi_slopes(num_q_heads, device) if options.pos_encoding_mode == "ALIBI" else None
        self.q_scale: torch.Tensor | None = None  # [num_q_heads]
        self.k_scale: torch.Tensor | None = None  # [num_kv_heads]
        self.v_scale: float | None = None
        self.v_scales: torch.Tensor | None = None  # [num_kv_heads]
        self.place = options.place
        self.sees_all = options.sees_all
        self.natural_lse = options.natural_lse

    def mask_mod(self, b: Any, h: Any, row: Any, kv_idx: Any, *, kv_len: Any, ctx_len: Any) -> Any:
        conditions = []
        if self.bits is not None and self.bits_start is not None:
            bit = row * kv_len + kv_idx
            conditions.append(((self.bits[self.bits_start[b] + (bit >> 3)] >> (bit & 7)) & 1) == 1)
        q_pos, kv_pos = row + ctx_len, kv_idx
        if self.place is not None:
            q_pos, kv_pos = self.placed(b, row, kv_idx)
        if self.is_causal:
            conditions.append(kv_pos <= q_pos if self.sees_all is None else (kv_pos <= q_pos) | self.sees_all[b])
        elif self.right is not None:
            conditions.append(kv_pos - q_pos <= self.right)
        if self.window_left is not None:
            conditions.append(q_pos - kv_pos <= self.window_left)
        return functools.reduce(operator.and_, conditions)

    def placed(self, b: Any, row: Any, kv_idx: Any) -> tuple[Any, Any]:
        """Places of a query and a key in the whole context that the request is a piece of."""
        assert self.place is not None
        return self.place.row_position[self.place.row_start[b] + row], self.place.kv_base[b] + kv_idx

    def score_mod(self, score: Any, b: Any, h: Any, row: Any, kv_idx: Any, *, kv_h: Any) -> Any:
        if self.q_scale is not None:
            score = score * self.q_scale[h]
        if self.k_scale is not None:
            score = score * self.k_scale[kv_h]
        if self.slopes is not None:
            # FlashInfer's bias lacks the shift of the query by kv_len - q_len
            q_pos, kv_pos = (row, kv_idx) if self.place is None else self.placed(b, row, kv_idx)
            score = score + self.slopes[h] * (kv_pos - q_pos)
        if self.cap is not None:
            score = self.cap * torch.tanh(score / self.cap)
        return score

    def output_transform(self, o: Any, lse: Any, b: Any, h: Any, q_idx: Any, *, kv_h: Any) -> Any:
        return o * (self.v_scale if self.v_scales is None else self.v_scales[kv_h])

    def lse_transform(self, lse: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return lse * 1.4426950408889634  # log2(e): FlashInfer's logsumexps have base 2

    @property
    def mask_numbers(self) -> tuple[int | None, int | None]:
        """Numbers that the mask reads: a plan is made for one pair of these."""
        return (self.right, self.window_left)

    @property
    def mask_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that the mask reads, by the names under which it captures them: lengths are planned with these."""
        found = {"bits": self.bits, "bits_start": self.bits_start, "sees_all": self.sees_all}
        if self.place is not None and (self.right is not None or self.window_left is not None):
            found |= vars(self.place)
        return {name: t for name, t in found.items() if t is not None}

    def variant(
        self,
        sinks: torch.Tensor | None = None,
        mask_mod: Callable[..., Any] | None = None,
        turns_keys: tuple[float, float] | None = None,
    ) -> Variant:
        """The variant of these hooks, without those that would do nothing; ``mask_mod`` takes the place of their mask, and keys
        are rotated with the scale and theta of ``turns_keys`` as they are read."""
        masks = (self.right, self.window_left, self.bits)
        scores = (self.q_scale, self.k_scale, self.slopes, self.cap)
        outputs = (self.v_scale, self.v_scales)
        return Variant(
            mask_mod=self.mask_mod if mask_mod is None and any(x is not None for x in masks) else mask_mod,
            score_mod=self.score_mod if any(x is not None for x in scores) else None,
            output_transform=self.output_transform if any(x is not None for x in outputs) else None,
            lse_transform=None if self.natural_lse else self.lse_transform,
            sink=sinks,
            k_transform=None if turns_keys is None else key_rotation(*turns_keys),
            q_index="local",
        )


@functools.lru_cache(maxsize=64)
def key_rotation(scale: float, theta: float) -> Callable[..., Any]:
    """A transform that turns a key to its position; the same object for the same rotation, as it is known by that."""
    rope = Rope(theta=theta, scale=scale)

    def turned(k: Any, b: Any, kv_h: Any, pos: Any) -> Any:
        return rope(k, pos)

    return turned


@functools.lru_cache(maxsize=64)
def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Slope of each head: ``2^(-8 i / n)`` for the first n heads, n the largest power of two, then ``2^(-4 (2 j - 1) / n)``.

    Shapes:  float32 [num_heads].
    """
    n = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * (2 * j - 1) / n) for j in range(1, num_heads - n + 1)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def softmax_scale(options: Options, head_dim: int, *scales: Scale) -> float:
    """Factor of q . k: the planned scale times those of the inputs that are numbers."""
    scale = 1 / math.sqrt(head_dim) if options.sm_scale is None else float(options.sm_scale)
    for s in scales:
        number = as_number(s)
        scale *= 1.0 if number is None else number
    return scale


def as_number(scale: Scale) -> float | None:
    """A scale that the host knows, as a float; None for one that is absent or lies in a tensor of several or on a GPU."""
    if isinstance(scale, torch.Tensor):
        return float(scale) if scale.numel() == 1 and scale.device.type == "cpu" else None
    return None if scale is None else float(scale)


def per_head(name: str, scale: Scale, num_heads: int, device: torch.device) -> torch.Tensor | None:
    """A scale that the host does not know, for each head; None if it is a number.

    Shapes:  scale of one element or [num_heads]; returns [num_heads], the same memory where kernels read its dtype.
    """
    if not isinstance(scale, torch.Tensor) or as_number(scale) is not None:
        return None
    if scale.numel() not in (1, num_heads):
        raise ShapeMismatch(f"{name} has shape {tuple(scale.shape)}, expected one number or [{num_heads}], one for each head.")
    if scale.device != device:
        raise ShapeMismatch(f"{name} is on {scale.device}, q is on {device}. Both must be on one device.")
    if scale.dtype not in READABLE:
        scale = scale.float()
    return scale.reshape(-1).expand(num_heads)


def hooks_for(
    options: Options,
    num_q_heads: int,
    num_kv_heads: int,
    device: torch.device,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Hooks:
    """The hooks of a call: its options, and the scales of its inputs that softmax_scale does not take."""
    hooks = Hooks(options, num_q_heads, device)
    hooks.q_scale = per_head("q_scale", q_scale, num_q_heads, device)
    hooks.k_scale = per_head("k_scale", k_scale, num_kv_heads, device)
    hooks.v_scale = as_number(v_scale)
    if hooks.v_scale == 1.0:
        hooks.v_scale = None
    hooks.v_scales = per_head("v_scale", v_scale, num_kv_heads, device)
    return hooks


def check_sinks(sinks: torch.Tensor | None, num_q_heads: int, device: torch.device) -> None:
    """Sinks are one float32 logit for each query head."""
    if sinks is None:
        return
    if sinks.shape != (num_q_heads,) or sinks.dtype != torch.float32 or sinks.device != device:
        raise ShapeMismatch(
            f"sinks has shape {tuple(sinks.shape)}, dtype {sinks.dtype} on {sinks.device}, expected float32 [{num_q_heads}] on "
            f"{device}: one natural logit for each query head."
        )
