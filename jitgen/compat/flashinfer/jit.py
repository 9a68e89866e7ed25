"""flashinfer.jit: jitgen compiles when a kernel is first called, so what is here only lets code that prebuilds go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jitgen.errors import UnsupportedOption


class MissingJITCacheError(RuntimeError):
    """FlashInfer's error for a module that is not prebuilt. jitgen raises jitgen.errors.KernelNotPrebuilt instead."""

    def __init__(self, message: str = "", spec: JitSpec | None = None) -> None:
        super().__init__(message)
        self.spec = spec


@dataclass(frozen=True)
class JitSpec:
    """What a ``gen_*`` function returns: the name of what was asked for. Nothing is generated from it."""

    name: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    needs_device_linking: bool = False
    aot_path: str = ""

    def build_and_load(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is no module behind the name."""
        raise UnsupportedOption(
            f"{self.name} is a FlashInfer module, and jitgen has no such module: a kernel is compiled when an entry point "
            "first needs it, and kept. Call the entry point once to compile ahead of time."
        )

    build = build_and_load


def refused_generator(name: str) -> Callable[..., JitSpec]:
    """A ``gen_*`` function of FlashInfer: it returns a spec, which build_jit_specs takes and which cannot be loaded."""

    def generate(*args: Any, **kwargs: Any) -> JitSpec:
        return JitSpec(name, args, kwargs)

    generate.__name__ = generate.__qualname__ = name
    generate.__doc__ = f"{name} of FlashInfer as a JitSpec; jitgen compiles when an entry point is first called."
    return generate


def build_jit_specs(specs: Sequence[JitSpec], *args: Any, **kwargs: Any) -> None:
    """Does nothing: jitgen compiles when an entry point is first called."""


gen_single_decode_module = refused_generator("gen_single_decode_module")
gen_batch_decode_module = refused_generator("gen_batch_decode_module")
gen_single_prefill_module = refused_generator("gen_single_prefill_module")
gen_batch_prefill_module = refused_generator("gen_batch_prefill_module")
gen_batch_attention_module = refused_generator("gen_batch_attention_module")
gen_batch_mla_module = refused_generator("gen_batch_mla_module")
gen_pod_module = refused_generator("gen_pod_module")
gen_page_module = refused_generator("gen_page_module")
gen_quantization_module = refused_generator("gen_quantization_module")
gen_rope_module = refused_generator("gen_rope_module")
gen_cascade_module = refused_generator("gen_cascade_module")
gen_sampling_module = refused_generator("gen_sampling_module")
