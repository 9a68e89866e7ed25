"""The copy of V that the 8-bit kernel multiplies: its header's code, run by threads of the CPU, against the order of keys
that makes accumulators of S the A operand of P V."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from jitgen import paths, toolchain

HEADER = "include/jitgen/sm90_fp8.cuh"
SHIM = """
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
#define JITGEN_FN inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
struct Index { int x; };
struct uint4 { unsigned x, y, z, w; };
static thread_local Index threadIdx;
static std::barrier<>* all_threads;
static char* memory_of_cta;
static void __syncthreads() { all_threads->arrive_and_wait(); }
static unsigned __ldg(const unsigned* p) { return *p; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = a | static_cast<unsigned long long>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
namespace jg {
static unsigned shared_address(char* p) { memory_of_cta = p; return 0; }
static void store_shared(unsigned at, uint4 v) { std::memcpy(memory_of_cta + at, &v, 16); }
static uint4 load_shared_128(unsigned at) { uint4 v; std::memcpy(&v, memory_of_cta + at, 16); return v; }
"""
ENTRY = """
}  // namespace jg
template <int kHeadDim, int kTileKv>
static void run(const char* rows, long long stride, int first_key, int kv_len, char* tile) {
  using Transpose = jg::TransposeValues<kHeadDim, kTileKv>;
  std::barrier<> barrier(Transpose::kThreads);
  all_threads = &barrier;
  std::vector<std::thread> threads;
  for (int i = 0; i < Transpose::kThreads; ++i)
    threads.emplace_back([=] { threadIdx.x = i; Transpose::run(rows, stride, first_key, kv_len, tile); });
  for (auto& thread : threads) thread.join();
}
extern "C" void copy_tile(int head_dim, int tile_kv, const char* rows, long long stride, int first, int kv_len, char* tile) {
  if (head_dim == 64 && tile_kv == 128) run<64, 128>(rows, stride, first, kv_len, tile);
  if (head_dim == 64 && tile_kv == 64) run<64, 64>(rows, stride, first, kv_len, tile);
  if (head_dim == 128 && tile_kv == 128) run<128, 128>(rows, stride, first, kv_len, tile);
  if (head_dim == 256 && tile_kv == 64) run<256, 64>(rows, stride, first, kv_len, tile);
}
"""


@pytest.fixture(scope="module")
def copy_tile(tmp_path_factory):
    cxx = toolchain.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler on this machine")
    text = (paths.template_dir() / HEADER).read_text()
    code = text[text.index("// ---- V ----") : text.index("// ---- shared memory and registers of a CTA")]
    source = tmp_path_factory.mktemp("copy") / "copy.cpp"
    source.write_text(SHIM + code + ENTRY)
    library = source.with_suffix(".so")
    command = [str(cxx.path), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)).copy_tile


def key_at(position: int) -> int:
    """Key of a position in a row of the copy: that whose weight a thread has at this place of its A operand."""
    quad, i = position % 16 // 4, position % 4
    return position // 16 * 16 + 2 * quad + (i if i < 2 else 8 + i - 2)


@pytest.mark.parametrize("head_dim, tile_kv", [(64, 128), (64, 64), (128, 128), (256, 64)])
@pytest.mark.parametrize("first_key, kv_len", [(0, 128), (128, 300), (128, 129)])
def test_copy_holds_the_keys_of_a_tile_in_the_order_of_the_weights(copy_tile, head_dim, tile_kv, first_key, kv_len):
    generator = torch.Generator().manual_seed(head_dim + kv_len)
    stride = head_dim + 32
    v = torch.randint(1, 256, (kv_len, stride), generator=generator, dtype=torch.uint8)
    tile = torch.full((head_dim, tile_kv), 255, dtype=torch.uint8)
    rows, out = ctypes.c_void_p(v.data_ptr()), ctypes.c_void_p(tile.data_ptr())
    copy_tile(head_dim, tile_kv, rows, ctypes.c_longlong(stride), first_key, kv_len, out)
    padded = torch.zeros(max(kv_len, first_key + tile_kv), head_dim, dtype=torch.uint8)
    padded[:kv_len] = v[:, :head_dim]
    keys = [first_key + key_at(position) for position in range(tile_kv)]
    assert torch.equal(tile, padded[keys].T)


def test_order_of_keys_makes_accumulators_an_operand():
    """A thread's accumulators of four column tiles, packed in the order of pack_fp8_tile, are its 32 columns of A."""
    for quad in range(4):
        for register in (0, 2):  # rows of the upper half; the lower half has the same columns
            tiles = (register, register + 1)
            packed = [8 * tile + 2 * quad + c for tile in tiles for c in range(2)]
            assert packed == [key_at(8 * register + 4 * quad + i) for i in range(4)]
