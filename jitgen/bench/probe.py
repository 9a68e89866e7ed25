"""What suite jit measures inside a fresh process (see jitgen.bench.fresh).

torch and the workloads are imported and the tensors made before the clock starts; everything of jitgen but this package
is imported after.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from jitgen.bench.fresh import serve
from jitgen.bench.method import synchronize
from jitgen.bench.peers import prepare_flex, prepare_jitgen
from jitgen.bench.spellings import shapes, variants
from jitgen.bench.workloads import Cell, ProblemSet, causal

# step of a first call -> where its function is looked up when the step runs
STEPS = {
    "trace": ("jitgen.variant", "trace_hooks"),
    "render": ("jitgen.render", "render_kernel"),
    "compile": ("jitgen.build", "build"),
    "load": ("jitgen.runtime", "CompiledKernel"),
}
IMPORTS = ("jitgen.api", "jitgen.variant", "jitgen.render", "jitgen.build")
HOT_CALLS = 1000  # in a batch; a GPU's launch queue holds about as many, and these kernels are faster than the host
HOT_BATCHES = 15


def first_cell(device: str, variant: str) -> Cell:
    """A problem so small that its kernel's own time is nothing beside that of a first call."""
    if device == "cuda":
        return Cell(1, 2, 2, 256, 128, "bfloat16", variant)
    return Cell(1, 2, 2, 256, 64, "float32", variant)


def first_call(device: str, variant: str, contender: str, family: str | None, split: bool) -> dict[str, Any]:
    """Seconds from hooks to a finished first output; with ``split``, also how they divide."""
    problem = ProblemSet(device).problem(first_cell(device, variant))
    prepare: Callable[[], Any] = lambda: prepare_jitgen(problem, family)  # noqa: E731
    if contender == "flex":
        prepare = lambda: prepare_flex(problem)  # noqa: E731
    synchronize(device)
    spent: dict[str, float] = {}
    start = time.perf_counter()
    if split:
        for module in IMPORTS:
            importlib.import_module(module)
        spent["import"] = time.perf_counter() - start
        for step, (module, name) in STEPS.items():
            add_clock(step, module, name, spent)
    call = prepare()
    output = call()
    synchronize(device)
    total = time.perf_counter() - start
    if not bool(output.isfinite().all()):
        raise RuntimeError(f"{contender} gave an output that is not finite")
    found: dict[str, Any] = {"total": total}
    if split:
        found |= {"split": {**spent, "rest": total - sum(spent.values())}}
    if contender == "jitgen":
        from jitgen.runtime import loaded_kernels

        found["module_bytes"] = Path(loaded_kernels()[-1].path).stat().st_size
    return found


