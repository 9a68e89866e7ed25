// wgmma: D[64, N] += A[64, 16] * B[16, N] by the four warps of a warp group, fp32 accumulators.
//
// Accumulators are float[N / 8][4]: thread t (warp w = t / 32, group g = t % 32 / 4, quad = t % 4) holds rows
// 16 w + g (elements 0, 1) and 16 w + g + 8 (elements 2, 3), columns 8 j + 2 quad + {0, 1}: the layout of mma.sync.
#pragma once
#include "jitgen/sm80_ptx.cuh"

namespace jg {

// ---- shared-memory descriptors (PTX ISA, matrix descriptor format) ----
// kSpanBytes: the swizzle span, 128 or 64. `lead` is the byte distance between spans along N of a transposed operand,
// `eight_rows` that between groups of 8 rows.
template <int kSpanBytes>
JITGEN_FN unsigned long long matrix_descriptor(unsigned address, unsigned lead, unsigned long long eight_rows = 8 * kSpanBytes) {
  constexpr unsigned long long kSwizzle = kSpanBytes == 128 ? 1 : 2;
  return (address & 0x3ffff) >> 4 | static_cast<unsigned long long>(lead >> 4) << 16 | (eight_rows >> 4) << 32 | kSwizzle << 62;
}
// That of a transposed B without swizzle, blocks of 8 columns and 8 rows of K with 16 bytes a row: `eight_columns` is the byte distance
// between blocks. Both halves of K read the same.
JITGEN_FN unsigned long long block_descriptor(unsigned address, unsigned eight_columns) {
  return (address & 0x3ffff) >> 4 | static_cast<unsigned long long>(eight_columns >> 4) << 32;
}
// The descriptor of an operand `offset` further on, in units of 16 bytes. The address is in the lower half: no carry to add.
JITGEN_FN unsigned long long operand_at(unsigned long long descriptor, unsigned offset) {
  return descriptor & 0xffffffff00000000ull | static_cast<unsigned>(static_cast<unsigned>(descriptor) + offset);
}
// Before the first wgmma of a batch whenever its registers were written by ordinary instructions.
JITGEN_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JITGEN_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <class Element> struct IsBf16 { static constexpr bool value = false; };
template <> struct IsBf16<bfloat16> { static constexpr bool value = true; };

// An asm statement names each accumulator in its text and again as an operand. JG_TEN(t) is the text of operands 10 t to
// 10 t + 9 (t empty for the first ten), JG_ACC(j) the four operands of column tile j.
#define JG_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define JG_FIRST_TEN "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define JG_TEXT_30 JG_FIRST_TEN "," JG_TEN(1) "," JG_TEN(2)
#define JG_TEXT_60 JG_TEXT_30 "," JG_TEN(3) "," JG_TEN(4) "," JG_TEN(5)
#define JG_TEXT_90 JG_TEXT_60 "," JG_TEN(6) "," JG_TEN(7) "," JG_TEN(8)
#define JG_TEXT_4 "%0,%1,%2,%3"
#define JG_TEXT_8 JG_TEXT_4 ",%4,%5,%6,%7"
#define JG_TEXT_16 JG_FIRST_TEN ",%10,%11,%12,%13,%14,%15"
#define JG_TEXT_24 JG_FIRST_TEN "," JG_TEN(1) ",%20,%21,%22,%23"
#define JG_TEXT_32 JG_TEXT_30 ",%30,%31"
#define JG_TEXT_40 JG_TEXT_30 "," JG_TEN(3)
#define JG_TEXT_48 JG_TEXT_30 "," JG_TEN(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define JG_TEXT_56 JG_TEXT_30 "," JG_TEN(3) "," JG_TEN(4) ",%50,%51,%52,%53,%54,%55"
#define JG_TEXT_64 JG_TEXT_60 ",%60,%61,%62,%63"
#define JG_TEXT_96 JG_TEXT_90 ",%90,%91,%92,%93,%94,%95"
#define JG_TEXT_128 JG_TEXT_90 "," JG_TEN(9) "," JG_TEN(10) "," JG_TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define JG_ACC(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define JG_FOUR(j) JG_ACC(j), JG_ACC(j + 1), JG_ACC(j + 2), JG_ACC(j + 3)
#define JG_ACC_4 JG_ACC(0)
#define JG_ACC_8 JG_ACC(0), JG_ACC(1)
#define JG_ACC_16 JG_FOUR(0)
#define JG_ACC_24 JG_FOUR(0), JG_ACC(4), JG_ACC(5)
#define JG_ACC_32 JG_FOUR(0), JG_FOUR(4)
#define JG_ACC_40 JG_ACC_32, JG_ACC(8), JG_ACC(9)
#define JG_ACC_48 JG_ACC_32, JG_FOUR(8)
#define JG_ACC_56 JG_ACC_48, JG_ACC(12), JG_ACC(13)
#define JG_ACC_64 JG_ACC_48, JG_FOUR(12)
#define JG_ACC_96 JG_ACC_64, JG_FOUR(16), JG_FOUR(20)
#define JG_ACC_128 JG_ACC_96, JG_FOUR(24), JG_FOUR(28)
#define JG_BEGIN(type, n) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, %" n ", 0;\nwgmma.mma_async.sync.aligned.m64n" type

// Wgmma<N>: shared() takes A and B by descriptor (kTransposeB: B is stored [K][N], as V is; kTransposeA: A [K][M]), registers() takes A from four
// registers and a transposed B; `add` = 0 overwrites D. wait<p>() returns when at most p batches are in flight; naming
// every accumulator keeps the compiler from reading them earlier. o0 to o5: numbers of the operands after the accumulators.
#define JG_DEFINE_WGMMA(kN, kCount, o0, o1, o2, o3, o4, o5)                                                                \
  template <> struct Wgmma<kN> {                                                                                          \
    template <class Element, int kTransposeB, int kTransposeA = 0>                                                        \
    static JITGEN_FN void shared(float (&d)[kN / 8][4], unsigned long long a, unsigned long long b, int add) {            \
      if constexpr (IsBf16<Element>::value)                                                                               \
        asm volatile(JG_BEGIN(#kN "k16.f32.bf16.bf16", o2) " {" JG_TEXT_##kCount "}, %" o0 ", %" o1 ", add, 1, 1, %" o4 ", %" o3 ";\n}" \
                     : JG_ACC_##kCount : "l"(a), "l"(b), "r"(add), "n"(kTransposeB), "n"(kTransposeA));                                     \
      else                                                                                                                \
        asm volatile(JG_BEGIN(#kN "k16.f32.f16.f16", o2) " {" JG_TEXT_##kCount "}, %" o0 ", %" o1 ", add, 1, 1, %" o4 ", %" o3 ";\n}" \
                     : JG_ACC_##kCount : "l"(a), "l"(b), "r"(add), "n"(kTransposeB), "n"(kTransposeA));                                     \
    }                                                                                                                     \
    template <class Element>                                                                                              \
    static JITGEN_FN void registers(float (&d)[kN / 8][4], const unsigned (&a)[4], unsigned long long b, int add) {       \
      if constexpr (IsBf16<Element>::value)                                                                               \
        asm volatile(JG_BEGIN(#kN "k16.f32.bf16.bf16", o5) " {" JG_TEXT_##kCount "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %" o4 ", add, 1, 1, 1;\n}" \
                     : JG_ACC_##kCount : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                   \
      else                                                                                                                \
        asm volatile(JG_BEGIN(#kN "k16.f32.f16.f16", o5) " {" JG_TEXT_##kCount "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %" o4 ", add, 1, 1, 1;\n}" \
                     : JG_ACC_##kCount : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                   \
    }                                                                                                                     \
    template <int kPending> static JITGEN_FN void wait(float (&d)[kN / 8][4]) {                                           \
      asm volatile("wgmma.wait_group.sync.aligned %" o0 ";" : JG_ACC_##kCount : "n"(kPending) : "memory");                \
    }                                                                                                                     \
  };
template <int kN> struct Wgmma;
JG_DEFINE_WGMMA(8, 4, "4", "5", "6", "7", "8", "9")
JG_DEFINE_WGMMA(16, 8, "8", "9", "10", "11", "12", "13")
JG_DEFINE_WGMMA(32, 16, "16", "17", "18", "19", "20", "21")
JG_DEFINE_WGMMA(48, 24, "24", "25", "26", "27", "28", "29")
JG_DEFINE_WGMMA(64, 32, "32", "33", "34", "35", "36", "37")
JG_DEFINE_WGMMA(80, 40, "40", "41", "42", "43", "44", "45")
JG_DEFINE_WGMMA(96, 48, "48", "49", "50", "51", "52", "53")
JG_DEFINE_WGMMA(112, 56, "56", "57", "58", "59", "60", "61")
JG_DEFINE_WGMMA(128, 64, "64", "65", "66", "67", "68", "69")
JG_DEFINE_WGMMA(192, 96, "96", "97", "98", "99", "100", "101")
JG_DEFINE_WGMMA(256, 128, "128", "129", "130", "131", "132", "133")

}  // namespace jg
