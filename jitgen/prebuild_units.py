"""From manifests to units of work: every kernel that they ask for, once, for every target."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jitgen import cache, runtime
from jitgen.dense_split import DECODE_ROWS, is_divisible
from jitgen.errors import JitgenError, ManifestError
from jitgen.families import PAGE_BOX, choose_spec, padded_head_dims, serving_spec
from jitgen.manifest import Manifest
from jitgen.portable import pack, targets_in, unpack
from jitgen.prebuild_variants import program_of
from jitgen.program import Program
from jitgen.render import TEMPLATE_OF_FAMILY
from jitgen.spec import CPU_DTYPES, CUDA_DTYPES, FP8_DTYPE, MLA_DIMS, MLA_FAMILIES, KernelSpec
from jitgen.target import CompileTarget, target_of

# sm90 has other tiles for short queries: all that some length would choose are built unless a manifest says q_len
Q_LENS = tuple(1 << n for n in range(21))
LAYOUTS = ("dense", "ragged", "paged")  # by hand; kernels of cascades are recorded
LATENT_ROWS = (16, 64)  # query rows of a key in latent attention: 16 heads, as eight GPUs share 128, and more
PLAN_FAMILIES = ("decode", None)  # a serving plan has two kernels on CUDA: one for decode steps, one for the rest
PREFILL_FAMILIES = ("sm80", "sm90", "sm90_wide")  # on CUDA, but latent attention
SPLIT = ("decode", "paged")  # the kernel of dense calls with few rows over many keys


class Unit(NamedTuple):
    """One kernel to build, for one target."""

    request: dict[str, Any]  # packed
    what: str
    arch: str

    @property
    def key(self) -> str:
        """Identity, the same on every machine: it decides which shard builds the unit."""
        return cache.digest(json.dumps(self.request, sort_keys=True))


def expand(manifests: Sequence[Manifest], archs: Sequence[str] | None = None) -> list[Unit]:
    """All kernels that the manifests ask for, in a fixed order.

    archs are targets to build for. A `[[kernel]]` without arch is built for each; a `[[request]]` is built for those of
    its kind (CUDA or CPU) in place of the one it was recorded on.
    Errors:  ManifestError, UnsupportedVariant.
    """
    units: dict[str, Unit] = {}
    for manifest in manifests:
        for number, kernel in enumerate(manifest.kernels, start=1):
            where = f"{manifest.path}: [[kernel]] {number}"
            for unit in _located(where, _of_kernel(kernel, manifest.folder, archs)):
                units.setdefault(unit.key, unit)
        for number, request in enumerate(manifest.requests, start=1):
            where = f"{manifest.path}: [[request]] {number}"
            for unit in _located(where, _of_request(request, archs)):
                units.setdefault(unit.key, unit)
    return sorted(units.values(), key=lambda unit: unit.key)


def shard_of(units: Sequence[Unit], number: int, count: int) -> list[Unit]:
    """The units of one shard, 1 <= number <= count; all shards together are all units, and their sizes differ by one."""
    return list(units[number - 1 :: count])


def _located(where: str, units: Iterator[Unit]) -> Iterator[Unit]:
    """Errors say which table of which file they are about."""
    try:
        yield from units
    except JitgenError as error:
        raise ManifestError(f"{where}: {error}") from error


# ---- written by people ------------------------------------------------------------------------------------------------


def _of_kernel(kernel: Mapping[str, Any], folder: Path, archs: Sequence[str] | None) -> Iterator[Unit]:
    name = kernel["variant"]
    program = program_of(name, kernel.get("captures", {}), folder)
    wanted = _listed(kernel, "arch", archs or ())
    if not wanted:
        raise ManifestError('no target: write arch = ["9.0a"], or give --arch.')
    options = [_listed(kernel, "dtype"), _listed(kernel, "head_dim"), _listed(kernel, "head_dim_v", (None,)), wanted]
    options += [_listed(kernel, "layout", ("dense",)), _listed(kernel, "q_len", Q_LENS), _listed(kernel, "rows", (None,))]
    options += [_listed(kernel, "page_size", (PAGE_BOX,))]
    for dtype, head_dim, head_dim_v, arch, layout, q_len, given_rows, page_size in itertools.product(*options):
        head_dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
        rows_of_key = (given_rows,) if given_rows else LATENT_ROWS if head_dims == MLA_DIMS else (8,)
        is_cuda = target_of(arch).kind == "cuda"
        is_plan = layout != "dense" and is_cuda and head_dims != MLA_DIMS
        families = [(family, layout) for family in _listed(kernel, "family", PLAN_FAMILIES if is_plan else (None,))]
        is_short = q_len <= DECODE_ROWS and layout == "dense" and "family" not in kernel
        if is_short and is_cuda and dtype in CUDA_DTYPES and is_divisible(program):
            families.append(SPLIT)
        for (family, place), rows in itertools.product(families, rows_of_key):
            sizes = {"q_len": q_len, "rows": rows, "page_size": page_size}
            spec = spec_of(program, dtype, head_dims, arch, family=family, layout=place, **sizes)
            yield Unit(pack((runtime.module_path, spec)), f"{name}: {spec.label}", spec.target.arch)


def _listed(kernel: Mapping[str, Any], name: str, default: Sequence[Any] = ()) -> list[Any]:
    value = kernel.get(name, list(default))
    values = value if isinstance(value, list) else [value]
    kinds = int if name in ("head_dim", "head_dim_v", "q_len", "rows", "page_size") else str
    fits = [type(v) is kinds and (kinds is str or v > 0) for v in values if v is not None]
    if not all(fits) or (name in kernel and not values):
        expected = "a positive number or a list of them" if kinds is int else "a string or a list of them"
        raise ManifestError(f"{name} = {value!r}: expected {expected}.")
    return values


def spec_of(
    program: Program,
    dtype: str,
    head_dims: tuple[int, int],
    arch: str,
    *,
    family: str | None = None,
    layout: str = "dense",
    q_len: int = Q_LENS[-1],
    rows: int = 8,
    page_size: int = PAGE_BOX,
) -> KernelSpec:
    """The kernel that a call with these types would choose on a machine of that architecture.

    Errors:  ManifestError for values that no kernel takes; those of families.cuda_spec.
    """
    target = target_of(arch)
    dtypes = CPU_DTYPES if target.kind == "cpu" else CUDA_DTYPES if layout != "dense" else (*CUDA_DTYPES, FP8_DTYPE)
    if dtype not in dtypes:
        raise ManifestError(f"dtype = {dtype!r}: kernels for {arch} take {', '.join(dtypes)}.")
    if layout not in LAYOUTS:
        raise ManifestError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}.")
    is_latent = head_dims == MLA_DIMS and layout == "paged"
    if any(dim % 8 or not 0 < dim <= 512 for dim in head_dims) and not is_latent:
        raise ManifestError(
            f"head dims {head_dims[0]} and {head_dims[1]}: expected multiples of 8 up to 512, "
            f"or {MLA_DIMS} with layout 'paged'."
        )
    if family is not None and family not in TEMPLATE_OF_FAMILY:
        raise ManifestError(f"family = {family!r}: expected one of {', '.join(TEMPLATE_OF_FAMILY)}.")
    if target.kind == "cpu":
        if family not in (None, "cpu"):
            raise ManifestError(f"family = {family!r} needs a CUDA architecture, arch is {arch!r}.")
        spec = _choose(program, dtype, head_dims, torch.device("cpu"), layout, family, q_len, rows, page_size)
        return dataclasses.replace(spec, target=target)
    with _as_on_device(arch.rstrip("af")):  # 9.0 and 9.0a both mean a Hopper device; the family decides which it becomes
        head_dims = head_dims if is_latent else padded_head_dims(*head_dims, dtype)
        return _choose(program, dtype, head_dims, torch.device("cuda", 0), layout, family, q_len, rows, page_size)


def _choose(
    program: Program,
    dtype: str,
    head_dims: tuple[int, int],
    device: torch.device,
    layout: str,
    family: str | None,
    q_len: int,
    rows: int,
    page_size: int,
) -> KernelSpec:
    """What a call, or a plan, chooses."""
    if layout == "dense":
        return choose_spec(program, dtype, head_dims, device, q_len=q_len, family=family)
    return serving_spec(program, dtype, head_dims, device, layout, family=family, rows=rows, page_size=page_size)


@contextmanager
def _as_on_device(arch: str) -> Iterator[None]:
    """Let what is chosen meanwhile be chosen for a device of this architecture, though there may be none."""
    kept = os.environ.get("JITGEN_CUDA_ARCH")
    os.environ["JITGEN_CUDA_ARCH"] = arch
    try:
        yield
    finally:
        if kept is None:
            del os.environ["JITGEN_CUDA_ARCH"]
        else:
            os.environ["JITGEN_CUDA_ARCH"] = kept


# ---- recorded -----------------------------------------------------------------------------------------------------------


def _of_request(request: Mapping[str, Any], archs: Sequence[str] | None) -> Iterator[Unit]:
    function, arguments = unpack(request)
    for target in _wanted_targets(arguments, archs):
        moved = tuple(_retargeted(argument, target) for argument in arguments)
        label = next((argument.label for argument in moved if hasattr(argument, "label")), function.__module__)
        arch = next((found.arch for found in targets_in(moved)), "")
        yield Unit(pack((function, *moved)), label, arch)


def _wanted_targets(arguments: tuple[Any, ...], archs: Sequence[str] | None) -> list[CompileTarget]:
    recorded = targets_in(arguments)
    if not recorded:
        raise ManifestError("the request names no target. Record the kernel again.")
    if archs is None:
        return recorded[:1]
    return [target for target in map(target_of, archs) if target.kind == recorded[0].kind]


def _retargeted(value: Any, target: CompileTarget) -> Any:
    """The same argument for another target; the family and tiles of an attention kernel follow it."""
    if isinstance(value, CompileTarget):
        return _like(value, target)
    if isinstance(value, KernelSpec) and value.layout == "dense" and value.family in (*PREFILL_FAMILIES, "sm90_fp8"):
        return value if value.target == target else _chosen_anew(value, target)
    if isinstance(value, KernelSpec) and value.family in (*PREFILL_FAMILIES, "decode"):
        return value if value.target.arch.rstrip("af") == target.arch.rstrip("af") else _planned_anew(value, target)
    if isinstance(value, KernelSpec) and value.family in MLA_FAMILIES:
        own = value.target.arch.rstrip("af") == target.arch.rstrip("af")  # what was recorded there may have been forced
        rows = value.tiles.tile_q
        return value if own else spec_of(value.program, value.dtype, MLA_DIMS, target.arch, layout=value.layout, rows=rows)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    moved = {name: _like(item, target) for name, item in fields.items() if isinstance(item, CompileTarget)}
    return dataclasses.replace(value, **moved) if moved else value


def _planned_anew(spec: KernelSpec, target: CompileTarget) -> KernelSpec:
    """The kernel of a plan that would have this one's work on another target."""
    family, page_size = "decode" if spec.family == "decode" else None, PAGE_BOX if spec.copies else None
    dims, rows = (spec.head_dim, spec.head_dim_v), spec.tiles.tile_q
    with _as_on_device(target.arch.rstrip("af")):
        new = serving_spec(
            spec.program, spec.dtype, dims, torch.device("cuda", 0), spec.layout,
            family=family, rows=rows, kv_dtype=spec.kv_dtype, page_size=page_size,
        )  # fmt: skip
    return dataclasses.replace(spec, family=new.family, tiles=new.tiles, target=new.target, copies=new.copies)


def _like(recorded: CompileTarget, wanted: CompileTarget) -> CompileTarget:
    """The wanted target, with architecture-specific instructions (9.0a) only where the recorded kernel has them."""
    if wanted.kind == "cpu":
        return wanted
    base = wanted.arch.rstrip("af")
    is_specific = recorded.arch[-1].isalpha() and int(base.partition(".")[0]) >= 9
    return target_of(base + "a" if is_specific else base)


def _chosen_anew(spec: KernelSpec, target: CompileTarget) -> KernelSpec:
    """The kernel that a call would choose for another target; one for short queries remains one for short queries."""

    def chosen(arch: str, family: str | None, q_len: int) -> KernelSpec:
        return spec_of(spec.program, spec.dtype, (spec.head_dim, spec.head_dim_v), arch, family=family, q_len=q_len)

    lengths = (q_len for q_len in reversed(Q_LENS) if chosen(spec.target.arch, spec.family, q_len).tiles == spec.tiles)
    new = chosen(target.arch, None, next(lengths, Q_LENS[-1]))
    return dataclasses.replace(spec, family=new.family, tiles=new.tiles, target=new.target, copies=new.copies)
