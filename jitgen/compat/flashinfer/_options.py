"""Options that every entry point of the shim takes: what they may be, and what is refused with the name of its replacement."""

from __future__ import annotations

from typing import Any

import torch

from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, UnsupportedOption

LAYOUTS = ("NHD", "HND")
POSITIONS = ("NONE", "ROPE_LLAMA", "ALIBI")
BACKENDS = ("auto", "fa2", "fa3")  # all of them mean jitgen's own kernels
ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)  # of a paged cache
WORKSPACE_ALIGNMENT = 16


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """An option given by name must be one of ``allowed``."""
    if value not in allowed:
        raise UnsupportedOption(f"{name}={value!r} is not known, expected {' or '.join(map(repr, allowed))}.")


def check_backend(backend: str, jit_args: object = None, kv_cache_sf: object = None) -> None:
    """Refuse what would run code that is not ours: other back ends, C++ variants, NVFP4 caches."""
    if backend not in BACKENDS:
        raise UnsupportedOption(
            f"backend={backend!r} is not one of {', '.join(BACKENDS)}, which all mean jitgen's own kernels. Leave it out."
        )
    if jit_args is not None:
        raise UnsupportedOption(
            "jit_args carries a variant as C++ text, which jitgen does not compile. Write it in Python as a jitgen.Variant "
            "(score_mod, mask_mod, sink, output_transform) and call the serving functions of jitgen with it."
        )
    check_scale_factors(kv_cache_sf)


def check_scale_factors(kv_cache_sf: object) -> None:
    """NVFP4 caches are refused."""
    if kv_cache_sf is not None:
        raise UnsupportedOption("kv_cache_sf was given: NVFP4 caches are not supported. Keep the cache in bfloat16 or float16.")


def check_no_extras(args: tuple[object, ...]) -> None:
    """Further positional arguments of run() belong to C++ variants."""
    if args:
        raise UnsupportedOption(
            f"run() got {len(args)} extra positional arguments, which only C++ variants (jit_args) take. Capture the values in "
            "the hooks of a jitgen.Variant instead."
        )


def check_changes(**options: object) -> None:
    """Options that would change the result, and that no kernel of ours implements."""
    for name, value in options.items():
        if value:
            raise UnsupportedOption(f"{name}={value!r} changes the result and is not supported. Leave it out.")


def check_multi_item(prefix_len_ptr: object, token_pos_in_items_ptr: object, max_item_len_ptr: object) -> None:
    """Multi-item scoring is refused rather than ignored."""
    given = (prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr)
    names = ("prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr")
    for name, value in zip(names, given, strict=True):
        if value is not None:
            raise UnsupportedOption(
                f"{name} was given: multi-item scoring is not one of the shim's masks. Write it as a mask_mod over captured "
                "prefix lengths and item starts: (kv_idx <= q_idx) & ((kv_idx < prefix[b]) | (kv_idx >= start[b, q_idx]))."
            )


def check_workspace(buffer: torch.Tensor, name: str = "float_workspace_buffer") -> torch.device:
    """Device of a workspace. Its memory is not used: plans allocate what they need, which is known exactly."""
    if not isinstance(buffer, torch.Tensor):
        raise InvalidType(f"{name} is a {type(buffer).__name__}, expected a torch.Tensor.")
    if buffer.device.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(f"{name} is on {buffer.device}, expected cpu or cuda. Allocate it where q will be.")
    if buffer.numel() and buffer.data_ptr() % WORKSPACE_ALIGNMENT:
        raise ShapeMismatch(
            f"{name} starts at an address that is not a multiple of {WORKSPACE_ALIGNMENT} bytes. Pass a fresh tensor, or a "
            "slice that starts at such a multiple."
        )
    return buffer.device


