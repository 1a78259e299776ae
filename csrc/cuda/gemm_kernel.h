// The kernels that the skinny GEMM is made of, and what is given to one (host). Each file of instances compiles by itself.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "gemm_sm90.h"

namespace openlora {

struct GemmWork {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages;
  int ring_bytes;  // of all stages
  GemmOutput output;
  const int32_t* wanted;  // of kLogits, as `bests`
  int2* bests;
};

struct GemmKernel {
  void (*run)(const CUtensorMap, const CUtensorMap, const GemmWork) = nullptr;  // null: there is none
  int threads = 0;
  int neighbours = 1;  // blocks that go through the same rows of W, each with tokens of its own: a grid has a multiple of these
};

// By the tokens of a wgmma.
GemmKernel narrow_gemm(int side_tokens);
GemmKernel head_gemm(int side_tokens);  // kLogits, which only this one does
GemmKernel tall_gemm(int side_tokens);
GemmKernel broad_gemm(int side_tokens);

}  // namespace openlora
