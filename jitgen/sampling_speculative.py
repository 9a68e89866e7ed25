"""Speculative decoding: which draft tokens stay, and the token after them, distributed exactly as the target."""

from __future__ import annotations

from typing import NamedTuple

import torch

from jitgen.checks import as_int32, dtype_name
from jitgen.errors import ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.graphs import sampling_operator
from jitgen.sampling_checks import check_output, check_rows
from jitgen.sampling_launch import address, get_kernel, launch, team_of
from jitgen.sampling_random import Generators, resolve_streams
from jitgen.sampling_spec import NO_PROCESSOR
from jitgen.streams import cuda_index, stream_of

MAX_DRAFT = 62  # one position of the stream for each, and one for the last token


class Verified(NamedTuple):
    """Result of speculative_verify, int32.

    ids [batch, num_draft + 1]: emitted draft tokens, the token drawn after them, then -1. accepted [batch]: draft tokens that
    pass, each looked at by itself. emitted [batch]: draft tokens in ids. path [batch, num_draft]: their numbers, then -1.
    """

    ids: torch.Tensor
    accepted: torch.Tensor
    emitted: torch.Tensor
    path: torch.Tensor


@sampling_operator
def speculative_verify(
    draft_probs: torch.Tensor | None,
    draft_ids: torch.Tensor,
    target_probs: torch.Tensor,
    *,
    parents: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    generator: Generators | None = None,
    advance: bool = False,
    status: torch.Tensor | None = None,
) -> Verified:
    """Verify drafts by rejection sampling, a chain or a tree of tokens per row, in one kernel.

    Draft token i was drawn from draft_probs[:, i], or is certain where draft_probs is None. In a chain each token follows the
    one before. In a tree ``parents`` says what each follows, -1 being the context; siblings are tried in their order, and a
    draft without replacement passes for each the distribution it was drawn from, earlier siblings excluded.

    Shapes:  draft_ids int32 [batch, num_draft], num_draft to 62; draft_probs [batch, num_draft, vocab]; target_probs
             [batch, num_draft + 1, vocab]: after the context, then after each draft token; parents int32 [batch, num_draft],
             each smaller than the token's own number. Probabilities float32, bfloat16 or float16, both the same.
    Units:   seed, offset, advance: as in sample. Draft token i uses position offset + i, the last token offset + 63.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice; CompileError. A row whose last distribution has no token ends
             with -1, and ``status`` (uint8 [batch]) says why. An id outside of the vocabulary is never accepted.
    Cost:    reads draft and target rows where a token is drawn from them: one of each in a chain.
    Source:  speculative sampling (Leviathan et al. 2023); trees: multi-round sampling (Miao et al. 2023).
    """
    check_rows("target_probs", target_probs, 3)
    batch, num_draft, vocab = check_draft(draft_probs, draft_ids, target_probs, parents)
    device = target_probs.device
    streams = resolve_streams(seed, offset, generator, advance, batch, device)
    shapes = ((batch, num_draft + 1), (batch,), (batch,), (batch, num_draft))
    result = Verified(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))
    if status is not None:
        check_output("status", status, (batch,), (torch.uint8,), device)
    if batch == 0:
        return result
    kernel = get_kernel("verify", dtype_name(target_probs.dtype), device, NO_PROCESSOR, from_probs=True)
    draft_ids, parents = (None if t is None else as_int32(t) for t in (draft_ids, parents))
    launch(kernel, device, (
        address(draft_probs), target_probs.data_ptr(), address(draft_ids), address(parents),
        *(t.data_ptr() for t in (result.ids, result.path, result.accepted, result.emitted)), address(status),
        address(streams.seed), streams.seed_value, address(streams.offset), streams.offset_value, streams.advance,
        stream_of(cuda_index(device)), torch.get_num_threads(), team_of(vocab, device), batch, vocab, num_draft,
        *((0, 0) if draft_probs is None else draft_probs.stride()[:2]), *target_probs.stride()[:2],
    ))  # fmt: skip
    return result


def check_draft(
    draft_probs: torch.Tensor | None, draft_ids: torch.Tensor, target_probs: torch.Tensor, parents: torch.Tensor | None
) -> tuple[int, int, int]:
    """Batch, draft length and vocabulary, once all inputs agree on them."""
    batch, rows, vocab = target_probs.shape
    num_draft = rows - 1
    if not 0 <= num_draft <= MAX_DRAFT:
        raise ShapeMismatch(f"target_probs has {rows} rows (axis 1), expected num_draft + 1, num_draft being 0 to {MAX_DRAFT}.")
    if draft_probs is not None:
        check_rows("draft_probs", draft_probs, 3)
        if tuple(draft_probs.shape) != (batch, num_draft, vocab):
            raise ShapeMismatch(
                f"draft_probs has shape {tuple(draft_probs.shape)}, expected {(batch, num_draft, vocab)} to fit target_probs."
            )
        if draft_probs.dtype != target_probs.dtype:
            raise UnsupportedDtype(
                f"draft_probs has dtype {dtype_name(draft_probs.dtype)}, target_probs {dtype_name(target_probs.dtype)}. "
                "Both must match."
            )
    for name, t in (("draft_ids", draft_ids), ("parents", parents)):
        if t is None and name == "parents":
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in (torch.int32, torch.int64):
            what = dtype_name(t.dtype) if isinstance(t, torch.Tensor) else type(t).__name__
            raise UnsupportedDtype(f"{name} is {what}, expected a tensor of int32 or int64.")
        if tuple(t.shape) != (batch, num_draft):
            raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected {(batch, num_draft)} to fit target_probs.")
    for name, t in (("draft_ids", draft_ids), ("draft_probs", draft_probs), ("parents", parents)):
        if t is not None and t.layout is not torch.strided:
            raise UnsupportedDevice(f"{name} has layout {t.layout}, expected torch.strided. Convert it with .to_dense().")
        if t is not None and t.device != target_probs.device:
            raise UnsupportedDevice(
                f"{name} is on {t.device}, target_probs on {target_probs.device}. All must be on one device."
            )
    return batch, num_draft, vocab
