// What the variant section needs beyond maths, the same on CPU and CUDA: saturated integers, and intervals.
//
// A mask expression is printed a second time over Bounds and Truth instead of int and bool: operators below give every
// operation its meaning over all elements of a rectangle at once. Loose is allowed, wrong is not.
// Included after the backend header, which defines JITGEN_FN and jg::load; it needs no other.
#pragma once

#ifdef __CUDACC__
#define JITGEN_MEMBER __device__ __forceinline__
#else
#define JITGEN_MEMBER __attribute__((always_inline))
#endif

namespace jg {

// ---- integers ----
// Saturates at 2^30: sums and comparisons with positions (below 2^28) come out as for the unsaturated value.
JITGEN_FN int narrow(long long x) {
  const long long limit = 1LL << 30;
  return (int)(x < -limit ? -limit : x > limit ? limit : x);
}
JITGEN_FN int clamp_index(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }
JITGEN_FN int wrap_index(int i, int size) { return i < 0 ? i + size : i; }

// ---- intervals ----
constexpr long long kFar = 1LL << 40;         // 64-bit captures beyond this are not analysed
constexpr long long kMaxScan = 1024;          // elements of a captured tensor looked at to bound a gather

// Every element of the rectangle has a value in [lo, hi]; with known == false nothing is known.
struct Bounds {
  long long lo, hi;
  bool known;
  Bounds() = default;
  JITGEN_MEMBER Bounds(long long x) : lo(x), hi(x), known(x >= -kFar && x <= kFar) {}
  JITGEN_MEMBER Bounds(long long lo, long long hi, int known = 1) : lo(lo), hi(hi), known(known) {}
};
JITGEN_FN Bounds anything() { return {0, 0, false}; }

// may: some element can be true. must: every element is true.
struct Truth {
  bool may, must;
  Truth() = default;
  JITGEN_MEMBER Truth(bool x) : may(x), must(x) {}
  JITGEN_MEMBER Truth(int may, int must) : may(may), must(must) {}
};
JITGEN_FN Truth unsure() { return {true, false}; }
// Behind a test that has returned where !may, or where must.
JITGEN_FN Truth possible(Truth t) { return {1, t.must}; }
JITGEN_FN Truth unproven(Truth t) { return {t.may, 0}; }
JITGEN_FN int tile_kind(Truth t) { return t.must ? kTileFull : t.may ? kTilePartial : kTileNone; }

JITGEN_FN Truth operator&(Truth a, Truth b) { return {a.may & b.may, a.must & b.must}; }
// Kind of a tile for a conjunction of what positions say and what tensors say, where a template tells the two apart.
constexpr int kTilePositions = 3;   // partial, and the tensors hide nothing
JITGEN_FN int tile_kind(Truth positions, Truth tensors) {
  const int kind = tile_kind(positions & tensors);
  return kind == kTilePartial && tensors.must ? kTilePositions : kind;
}
JITGEN_FN Truth operator|(Truth a, Truth b) { return {a.may | b.may, a.must | b.must}; }
JITGEN_FN Truth operator!(Truth a) { return {!a.must, !a.may}; }
JITGEN_FN Truth operator==(Truth a, Truth b) { return (a & b) | (!a & !b); }
JITGEN_FN Truth operator!=(Truth a, Truth b) { return !(a == b); }
JITGEN_FN Truth as_truth(Bounds a) { return {!a.known | (a.lo != 0) | (a.hi != 0), a.known & ((a.lo > 0) | (a.hi < 0))}; }
JITGEN_FN Bounds as_bounds(Truth a) { return {a.must, a.may}; }

JITGEN_FN Truth decided(bool known, bool may, bool must) { return {!known | may, known & must}; }
JITGEN_FN Truth operator<(Bounds a, Bounds b) { return decided(a.known & b.known, a.lo < b.hi, a.hi < b.lo); }
JITGEN_FN Truth operator<=(Bounds a, Bounds b) { return decided(a.known & b.known, a.lo <= b.hi, a.hi <= b.lo); }
JITGEN_FN Truth operator==(Bounds a, Bounds b) {
  return decided(a.known & b.known, (a.lo <= b.hi) & (b.lo <= a.hi), (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo));
}
JITGEN_FN Truth operator!=(Bounds a, Bounds b) { return !(a == b); }

JITGEN_FN long long least(long long a, long long b) { return a < b ? a : b; }
JITGEN_FN long long most(long long a, long long b) { return a < b ? b : a; }
JITGEN_FN Bounds hull(Bounds a, Bounds b) { return {least(a.lo, b.lo), most(a.hi, b.hi), a.known & b.known}; }

JITGEN_FN Bounds operator+(Bounds a, Bounds b) { return {a.lo + b.lo, a.hi + b.hi, a.known & b.known}; }
JITGEN_FN Bounds operator-(Bounds a, Bounds b) { return {a.lo - b.hi, a.hi - b.lo, a.known & b.known}; }
JITGEN_FN Bounds operator-(Bounds a) { return {-a.hi, -a.lo, a.known}; }
JITGEN_FN Bounds operator*(Bounds a, Bounds b) {
  const long long w = a.lo * b.lo, x = a.lo * b.hi, y = a.hi * b.lo, z = a.hi * b.hi;
  return {least(least(w, x), least(y, z)), most(most(w, x), most(y, z)), a.known & b.known};
}
// For sums and products that could leave 64 bits: values far from zero are given up.
JITGEN_FN bool within(Bounds a, long long limit) { return a.known & (a.lo >= -limit) & (a.hi <= limit); }
JITGEN_FN Bounds near(Bounds a) { return within(a, kFar) ? a : anything(); }
JITGEN_FN Bounds times(Bounds a, Bounds b) {
  const long long limit = 1LL << 31;
  return (within(a, limit) & within(b, limit)) ? near(a * b) : anything();
}
JITGEN_FN Bounds min(Bounds a, Bounds b) { return {least(a.lo, b.lo), least(a.hi, b.hi), a.known & b.known}; }
JITGEN_FN Bounds max(Bounds a, Bounds b) { return {most(a.lo, b.lo), most(a.hi, b.hi), a.known & b.known}; }
JITGEN_FN Bounds abs(Bounds a) {
  const long long low = most(a.lo, -a.hi);    // negative if the interval holds 0 inside
  return {most(low, 0), most(-a.lo, a.hi), a.known};
}
JITGEN_FN Bounds sign(Bounds a) { return {(a.lo > 0) - (a.lo < 0), (a.hi > 0) - (a.hi < 0), a.known}; }
// Floor division and remainder by one positive divisor; a range of divisors is not analysed.
JITGEN_FN Bounds floor_div(Bounds a, Bounds d) {
  if ((d.lo != d.hi) | (d.lo <= 0)) return anything();
  return {floor_div(a.lo, d.lo), floor_div(a.hi, d.lo), a.known & d.known};
}
JITGEN_FN Bounds floor_mod(Bounds a, Bounds d) {
  if ((d.lo != d.hi) | (d.lo <= 0)) return anything();
  const long long first = floor_div(a.lo, d.lo), last = floor_div(a.hi, d.lo);
  if (!a.known | (first != last)) return {0, d.lo - 1, d.known};
  return {a.lo - first * d.lo, a.hi - first * d.lo, d.known};
}
// Ones up to the highest bit in which two numbers differ: above it, all numbers between them agree.
JITGEN_FN long long varying_bits(long long lo, long long hi) {
  unsigned long long bits = static_cast<unsigned long long>(lo ^ hi);
  for (int step = 1; step < 64; step *= 2) bits |= bits >> step;
  return static_cast<long long>(bits);
}
JITGEN_FN Bounds keep_bits(Bounds a, long long mask) {   // a & mask, mask > 0
  if (!a.known | (a.lo < 0)) return {0, mask};
  const long long free = varying_bits(a.lo, a.hi);
  return {a.lo & ~free & mask, (a.lo | free) & mask};
}
JITGEN_FN Bounds join_bits(Bounds a, Bounds b) {   // a | b
  if (!a.known | !b.known | (a.lo < 0) | (b.lo < 0)) return anything();
  const long long free = varying_bits(a.lo, a.hi) | varying_bits(b.lo, b.hi), bits = a.lo | b.lo;
  return {bits & ~free, bits | free};
}
JITGEN_FN Bounds choose(Truth condition, Bounds yes, Bounds no) {
  return condition.must ? yes : condition.may ? hull(yes, no) : no;
}
JITGEN_FN Truth choose(Truth condition, Truth yes, Truth no) {
  return {(condition.may & yes.may) | (!condition.must & no.may),
          (condition.must & yes.must) | (!condition.may & no.must) | (yes.must & no.must)};
}

// ---- gathers ----
// Bounds of an element of a type, when the elements cannot be looked at.
JITGEN_FN Bounds element_bounds(const long long*) { return anything(); }
JITGEN_FN Bounds element_bounds(const int*) { return {-(1LL << 31), (1LL << 31) - 1}; }
JITGEN_FN Bounds element_bounds(const short*) { return {-(1LL << 15), (1LL << 15) - 1}; }
JITGEN_FN Bounds element_bounds(const signed char*) { return {-128, 127}; }
JITGEN_FN Bounds element_bounds(const unsigned char*) { return {0, 255}; }
JITGEN_FN Bounds element_bounds(const bool*) { return {0, 1}; }

// Indices along one dimension, as the element form reads them: negative ones counted from the end, the rest clamped.
struct Axis { long long lo, hi, stride; };

JITGEN_FN Axis axis(Bounds index, long long size, long long stride) {
  const bool wraps = index.lo < 0;
  const long long shift = (wraps & (index.hi < 0)) ? size : 0;
  const bool all = !index.known | (wraps & (index.hi >= 0));
  const long long lo = all ? 0 : index.lo + shift, hi = all ? size - 1 : index.hi + shift;
  return {most(0, least(lo, size - 1)), most(0, least(hi, size - 1)), stride};
}
// Of positions known to be inside.
JITGEN_FN Axis inside(Bounds index, long long stride) { return {index.lo, index.hi, stride}; }
JITGEN_FN long long extent(Axis a) { return a.hi - a.lo + 1; }

template <class T> JITGEN_FN Bounds checked(const T*, long long lo, long long hi) {
  return {lo, hi, sizeof(T) < 8 || (lo >= -kFar && hi <= kFar)};
}
JITGEN_FN int least(int a, int b) { return a < b ? a : b; }
JITGEN_FN int most(int a, int b) { return a < b ? b : a; }
#ifdef __CUDACC__
// First of the elements if they are neighbouring 32-bit integers that begin and end at 16 bytes, as those of whole tiles do.
template <class T> JITGEN_FN const T* words_of(const T*, Axis) { return nullptr; }
JITGEN_FN const int* words_of(const int* base, Axis i) {
  const int* first = base + i.lo;
  return i.stride == 1 && (reinterpret_cast<unsigned long long>(first) & 15) == 0 && extent(i) % 4 == 0 ? first : nullptr;
}
#else
// Least and largest of a row of elements, in a function of its own: mask_tile is asked in half a dozen places.
template <class T> static __attribute__((noinline)) Bounds scan_elements(const T* first, int count, long long stride) {
  auto lo = load(first, 0), hi = lo;   // int for all but 64-bit elements
  if (stride == 1) {
#pragma omp simd reduction(min : lo) reduction(max : hi)
    for (int n = 0; n < count; ++n) {   // from 0: the whole vectors of a panel
      const auto value = load(first, n);
      lo = value < lo ? value : lo;
      hi = value > hi ? value : hi;
    }
  } else {
    for (int n = 1; n < count; ++n) {
      const auto value = load(first, n * stride);
      lo = value < lo ? value : lo;
      hi = value > hi ? value : hi;
    }
  }
  return checked(first, lo, hi);
}
#endif
// Least and largest element of a box of a tensor.
template <class T> JITGEN_FN Bounds scan(const T* base, Axis i) {
  if (extent(i) > kMaxScan) return element_bounds(base);
#ifdef __CUDACC__
  if (const int* first = reinterpret_cast<const int*>(words_of(base, i))) {   // four elements a load
    const int4 head = __ldg(reinterpret_cast<const int4*>(first));
    int lo = least(least(head.x, head.y), least(head.z, head.w)), hi = most(most(head.x, head.y), most(head.z, head.w));
#pragma unroll 2
    for (int n = 1; n < static_cast<int>(extent(i) / 4); ++n) {
      const int4 four = __ldg(reinterpret_cast<const int4*>(first) + n);
      lo = least(lo, least(least(four.x, four.y), least(four.z, four.w)));
      hi = most(hi, most(most(four.x, four.y), most(four.z, four.w)));
    }
    return {lo, hi};
  }
  const T* first = base + i.lo * i.stride;
  auto lo = load(first, 0), hi = lo;   // int for all but 64-bit elements
  for (int n = static_cast<int>(extent(i)) - 1; n > 0; --n) {
    first += i.stride;
    const auto value = load(first, 0);
    lo = least(lo, value);
    hi = most(hi, value);
  }
  return checked(base, lo, hi);
#else
  return scan_elements(base + i.lo * i.stride, static_cast<int>(extent(i)), i.stride);
#endif
}
template <class T> JITGEN_FN Bounds scan(const T* base, Axis i, Axis j) {
  if (extent(i) * extent(j) > kMaxScan) return element_bounds(base);
  Bounds found = scan(base + i.lo * i.stride, j);
  for (long long x = i.lo + 1; x <= i.hi; ++x) found = hull(found, scan(base + x * i.stride, j));
  return found;
}
template <class T> JITGEN_FN Bounds scan(const T* base, Axis i, Axis j, Axis k) {
  if (extent(i) * extent(j) > kMaxScan || extent(i) * extent(j) * extent(k) > kMaxScan) return element_bounds(base);
  Bounds found = scan(base + i.lo * i.stride, j, k);
  for (long long x = i.lo + 1; x <= i.hi; ++x) found = hull(found, scan(base + x * i.stride, j, k));
  return found;
}
// The same by a whole warp, whose lanes all pass the same arguments: mask_span is called so.
template <class T> JITGEN_FN Bounds scan_together(const T* base, Axis i) {
#ifdef __CUDACC__
  if (extent(i) > kMaxScan) return element_bounds(base);
  auto lo = load(base, i.lo * i.stride), hi = lo;
  for (long long x = i.lo + (threadIdx.x & 31); x <= i.hi; x += 32) {
    const auto value = load(base, x * i.stride);
    lo = least(lo, value);
    hi = most(hi, value);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    lo = least(lo, __shfl_xor_sync(0xffffffffu, lo, step));
    hi = most(hi, __shfl_xor_sync(0xffffffffu, hi, step));
  }
  return checked(base, lo, hi);
#else
  return scan(base, i);
#endif
}
// The same for a tensor declared ascending: its ends.
template <class T> JITGEN_FN Bounds scan_sorted(const T* base, Axis i) {
  return checked(base, load(base, i.lo * i.stride), load(base, i.hi * i.stride));
}

}  // namespace jg
