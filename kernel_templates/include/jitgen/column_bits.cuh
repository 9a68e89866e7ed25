// Masks by bits: all columns that a thread has in a row of a tile are compared at once, and give a bit each, in order.
//
// A mask expression is printed over Columns instead of a column. Bits become predicates seven at a time, so that a mask costs
// a select an element, whatever it says. Layout of the columns: accumulators of wgmma (sm90_wgmma.cuh).
#pragma once
#include "jitgen/cuda_math.cuh"
#include "jitgen/span.h"

namespace jg {

struct ColumnBits {
  unsigned bits;
  ColumnBits() = default;
  JITGEN_MEMBER ColumnBits(bool all) : bits(all ? ~0u : 0u) {}
};
JITGEN_FN ColumnBits column_bits(unsigned bits) {
  ColumnBits result;
  result.bits = bits;
  return result;
}
JITGEN_FN ColumnBits operator&(ColumnBits a, ColumnBits b) { return column_bits(a.bits & b.bits); }
JITGEN_FN ColumnBits operator|(ColumnBits a, ColumnBits b) { return column_bits(a.bits | b.bits); }
JITGEN_FN ColumnBits operator!(ColumnBits a) { return column_bits(~a.bits); }

// Relations of what ascends with the columns, from what Values says of itself: below(x), up_to(x).
template <class Values> struct Ascends {
  template <class X> JITGEN_FN friend ColumnBits operator<(Values a, X x) { return a.below(x); }
  template <class X> JITGEN_FN friend ColumnBits operator<=(Values a, X x) { return a.up_to(x); }
  template <class X> JITGEN_FN friend ColumnBits operator==(Values a, X x) { return a.up_to(x) & !a.below(x); }
  template <class X> JITGEN_FN friend ColumnBits operator!=(Values a, X x) { return !a.up_to(x) | a.below(x); }
  template <class X> JITGEN_FN friend ColumnBits operator<(X x, Values a) { return !a.up_to(x); }
  template <class X> JITGEN_FN friend ColumnBits operator<=(X x, Values a) { return !a.below(x); }
  template <class X> JITGEN_FN friend ColumnBits operator==(X x, Values a) { return a.up_to(x) & !a.below(x); }
  template <class X> JITGEN_FN friend ColumnBits operator!=(X x, Values a) { return !a.up_to(x) | a.below(x); }
};

// Columns first + 8 j and first + 8 j + 1 of a tile of kTileKv.
template <int kTileKv> struct Columns : Ascends<Columns<kTileKv>> {
  static_assert(kTileKv <= 128, "a thread has 32 columns at most");
  int first;
  JITGEN_MEMBER explicit Columns(int first) : first(first) {}
  JITGEN_MEMBER ColumnBits below(int x) const { return run(x, first); }
  JITGEN_MEMBER ColumnBits up_to(int x) const { return run(x, first - 1); }
  JITGEN_MEMBER ColumnBits below(long long x) const { return below(narrow(x)); }
  JITGEN_MEMBER ColumnBits up_to(long long x) const { return up_to(narrow(x)); }
  // As many as columns from `least` on are below x, were all of the tile ours.
  JITGEN_MEMBER ColumnBits run(int x, int least) const {
    const int length = min(max(x, least), least + kTileKv) - least, count = (length >> 2 & ~1) + min(length & 7, 2);
    unsigned others;
    asm("shl.b32 %0, %1, %2;" : "=r"(others) : "r"(~0u), "r"(count));   // unlike <<, it takes 32
    return column_bits(~others);
  }
};

// What both rows of a thread see of a tile.
struct KeptColumns {
  ColumnBits of[2];

  // Logits of other columns never count.
  template <int kColTiles> JITGEN_MEMBER void hide_others(float (&s)[kColTiles][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 2 * kColTiles; ++n) {
        float& x = s[n / 2][2 * half + n % 2];
        x = of[half].bits >> n & 1 ? x : -INFINITY;
      }
  }
};

// A search for the first of `size` ascending elements that is not below x, or (kAbove) that is above it; `size` if there is none.
template <class T, class X, bool kAbove> struct Search {
  const T* values;
  int size;
  X x;
};
template <class T, class X> JITGEN_FN Search<T, X, false> first_at_least(const T* values, int size, X x) { return {values, size, x}; }
template <class T, class X> JITGEN_FN Search<T, X, true> first_above(const T* values, int size, X x) { return {values, size, x}; }

// Searches in step, as each is a chain of reads (documents 0.5 % faster than one after the other). `make(i)`: the i-th; all are of the
// same elements.
template <class T, class X, bool kAbove, int kCount, class Make> JITGEN_FN void search_like(const Search<T, X, kAbove>& first, int (&found)[kCount], const Make& make) {
  const T* const values = first.values;
  const int size = first.size;
  X x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = make(i).x, found[i] = 0;
#pragma unroll 1
  for (int step = size > 0 ? 1 << (31 - __clz(size)) : 0; step > 0; step >>= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int next = found[i] + step;
      const auto value = load(values, min(next, size) - 1);
      if ((kAbove ? value <= x[i] : value < x[i]) & (next <= size)) found[i] = next;
    }
  }
}
template <int kCount, class Make> JITGEN_FN void search_together(int (&found)[kCount], const Make& make) { search_like(make(0), found, make); }

}  // namespace jg
