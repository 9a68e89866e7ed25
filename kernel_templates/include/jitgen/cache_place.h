// Where the rows of a token go, and by how much they are turned. The same on CPU and CUDA; included after the header with
// the backend's maths.
#pragma once

#include "jitgen/span.h"
#include "jitgen/turns.h"

#ifdef __CUDACC__
#define JITGEN_ANYWHERE __host__ __device__ __forceinline__
#else
#define JITGEN_ANYWHERE __attribute__((always_inline))
#endif

namespace jg {

// Of what is written: none, read per head, found per row and stored by slot. kRead: of what is read, per head or by slot.
enum class Scale { kNone, kGiven, kStored, kRead };
// Where rows go: row of the token; slot mapping; request, position and page table. Or where they come from, to go to the row
// of the token: a page table, or the rows from list_start on of each request.
enum class Places { kRows, kSlots, kPages, kFromPages, kFromRows };
template <Places kPlaces> constexpr bool kGathers = kPlaces == Places::kFromPages || kPlaces == Places::kFromRows;

// The rows of one kind: those of all heads of a token lie at multiples of stride_h from each other. The strides of x are those
// of tokens and heads, the strides of out those of places; a gather reads at places and writes by token.
struct Rows {
  const void* x;
  void* out;
  float* scale;        // null: one number for all
  float scale_value;
  int64_t num_heads, heads_per_unit;
  int64_t x_stride_t, x_stride_h;
  int64_t out_stride_p, out_stride_s, out_stride_h;   // page, slot in the page (or token), head
  int64_t scale_stride_s, scale_stride_h;
};

struct Place {
  int b, pos;
  int64_t page, offset, slot;   // offset: in the page
  bool exists;                  // false: the token is skipped
  bool is_wrong;                // it names a page, a slot or a request that is not there
};

// What a row that is read is multiplied by.
JITGEN_FN float read_scale(const Rows& rows, const Place& place, int64_t h) {
  return rows.scale_value * (rows.scale ? rows.scale[place.slot * rows.scale_stride_s + h * rows.scale_stride_h] : 1.0f);
}

JITGEN_FN int64_t index_at(const void* indices, int64_t i, bool is_wide) {
  return is_wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int*>(indices)[i];
}

// The request that holds a row: the last one that begins at or before it, by bisection. In decode each has a row, and is found
// by one look in place of a chain of them.
JITGEN_FN int request_of(const int* indptr, int batch, int64_t row) {
  if (row < batch && indptr[row] <= row && row < indptr[row + 1]) return static_cast<int>(row);
  int below = 0, above = batch;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    if (indptr[middle] <= row) below = middle;
    else above = middle;
  }
  return below;
}

constexpr int kWidePositions = 1, kWideRequests = 2, kWideSlots = 4;   // bits of Args::wide: which indices are int64

template <Places kPlaces, class Args> JITGEN_FN Place find_place(const Args& args, int64_t token) {
  Place place = {0, 0, 0, token, 0, true, false};
  int64_t b = 0, pos = 0;
  if (args.q_indptr) {
    b = request_of(args.q_indptr, static_cast<int>(args.batch), token);
    place.exists = args.batch > 0 && token >= args.q_indptr[0] && token < args.q_indptr[args.batch];
    if (place.exists) pos = (args.lengths ? args.lengths[b] : 0) + token - args.q_indptr[b + args.from_end];
  } else {
    if (args.positions) pos = index_at(args.positions, token, args.wide & kWidePositions);
    if (args.batch_indices) b = index_at(args.batch_indices, token, args.wide & kWideRequests);
  }
  if (kPlaces == Places::kSlots) {
    place.slot = index_at(args.slot_mapping, token, args.wide & kWideSlots);
    place.exists = place.exists && place.slot >= 0;
    place.page = place.exists ? place.slot / args.page_size : 0;
    place.offset = place.slot - place.page * args.page_size;
    place.is_wrong = place.exists && place.page >= args.num_pages;
  }
  if (kPlaces == Places::kFromRows && place.exists) {
    place.offset = place.slot = args.list_start[b] + token - args.q_indptr[b];
    place.page = 0;
    place.is_wrong = place.offset < 0 || place.offset >= args.num_pages * args.page_size;
  }
  if (kPlaces == Places::kPages || kPlaces == Places::kFromPages) {
    const int64_t at = kPlaces == Places::kFromPages && place.exists ? token - args.q_indptr[b] : pos;   // in the list
    const bool is_wrong = at > 0x7fffffff || (at < 0 && args.q_indptr);   // a request has more new tokens than tokens
    place.is_wrong = place.exists && b >= 0 && (b >= args.batch || is_wrong);
    place.exists = place.exists && b >= 0 && at >= 0;
    if (place.exists && !place.is_wrong) {
      const int64_t number = static_cast<unsigned>(at) / static_cast<unsigned>(args.page_size);
      const int64_t start = args.list_start ? args.list_start[b] : b * args.list_stride;
      const int64_t length = args.list_start ? args.list_start[b + 1] - start : args.list_length;
      const bool is_within = !args.list_start || (start >= 0 && start + number < args.list_length);   // of all lists
      place.is_wrong = kPlaces == Places::kPages && (number >= length || !is_within);   // lists to gather from are trusted
      if (!place.is_wrong) place.page = args.pages[start + number];
      place.is_wrong = place.is_wrong || place.page < 0 || place.page >= args.num_pages;
      place.offset = at - number * args.page_size;
      place.slot = place.page * args.page_size + place.offset;
    }
  }
  place.exists = place.exists && !place.is_wrong;
  place.b = static_cast<int>(b);
  place.pos = static_cast<int>(pos);
  return place;
}

// ---- 8-bit elements ----
#ifdef __CUDACC__
struct float8_e4m3fn { unsigned char bits; };
struct float8_e5m2 { unsigned char bits; };
struct int8 { signed char value; };
#endif
template <class T> constexpr float kLargest = 127.0f;   // int8
template <> constexpr float kLargest<float8_e4m3fn> = 448.0f;
template <> constexpr float kLargest<float8_e5m2> = 57344.0f;

// The nearest value, ties to even; what is too large becomes the largest. kMantissa bits, least normal exponent kLeast.
template <int kMantissa, int kLeast> JITGEN_FN unsigned char round_to_byte(float x, float most, unsigned char nan) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  const unsigned sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<unsigned char>(sign | nan);
  float size;
  __builtin_memcpy(&size, &magnitude, 4);
  size = size < most ? size : most;
  // Adding 1.5 * 2^23 units of the last place leaves the rounded number of units in the low bits of the sum.
  unsigned clamped;
  __builtin_memcpy(&clamped, &size, 4);
  const int exponent = static_cast<int>(clamped >> 23) - 127, place = exponent < kLeast ? kLeast : exponent;
  const unsigned unit_bits = static_cast<unsigned>(place - kMantissa + 127) << 23;
  float unit;
  __builtin_memcpy(&unit, &unit_bits, 4);
  const float magic = 12582912.0f * unit, sum = size + magic;
  const unsigned units = static_cast<unsigned>((sum - magic) / unit);   // up to 2^(kMantissa + 1): it may carry
  return static_cast<unsigned char>(sign | (units + (static_cast<unsigned>(place - kLeast) << kMantissa)));
}
JITGEN_FN float8_e4m3fn to_e4m3(float x) { return {round_to_byte<3, -6>(x, 448.0f, 0x7f)}; }
JITGEN_FN float8_e5m2 to_e5m2(float x) { return {round_to_byte<2, -14>(x, 57344.0f, 0x7f)}; }

}  // namespace jg
