"""Modules of the sm90 family compiled without a GPU: registers, tensor-core shapes and the order of the main loop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiling import compile_source
from disassembly import disassemble
from norm_cases import StickBreaking

import jitgen
from jitgen import toolchain
from jitgen.emit_early import early_parts
from jitgen.render import render_kernel
from jitgen.spec import KernelSpec
from jitgen.target import cuda_target
from jitgen.tiles_sm90 import sm90_tiles

LAUNCH_REGISTERS = {384: 168, 512: 128, 640: 96}  # 65536 over the threads, rounded down to a multiple of 8
CONSUMER_REGISTERS = {384: 240, 512: 160, 640: 112}  # the most that setmaxnreg gives them

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def causal_only() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal)


def soft_cap_window() -> jitgen.Variant:
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: 50.0 * torch.tanh(s / 50.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 1024),
    )


def alibi() -> jitgen.Variant:
    slopes = torch.zeros(32)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)


def clipped_bias() -> jitgen.Variant:
    table = torch.zeros(32, 128)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp(q_idx - kv_idx, 0, 127)], mask_mod=causal
    )


def dense_bias() -> jitgen.Variant:
    bias = torch.zeros(32, 64, 64, dtype=torch.bfloat16)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=causal)


def biases() -> jitgen.Variant:
    """A bias of each key, a row, a multiple of the distance and a table of it."""
    keys, rows, slopes, table = torch.zeros(32, 64), torch.zeros(32, 64), torch.zeros(32), torch.zeros(32, 33)

    def score(s, b, h, q_idx, kv_idx):
        near = table[h, torch.clamp(q_idx - kv_idx, 0, 32)]
        return s + keys[h, kv_idx] + rows[h, q_idx] - slopes[h] * (q_idx - kv_idx) + near

    return jitgen.Variant(score_mod=score)


def key_bias() -> jitgen.Variant:
    bias = torch.zeros(32, 64)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, kv_idx], mask_mod=causal)


def sorted_documents() -> jitgen.Variant:
    doc = jitgen.sorted(torch.zeros(8192, dtype=torch.int32))
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


def every_hook() -> jitgen.Variant:
    doc, slopes, gate = torch.zeros(8192, dtype=torch.int32), torch.zeros(32), torch.zeros(32)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
        sink=torch.zeros(32),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=StickBreaking)


HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
MODULES = [
    *((causal_only, "bfloat16", *dims) for dims in HEAD_DIMS),
    *((every_hook, "bfloat16", *dims) for dims in HEAD_DIMS),
    (plain, "float16", 64, 64),
    (causal_only, "bfloat16", 64, 64, 1024),
    (causal_only, "bfloat16", 128, 128, 1024),
    (plain, "float16", 128, 128),
    (plain, "float16", 256, 256),
    (soft_cap_window, "float16", 64, 64),
    (soft_cap_window, "bfloat16", 128, 128),
    (alibi, "bfloat16", 96, 96),
    (alibi, "float16", 256, 256),
    (clipped_bias, "bfloat16", 128, 128),
    *((dense_bias, "bfloat16", *dims) for dims in HEAD_DIMS),
    *((biases, dtype, *dims) for dims in HEAD_DIMS for dtype in ("bfloat16", "float16")),
    (key_bias, "bfloat16", 128, 128),
    (key_bias, "float16", 256, 256),
    (sorted_documents, "bfloat16", 128, 128),
    (stick_breaking, "bfloat16", 128, 128),
    (stick_breaking, "bfloat16", 256, 256),
]


def name_of(case) -> str:
    make, dtype, head_dim, head_dim_v, *q_len = case
    dims = f"hd{head_dim}" + (f"_{head_dim_v}" if head_dim_v != head_dim else "")
    return "-".join([make.__name__, dtype, dims, *map(str, q_len)])


class Module:
    """A compiled module: its spec, what the compiler printed, and its instructions."""

    def __init__(self, case, directory: Path) -> None:
        make, dtype, head_dim, head_dim_v, *q_len = case
        program = make().trace().program
        tiles = sm90_tiles(head_dim, head_dim_v, program, q_len=q_len[0] if q_len else 1 << 20)
        self.spec = KernelSpec("sm90", program, dtype, head_dim, head_dim_v, tiles, cuda_target("9.0a"))
        source = render_kernel(self.spec)
        self.has_halves = "jg::VisibleHalves" in source.text  # its groups may see half a tile alone
        self.adds_terms = "jg::ProductTerms" in source.text
        self.binary, self.output = compile_source(source, directory, *self.spec.target.flags)
        self._sass = None

    @property
    def threads(self) -> int:
        return 32 * self.spec.tiles.num_warps

    @property
    def num_products(self) -> int:
        """Of the main loop: steps of Q K^T, of P V, and one for what keys add to scores."""
        steps = self.spec.head_dim // 16 + self.spec.tiles.tile_kv // 16
        return steps + self.adds_terms

    @property
    def is_in_place(self) -> bool:
        """Whether P has the registers of S, as beside a copied bias where three groups leave no others."""
        is_copied = "tile" in early_parts(self.spec.program, "dense", self.spec.head_dim_v)
        return is_copied and self.spec.tiles.tile_q == 192 and self.spec.head_dim_v > 64

    @property
    def sass(self) -> list[str]:
        if self._sass is None:
            self._sass = disassemble(self.binary).splitlines()
        return self._sass


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def module(request, tmp_path_factory):
    return Module(request.param, tmp_path_factory.mktemp("module"))


def main_loop(sass: list[str], num_products: int) -> list[str]:
    """Instructions of the smallest loop that holds both products."""
    address = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+)(.*?);")
    found = [(int(m[1], 16), m[2], m[3]) for m in map(address.search, sass) if m]
    loops = []
    for at, name, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) <= at:
            body = [f"{n}{o}" for a, n, o in found if int(target[1], 16) <= a <= at]
            if sum(line.startswith("HGMMA") for line in body) == num_products:
                loops.append(body)
    assert loops, f"no loop of {num_products} HGMMA"
    return min(loops, key=len)


def test_module_spills_nothing(module):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", module.output)
    assert spills == [("0", "0", "0")], module.output


def test_module_has_no_serialised_products(module):
    assert not re.findall(r".*C75\d\d.*", module.output)


def test_module_keeps_to_its_registers(module):
    assert f"Used {LAUNCH_REGISTERS[module.threads]} registers" in module.output
    highest = max(int(n) for line in module.sass for n in re.findall(r"\bR(\d+)\b", line))
    assert highest < CONSUMER_REGISTERS[module.threads]


def test_module_uses_the_instructions_it_is_written_for(module):
    text = "\n".join(module.sass)
    tiles, spec = module.spec.tiles, module.spec
    shapes = set(re.findall(r"HGMMA\.(64x\d+x16)\.", text))
    halves = {f"64x{tiles.tile_kv // 2}x16"} if module.has_halves else set()
    assert shapes == {f"64x{tiles.tile_kv}x16", f"64x{spec.head_dim_v}x16"} | halves
    for name in ("UTMALDG", "UTMASTG", "SYNCS", "STSM"):
        assert name in text, f"no {name}"
    assert text.count("USETMAXREG") == 2
    assert not re.findall(r"\b(?:LDL|STL)\b", text)


def test_main_loop_waits_for_pv_between_maximum_and_weights(module):
    """Hooks and maximum run under P V; packing and storing P under the exponentials."""
    if module.spec.program.norm is not None:
        pytest.skip("the variant's own norm orders its work itself")
    if module.is_in_place:
        pytest.skip("P V is waited for before Q K^T")
    loop = main_loop(module.sass, module.num_products)
    wait_for_o = next(i for i, line in enumerate(loop) if line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    maxima = [i for i, line in enumerate(loop) if line.startswith("FMNMX")]
    exponentials = [i for i, line in enumerate(loop) if line.startswith("MUFU.EX2")]
    before = sum(i < wait_for_o for i in maxima)
    assert before >= 0.9 * len(maxima), f"{before} of {len(maxima)} maxima before the wait for P V"
    early = sum(i < wait_for_o for i in exponentials)
    assert early <= 0.1 * len(exponentials), f"{early} of {len(exponentials)} exponentials before the wait for P V"


def test_terms_of_keys_are_a_step_of_the_product(module):
    """No thread reads them from shared memory, which has no time for it, and no product waits for registers."""
    if not module.adds_terms:
        pytest.skip("keys add nothing to scores, or threads read it")
    loop = main_loop(module.sass, module.num_products)
    shape, products = f"HGMMA.64x{module.spec.tiles.tile_kv}x16.F32.BF16", [line for line in loop if line.startswith("HGMMA")]
    assert re.match(rf"{shape} R\d+, R\d+, gdesc\[UR\d+\]\.tnspB, RZ, !UPT", products[0]), products[0]
    assert not [line for line in loop if line.startswith("LDS.")]
    assert sum(line.startswith("WARPGROUP.ARRIVE") for line in loop) == 2


def test_half_tiles_stay_out_of_the_main_loop(module):
    """They have products of their own: branches between those of the main loop would have ptxas serialise all of them."""
    if not module.has_halves:
        pytest.skip("no group sees half a tile alone")
    num_keys, num_values = module.spec.head_dim // 16, module.spec.tiles.tile_kv // 16
    everywhere = sum("HGMMA" in line for line in module.sass)
    whole = 2 * (num_keys + num_values)  # before and in the main loop, in it and behind it
    assert everywhere == whole + num_keys + num_values // 2
    main_loop(module.sass, num_keys + num_values)


def test_products_in_place_follow_each_other(module):
    """Where P has the registers of S, a group waits for P V, and then reads what Q K^T begins from."""
    if not module.is_in_place:
        pytest.skip("P has registers of its own, or shared memory")
    num_values, num_keys = module.spec.tiles.tile_kv // 16, module.spec.head_dim // 16
    loop = main_loop(module.sass, num_keys + num_values)
    wait_for_o = next(i for i, line in enumerate(loop) if line.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    products = [i for i, line in enumerate(loop) if line.startswith("HGMMA")]
    reads = [i for i, line in enumerate(loop) if line.startswith("LDSM")]
    assert len(reads) == num_values
    assert products[num_values - 1] < wait_for_o < min(reads) and max(reads) < products[num_values]


def test_main_loop_keeps_descriptors_in_uniform_registers(module):
    """A product whose descriptor lies in ordinary registers costs a move for each instruction."""
    if module.spec.program.norm is not None:
        pytest.skip("scans along a row need the registers")
    loop = main_loop(module.sass, module.num_products)
    products = [i for i, line in enumerate(loop) if line.startswith("HGMMA")]
    moves = sum(line.startswith("R2UR") for line in loop[products[0] : products[-1]])
    assert moves <= 4, f"{moves} moves to uniform registers between the products of the main loop"
