"""Where the random numbers of a sampling call come from: seeds and offsets given, or taken from a torch generator.

Row r of a call reads Philox4x32-10 with key = seed and counter = (offset + draw, subsequence). A tensor of seeds has one
per row and subsequence 0, so that a row's token depends on its own seed, offset and distribution only. A single seed serves
all rows, told apart by subsequence = r. No call reads more than 64 positions: move offsets by DRAWS_PER_CALL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jitgen.errors import InvalidType, InvalidValue, ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.streams import is_capturing

DRAWS_PER_CALL = 64
_SIGN, _ALL = 2**63, 2**64

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Streams:
    """Seeds and offsets as launch arguments; the tensors are None where one value serves all rows."""

    seed: torch.Tensor | None
    seed_value: int
    offset: torch.Tensor | None
    offset_value: int
    advance: bool


def resolve_streams(
    seed: int | torch.Tensor | None,
    offset: int | torch.Tensor | None,
    generator: Generators | None,
    advance: bool,
    batch: int,
    device: torch.device,
) -> Streams:
    """Streams of a call; without a seed they come from ``generator``, else from torch's default one (torch.manual_seed).

    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice; InvalidValue when arguments exclude each other, or when a CUDA
             graph is captured and every replay would repeat the same numbers.
    """
    if not isinstance(advance, bool):
        raise InvalidType(f"advance is {advance!r} of type {type(advance).__name__}, expected True or False.")
    if seed is None:
        if offset is not None or advance:
            raise InvalidValue("offset and advance need a seed. Pass seed, an int or a tensor [batch] of int64.")
        if is_capturing(device):
            raise InvalidValue(
                "a CUDA graph is being captured without a seed, so every replay would repeat the same draws. "
                "Pass seed and offset tensors and advance=True."
            )
        return _from_generators(generator, batch, device)
    if generator is not None:
        raise InvalidValue("seed and generator were both given. Use one of the two.")
    if advance and not isinstance(offset, torch.Tensor):
        raise InvalidValue(f"advance=True moves offsets in place, but offset is {offset!r}. Pass a tensor [batch] of int64.")
    seeds, seed_value = _per_row("seed", seed, batch, device)
    offsets, offset_value = _per_row("offset", 0 if offset is None else offset, batch, device)
    return Streams(seeds, seed_value, offsets, offset_value, advance)


def _per_row(name: str, value: int | torch.Tensor, batch: int, device: torch.device) -> tuple[torch.Tensor | None, int]:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected an int or a tensor [batch].")
        return None, (value + _SIGN) % _ALL - _SIGN
    if value.dtype not in (torch.int64, torch.uint64):
        raise UnsupportedDtype(f"{name} has dtype {str(value.dtype)[6:]}, expected int64. Convert with .to(torch.int64).")
    if tuple(value.shape) != (batch,) or not value.is_contiguous():
        raise ShapeMismatch(f"{name} has shape {tuple(value.shape)}, expected a contiguous ({batch},): one for each row.")
    if value.device != device:
        raise UnsupportedDevice(f"{name} is on {value.device}, the rows are on {device}. Move it with .to({str(device)!r}).")
    return value, 0


def _from_generators(generator: Generators | None, batch: int, device: torch.device) -> Streams:
    if generator is None or isinstance(generator, torch.Generator):
        seed, offset = next_position(generator)
        return Streams(None, seed, None, offset, False)
    if not isinstance(generator, tuple | list) or not all(isinstance(one, torch.Generator) for one in generator):
        raise InvalidType(f"generator is {generator!r}, expected a torch.Generator, or a list of one for each row.")
    if len(generator) != batch:
        raise ShapeMismatch(f"generator has {len(generator)} entries, expected {batch}: one for each row.")
    positions = [next_position(one) for one in generator]
    seeds, offsets = torch.tensor(positions, dtype=torch.int64, device="cpu").reshape(batch, 2).unbind(1)
    return Streams(seeds.contiguous().to(device), 0, offsets.contiguous().to(device), 0, False)


def next_position(generator: torch.Generator | None) -> tuple[int, int]:
    """Seed and offset for one call; the generator moves on."""
    if generator is not None and generator.device.type == "cuda":
        offset = generator.get_offset()
        generator.set_offset(offset + DRAWS_PER_CALL)
        return (generator.initial_seed() + _SIGN) % _ALL - _SIGN, offset
    return int(torch.randint(-_SIGN, _SIGN - 1, (), dtype=torch.int64, device="cpu", generator=generator)), 0
