// The skinny GEMM of an output projection: kLogits of gemm_sm90.h, the largest of every row found on the way (gemm_best.cuh).
#include "gemm_kernel.cuh"

namespace openlora {
namespace {

template <int kTokens>
GemmKernel head_kernel() {
  return gemm_kernel<GemmBlock<2, 1, 1, kTokens, true>>();
}

}  // namespace

GemmKernel head_gemm(int side_tokens) {
  switch (side_tokens) {
    case 8: return head_kernel<8>();
    case 16: return head_kernel<16>();
    case 32: return head_kernel<32>();
    case 64: return head_kernel<64>();
    case 96: return head_kernel<96>();
    case 128: return head_kernel<128>();
    case 160: return head_kernel<160>();
    case 192: return head_kernel<192>();
    case 224: return head_kernel<224>();
    case 256: return head_kernel<256>();
    default: return {};
  }
}

}  // namespace openlora
