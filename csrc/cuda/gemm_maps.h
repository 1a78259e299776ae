// Tensor maps of the GEMMs' matrices, for the copy engine (host).
#pragma once

#include <cstdint>

#include <cuda.h>

namespace openlora {

// A [rows, columns] bf16 matrix read in boxes of [box_rows, 64], zeros beyond its edge. False where the driver cannot.
bool encode_matrix(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows);

// W of gate and up, [2][rows / 2, columns], in boxes that take 8 rows of each in turn.
bool encode_pairs(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int box_rows);

}  // namespace openlora
