// The skinny GEMM with the tokens in two halves, each a wgmma n side of its own. Planes and ranges of k are those of every other
// form, so a row's bits are those of smaller batches.
//
// Tall, for 257 to 320 tokens: a block has both halves of a fair tile of W's rows. Broad, from 193 tokens on, where a fair tile fills three
// quarters of what wgmma computes: a block has one half and 192 rows of W, which its neighbour reads too.
//
// Bound: shared memory, of which wgmma reads 26 KB and the copies write 13 KB for 16 inputs at 288 tokens, 307 clocks where the
// tensor cores take 288; and the chip's power, which lowers its clock to 1.4 GHz where such steps follow one another.
#include "gemm_kernel.cuh"

namespace openlora {

GemmKernel tall_gemm(int side_tokens) {
  switch (side_tokens) {
    case 144: return gemm_kernel<GemmBlock<2, 2, 1, 144>>();
    case 160: return gemm_kernel<GemmBlock<2, 2, 1, 160>>();
    default: return {};
  }
}

GemmKernel broad_gemm(int side_tokens) {
  switch (side_tokens) {
    case 112: return gemm_kernel<GemmBlock<3, 1, 2, 112>>();
    case 128: return gemm_kernel<GemmBlock<3, 1, 2, 128>>();
    case 144: return gemm_kernel<GemmBlock<3, 1, 2, 144>>();
    case 160: return gemm_kernel<GemmBlock<3, 1, 2, 160>>();
    default: return {};
  }
}

}  // namespace openlora
