"""Sampling without sorting: tokens from logits or probabilities, renormalisation, masks, softmax.

The values of a row at or above a threshold are kept. For a small top_k the largest values are listed; else tokens are drawn,
each from what lies above the last, until one is inside of the filters; where that takes long, and for whole rows, the
threshold is searched in the row held on chip. Values equal to it are all kept: top_k may then keep more than k tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jitgen.checks import dtype_name
from jitgen.errors import InvalidType, InvalidValue, UnsupportedDtype, VariantError
from jitgen.graphs import sampling_operator
from jitgen.sampling_checks import ROW_DTYPES, check_indices, check_output, check_rows, row_parameter
from jitgen.sampling_hooks import Processor, resolve_processors
from jitgen.sampling_launch import address, capture_words, get_kernel, launch, team_of
from jitgen.sampling_processors import Penalties, processors_of
from jitgen.sampling_random import Generators, Streams, resolve_streams
from jitgen.streams import cuda_index, stream_of

ORDERS = ("top_k_first", "joint")
# Status of a row, by code; rows that are not 'ok' have no token.
STATUS = ("ok", "nan", "infinite", "empty", "negative", "no such row")
BAD_TOKEN = -1
_NO_STREAMS = Streams(None, 0, None, 0, False)
_UP = float("inf")
_MOST = 2**31 - 1


@sampling_operator
def sample(
    x: torch.Tensor,
    *,
    from_logits: bool = True,
    temperature: float | torch.Tensor | None = None,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
    order: str = "top_k_first",
    processor: Processor | Sequence[Processor] | None = None,
    penalties: Penalties | None = None,
    bitmask: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    generator: Generators | None = None,
    advance: bool = False,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    bad_token: int = BAD_TOKEN,
    return_valid: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row, in one kernel.

    Logits pass penalties, processor and bitmask, then are divided by the temperature; 0 asks for the largest (ties drawn).
    Filters: top_k (0 or less: off), top_p, min_p (a share of the largest probability). order "top_k_first" lets top_p count
    from what top_k left, "joint" from the whole. ``processor`` is a function (logit, token, row) -> logit, or several.

    Shapes:  x [rows, vocab] float32, bfloat16 or float16, rows at any stride; parameters a number or a tensor [batch]; indices
             [batch] names the row of x for each output (default: its own); returns int32 [batch] (out= may be int64) and, with
             return_valid, bool [batch]. ``status`` uint8 [batch] receives codes, see jitgen.sampling.STATUS.
    Units:   seed, offset: see jitgen.sampling_random. A row's token depends on its seed, offset and distribution only; advance
             adds 64 to the offsets on the device, so that replays of a CUDA graph differ.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, InvalidValue, InvalidType, UnsupportedVariant (of a
             processor), CompileError.
             A row with NaN, infinite, negative or no mass gets bad_token and valid False; it disturbs no other.
    Cost:    compiles once per combination of filters and dtypes; reads x from memory once. Inside torch.compile the call is one
             operator, whatever processors capture there; a generator breaks the graph.
    """
    check_rows("x", x)
    if not isinstance(order, str) or order not in ORDERS:
        raise InvalidValue(f"order is {order!r}, expected 'top_k_first' or 'joint'.")
    if not from_logits and temperature is not None:
        raise VariantError("temperature divides logits, and from_logits is False. Pass logits, or leave it out.")
    if isinstance(bad_token, bool) or not isinstance(bad_token, int):
        raise InvalidType(f"bad_token is {bad_token!r} of type {type(bad_token).__name__}, expected an int.")
    if abs(bad_token) > _MOST:
        raise InvalidValue(f"bad_token is {bad_token}, expected an int of 32 bits.")
    if not isinstance(advance, bool):
        raise InvalidType(f"advance is {advance!r} of type {type(advance).__name__}, expected a bool.")
    rows, batch = check_indices(indices, x.shape[0], x.device)
    out = check_output("out", out, (batch,), (torch.int32, torch.int64), x.device)
    streams = resolve_streams(seed, offset, generator, advance, batch, x.device)
    valid = torch.empty(batch, dtype=torch.bool, device=x.device) if return_valid else None
    run(
        "sample", x, out, from_probs=not from_logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        top_k_first=order == "top_k_first", processors=processors_of(x.shape[1], penalties, processor, bitmask),
        streams=streams, indices=rows, status=status, valid=valid, bad_token=bad_token,
    )  # fmt: skip
    return out if valid is None else (out, valid)


