// The skinny GEMM's other form, for many tokens and a W of many rows: tokens are the m side of wgmma and 200 or 224 rows of W its n
// side. Tiles of that size leave no SM a round short, are not rounded up to blocks of 64 rows of W, and read x half as often. Every
// sum runs over k in the same order, so the bits are the same.
#pragma once

#include "gemm_sm90.h"

namespace openlora {

// Arguments are checked by the caller, who says with gemm_is_wide and gemm_is_wide_head (gemm_plan.h) what these can do.

// kSiluMul, or kBfloat16 of one plane.
cudaError_t launch_wide_gemm(const SkinnyGemmArgs& args, cudaStream_t stream);

// kLogits.
cudaError_t launch_wide_head(const SkinnyGemmArgs& args, cudaStream_t stream);

}  // namespace openlora
