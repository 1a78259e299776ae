// The wide GEMM of gemm_wide_sm90.h, a tile of 224 rows of W a block. See gemm_wide.cuh; beside the ring, a warp's lines of y take
// 3.75 KB. Tensor cores: 1,792 clocks a stage.
#include "gemm_wide_sm90.h"

#include <cuda_bf16.h>

#include "gemm_maps.h"
#include "gemm_wide.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kRows = kGemmWideRows;
constexpr int kHalf = kRows / 2;        // accumulators of an m64 block, and columns of y at a time
constexpr int kPitch = gemm_line_pitch(kHalf * 2);
constexpr int kPieces = kHalf * 2 / 16;  // of 16 bytes
constexpr int kLineBytes = 16 * kPitch;
using Ring = WideRing<kRows>;
constexpr int kSharedBytes = 1024 + Ring::kBytes + kWideWarps * kLineBytes;
static_assert(kSharedBytes <= kGemmSharedBytes);

struct Work {
  __nv_bfloat16* y;
  int tokens, columns, k_blocks;  // columns: of y
};

// 16 tokens of a warp, 112 columns, from shared memory to y.
__device__ __forceinline__ void store_pieces(const Work& work, uint32_t lines, int lane, int first_token, int column) {
  __syncwarp();
#pragma unroll 1
  for (int at = lane; at < 16 * kPieces; at += kWarp) {
    const int token = first_token + at / kPieces, piece = at % kPieces;
    if (token < work.tokens && column + piece * 8 < work.columns) {
      *reinterpret_cast<uint4*>(work.y + static_cast<int64_t>(token) * work.columns + column + piece * 8) =
          load_piece(lines + at / kPieces * kPitch + piece * 16);
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void put_blocks(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// A warp's 16 tokens of an m64 block. Lane l names the place of row l % 8 of block l / 8: tokens 0 and 8 of 8 columns, then of the next.
template <bool kIsGated>
__device__ __forceinline__ void store_block(const Work& work, uint32_t lines, const float (&d)[kHalf], int first_token) {
  const int lane = fresh_thread() % kWarp;
  const uint32_t place = lines + (lane / 8 % 2 * 8 + lane % 8) * kPitch + lane / 16 * 16;
#pragma unroll
  for (int part = 0; part < (kIsGated ? 1 : 2); ++part) {
#pragma unroll
    for (int j = 0; j < kHalf / 8; j += 2) {
      uint32_t v[4];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const float* at = kIsGated ? &d[(j + b) * 8] : &d[(part * (kHalf / 8) + j + b) * 4];  // 8 of gate, then the same 8 of up
        v[2 * b] = kIsGated ? pack_bf16(silu(at[0]) * at[4], silu(at[1]) * at[5]) : pack_bf16(at[0], at[1]);
        v[2 * b + 1] = kIsGated ? pack_bf16(silu(at[2]) * at[6], silu(at[3]) * at[7]) : pack_bf16(at[2], at[3]);
      }
      put_blocks(place + j * 16, v);
    }
    store_pieces(work, lines, lane, first_token, blockIdx.x * (kIsGated ? kHalf : kRows) + part * kHalf);
  }
}

template <bool kIsGated>
__global__ __launch_bounds__(kWideThreads, 1) void wide_gemm(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                                                             const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  const Ring ring{(shared_address(shared) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    ring.init();
    ring.start<kIsGated>(&w_map, &x_map, blockIdx.x, work.k_blocks);
  }
  __syncthreads();
  wait_for_dependencies();  // y may still be read by a kernel ahead
  float low[kHalf], high[kHalf];
  wgmma_clear(low);
  wgmma_clear(high);
  WidePosition at;
#pragma unroll 1
  for (int k = 0; k < work.k_blocks; ++k, at.advance()) {
    ring.multiply(low, high, at);
    wgmma_wait<1>();  // the stage before has been read; its place takes what comes two stages behind this one
    if (k > 0) {
      ring.release(at.freed);
      const int coming = k - 1 + kWideStages;
      if (fresh_thread() == 0 && coming < work.k_blocks) ring.refill<kIsGated>(&w_map, &x_map, blockIdx.x, coming, at);
    }
  }
  wgmma_wait<0>();
  wgmma_results<kHalf>(low);
  wgmma_results<kHalf>(high);
  const int warp = fresh_thread() / kWarp, first_token = warp / 4 * 128 + warp % 4 * 16;
  const uint32_t lines = ring.base + Ring::kBytes + warp * kLineBytes;
  if (first_token < work.tokens) store_block<kIsGated>(work, lines, low, first_token);
  if (first_token + 64 < work.tokens) store_block<kIsGated>(work, lines, high, first_token + 64);
#endif
}

}  // namespace

cudaError_t launch_wide_gemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  const bool is_gated = args.output == GemmOutput::kSiluMul;
  const auto kernel = is_gated ? wide_gemm<true> : wide_gemm<false>;
  CUtensorMap w_map, x_map;
  if (!encode_w(&w_map, args, kRows) || !encode_x(&x_map, args, kGemmMaxTokens)) return cudaErrorInvalidValue;
  const Work work{static_cast<__nv_bfloat16*>(args.y), args.tokens, is_gated ? args.outputs / 2 : args.outputs, args.inputs / kGemmBlockK};
  const Shape shape{gemm_row_tiles(args.outputs, kRows), kWideThreads, kSharedBytes};
  return launch(kernel, shape, args.use_pdl ? Follow::kWaitFirst : Follow::kPlain, stream, w_map, x_map, work);
}

}  // namespace openlora
