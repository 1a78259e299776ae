// The skinny GEMM's forms with the tokens in two halves, each a wgmma n side of its own. Planes and ranges of k are those of every
// other form, so a row's bits are those of smaller batches.
//
// Tall, for 257 to 320 tokens: a block has both halves of a fair tile of W's rows. Broad, from 193 tokens on, where a fair tile fills three
// quarters of what wgmma computes: a block has one half and 192 rows of W, which its neighbour reads too.
#pragma once

#include "gemm_sm90.h"

namespace openlora {

// Arguments are checked by the caller. Not kLogits.
cudaError_t launch_tall_gemm(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream);

}  // namespace openlora
