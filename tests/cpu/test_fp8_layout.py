"""The transposition of V: its header's code, run by threads of the CPU in place of a warp's, against the order of keys that
makes accumulators of S the A operand of P V, and its accesses to shared memory against the banks."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from jitgen import paths, toolchain

HEADERS = ("include/jitgen/sm90_geometry.cuh", "include/jitgen/sm90_fp8.cuh")
SHIM = """
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
#define JITGEN_FN inline
#define __host__
#define __device__
struct Index { unsigned x; };
static thread_local Index threadIdx;
static std::barrier<> all_lanes(32);
static unsigned char* memory;
static unsigned addresses[32];
static unsigned short values[32][4][2];
static int most_in_a_bank, num_accesses;
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = a | static_cast<unsigned long long>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
// Each matrix is eight rows of 16 bytes, four banks.
static void count_banks() {
  ++num_accesses;
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows[8] = {};
    for (int row = 0; row < 8; ++row) {
      int& count = rows[addresses[8 * matrix + row] / 16 % 8];
      if (++count > most_in_a_bank) most_in_a_bank = count;
    }
  }
}
namespace jg {
static int stay(int x) { return x; }
static void load_matrix_transposed(unsigned (&r)[4], unsigned address) {
  const int lane = threadIdx.x & 31;
  addresses[lane] = address;
  all_lanes.arrive_and_wait();
  if (lane == 0) count_banks();
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned short pair[2];
    for (int i = 0; i < 2; ++i) std::memcpy(&pair[i], memory + addresses[8 * matrix + lane % 4 * 2 + i] + lane / 4 * 2, 2);
    r[matrix] = pair[0] | pair[1] << 16;
  }
  all_lanes.arrive_and_wait();
}
static void store_matrix(unsigned address, const unsigned (&r)[4]) {
  const int lane = threadIdx.x & 31;
  addresses[lane] = address;
  all_lanes.arrive_and_wait();
  if (lane == 0) count_banks();
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(memory + addresses[8 * matrix + lane / 4] + lane % 4 * 4, &r[matrix], 4);
  all_lanes.arrive_and_wait();
}
"""
ENTRY = """
}  // namespace jg
using Square = jg::SquareTranspose;
extern "C" unsigned place_in_square(int row, int byte) {
  return Square::Rows::chunk_offset(row, byte / 16, Square::kSide) + byte % 16;
}
extern "C" int turn_square(unsigned char* square, int* most) {
  memory = square;
  most_in_a_bank = num_accesses = 0;
  std::vector<std::thread> lanes;
  for (unsigned lane = 0; lane < 32; ++lane)
    lanes.emplace_back([=] {
      threadIdx.x = 64 + lane;
      Square::turn(0);
    });
  for (auto& lane : lanes) lane.join();
  *most = most_in_a_bank;
  return num_accesses;
}
"""
SIDE = 64


def part(path: str, first: str, last: str) -> str:
    text = (paths.template_dir() / path).read_text()
    return text[text.index(first) : text.index(last)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    cxx = toolchain.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler on this machine")
    tile = part(HEADERS[0], "template <int kCols> struct SpanTile", "// Barriers and small messages")
    code = part(HEADERS[1], "struct SquareTranspose {", "JITGEN_FN void tensor_load_span")
    source = tmp_path_factory.mktemp("square") / "square.cpp"
    source.write_text(SHIM + tile + code + ENTRY)
    binary = source.with_suffix(".so")
    command = [str(cxx.path), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(binary))


def key_at(position: int) -> int:
    """Key of a position in a row of the copy: that whose weight a thread has at this place of its A operand."""
    quad, i = position % 16 // 4, position % 4
    return position // 16 * 16 + 2 * quad + (i if i < 2 else 8 + i - 2)


def test_square_is_turned_in_the_order_of_the_weights(library):
    v = torch.randint(0, 256, (SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)  # [key][column]
    places = torch.tensor([[library.place_in_square(row, byte) for byte in range(SIDE)] for row in range(SIDE)])
    assert torch.equal(places.flatten().sort().values, torch.arange(SIDE * SIDE))
    square = torch.empty(SIDE * SIDE, dtype=torch.uint8)
    square[places] = v
    most = ctypes.c_int()
    count = library.turn_square(ctypes.c_void_p(square.data_ptr()), ctypes.byref(most))
    assert torch.equal(square[places], v[[key_at(position) for position in range(SIDE)]].T)
    assert count == 2 * SIDE * SIDE // 512  # each byte is read once and written once, 512 at a time
    assert most.value == 1


def test_order_of_keys_makes_accumulators_an_operand():
    """A thread's accumulators of four column tiles, packed in the order of pack_fp8_tile, are its 32 columns of A."""
    for quad in range(4):
        for register in (0, 2):  # rows of the upper half; the lower half has the same columns
            tiles = (register, register + 1)
            packed = [8 * tile + 2 * quad + c for tile in tiles for c in range(2)]
            assert packed == [key_at(8 * register + 4 * quad + i) for i in range(4)]
