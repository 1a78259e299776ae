// Tensor maps of the GEMMs' matrices, for the copy engine (host).
#pragma once

#include <cstdint>

#include <cuda.h>

#include "gemm_sm90.h"

namespace openlora {

// Both are read in boxes of [box_rows, 64], zeros beyond the edge. False where the driver cannot.

// Of kSiluMul W is gate and up, [2][N / 2, K], in boxes that take 8 rows of each in turn.
bool encode_w(CUtensorMap* map, const SkinnyGemmArgs& args, int box_rows);

bool encode_x(CUtensorMap* map, const SkinnyGemmArgs& args, int box_rows);

}  // namespace openlora