def as_dtype(dtype: str | torch.dtype | None, name: str) -> torch.dtype:
    """A dtype given as torch.dtype or by name ('float16', 'torch.bfloat16')."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise UnsupportedDtype(f"{name}={dtype!r} is not a dtype. Pass a torch.dtype or its name, such as 'bfloat16'.")
    return found


def attention_dtypes(
    q: Any, kv: Any, out: Any, both: Any = None, *, stored: bool = False
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Planned dtypes of q, of the keys and values, and of the output, with FlashInfer's defaults.

    ``stored``: keys and values may have 8 bits.
    Errors:  UnsupportedDtype for dtypes that no kernel reads, and when keys differ from queries in any other way.
    """
    q_dtype = as_dtype(q if q is not None else both if both is not None else torch.float16, "q_data_type")
    kv = kv if kv is not None else both
    kv_dtype = q_dtype if kv is None else as_dtype(kv, "kv_data_type")
    o_dtype = q_dtype if out is None else as_dtype(out, "o_data_type")
    is_stored = kv_dtype in STORED_DTYPES
    for name, dtype in (("q_data_type", q_dtype), ("kv_data_type", kv_dtype), ("o_data_type", o_dtype)):
        if dtype not in ATTENTION_DTYPES and not (is_stored and name == "kv_data_type"):
            raise UnsupportedDtype(
                f"{name} is {dtype}, expected float16, bfloat16 or, on the CPU, float32. Convert with .to()."
            )
    if is_stored and not stored:
        raise UnsupportedDtype(f"kv_data_type is {kv_dtype}, which only the wrappers of paged caches read. Convert with .to().")
    if kv_dtype != q_dtype and not is_stored:
        raise UnsupportedDtype(f"kv_data_type is {kv_dtype}, q_data_type is {q_dtype}. Both must match: convert with .to().")
    return q_dtype, kv_dtype, o_dtype


def check_dtype(name: str, t: torch.Tensor, planned: torch.dtype) -> None:
    """A tensor has the dtype that was planned for it."""
    if t.dtype != planned:
        raise UnsupportedDtype(f"{name} has dtype {t.dtype}, the plan says {planned}. Plan again with its dtype.")


def split_cache(cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a paged cache as views [pages, page_size, num_kv_heads, head_dim].

    ``cache`` is a pair of 4-D tensors or one 5-D tensor [pages, 2, ...] in the layout NHD or HND, with any strides.
    """
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2 or any(not isinstance(t, torch.Tensor) or t.dim() != 4 for t in cache):
            raise ShapeMismatch(f"paged_kv_cache is a {type(cache).__name__} of {len(cache)}, expected two 4-D tensors (k, v).")
        k, v = cache
    else:
        if cache.dim() != 5 or cache.shape[1] != 2:
            raise ShapeMismatch(
                f"paged_kv_cache has shape {tuple(cache.shape)}, expected [pages, 2, page_size, num_kv_heads, head_dim] (NHD), "
                "[pages, 2, num_kv_heads, page_size, head_dim] (HND), or a pair of 4-D tensors."
            )
        k, v = cache.unbind(1)
    return (k, v) if layout == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


def rows_first(t: torch.Tensor, layout: str) -> torch.Tensor:
    """Keys or values [kv_len, num_kv_heads, head_dim] of a tensor in the layout NHD or HND, as a view."""
    return t if layout == "NHD" else t.transpose(0, 1)


def named_options(call: str, names: tuple[str, ...], values: tuple[object, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Options of which some were given by position, under their names."""
    if len(values) > len(names):
        raise InvalidType(f"{call} takes at most {len(names)} options by position ({', '.join(names)}), got {len(values)}.")
    given = dict(zip(names, values, strict=False))
    twice = given.keys() & options.keys()
    if twice:
        raise InvalidType(f"{call} got {', '.join(twice)} by position and by name.")
    return {**given, **options}


def known_options(call: str, names: tuple[str, ...], values: tuple[object, ...], options: dict[str, Any]) -> dict[str, Any]:
    """As named_options, of a call that takes no others."""
    for name in options.keys() - set(names):
        raise InvalidType(f"{call} takes no option {name!r}, expected one of {', '.join(names)}.")
    return named_options(call, names, values, options)
