// The skinny GEMM whose tokens are one wgmma n side.
#include "gemm_kernel.cuh"

namespace openlora {

GemmKernel narrow_gemm(int side_tokens) {
  switch (side_tokens) {
    case 8: return gemm_kernel<GemmBlock<2, 1, 1, 8>>();
    case 16: return gemm_kernel<GemmBlock<2, 1, 1, 16>>();
    case 32: return gemm_kernel<GemmBlock<2, 1, 1, 32>>();
    case 64: return gemm_kernel<GemmBlock<2, 1, 1, 64>>();
    case 96: return gemm_kernel<GemmBlock<2, 1, 1, 96>>();
    case 128: return gemm_kernel<GemmBlock<2, 1, 1, 128>>();
    case 160: return gemm_kernel<GemmBlock<2, 1, 1, 160>>();
    case 192: return gemm_kernel<GemmBlock<2, 1, 1, 192>>();
    case 224: return gemm_kernel<GemmBlock<2, 1, 1, 224>>();
    case 256: return gemm_kernel<GemmBlock<2, 1, 1, 256>>();
    default: return {};
  }
}

}  // namespace openlora
