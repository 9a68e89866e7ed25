"""The mask that transformers hands to the layers of a model: functions of positions, as hooks of the layers' calls."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.attention.flex_attention import BlockMask

from jitgen.compat.transformers._hooks import is_zero, one_mask

Mask = Callable[..., Any]


class ModelMask(BlockMask):
    """A mask of a model as a function of positions, and the lengths that it is for; no tensor of [q_len, kv_len].

    transformers passes on what is a BlockMask as it finds it, which is why this is one; it has no block lists. To code that
    computes with it, it is the tensor that such a model has otherwise: the boolean one of ``sdpa``, or the one of ``eager``,
    which is added to scores, where the model knows no ``sdpa``. See ``dense()``.
    """

    def __init__(
        self,
        pattern: Mask | None,
        padding: Mask | None,
        shape: tuple[int, int, int],
        offsets: tuple[Any, Any],
        device: torch.device,
        *,
        has_unwritten: bool,
        config: Any = None,
        score_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> None:
        self.pattern = pattern  # what the model hides from a query; None: nothing
        self.padding = padding
        self.batch, self.q_length, self.kv_length = shape
        self.q_offset, self.kv_offset = offsets  # positions of the first query and key
        self.device = device
        self.variant = variant  # the name it was registered under, if there is one
        self.config, self.score_dtype = config, score_dtype  # of the model whose code may compute with the mask, and in what
        self.has_unwritten = has_unwritten  # keys behind the last query may be room of a cache that nothing was written to
        self._hooks: dict[tuple[bool, bool], Mask | None] = {}  # made, for the layers that follow

    def hook(self, *, local: bool, replaced: bool = False) -> Mask | None:
        """The mask over row numbers from 0 on, or with ``local`` False as jitgen.attention counts, and over key numbers.

        With ``replaced`` the pattern is left out, and what is no key at all is not.
        """
        if is_compiling():
            return self._made(local, replaced)
        asked = local, replaced
        if asked not in self._hooks:
            self._hooks[asked] = self._made(local, replaced)
        return self._hooks[asked]

    def _made(self, local: bool, replaced: bool) -> Mask | None:
        parts = [part for part in (None if replaced else self.pattern, self.padding) if part is not None]
        if replaced and self.has_unwritten:
            parts.append(written(self.q_offset + self.q_length))
        mask = one_mask(parts)
        return None if mask is None else shifted(mask, *self.shifts(local))

    @property
    def is_aligned(self) -> bool:
        """Whether the last query has the position of the last key, as jitgen.attention counts them."""
        is_known = not isinstance(self.q_offset, torch.Tensor)
        return is_known and self.q_offset + self.q_length == self.kv_offset + self.kv_length

    def shifts(self, local: bool) -> tuple[Any, Any]:
        """What to add to the q_idx and kv_idx of a call to have positions."""
        return (self.q_offset if local else self.kv_offset), self.kv_offset

    def dense(self) -> torch.Tensor:
        """The mask as a tensor.

        Shapes:  [batch, 1, q_length, kv_length]: bool, or numbers to add to scores, as the code of the model expects.
        """
        b, q, kv = (torch.arange(n, device=self.device) for n in (self.batch, self.q_length, self.kv_length))
        b, q, kv = b[:, None, None, None], q[:, None], kv[None, :]
        hook = self.hook(local=True)
        found = torch.ones((), dtype=torch.bool, device=self.device) if hook is None else hook(b, torch.zeros_like(b), q, kv)
        if self.config is not None and adds_masks(type(self.config).__module__, type(self.config).__name__):
            if self.variant is not None and not is_compiling():
                warn_of_unused(self.variant, type(self.config).__name__)
            found = torch.where(found, 0.0, torch.finfo(self.score_dtype).min).to(self.score_dtype)
        return found.expand(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, 1, self.q_length, self.kv_length

    def to(self, *where: Any, **options: Any) -> ModelMask | torch.Tensor:
        """The mask with what it captures on another device, itself if it is there already; as another dtype, the tensor."""
        given = [value for value in (*where, *options.values()) if value is not None and not isinstance(value, bool)]
        if len(given) != 1 or not isinstance(given[0], str | int | torch.device):
            return self.dense().to(*where, **options)
        device = torch.device(given[0])
        if device == self.device:
            return self
        pattern, padding, q_offset = (moved(part, device) for part in (self.pattern, self.padding, self.q_offset))
        shape = self.batch, self.q_length, self.kv_length
        offsets = q_offset, self.kv_offset
        whose = {"config": self.config, "score_dtype": self.score_dtype, "variant": self.variant}
        return ModelMask(pattern, padding, shape, offsets, device, has_unwritten=self.has_unwritten, **whose)

    def __getitem__(self, index: Any) -> torch.Tensor:  # type: ignore[override]
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in dir(torch.Tensor):
            raise AttributeError(f"ModelMask has no attribute {name!r}")
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(as_tensor, args), **{name: as_tensor(value) for name, value in (kwargs or {}).items()})

    def __and__(self, other: Any) -> torch.Tensor:
        return self.dense() & as_tensor(other)

    def __or__(self, other: Any) -> torch.Tensor:
        return self.dense() | as_tensor(other)

    def __invert__(self) -> torch.Tensor:
        return ~self.dense()

    def __repr__(self) -> str:
        return f"ModelMask(shape={self.shape}, q_offset={self.q_offset}, kv_offset={self.kv_offset})"

    __str__ = __repr__
    __rand__, __ror__ = __and__, __or__


def as_tensor(value: Any) -> Any:
    """A ModelMask as the tensor that it stands for, in a list too; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(map(as_tensor, value))
    return value.dense() if isinstance(value, ModelMask) else value


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Mask | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    **others: Any,
) -> ModelMask | torch.Tensor:
    """What transformers' AttentionMaskInterface calls for the mask of a forward pass.

    Shapes:  attention_mask bool [batch, length]: False at padding; positions behind its end are hidden.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    pattern = causal_mask_function if mask_function is None else mask_function
    padding = None if attention_mask is None else padding_hook(attention_mask, kv_length, kv_offset)
    mask = ModelMask(
        None if pattern is bidirectional_mask_function else pattern,
        padding,
        (batch_size, q_length, kv_length),
        (q_offset, kv_offset),
        torch.device(device),
        has_unwritten=allow_is_bidirectional_skip is None,  # only given for masks that see both ways
        config=config,
        score_dtype=dtype,
        variant=variant,
    )
    return mask.dense() if getattr(config, "model_type", None) in LEAVE_BLOCK_MASKS_OUT else mask


# Models whose code combines the mask with its own, but for a BlockMask, which it drops.
LEAVE_BLOCK_MASKS_OUT = ("doge",)


@torch.compiler.assume_constant_result
def adds_masks(module: str, config: str) -> bool:
    """Whether the code of models with a config of this name, where it computes attention itself, adds its mask to the scores:
    as ``eager`` does, which is all that it has without ``sdpa``. ``module``: that of the config, beside which models are."""
    beside = f"{module.rpartition('.')[0]}.modeling_"
    kinds = [kind for name, found in list(sys.modules.items()) if name.startswith(beside) for kind in vars(found).values()]
    models = [kind for kind in kinds if getattr(getattr(kind, "config_class", None), "__name__", None) == config]
    return bool(models) and not any(getattr(model, "_supports_sdpa", True) for model in models)


@lru_cache
def warn_of_unused(variant: str, config: str) -> None:
    """Say, once, that a model does not ask for the attention that was registered."""
    warnings.warn(
        f"a model of {config} computes attention itself and does not ask for {variant!r}: its variant has no effect there.",
        stacklevel=2,
    )


def padding_hook(attention_mask: torch.Tensor, kv_length: int, kv_offset: Any) -> Mask | None:
    """A mask that hides padding. Where its values may be looked at: None without padding, else bounds of what is real, which
    tell whole tiles from partial ones, unless there is padding in between."""
    from transformers.masking_utils import padding_mask_function, prepare_padding_mask

    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if is_compiling() or (padding.is_cuda and torch.cuda.is_current_stream_capturing()):
        return padding_mask_function(padding)  # type: ignore[no-any-return]
    count, length = padding.sum(1, dtype=torch.int32), padding.shape[1]
    first = padding.int().argmax(1).to(torch.int32)
    end = first + count
    position = torch.arange(length, device=padding.device)
    is_run = (padding == ((position >= first[:, None]) & (position < end[:, None]))).all()
    has_none, is_one_run = torch.stack([(count == length).all(), is_run]).tolist()
    if has_none:
        return None
    return between(first, end) if is_one_run else padding_mask_function(padding)


def between(first: torch.Tensor, end: torch.Tensor) -> Mask:
    """Keys from ``first`` of their sequence up to ``end``."""

    def is_real(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx >= first[b]) & (kv_idx < end[b])

    return is_real


def written(end: Any) -> Mask:
    """Keys up to ``end``."""

    def is_written(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return kv_idx < end

    return is_written


def shifted(mask: Mask, q_shift: Any, kv_shift: Any) -> Mask:
    """A mask over positions as one over the row and key numbers of a call.

    Plain, where at_positions makes a signature for any hook: Dynamo runs this, and could not make one.
    """
    if is_zero(q_shift) and is_zero(kv_shift):
        return mask

    def over_numbers(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return mask(b, h, q_idx + q_shift, kv_idx + kv_shift)

    return over_numbers


def moved(value: Any, device: torch.device) -> Any:
    """A function made anew over what it captures, with tensors on another device; a tensor there; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)([moved(item, device) for item in value])
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    cells = tuple([types.CellType(moved(cell.cell_contents, device)) for cell in value.__closure__])
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    return made
