// Where everything of a CTA lies in shared memory, and how many registers each warp group gets: all of it follows from
// the head dims and the tile.
#pragma once
#include "jitgen/sm90_ptx.cuh"

namespace jg {

// A tile of 16-bit elements as the copy engine writes it: spans of kSpan columns, each [rows][kSpan] with 128-byte (64
// columns) or 64-byte swizzle (32 columns, for head_dim 96).
template <int kCols> struct SpanTile {
  static constexpr int kSpan = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kSpanBytes = kSpan * 2;
  static_assert(kCols % 32 == 0, "rows must be a multiple of 64 bytes");

  // Descriptor offset (16-byte units) of columns [16 step, 16 step + 16) of a tile of `rows` rows.
  static constexpr __host__ __device__ int step_offset(int step, int rows) {
    return (step * 16 / kSpan * rows * kSpanBytes + step * 16 % kSpan * 2) >> 4;
  }
  static JITGEN_FN int swizzle(int row) { return kSpan == 64 ? row & 7 : row >> 1 & 3; }   // what chunk numbers are xored with
  // Byte offset of the 16-byte chunk `chunk` of row `row`, swizzled.
  static JITGEN_FN unsigned chunk_offset(int row, int chunk, int rows) {
    constexpr int kChunks = kSpan / 8;
    return chunk / kChunks * rows * kSpanBytes + row * kSpanBytes + ((chunk % kChunks ^ swizzle(row)) << 4);
  }
};

// Barriers and small messages at the end of shared memory.
template <int kStages> struct ControlBlock {
  unsigned long long q_full[4], q_empty[4];   // of each warp group
  unsigned long long o_done;
  unsigned long long k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  unsigned long long work_full[2], work_empty[2], found_full[2];
  alignas(16) int4 work[2];   // {first row, head, batch, kind}
  // Which KV tile a stage holds, with flags. Two laps: a word is written again after every group has released the K of one lap later.
  // Where each warp releases it, lane 0 has read the word itself; where its leader does, that is behind a turn that all threads of the
  // group pass after they have read the word (racecheck does not follow a named barrier and an mbarrier in a chain, and reports it;
  // lane 0 of each warp reading for it, and letting go or not, is silent and makes a dense bias 3 % slower).
  int step[2 * kStages];
};

// kExtraBytes: of what a kernel has beside these, behind the control block. kCopiedBytes: of what it has the copy engine bring, for
// all groups. kInPlace: P takes the registers of S, as the products of a group never overlap.
template <int kHeadDim, int kHeadDimV, int kTileQ, int kTileKv, int kStages, bool kClassifies, int kExtraBytes = 0,
          int kCopiedBytes = 0, bool kInPlace = false>
struct Geometry {
  static constexpr int kGroups = kTileQ / 64;   // consumer warp groups, 64 query rows each
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kQueryWarps = kGroups == 3 ? 3 : 1;   // of the producer's, beside the first: they copy Q
  static_assert(kTileQ % 64 == 0 && kGroups >= 2 && kGroups <= 4 && kTileKv % 16 == 0, "unsupported tile");

  // ---- registers (setmaxnreg): launch registers are 168, 128 and 96 for 2, 3 and 4 groups, so the pools per lane are
  // 504, 512 and 480. More would hang the kernel. A producer that classifies tiles by captured tensors spills with 24.
  // Consumers of three groups have no room for P beside O and S from head_dim_v 96 on: P goes through shared memory
  // (192 x 128 with P in registers spills 560 B and serialises wgmma).
  static constexpr int kProducerRegs = kGroups == 2 ? (kClassifies ? 40 : 24) : 32;
  static constexpr int kConsumerRegs = kGroups == 2 ? (kClassifies ? 232 : 240) : kGroups == 3 ? 160 : 112;
  static constexpr bool kSharedP = kGroups >= 3 && kHeadDimV >= 96 && !kInPlace;
  static_assert(!kSharedP || kTileKv % 64 == 0, "P tiles are spans of 64 columns");

  // ---- shared memory: V stages, K stages, Q, P, O, what is copied, control ----
  static constexpr int kGroupQBytes = 64 * kHeadDim * 2;
  static constexpr int kKeyBytes = kTileKv * kHeadDim * 2;
  static constexpr int kValueBytes = kTileKv * kHeadDimV * 2;
  static constexpr int kGroupPBytes = 64 * kTileKv * 2;
  static constexpr int kKeyAt = kStages * kValueBytes;
  static constexpr int kQueryAt = kKeyAt + kStages * kKeyBytes;
  static constexpr int kPAt = kQueryAt + kGroups * kGroupQBytes;
  static constexpr int kOwnOAt = kPAt + (kSharedP ? kGroups * kGroupPBytes : 0);
  static constexpr int kLimit = 232448 - static_cast<int>(sizeof(ControlBlock<kStages>)) - kExtraBytes - kCopiedBytes;   // 227 KiB per CTA
  // O has its own buffer when there is room; else each group's lies over its own P, and the next P waits for the store; else
  // it leaves in passes of kOutputCols columns through a buffer of that width (hd256: 1 to 3 % faster at 1k and 4k than over V); else all
  // of it lies over V, and the next V waits.
  static constexpr bool has_room(int cols) { return kOwnOAt + kGroups * 64 * cols * 2 <= kLimit; }
  static constexpr bool kOutputOverP = !has_room(kHeadDimV) && kSharedP && kHeadDimV <= kTileKv;
  static constexpr int own_output_cols() {
    int cols = kHeadDimV;
    while (cols > 0 && !(kHeadDimV % cols == 0 && has_room(cols))) cols = (cols - 1) / 64 * 64;
    return cols;
  }
  static constexpr bool kOwnO = !kOutputOverP && own_output_cols() > 0;
  static constexpr bool kOutputOverV = !kOwnO && !kOutputOverP;
  static constexpr int kOutputCols = kOwnO ? own_output_cols() : kHeadDimV;
  static constexpr int kGroupOBytes = 64 * kOutputCols * 2;
  static constexpr int kOutputAt = kOwnO ? kOwnOAt : kOutputOverP ? kPAt : 0;
  static constexpr int kOutputPitch = kOutputOverP ? kGroupPBytes : kGroupOBytes;
  static constexpr int kCopiedAt = kOwnOAt + (kOwnO ? kGroups * kGroupOBytes : 0);
  static constexpr int kControlAt = kCopiedAt + kCopiedBytes;
  static constexpr int kExtraAt = kControlAt + static_cast<int>(sizeof(ControlBlock<kStages>));
  static constexpr int kSharedBytes = kExtraAt + kExtraBytes;
  static_assert(kCopiedAt <= kLimit, "tile does not fit in shared memory");
  static_assert(!kOutputOverV || kGroups * kGroupOBytes <= kKeyAt, "O does not fit over V");
  static_assert(kKeyBytes % 1024 == 0 && kValueBytes % 1024 == 0, "stages must stay 1024-byte aligned");
};

}  // namespace jg
