"""Entering jitgen, plain or with a variant of the user's, into the tables that transformers looks implementations up in."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jitgen.compat.transformers._layer import Attention
from jitgen.compat.transformers._mask import model_mask
from jitgen.errors import InvalidValue, UnsupportedOption, VariantError
from jitgen.signatures import name_of, signature_of
from jitgen.variant import Variant

OLDEST = (5, 17)  # transformers releases that the tests have run with: this one, and the newest when they were written
TAKEN = ("eager", "sdpa", "flex_attention")


def register(
    name: str = "jitgen", variant: Variant | Callable[..., Any] | None = None, *, replace_mask: bool = False
) -> None:
    """Make ``attn_implementation=name`` run a model's attention by jitgen.

    The model's mask (causal, windows, chunks, packed sequences, padding), soft cap, sinks and position bias are hooks of the
    call: tiles that the mask excludes are skipped, and no [q_len, kv_len] mask is made. A model whose own code computes with
    its mask gets the tensor of ``sdpa`` for that, or of ``eager`` where it knows no ``sdpa``.

    variant       hooks on top of the model's: its mask_mod keeps keys among those that the model keeps, its score_mod follows
                  the model's soft cap and bias. A function of one argument is asked for each layer: it is given the module of
                  the layer's attention and returns a Variant, or None to leave the layer as it is.
    replace_mask  the variant's mask takes the place of the model's pattern; padding and unwritten cache stay hidden.

    Units:   q_idx and kv_idx of the hooks are the positions that transformers counts, over the whole cache and any padding.
    Errors:  InvalidValue for a name of transformers' own, or a transformers that is too old; VariantError. The calls: see
             jitgen.attention; UnsupportedOption for dropout, head masks and output_attentions=True; GradNotSupported.
    Cost:    nothing here. A forward pass looks at the padding mask once, which waits for its device, as ``sdpa`` does.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, __version__

    check_version(__version__)
    if not isinstance(name, str) or not name or name in TAKEN or "|" in name or "flash" in name:
        raise InvalidValue(
            f"name is {name!r}, expected one that transformers does not use itself: without 'flash' and '|', and none of "
            f"{', '.join(TAKEN)}. 'jitgen' is one."
        )
    for_layer = chooser(variant)
    if replace_mask and variant is None:
        raise VariantError("replace_mask=True replaces the model's mask by the variant's, and no variant was given.")
    AttentionInterface.register(name, Attention(for_layer, replace_mask))
    AttentionMaskInterface.register(name, model_mask if variant is None else partial(model_mask, variant=name))


def check_version(version: str) -> None:
    """transformers hands masks over as functions of positions, in the form that the shim reads.

    Errors:  UnsupportedOption.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise UnsupportedOption(
            f"transformers {version} is installed, and this needs {'.'.join(map(str, OLDEST))} or later. "
            "Install it: pip install -U transformers"
        )


def chooser(variant: Any) -> Callable[[torch.nn.Module], Variant | None]:
    """The variant of a layer, as a function of its module."""
    if variant is None:
        return lambda module: None
    if is_of_layer(variant):
        return lambda module: checked(variant(module), f"'{name_of(variant)}' returned")
    found = checked(variant, "variant is")
    return lambda module: found


def is_of_layer(variant: Any) -> bool:
    """Whether this is a function of a module, and no hook or object with hooks."""
    if isinstance(variant, Variant | type | torch.Tensor) or not callable(variant):
        return False
    return signature_of(variant).required == 1


def checked(variant: Any, said: str) -> Variant | None:
    """A Variant over the model's positions.

    Errors:  VariantError.
    """
    if variant is None:
        return None
    variant = Variant.of(variant)
    if variant.q_index is not None:
        raise VariantError(
            f"{said} a Variant with q_index={variant.q_index!r}; in a model, q_idx is the position that transformers counts. "
            "Leave q_index out."
        )
    return variant
