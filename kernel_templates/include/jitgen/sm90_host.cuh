// Host side of a launch: tensor maps, and a tile counter that no concurrent launch shares.
#pragma once
#include "jitgen/sm90_geometry.cuh"

// Unnamed, because statics of inline functions are otherwise one object for all modules that a process has loaded: the
// second module would find its device prepared.
namespace jg {
namespace {

constexpr int kErrorNoEncoder = 20001;    // the driver has no cuTensorMapEncodeTiled
constexpr int kErrorTensorMap = 20002;    // it refused a tensor, or rows are broadcast
constexpr int kErrorTooManyTiles = 20003;
constexpr int kErrorCannotCopy = 20004;   // a captured tensor is not for the copy engine: the caller has another kernel for it

inline const char* launch_error_string(int code) {
  if (code == kErrorNoEncoder) return "the driver has no cuTensorMapEncodeTiled. Update it, or use the sm80 family.";
  if (code == kErrorTensorMap) return "the driver refused a tensor map: bases and strides must be multiples of 16 bytes, and that of rows not 0. Copy the tensor.";
  if (code == kErrorCannotCopy) return "the copy engine cannot take a captured tensor.";
  if (code == kErrorTooManyTiles) return "more than 2^31 query tiles in one launch. Split the batch.";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// ---- tensor maps ----
// A [batch, heads, rows, kCols] tensor, strides in elements. Equal keys give equal maps.
struct TensorKey { const void* base; int64_t rows, heads, batch, stride_s, stride_h, stride_b; };

using EncodeTiled = int (*)(TensorMap*, int type, unsigned rank, void* base, const unsigned long long* sizes,
                            const unsigned long long* strides, const unsigned* box, const unsigned* element_strides,
                            int interleave, int swizzle, int l2_promotion, int out_of_bounds);

inline EncodeTiled find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function) : nullptr;
}

// How much a read of the copy engine brings to L2 around what it asked for. Where kernels wait for memory alone the wide one costs
// a tenth of the bandwidth of an H200 (rows of 256 bytes: 4117 GB/s, 4525 with the narrow one), and is not felt on an H100.
constexpr int kNarrowPromotion = 2, kWidePromotion = 3;   // of the driver's: 128 and 256 bytes

// One operand; encoding again (about 1 us) only when the key differs from the last one of this thread.
template <int kCols, int kPromotion = kWidePromotion, class Tile = SpanTile<kCols>> struct OperandMap {
  TensorKey key = {};
  Operand operand = {};

  // A copy moves box_rows rows of box_cols columns.
  int update(const TensorKey& wanted, bool is_bf16, unsigned box_rows, unsigned box_cols = kCols) {
    if (same(wanted)) return 0;
    static const EncodeTiled encode = find_encoder();
    if (!encode) return kErrorNoEncoder;
    using u64 = unsigned long long;
    operand.head_step = wanted.stride_h != 0, operand.batch_step = wanted.stride_b != 0;
    const u64 rows = wanted.rows, heads = operand.head_step ? wanted.heads : 1, batch = operand.batch_step ? wanted.batch : 1;
    // {element in span, row, span, head, batch}; the stride of an axis of length 1 is never used but must be legal.
    const auto bytes = [](u64 size, int64_t stride) { return size == 1 ? 16ull : static_cast<u64>(stride * 2); };
    const u64 sizes[5] = {Tile::kSpan, rows, kCols / Tile::kSpan, heads, batch};
    const u64 strides[4] = {bytes(rows, wanted.stride_s), Tile::kSpanBytes, bytes(heads, wanted.stride_h), bytes(batch, wanted.stride_b)};
    const unsigned box[5] = {Tile::kSpan, box_rows, box_cols / Tile::kSpan, 1, 1}, ones[5] = {1, 1, 1, 1, 1};
    // Driver enums: data type 6 = fp16, 9 = bf16; swizzle 3 = 128 bytes, 2 = 64; zero fill.
    key.base = nullptr;
    void* const base = const_cast<void*>(wanted.base);
    if (strides[0] == 0 || encode(&operand.map, is_bf16 ? 9 : 6, 5, base, sizes, strides, box, ones, 0, Tile::kSpan == 64 ? 3 : 2, kPromotion, 0))
      return kErrorTensorMap;
    key = wanted;
    return 0;
  }
  bool same(const TensorKey& k) const {
    return key.base == k.base && key.rows == k.rows && key.heads == k.heads && key.batch == k.batch && key.stride_s == k.stride_s &&
           key.stride_h == k.stride_h && key.stride_b == k.stride_b;
  }
};

// A captured tensor of 16-bit elements, copied in boxes of box_rows rows and kSpan keys. Sizes and strides (in elements) of keys,
// rows and two more dimensions; that of keys is 1.
struct CapturedKey { const void* base; int64_t sizes[4], strides[3]; };
template <int kSpan> struct CapturedBoxes {
  CapturedKey key = {};
  TensorMap map = {};

  int update(const CapturedKey& wanted, bool is_bf16, unsigned box_rows) {
    if (!__builtin_memcmp(&key, &wanted, sizeof(key))) return 0;
    bool is_aligned = reinterpret_cast<unsigned long long>(wanted.base) % 16 == 0 && wanted.sizes[0] > 0;
    for (int i = 0; i < 3; ++i) is_aligned &= wanted.sizes[i + 1] == 1 || wanted.strides[i] % 8 == 0;
    if (!is_aligned) return kErrorCannotCopy;
    static const EncodeTiled encode = find_encoder();
    if (!encode) return kErrorNoEncoder;
    unsigned long long sizes[4], strides[3];
    for (int i = 0; i < 4; ++i) sizes[i] = wanted.sizes[i];
    for (int i = 0; i < 3; ++i) strides[i] = wanted.sizes[i + 1] == 1 ? 16 : wanted.strides[i] * 2;
    const unsigned box[4] = {kSpan, box_rows, 1, 1}, ones[4] = {1, 1, 1, 1};
    key.base = nullptr;
    if (encode(&map, is_bf16 ? 9 : 6, 4, const_cast<void*>(wanted.base), sizes, strides, box, ones, 0, kSpan == 64 ? 3 : 2, 3, 0)) return kErrorCannotCopy;
    key = wanted;
    return 0;
  }
};

// ---- tile counters ----
// A launch that takes its tiles dynamically counts in device memory; its last CTA sets the counter back to zero. Launches
// that may run at the same time must not share one: each stream has its own (launches of a stream follow each other), and
// so has each captured launch (replays of a graph follow each other). With all of them taken the launch is given -1 and
// walks its tiles in a fixed order: slower by 2 to 12 % under a causal mask, never wrong.
constexpr int kStreamCounters = 64, kCapturedCounters = 4032;
__device__ int tile_counters[kStreamCounters + kCapturedCounters][2];   // {tiles taken, CTAs done}

// The tile that a CTA takes behind `tile`, in lane 0 of the warp that takes it. `counter`: of the launch, -1: none.
JITGEN_FN int next_tile(int tile, int counter, bool leader) {
  int taken = tile;
  if (leader && counter >= 0) taken = atomicAdd(&tile_counters[counter][0], 1);
  return taken + static_cast<int>(gridDim.x);
}
// When a CTA has taken all that it will: the last one makes the counter ready for the next launch.
JITGEN_FN void leave_counter(int counter, bool leader) {
  if (leader && counter >= 0) {
    int* taken_done = tile_counters[counter];
    if (atomicAdd(&taken_done[1], 1) == static_cast<int>(gridDim.x) - 1) taken_done[0] = taken_done[1] = 0;
  }
}

inline int counter_of(cudaStream_t stream) {
  static int captured = 0, known = 0, lock = 0;
  static unsigned long long stream_ids[kStreamCounters];
  cudaStreamCaptureStatus status;
  unsigned long long id;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) return -1;
  if (status != cudaStreamCaptureStatusNone) {
    if (__atomic_load_n(&captured, __ATOMIC_RELAXED) >= kCapturedCounters) return -1;
    const int taken = __atomic_fetch_add(&captured, 1, __ATOMIC_RELAXED);
    return taken < kCapturedCounters ? kStreamCounters + taken : -1;
  }
  if (cudaStreamGetId(stream, &id) != cudaSuccess) return -1;   // unlike the handle, never used again for another stream
  const auto find = [&] {
    for (int i = 0, n = __atomic_load_n(&known, __ATOMIC_ACQUIRE); i < n; ++i)
      if (stream_ids[i] == id) return i;
    return -1;
  };
  int slot = find();
  if (slot >= 0) return slot;
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {}
  slot = find();
  if (slot < 0 && known < kStreamCounters) {
    slot = known;
    stream_ids[slot] = id;
    __atomic_store_n(&known, known + 1, __ATOMIC_RELEASE);
  }
  __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
  return slot;
}

// Facts of the current device that a launch needs; the kernel's shared-memory limit is raised on first use.
inline cudaError_t prepare_device(const void* kernel, int shared_bytes, int& num_sms) {
  constexpr int kMaxDevices = 64;
  static int known[kMaxDevices];   // SM count, set once; two threads may both set it, to the same value
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  num_sms = device < kMaxDevices ? __atomic_load_n(&known[device], __ATOMIC_ACQUIRE) : 0;
  if (num_sms) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && device < kMaxDevices) __atomic_store_n(&known[device], num_sms, __ATOMIC_RELEASE);
  return error;
}

}  // namespace
}  // namespace jg
