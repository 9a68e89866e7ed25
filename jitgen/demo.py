"""jitgen demo: define a variant, compile it, run it, compare it with the oracle, and say where the kernel is kept."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import jitgen
from jitgen import paths, reference, runtime
from jitgen.cache.admin import tree_size
from jitgen.cache.store import Store, discard
from jitgen.cli_text import duration_text, field, has_colour, paint, size_text
from jitgen.errors import UnsupportedDevice
from jitgen.families import choose_spec
from jitgen.progress import progress_line
from jitgen.show_kernel import kernel_of
from jitgen.spec import KernelSpec

SHAPE = {"batch": 1, "num_q_heads": 8, "num_kv_heads": 2, "length": 1024, "head_dim": 64}
DTYPE_OF_DEVICE = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = 10  # calls whose median is shown
NAME_WIDTH = 22

# ---- the variant: captured numbers are launch arguments ----
cap, window = 30.0, 256
OTHER_WINDOW = 100


def score_mod(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return cap * torch.tanh(score / cap)


def mask_mod(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


VARIANT = jitgen.Variant(score_mod=score_mod, mask_mod=mask_mod)


@dataclass(frozen=True)
class Outcome:
    """A result beside the oracle's."""

    out: torch.Tensor
    error: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance


def main(device: str | None = None, *, fresh: bool = False) -> int:
    """Run on every device there is, or on one; returns the exit code.

    Errors:  UnsupportedDevice when there is no such device; CompileError, ToolchainMissing and others as a call's.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDevice("there is no CUDA device that torch can use. Run: jitgen doctor")
    devices = [device] if device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(paint("An attention variant is two Python functions: a soft cap, and a sliding window.", "bold") + "\n")
    print(f"    cap, window = {cap}, {window}\n")
    for hook in (score_mod, mask_mod):
        print("\n".join("    " + line for line in source_lines(hook)) + "\n")
    print("    jitgen.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod)")
    right = [run_on(kind, fresh) for kind in devices]
    print("\n" + paint("next", "bold"))
    print("  jitgen show jitgen.demo:VARIANT --mask      expressions, kernel, and a picture of the mask")
    print("  jitgen show jitgen.demo:VARIANT --source    the generated source")
    return 0 if all(right) else 1


def source_lines(hook: Callable[..., object]) -> list[str]:
    """A function as its source has it, without what only concerns type checkers."""
    return [line.partition("  # type:")[0] for line in inspect.getsource(hook).rstrip().split("\n")]


def run_on(device: str, fresh: bool) -> bool:
    """Compile or load for one device, run, compare, and print each step when it is done; whether all was right."""
    torch.manual_seed(0)
    q, k, v = make_inputs(device)
    shape = f"q {list(q.shape)}, k and v {list(k.shape)}, {str(q.dtype).removeprefix('torch.')}"
    print(f"\n{paint(f'on {device_name(device)}', 'bold')}: {shape}")
    spec = choose_spec(VARIANT.trace().program, str(q.dtype).removeprefix("torch."), (q.shape[3], v.shape[3]), q.device)
    was_stored = forget_or_find(spec, fresh)
    show("first call", timed(lambda: jitgen.attention(q, k, v, VARIANT), device), first_call_text(was_stored, spec))
    show("later calls", median_time(lambda: jitgen.attention(q, k, v, VARIANT), device), "the kernel is in memory")
    first = compared(q, k, v)
    show_error("largest error", first)
    has_changed = run_changed(first, q, k, v)
    entry = runtime.get_kernel(spec).path.parent
    print(field("kernel", str(entry), name_width=NAME_WIDTH))
    contents = f"{size_text(tree_size(entry))}: library, source, headers, build log, key"
    print(field("", contents, name_width=NAME_WIDTH))
    return first.is_right and has_changed


def run_changed(first: Outcome, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Run with another window: the result must change, and agree with the oracle again, without another kernel."""
    global window
    kept, loaded = window, len(runtime.loaded_kernels())
    try:
        window = OTHER_WINDOW
        seconds = timed(lambda: jitgen.attention(q, k, v, VARIANT), q.device.type)
        changed = compared(q, k, v)
    finally:
        window = kept
    new = len(runtime.loaded_kernels()) - loaded
    moved = (changed.out - first.out).abs().max().item()
    how = "the same kernel, nothing compiled" if new == 0 else f"{new} more kernel compiled"
    show(f"window = {OTHER_WINDOW}", seconds, f"{how}; the result moved by up to {moved:.2g}")
    show_error("largest error", changed)
    return changed.is_right and moved > changed.tolerance and new == 0


def make_inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v; the logits are large enough for the cap to matter."""
    batch, q_heads, kv_heads, length, dim = SHAPE.values()
    like = {"device": device, "dtype": DTYPE_OF_DEVICE[device]}
    k, v = (torch.randn(batch, kv_heads, length, dim, **like) for _ in "kv")
    return 8 * torch.randn(batch, q_heads, length, dim, **like), k, v


def forget_or_find(spec: KernelSpec, fresh: bool) -> bool:
    """Whether the kernel is already stored; with ``fresh`` it is removed from the user store first."""
    entry, root = kernel_of(spec).entry, paths.cache_dir()
    if fresh and entry is not None and entry.parent == root:
        discard(Store(root), entry)
        entry = kernel_of(spec).entry
    return entry is not None


def first_call_text(was_stored: bool, spec: KernelSpec) -> str:
    if was_stored:
        return "traced, loaded from the store; --fresh compiles it again"
    return f"traced, generated, compiled for {spec.target.isa if spec.family == 'cpu' else spec.target.arch}, loaded"


def compared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outcome:
    """Compare with the oracle in float64.

    Source:  tolerance: weights and results are rounded to the dtype, and a weight is the exponential of a logit of up
             to `cap`, which float32 holds to within cap * eps, once after q . k and once after tanh.
    """
    out = jitgen.attention(q, k, v, VARIANT).double()
    with progress_line("evaluating the oracle"):
        want = reference.attention(q, k, v, VARIANT)
    relative = torch.finfo(q.dtype).eps + 2 * cap * torch.finfo(torch.float32).eps
    return Outcome(out, (out - want).abs().max().item(), relative * v.abs().max().item())


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, until its result is there."""
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def median_time(call: Callable[[], object], device: str) -> float:
    return sorted(timed(call, device) for _ in range(REPEATS))[REPEATS // 2]


def device_name(device: str) -> str:
    if device == "cuda":
        return f"the GPU ({torch.cuda.get_device_name()})"
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' * (threads != 1)})"


# ---- printing -------------------------------------------------------------------------------------------------------


def show(name: str, seconds: float, text: str) -> None:
    time_text = f"{duration_text(seconds):>8}"
    print(f"  {name:<{NAME_WIDTH}}{paint(time_text, 'cyan')}   {text}", flush=True)


def show_error(name: str, outcome: Outcome) -> None:
    """The error beside its bound, marked in words and, on a terminal, in colour."""
    mark = "✓" if outcome.is_right else "✗"
    verdict = "against the oracle in float64" if outcome.is_right else "TOO LARGE against the oracle in float64"
    style = "green" if outcome.is_right else "red"
    number = f"{outcome.error:>8.1e}"
    lead = paint(number, style) if has_colour() else number
    print(f"  {name:<{NAME_WIDTH}}{lead} {paint(mark, style)} {verdict}, allowed {outcome.tolerance:.1e}", flush=True)