@sampling_operator
def softmax(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor | None = None,
    processor: Processor | Sequence[Processor] | None = None,
    penalties: Penalties | None = None,
    bitmask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities of rows of logits, processed and divided by the temperature on the way; one read and one write.

    Shapes:  logits [rows, vocab]; returns the same shape in ``dtype``. A row that is all -inf yields zeros, one with NaN or
             +inf yields NaN.
    Errors:  as sample.
    """
    check_rows("logits", logits)
    if not isinstance(dtype, torch.dtype) or dtype not in ROW_DTYPES:
        raise UnsupportedDtype(f"dtype is {dtype}, expected one of {', '.join(map(str, ROW_DTYPES))}.")
    out = check_output("out", out, tuple(logits.shape), (dtype,) if out is None else ROW_DTYPES, logits.device)
    processors = processors_of(logits.shape[1], penalties, processor, bitmask)
    run("probs", logits, out, temperature=temperature, processors=processors, status=status)
    return out


@sampling_operator
def renorm(
    probs: torch.Tensor,
    *,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
    order: str = "top_k_first",
    out: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities with what the filters exclude set to 0 and the rest summing to 1.

    Shapes:  probs [rows, vocab], not necessarily normalised; returns the same shape and dtype. A row of zeros stays zeros, one
             with NaN, infinite or negative entries yields NaN.
    Errors:  as sample.
    """
    check_rows("probs", probs)
    if not isinstance(order, str) or order not in ORDERS:
        raise InvalidValue(f"order is {order!r}, expected 'top_k_first' or 'joint'.")
    out = check_output("out", out, tuple(probs.shape), (probs.dtype,), probs.device)
    run(
        "probs", probs, out, from_probs=True, top_k=top_k, top_p=top_p, min_p=min_p, top_k_first=order == "top_k_first",
        status=status,
    )  # fmt: skip
    return out


@sampling_operator
def mask_logits(
    logits: torch.Tensor,
    *,
    top_k: int | torch.Tensor,
    out: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits with all but the top_k largest of each row (and what equals the last of them) set to -inf.

    Shapes:  logits [rows, vocab]; returns the same shape and dtype. A row with NaN or +inf yields NaN.
    Errors:  as sample.
    """
    check_rows("logits", logits)
    out = check_output("out", out, tuple(logits.shape), (logits.dtype,), logits.device)
    run("mask", logits, out, top_k=top_k, status=status)
    return out


@sampling_operator
def process_logits(
    logits: torch.Tensor,
    processor: Processor | Sequence[Processor] | None = None,
    *,
    penalties: Penalties | None = None,
    bitmask: torch.Tensor | None = None,
    temperature: float | torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits after penalties, processor, bitmask and temperature, in this order; ``out`` may be the logits themselves.

    Shapes:  logits [rows, vocab]; returns the same shape and dtype.
    Errors:  as sample.
    """
    check_rows("logits", logits)
    out = check_output("out", out, tuple(logits.shape), (logits.dtype,), logits.device)
    run(
        "process",
        logits,
        out,
        temperature=temperature,
        processors=processors_of(logits.shape[1], penalties, processor, bitmask),
    )
    return out


def run(
    op: str,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    from_probs: bool = False,
    temperature: float | torch.Tensor | None = None,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
    top_k_first: bool = False,
    processors: tuple[Processor, ...] = (),
    streams: Streams = _NO_STREAMS,
    indices: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    bad_token: int = BAD_TOKEN,
) -> None:
    """Launch one operation on checked rows."""
    batch, vocab, device = out.shape[0], x.shape[1], x.device
    if processors and from_probs:
        raise VariantError("processors change logits, and from_logits is False. Pass logits.")
    temperatures, temperature = row_parameter("temperature", temperature, 1.0, (0.0, _UP), batch, device)
    top_ks, k = row_parameter("top_k", top_k, 0, (-_MOST, _MOST), batch, device)
    top_ps, p = row_parameter("top_p", top_p, 1.0, (0.0, 1.0), batch, device)
    min_ps, least = row_parameter("min_p", min_p, 0.0, (0.0, 1.0), batch, device)
    if status is not None:
        check_output("status", status, (batch,), (torch.uint8,), device)
    program, values = resolve_processors(processors)
    words = capture_words(program, values, batch, vocab, device)
    if batch == 0:
        return
    kernel = get_kernel(
        op, dtype_name(x.dtype), device, program, out_dtype="" if op == "sample" else dtype_name(out.dtype),
        from_probs=from_probs, has_top_k=top_k is not None, has_top_p=top_p is not None, has_min_p=min_p is not None,
        top_k_first=top_k_first and top_k is not None and top_p is not None,
    )  # fmt: skip
    launch(kernel, device, (
        x.data_ptr(), out.data_ptr(), address(status), address(valid), address(indices),
        address(temperatures), temperature, address(top_ks), k, address(top_ps), p, address(min_ps), least,
        address(streams.seed), streams.seed_value, address(streams.offset), streams.offset_value, streams.advance, bad_token,
        out.dtype == torch.int64, stream_of(cuda_index(device)), torch.get_num_threads(), team_of(vocab, device), batch,
        x.shape[0], vocab, x.stride(0), out.stride(0) if out.dim() == 2 else 1, *words,
    ))  # fmt: skip


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Logits with -inf for the tokens whose bit is 0, in place unless ``out`` is given.

    Shapes:  logits [batch, vocab]; bitmask [batch, ceil(vocab / 32)] int32, bit i of word w being token 32 w + i.
    Errors:  as sample.
    """
    return process_logits(logits, bitmask=bitmask, out=logits if out is None else out)


def apply_penalties(logits: torch.Tensor, penalties: Penalties, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after the penalties, in place unless ``out`` is given. jitgen.sample(penalties=...) does it on the way.

    Errors:  as sample.
    """
    return process_logits(logits, penalties=penalties, out=logits if out is None else out)
