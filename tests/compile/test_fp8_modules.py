"""Modules of the sm90_fp8 family compiled without a GPU: registers, tensor-core shapes and the copies of V."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiling import compile_source
from disassembly import disassemble
from test_sm90_modules import (
    CONSUMER_REGISTERS,
    LAUNCH_REGISTERS,
    alibi,
    causal_only,
    every_hook,
    plain,
    soft_cap_window,
    sorted_documents,
)

import jitgen
from jitgen import fp8, toolchain
from jitgen.families import cuda_spec
from jitgen.program import Program
from jitgen.render import render_kernel
from jitgen.spec import FP8_DTYPE
from jitgen.target import cuda_target
from jitgen.tiles_fp8 import FP8_HEAD_DIMS

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def scaled(make) -> Program:
    """The program of a variant with scales of heads, of requests and heads, and of all."""
    traced = make().trace()
    q = torch.zeros(2, 32, 1, 64, dtype=fp8.FP8)
    scales = (torch.ones(32), torch.ones(2, 32), torch.ones(()))
    return fp8.with_scales(traced.program, traced.values(), q, q, scales)[0]


def soft_cap() -> jitgen.Variant:
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: 20.0 * torch.tanh(s / 20.0))


def window() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 1024))


KERNELS = ("transpose_values", "attention_kernel")
MODULES = [
    *((make, "plain", head_dim) for head_dim in FP8_HEAD_DIMS for make in (plain, causal_only, every_hook)),
    *((every_hook, "scaled", head_dim) for head_dim in FP8_HEAD_DIMS),
    *((make, "scaled", 128) for make in (plain, causal_only)),
    *((make, scales, head_dim) for head_dim in (64, 128) for make in (soft_cap, alibi) for scales in ("plain", "scaled")),
    *((make, "plain", head_dim) for head_dim in FP8_HEAD_DIMS for make in (soft_cap_window, window, sorted_documents)),
    *((make, "scaled", 128) for make in (soft_cap_window, window, sorted_documents)),
    (alibi, "scaled", 256),
]


class Module:
    """A compiled module: its spec, what the compiler printed, and the instructions of each kernel."""

    def __init__(self, case, directory: Path) -> None:
        make, scales, head_dim = case
        program = scaled(make) if scales == "scaled" else make().trace().program
        self.spec = cuda_spec(program, FP8_DTYPE, (head_dim, head_dim), "sm90_fp8", cuda_target("9.0a"))
        source = render_kernel(self.spec)
        self.has_halves = "kHalfTile" in source.text
        self.looks_late = head_dim == 64 and "kLooksLate = kHeadDim == 64 && !false" in source.text
        # whether the producer looks through captured tensors to classify tiles
        self.searches = re.search(r"Fp8Geometry<kHeadDim, kTileQ, kTileKv, kNumStages, (true|false)", source.text)[1] == "true"
        self.binary, self.output = compile_source(source, directory, *self.spec.target.flags)
        self._sass: dict[str, str] | None = None

    @property
    def sums_by_product(self) -> bool:
        """Whether the tensor cores sum the weights, where LSE is not wanted."""
        program = self.spec.program
        reads_lse = program.lse is not None or (program.output is not None and "lse" in program.output.deps)
        return not reads_lse and self.spec.head_dim <= 128

    @property
    def threads(self) -> int:
        return 32 * self.spec.tiles.num_warps

    def sass(self, kernel: str) -> str:
        if self._sass is None:
            _, *parts = re.split(r"Function : (\S+)", disassemble(self.binary))
            self._sass = dict(zip(parts[::2], parts[1::2], strict=True))
        (text,) = (text for name, text in self._sass.items() if kernel in name)
        return text

    def registers(self, kernel: str) -> int:
        """What ptxas says a kernel is launched with."""
        found = re.search(rf"Compiling entry function '\w*{kernel}\w*'.*?Used (\d+) registers", self.output, re.DOTALL)
        assert found, self.output
        return int(found[1])


@pytest.fixture(scope="module", params=MODULES, ids=lambda case: f"{case[0].__name__}-{case[1]}-hd{case[2]}")
def module(request, tmp_path_factory):
    return Module(request.param, tmp_path_factory.mktemp("module"))


def test_module_spills_nothing(module):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", module.output)
    assert spills == [("0", "0", "0")] * 2, module.output


def test_module_has_no_serialised_products(module):
    assert not re.findall(r".*C75\d\d.*", module.output)


def test_module_keeps_to_its_registers(module):
    assert module.registers("attention_kernel") == LAUNCH_REGISTERS[module.threads]
    highest = max(int(n) for n in re.findall(r"\bR(\d+)\b", module.sass("attention_kernel")))
    assert highest < CONSUMER_REGISTERS[module.threads]


def test_module_multiplies_in_8_bits(module):
    text, tiles = module.sass("attention_kernel"), module.spec.tiles
    shapes = set(re.findall(r"GMMA\.(\S+)", text))
    widths = {tiles.tile_kv, module.spec.head_dim + (8 if module.sums_by_product else 0)}
    widths |= {tiles.tile_kv // 2} if module.has_halves else set()
    kinds = {f"64x{n}x32.F32.E4M3.E4M3" for n in widths}
    assert shapes == kinds
    for name in ("UTMALDG", "UTMASTG", "SYNCS", "STSM"):
        assert name in text, f"no {name}"
    assert text.count("USETMAXREG") == 2
    assert not re.findall(r"\b(?:LDL|STL)\b", text)


def test_weights_are_packed_without_shuffles(module):
    """Two conversions make four weights, the second by merging; only maxima and denominators cross lanes.

    Some pairs of column tiles are polynomials in half precision, where the exp2 unit is short.
    """
    text, tiles = module.sass("attention_kernel"), module.spec.tiles
    kinds = ("F32.PACK_AB", "F16.UNPACK_B")
    packed = {kind: len(re.findall(rf"F2FP\.SATFINITE\.E4M3\.{kind}_MERGE_C", text)) for kind in kinds}
    every = {64: 6, 128: 4}.get(module.spec.head_dim)
    ways = 4 * (2 if module.sums_by_product else 1)  # of four each, with sums and without
    tiles_of = [tiles.tile_kv] * (3 if module.looks_late else 2)  # the first, the others, where maxima are looked at late again
    expected = dict.fromkeys(kinds, 0)
    for keys in tiles_of + [tiles.tile_kv // 2] * module.has_halves:
        pairs = keys // 16
        polynomials = pairs // every if every else 0
        expected["F32.PACK_AB"] += ways * (pairs - polynomials)
        expected["F16.UNPACK_B"] += ways * polynomials
    assert packed == expected
    if not module.searches:  # a producer that does shuffles too
        assert len(re.findall(r"\bSHFL\.BFLY", text)) == (3 if module.has_halves else 2) * 4 + 4


def kv_loop(text: str, num_products: int) -> str:
    """The instructions of the shortest loop with so many products."""
    code = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    jumps = [(address, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", line)) for address, line in code]
    loops = [(int(to[1], 16), address) for address, to in jumps if to and int(to[1], 16) < address]
    bodies = ["\n".join(line for address, line in code if first <= address <= last) for first, last in loops]
    return min((body for body in bodies if body.count("GMMA") == num_products), key=len)


def test_stages_are_addressed_by_uniform_registers(module):
    """Descriptors of products take uniform registers. A loop that ptxas takes for divergent moves each of them there, between
    the products: that made causal masks 7 to 10 % slower."""
    num_products = module.spec.head_dim // 32 + module.spec.tiles.tile_kv // 32
    loop = kv_loop(module.sass("attention_kernel"), num_products)
    assert loop.count("R2UR") <= 4


def test_v_is_transposed_512_bytes_at_a_time(module):
    """A square of 4 KiB by instructions that read and write 512 bytes; by idle warps too, where there is room for it."""
    squares = {kernel: len(re.findall(r"\bLDSM\.16\.MT88\.4\b", module.sass(kernel))) for kernel in KERNELS}
    has_copiers = module.spec.tiles.tile_q == 192 and not module.searches
    assert squares == {"transpose_values": 8, "attention_kernel": 8 if has_copiers else 0}
    for name in ("UTMALDG", "UTMASTG", "STSM"):
        assert name in module.sass("transpose_values"), f"no {name}"
