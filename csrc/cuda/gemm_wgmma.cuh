// wgmma m64nNk16 (bf16 x bf16 -> float32, both operands from shared memory) for the n sizes of the skinny GEMM.
//
// A thread of the warpgroup holds d[N / 2]: with warp w and lane l, d[4 j + 2 h + i] is row 16 w + l / 4 + 8 h and column
// 8 j + 2 (l % 4) + i (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
#pragma once

#include <cstdint>

namespace openlora {

// Descriptor of a K-major tile with 128-byte swizzle: 8-row groups lie 1024 bytes apart. `address` is the tile's address in
// shared memory (1024-byte aligned, plus 32 bytes for each k16 step inside the swizzle row).
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kFixed = (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
  return kFixed | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A warpgroup's registers a thread, from here on; a multiple of 8.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Keeps the compiler from moving uses of accumulators across the fences around them.
template <int kCount>
__device__ __forceinline__ void wgmma_results(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void wgmma_clear(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = 0.0f;
  wgmma_results(d);
}

// Operand lists of N / 2 registers, each built on the one before.
#define GEMM_P4 "%0,%1,%2,%3"
#define GEMM_P8 GEMM_P4 ",%4,%5,%6,%7"
#define GEMM_P16 GEMM_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define GEMM_P32 GEMM_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GEMM_P48 GEMM_P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define GEMM_P56 GEMM_P48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define GEMM_P64 GEMM_P48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define GEMM_P72 GEMM_P64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define GEMM_P80 GEMM_P64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define GEMM_P96 GEMM_P80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define GEMM_P100 GEMM_P96 ",%96,%97,%98,%99"
#define GEMM_P112 GEMM_P96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define GEMM_P128 GEMM_P112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define GEMM_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GEMM_F8(i) GEMM_F4(i), GEMM_F4(i + 4)
#define GEMM_F16(i) GEMM_F8(i), GEMM_F8(i + 8)
#define GEMM_F32(i) GEMM_F16(i), GEMM_F16(i + 16)
#define GEMM_F48(i) GEMM_F32(i), GEMM_F16(i + 32)
#define GEMM_F56(i) GEMM_F48(i), GEMM_F8(i + 48)
#define GEMM_F64(i) GEMM_F32(i), GEMM_F32(i + 32)
#define GEMM_F72(i) GEMM_F64(i), GEMM_F8(i + 64)
#define GEMM_F80(i) GEMM_F64(i), GEMM_F16(i + 64)
#define GEMM_F96(i) GEMM_F64(i), GEMM_F32(i + 64)
#define GEMM_F100(i) GEMM_F96(i), GEMM_F4(i + 96)
#define GEMM_F112(i) GEMM_F64(i), GEMM_F48(i + 64)
#define GEMM_F128(i) GEMM_F64(i), GEMM_F64(i + 64)

// d += A[64, 16] B[N, 16]^T. COUNT is N / 2; A and B are the numbers of the operands after the accumulators.
#define GEMM_WGMMA(N, COUNT, A, B)                                                                          \
  template <>                                                                                               \
  struct Wgmma<N> {                                                                                         \
    static __device__ __forceinline__ void add(float (&d)[COUNT], uint64_t a, uint64_t b) {                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" GEMM_P##COUNT "}, %" #A     \
                   ", %" #B ", 1, 1, 1, 0, 0;"                                                              \
                   : GEMM_F##COUNT(0)                                                                       \
                   : "l"(a), "l"(b));                                                                       \
    }                                                                                                       \
  };

template <int kTokens>
struct Wgmma;

GEMM_WGMMA(8, 4, 4, 5)
GEMM_WGMMA(16, 8, 8, 9)
GEMM_WGMMA(32, 16, 16, 17)
GEMM_WGMMA(64, 32, 32, 33)
GEMM_WGMMA(96, 48, 48, 49)
GEMM_WGMMA(112, 56, 56, 57)
GEMM_WGMMA(128, 64, 64, 65)
GEMM_WGMMA(144, 72, 72, 73)
GEMM_WGMMA(160, 80, 80, 81)
GEMM_WGMMA(192, 96, 96, 97)
GEMM_WGMMA(200, 100, 100, 101)
GEMM_WGMMA(224, 112, 112, 113)
GEMM_WGMMA(256, 128, 128, 129)

}  // namespace openlora
