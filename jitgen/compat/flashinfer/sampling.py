"""``flashinfer.sampling``: its functions and their defaults, over jitgen's sampling kernels.

What differs: float32, bfloat16 and float16 are read as they are; per-row seeds and offsets count for their rows; top_k, top_p
and min_p are those of the output row, with ``indices`` too; CPU tensors work. A row that has no token (NaN, no mass) gets 0,
and return_valid says so. ``deterministic``, ``is_deterministic`` and ``enable_pdl`` are hints: results always are.
"""

from __future__ import annotations

import torch

from jitgen import sampling as native
from jitgen.errors import InvalidValue, UnsupportedOption
from jitgen.sampling_speculative import speculative_verify

Number = float | torch.Tensor
Count = int | torch.Tensor
Sampled = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

ORDERS = ("top_k_first", "joint")
NO_TOKEN = 0
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd: rows that share a seed get streams far apart


def softmax(logits: torch.Tensor, temperature: Number | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """Softmax of rows of logits divided by the temperature, in float32."""
    return native.softmax(logits, temperature=temperature)


def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
) -> torch.Tensor:
    """Tokens drawn from the softmax of rows of logits."""
    return _sample(logits, True, indices, generator, check_nan, seed, offset)  # type: ignore[return-value]


def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
    return_valid: bool = False,
) -> Sampled:
    """Tokens drawn from rows of probabilities."""
    return _sample(probs, False, indices, generator, check_nan, seed, offset, return_valid)


def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Number,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
    return_valid: bool = False,
) -> Sampled:
    """Tokens drawn from the smallest set of tokens whose mass reaches top_p."""
    return _sample(probs, False, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Count,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
    return_valid: bool = False,
) -> Sampled:
    """Tokens drawn from the top_k most probable ones."""
    return _sample(probs, False, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Number,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
    return_valid: bool = False,
) -> Sampled:
    """Tokens drawn from those that have at least min_p times the largest probability."""
    return _sample(probs, False, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: Count,
    top_p: Number,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
) -> torch.Tensor:
    """Tokens drawn from logits under top_k and top_p."""
    _check_order(filter_apply_order)
    return _sample(  # type: ignore[return-value]
        logits, True, indices, generator, check_nan, seed, offset, top_k=top_k, top_p=top_p, order=filter_apply_order
    )


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Count,
    top_p: Number,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Count | None = None,
    offset: Count | None = None,
    return_valid: bool = False,
) -> Sampled:
    """Tokens drawn from probabilities under top_k and top_p."""
    _check_order(filter_apply_order)
    return _sample(
        probs,
        False,
        indices,
        generator,
        check_nan,
        seed,
        offset,
        return_valid,
        top_k=top_k,
        top_p=top_p,
        order=filter_apply_order,
    )


def top_p_renorm_probs(probs: torch.Tensor, top_p: Number, is_deterministic: bool = False) -> torch.Tensor:
    """Probabilities with all but the smallest set whose mass reaches top_p set to 0, summing to 1."""
    return native.renorm(probs, top_p=top_p)


def top_k_renorm_probs(probs: torch.Tensor, top_k: Count, is_deterministic: bool = False) -> torch.Tensor:
    """Probabilities with all but the top_k largest set to 0, summing to 1."""
    return native.renorm(probs, top_k=top_k)


def top_k_mask_logits(logits: torch.Tensor, top_k: Count) -> torch.Tensor:
    """Logits with all but the top_k largest set to -inf."""
    return native.mask_logits(logits, top_k=top_k)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: Count | None = None,
    offset: Count | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that speculation emits, and for each row how many draft tokens pass by themselves and how many are emitted.

    Counts are added to the tensors given for them. The token after a rejection is defined even where draft and target agree.
    """
    batch, device = draft_token_ids.shape[0], draft_token_ids.device
    found = speculative_verify(
        draft_probs, draft_token_ids, target_probs, generator=generator,
        seed=per_row(seed, batch, device), offset=per_row(offset, batch, device, True),
    )  # fmt: skip
    counts = []
    for given, own in (
        (maybe_output_accepted_token_num, found.accepted),
        (maybe_output_emitted_draft_token_num, found.emitted),
    ):
        counts.append(own if given is None else given.add_(own))
    return found.ids, counts[0], counts[1]


# ---- common to all ------------------------------------------------------------------------------------------------------


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise UnsupportedOption(f"filter_apply_order={order!r} is not known, expected 'top_k_first' or 'joint'.")


def per_row(value: Count | None, batch: int, device: torch.device, is_offset: bool = False) -> Count | None:
    """A seed or offset as jitgen takes it: one tensor element for all rows becomes one for each."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device=device, dtype=torch.int64).flatten()
    if value.numel() == 1 and batch != 1:
        spread = (
            torch.zeros(batch, dtype=torch.int64, device=device) if is_offset else torch.arange(batch, device=device) * _GOLDEN
        )
        return value + spread
    return value.contiguous()


def _sample(
    x: torch.Tensor,
    from_logits: bool,
    indices: torch.Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Count | None,
    offset: Count | None,
    return_valid: bool = False,
    **filters: object,
) -> Sampled:
    if check_nan and bool(torch.isnan(x).any()):
        raise InvalidValue(f"{'logits' if from_logits else 'probs'} contain NaN, and check_nan is set. Look at what made them.")
    batch = x.shape[0] if indices is None else indices.shape[0]
    return native.sample(
        x, from_logits=from_logits, indices=indices, generator=generator, seed=per_row(seed, batch, x.device),
        offset=per_row(offset, batch, x.device, True), return_valid=return_valid, bad_token=NO_TOKEN,
        out=tokens_like(indices), **filters,
    )  # type: ignore[arg-type]  # fmt: skip


def tokens_like(indices: torch.Tensor | None) -> torch.Tensor | None:
    """Where tokens are written: they have the dtype of ``indices``, and int32 without."""
    is_long = isinstance(indices, torch.Tensor) and indices.dtype == torch.int64
    return torch.empty_like(indices) if is_long else None  # type: ignore[arg-type]
