// The work items of one block of a skinny GEMM, in order: planes innermost.
#pragma once

#include "gemm_kernel.h"
#include "gemm_plan.h"

namespace openlora {

template <int kNeighbours, bool kIsOnePlane>
struct GemmItems {
  const GemmWork& work;
  int item, row_tile, plane, first_k, end_k;

  __device__ __forceinline__ explicit GemmItems(const GemmWork& w) : work(w), item(static_cast<int>(blockIdx.x) / kNeighbours) { locate(); }
  __device__ __forceinline__ bool is_done() const { return item >= work.row_tiles * work.planes; }
  __device__ __forceinline__ int first_row() const { return row_tile * work.tile_rows; }
  __device__ __forceinline__ void next() {
    item += static_cast<int>(gridDim.x) / kNeighbours;
    locate();
  }
  __device__ __forceinline__ void locate() {
    if constexpr (kIsOnePlane) {
      row_tile = item, plane = 0, first_k = 0, end_k = work.k_blocks;
      return;
    }
    row_tile = item / work.planes;
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

}  // namespace openlora
