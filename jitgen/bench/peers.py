"""Who is timed: one function per contender that turns a problem into a call, or raises with the reason."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from jitgen.bench.config import BenchConfig
from jitgen.bench.workloads import Hooks, Problem, causal

Prepared = Callable[[], torch.Tensor]


class Unsupported(Exception):
    """The contender cannot do this problem; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A contender. ``prepare`` may compile; the call it returns yields [batch, heads, length, head_dim]."""

    name: str
    prepare: Callable[[Problem], Prepared]
    devices: tuple[str, ...] = ("cuda",)
    distributions: tuple[str, ...] = ()  # packages whose versions are reported
    is_slow_to_start: bool = False  # compiles for minutes: left out by --quick


# ---- ours -----------------------------------------------------------------------------------------------------------


def prepare_jitgen(problem: Problem, family: str | None) -> Prepared:
    """jitgen.attention with the problem's hooks as one Variant."""
    import jitgen

    hooks = problem.hooks
    if hooks.with_sorted is not None:
        hooks = hooks.with_sorted(jitgen.sorted)
    parts = {"score_mod": hooks.score_mod, "mask_mod": hooks.mask_mod, "sink": hooks.sink}
    given = {name: part for name, part in parts.items() if part is not None}
    variant = jitgen.Variant(**given) if given else None
    q, k, v = problem.q, problem.k, problem.v
    return lambda: jitgen.attention(q, k, v, variant, family=family)


def jitgen_peers(families: tuple[str, ...]) -> list[Peer]:
    """One contender per kernel family; "auto", or none named, is the family that jitgen chooses by itself."""
    peers = []
    for family in families or ("auto",):
        name, forced = ("jitgen", None) if family == "auto" else (f"jitgen-{family}", family)
        peers.append(Peer(name, partial(prepare_jitgen, family=forced), ("cpu", "cuda")))
    return peers


def prepare_ragged(problem: Problem) -> Prepared:
    """Documents as requests of their own, by jitgen.ragged_attention: what a mask over them competes with."""
    import jitgen

    cell, hooks = problem.cell, problem.hooks
    if not hooks.documents:
        raise Unsupported("for documents only: the others have no requests")
    q, k, v = packed(problem)
    starts, longest = sequence_starts(problem), max(hooks.documents)
    plan = jitgen.Plan(
        len(starts) - 1, len(q), cell.num_q_heads, cell.num_kv_heads, cell.head_dim, dtype=q.dtype, device=q.device,
        layout="ragged", variant=causal, max_q_len=longest, max_kv_len=longest,
    )  # fmt: skip
    plan.update(starts, kv_indptr=starts)
    return lambda: unpacked(problem, jitgen.ragged_attention(q, k, v, plan))


RAGGED = Peer("jitgen-ragged", prepare_ragged, ("cpu", "cuda"))


def packed(problem: Problem) -> tuple[torch.Tensor, ...]:
    """q, k, v as [tokens, heads, head_dim], the sequences one behind the other."""
    return tuple(t.flatten(0, 1) for t in heads_last(problem))


def unpacked(problem: Problem, out: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_dim] as [batch, heads, length, head_dim]."""
    return out.unflatten(0, (problem.cell.batch, problem.cell.length)).transpose(1, 2)


def sequence_starts(problem: Problem, *, of_keys: bool = False) -> torch.Tensor:
    """First tokens of what attention stays within, and their number: documents, or whole sequences."""
    cell = problem.cell
    lengths = problem.hooks.documents or (cell.kv_length if of_keys else cell.length,)
    ends = torch.tensor(lengths * cell.batch).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(problem.q.device, torch.int32)


# ---- torch ----------------------------------------------------------------------------------------------------------


def prepare_sdpa(problem: Problem, backend: str | None) -> Prepared:
    """torch.nn.functional.scaled_dot_product_attention with one backend; None leaves the choice to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    hooks, q, k, v = problem.hooks, problem.q, problem.k, problem.v
    if not hooks.is_builtin or hooks.softcap is not None or hooks.window_left is not None:
        raise Unsupported("SDPA's fused kernels have no such score or mask")
    call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=hooks.is_causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call
    chosen = getattr(SDPBackend, backend)

    def with_backend() -> torch.Tensor:
        with sdpa_kernel(chosen):
            return call()

    return with_backend


# Of a captured tensor: past them the Triton kernel of torch 2.11 reads outside of it (pytorch/pytorch#187904), and the CUDA
# context of everyone is lost.
FLEX_ELEMENTS = 2**31


def refuse_large_captures(hooks: Hooks) -> None:
    """Raise where a tensor in the closures of the hooks is too large for FlexAttention's offsets."""
    functions = [f for f in (hooks.score_mod, hooks.mask_mod) if f is not None]
    captured = [cell.cell_contents for f in functions for cell in f.__closure__ or ()]
    largest = max((t.numel() for t in captured if isinstance(t, torch.Tensor)), default=0)
    if largest > FLEX_ELEMENTS:
        raise Unsupported(f"illegal memory access: a captured tensor has {largest} elements, its offsets have 32 bits")