def first_step(device: str) -> dict[str, float]:
    """Seconds of each part of a serving loop's first step: 3 requests, one of them new, 32 query heads on 8 of 128."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q_len, kv_len = torch.tensor([1, 37, 3]), torch.tensor([100, 37, 512])
    q_indptr = torch.cat([torch.zeros(1, dtype=torch.int64), q_len.cumsum(0)]).to(device)
    kv_len, pages = kv_len.to(device), torch.randperm(128)[:96].view(3, 32).to(device)
    q, k, v = (torch.randn(41, heads, 128, device=device, dtype=dtype) for heads in (32, 8, 8))
    kv_cache = torch.zeros(128, 2, 16, 8, 128, device=device, dtype=dtype)
    logits = torch.randn(3, 32000, device=device)
    synchronize(device)
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize(device)
        marks.append(time.perf_counter())

    import jitgen

    options = {"dtype": dtype, "device": q.device, "page_size": 16, "variant": causal}
    plan = jitgen.Plan(8, 64, 32, 8, 128, **options).update(q_indptr, kv_len)
    mark()
    jitgen.append(kv_cache, k, v, pages, q_indptr=q_indptr, kv_len=kv_len)
    mark()
    jitgen.paged_attention(q, kv_cache, pages, plan)
    mark()
    jitgen.sample(logits, top_p=0.9, temperature=0.7)
    mark()
    parts = ("plan", "append", "attention", "sample")
    return {part: end - begin for part, (begin, end) in zip(parts, itertools.pairwise(marks), strict=True)}


def add_clock(step: str, module: str, name: str, spent: dict[str, float]) -> None:
    """Replace a function by one that adds its seconds to ``spent[step]``."""
    owner = sys.modules[module]
    original = getattr(owner, name)
    spent[step] = 0.0

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[step] += time.perf_counter() - start

    setattr(owner, name, clocked)


# ---- host time of a call that compiles nothing ----------------------------------------------------------------------


def hot_calls(device: str, family: str | None) -> dict[str, Any]:
    """Microseconds of host time of jitgen.attention on tensors of one position.

    On cuda a call returns once its kernel is in the queue, so its time is host time, the driver's launch included. On
    the CPU a call runs its kernel; there the loaded module's entry point is replaced by a C function that does nothing,
    called through ctypes in the same way, so that everything but the kernel is timed. An empty Python function with the
    same arguments is timed too; ``overhead`` is what is beyond it.
    """
    import jitgen

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, 1, 1, 64, device=device, dtype=dtype) for _ in range(3))
    slopes, cap = torch.ones(1, device=device), 20.0

    def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return cap * torch.tanh(score / cap) + slopes[h] * (kv_idx - q_idx)

    variant = jitgen.Variant(score_mod=score_mod, mask_mod=causal)

    def empty(q: Any, k: Any, v: Any, variant: Any = None, *, mask_mod: Any = None, family: Any = None) -> None:
        pass

    calls = {
        "plain": lambda f: f(q, k, v, family=family),
        "mask_mod=causal": lambda f: f(q, k, v, mask_mod=causal, family=family),
        "Variant, 2 captures": lambda f: f(q, k, v, variant, family=family),
    }
    found = {}
    for name, call in calls.items():
        whole = microseconds(lambda call=call: call(jitgen.attention), device)
        nothing = microseconds(lambda call=call: call(empty), device)
        host = whole if device == "cuda" else without_kernel(lambda call=call: call(jitgen.attention))
        found[name] = {"call": whole, "empty": nothing, "overhead": host - nothing}
    found["torch SDPA"] = {"call": microseconds(lambda: F.scaled_dot_product_attention(q, k, v), device)}
    return found


def without_kernel(call: Callable[[], object]) -> float:
    """Microseconds of a CPU call whose kernels do nothing."""
    from jitgen.runtime import loaded_kernels

    nothing = ctypes.CDLL(None).isascii  # looks at one word and touches no memory; 0 for what is no small number
    nothing.argtypes, nothing.restype = [ctypes.c_char_p], ctypes.c_int
    kernels = {kernel: kernel.launch for kernel in loaded_kernels()}
    try:
        for kernel in kernels:
            kernel.launch = nothing
        return microseconds(call, "cpu")
    finally:
        for kernel, launch in kernels.items():
            kernel.launch = launch


def microseconds(call: Callable[[], object], device: str) -> float:
    """Median over batches of the mean time of a call on the host; the device is idle when a batch starts."""
    means = []
    for _ in range(HOT_BATCHES + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(HOT_CALLS):
            call()
        means.append((time.perf_counter() - start) / HOT_CALLS * 1e6)
    synchronize(device)
    return statistics.median(means[1:])  # the first batch warms up


# ---- number of modules ----------------------------------------------------------------------------------------------


def count_modules(device: str, family: str | None, num_variants: int, num_shapes: int) -> dict[str, Any]:
    """Run every variant on every shape from an empty store, and count the modules that were built."""
    import jitgen
    from jitgen.runtime import loaded_kernels

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = []
    for batch, num_q_heads, num_kv_heads, q_len, kv_len in shapes(num_shapes):
        sizes = ((num_q_heads, q_len), (num_kv_heads, kv_len), (num_kv_heads, kv_len))
        inputs.append([torch.randn(batch, *size, 64, device=device, dtype=dtype) for size in sizes])
    start, distinct = time.perf_counter(), 0
    for hooks in variants(device, num_variants):
        before = len(loaded_kernels())
        for variant in hooks:
            for q, k, v in inputs:
                jitgen.attention(q, k, v, **variant, family=family)  # type: ignore[arg-type]
        # one kernel for each choice of tiles: some families have others for short queries
        distinct += len({kernel.spec.tiles for kernel in loaded_kernels()[before:]})
    synchronize(device)
    seconds = time.perf_counter() - start
    modules = len({str(kernel.path) for kernel in loaded_kernels()})
    counts = {"variants": num_variants, "shapes": num_shapes, "calls": num_variants * num_shapes}
    return {**counts, "distinct": distinct, "modules": modules, "seconds": seconds}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "first_call": first_call,
    "first_step": first_step,
    "hot_calls": hot_calls,
    "count_modules": count_modules,
}

if __name__ == "__main__":
    serve(TASKS)
