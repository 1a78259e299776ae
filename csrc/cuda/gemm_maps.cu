// See gemm_maps.h.
#include "gemm_maps.h"

#include <cuda_runtime.h>

#include "gemm_plan.h"

namespace openlora {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found through the runtime so that nothing links libcuda.
EncodeTiled find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
}

EncodeTiled encoder() {
  static const EncodeTiled found = find_encoder();
  return found;
}

}  // namespace

bool encode_matrix(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  const EncodeTiled encode = encoder();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kGemmBlockK, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode != nullptr && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool encode_pairs(CUtensorMap* map, const void* matrix, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * 2;
  const EncodeTiled encode = encoder();
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), 8, 2, static_cast<cuuint64_t>(rows / 16)};
  const cuuint64_t strides[3] = {row_bytes, row_bytes * static_cast<cuuint64_t>(rows / 2), row_bytes * 8};
  const cuuint32_t box[4] = {kGemmBlockK, 8, 2, static_cast<cuuint32_t>(box_rows / 16)};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode != nullptr && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace openlora