def prepare_flex(problem: Problem) -> Prepared:
    """torch.compile(flex_attention); its BlockMask is built beforehand and not timed."""
    from torch.nn.attention import flex_attention as flex

    hooks, q, k, v = problem.hooks, problem.q, problem.k, problem.v
    if q.is_cuda:
        refuse_large_captures(hooks)
    for limit in ("recompile_limit", "accumulated_recompile_limit"):  # one compilation per variant and shape
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 4096)
    length, device, gqa = problem.cell.length, str(q.device), q.shape[1] != k.shape[1]
    block_mask = None
    if hooks.mask_mod is not None:
        block_mask = flex.create_block_mask(hooks.mask_mod, None, None, length, length, device=device)
    options: dict[str, Any] = {"score_mod": hooks.score_mod, "block_mask": block_mask, "enable_gqa": gqa}
    if hooks.sink is None:
        return partial(torch.compile(flex.flex_attention, dynamic=False), q, k, v, **options)

    def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        out, lse = flex.flex_attention(q, k, v, return_lse=True, **options)
        return (out * torch.sigmoid(lse - sink[:, None])[..., None]).to(out.dtype)

    return partial(torch.compile(with_sink, dynamic=False), q, k, v, hooks.sink)


# ---- other libraries ------------------------------------------------------------------------------------------------


def builtin_arguments(problem: Problem, *, takes_documents: bool = False) -> tuple[bool, float, tuple[int, int]]:
    """(causal, softcap or 0, (window_left, window_right)) as the flash-attention packages take them."""
    hooks = problem.hooks
    if not hooks.is_builtin and not (takes_documents and hooks.documents):
        raise Unsupported("no built-in option for this variant")
    window = (-1, -1) if hooks.window_left is None else (hooks.window_left, 0)
    return hooks.is_causal, hooks.softcap or 0.0, window


def heads_last(problem: Problem) -> tuple[torch.Tensor, ...]:
    """q, k, v as [batch, length, heads, head_dim]; copies when the problem lies otherwise."""
    return tuple(t.transpose(1, 2).contiguous() for t in (problem.q, problem.k, problem.v))


def only_output(found: object) -> torch.Tensor:
    """The output of a function that may also return a logsumexp."""
    return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[return-value]


def first_output(found: object) -> torch.Tensor:
    """The same, back as [batch, heads, length, head_dim]."""
    return only_output(found).transpose(1, 2)


def prepare_fa3(problem: Problem) -> Prepared:
    """FlashAttention 3, forward-only package; documents as sequences of different lengths."""
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func

    is_causal, softcap, window = builtin_arguments(problem, takes_documents=True)
    if problem.hooks.documents:
        starts, longest = sequence_starts(problem), max(problem.hooks.documents)
        options = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
        tokens = packed(problem)
        return lambda: unpacked(problem, only_output(flash_attn_varlen_func(*tokens, **options)))
    q, k, v = heads_last(problem)
    return lambda: first_output(flash_attn_func(q, k, v, causal=is_causal, softcap=softcap, window_size=window))


def prepare_fa4(problem: Problem) -> Prepared:
    """FlashAttention 4 (CuTe DSL); compiles on the first call."""
    from flash_attn.cute import flash_attn_func

    is_causal, softcap, window = builtin_arguments(problem)
    options: dict[str, Any] = {"causal": is_causal}
    if softcap:
        options["softcap"] = softcap
    if window != (-1, -1):
        options |= {"causal": False, "window_size": window}
    q, k, v = heads_last(problem)
    return lambda: first_output(flash_attn_func(q, k, v, **options))


def prepare_flashinfer(problem: Problem) -> Prepared:
    """FlashInfer's ragged prefill on its FA3 backend; compiles for minutes the first time."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    is_causal, softcap, (window_left, _) = builtin_arguments(problem, takes_documents=True)
    cell = problem.cell
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=problem.q.device)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
    starts, key_starts = sequence_starts(problem), sequence_starts(problem, of_keys=True)
    wrapper.plan(
        starts, key_starts, cell.num_q_heads, cell.num_kv_heads, cell.head_dim, causal=is_causal, window_left=window_left,
        logits_soft_cap=softcap, q_data_type=problem.q.dtype,
    )  # fmt: skip
    q, k, v = packed(problem)
    return lambda: unpacked(problem, wrapper.run(q, k, v))


# In the order they are listed. SDPA comes first among the peers: the others are compared with the first right output.
PEERS = (
    Peer("sdpa-flash", partial(prepare_sdpa, backend="FLASH_ATTENTION")),
    Peer("sdpa-cudnn", partial(prepare_sdpa, backend="CUDNN_ATTENTION")),
    Peer("sdpa", partial(prepare_sdpa, backend=None), ("cpu",)),
    Peer("fa3", prepare_fa3, distributions=("fa3-fwd",)),
    Peer("fa4", prepare_fa4, distributions=("flash-attn-4",)),
    Peer("flashinfer", prepare_flashinfer, distributions=("flashinfer-python",), is_slow_to_start=True),
    Peer("flex", prepare_flex, ("cpu", "cuda"), ("triton",)),
)


def contenders(config: BenchConfig, *more: Peer) -> tuple[list[Peer], list[str]]:
    """Who takes part, ours first, ``more`` of a suite behind them, and a note on each that could and does not."""
    chosen, notes = [*jitgen_peers(config.families), *more], []
    for peer in PEERS:
        if config.device not in peer.devices or not config.keeps_peer(peer.name):
            continue
        if peer.is_slow_to_start and config.quick:
            notes.append(f"{peer.name}: left out by --quick, it compiles for minutes")
        else:
            chosen.append(peer)
    return chosen, notes


def versions() -> dict[str, str]:
    """Installed versions of torch and of the contenders' packages."""
    found = {"torch": torch.__version__}
    for name in ("jitgen", *(name for peer in PEERS for name in peer.distributions)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
