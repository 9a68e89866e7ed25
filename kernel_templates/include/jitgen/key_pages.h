// Where keys lie in a paged cache, which hooks know as page and kv_slot. The same on CPU and CUDA.
// Included after the backend header, which defines JITGEN_FN and jg::load, and span.h.
#pragma once

#include "jitgen/span.h"

namespace jg {

// Pages of a request for one KV head.
struct KeyPages {
  const int* pages;   // in the order of its keys
  int last;           // key; none behind it has a page
  int size;           // keys of a page
  unsigned magic;     // x / size = x * magic >> shift
  int shift;

  JITGEN_MEMBER int page(int kv_idx) const { return jg::load(pages, number(inside(kv_idx))); }
  JITGEN_MEMBER int slot(int kv_idx) const {
    const int key = inside(kv_idx), n = number(key);
    return jg::load(pages, n) * size + key - n * size;
  }

 private:
  JITGEN_MEMBER int inside(int kv_idx) const { return kv_idx < last ? kv_idx : last; }
  JITGEN_MEMBER int number(int key) const {
    return static_cast<int>(static_cast<unsigned long long>(static_cast<unsigned>(key)) * magic >> shift);
  }
};

template <class Args> JITGEN_FN KeyPages key_pages(const Args& args, int b, int kv_h, int kv_len) {
  const long long start = args.key_page_start ? jg::load(args.key_page_start, b) : b * args.key_page_stride;
  return {args.key_pages + start + kv_h * args.key_page_head_stride, kv_len - 1, static_cast<int>(args.key_page_size),
          static_cast<unsigned>(args.key_page_magic), static_cast<int>(args.key_page_shift)};
}

// Where rows are gathered from: all of the rows exist, and KV heads share their pages.
template <class Args> JITGEN_FN KeyPages pages_to_gather(const Args& args, int b) {
  const long long start = args.list_start ? args.list_start[b] : b * args.list_stride;
  return {args.pages + start, 0x7fffffff, static_cast<int>(args.key_page_size), static_cast<unsigned>(args.key_page_magic),
          static_cast<int>(args.key_page_shift)};
}

}  // namespace jg
