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

constexpr int kMostDimensions = 4;

// A bf16 tensor, its innermost dimension first: `sizes` and `box` of each, bytes from one to the next of all but the innermost.
struct Tensor {
  const void* data;
  cuuint32_t dimensions;
  cuuint64_t sizes[kMostDimensions], strides[kMostDimensions - 1];
  cuuint32_t box[kMostDimensions];
};

bool encode(CUtensorMap* map, const Tensor& t) {
  const EncodeTiled encode_tiled = encoder();
  const cuuint32_t steps[kMostDimensions] = {1, 1, 1, 1};
  return encode_tiled != nullptr && encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, t.dimensions, const_cast<void*>(t.data), t.sizes, t.strides,
                                                 t.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool encode_matrix(CUtensorMap* map, const void* matrix, cuuint64_t rows, cuuint64_t columns, cuuint64_t stride, cuuint32_t box_rows) {
  return encode(map, {matrix, 2, {columns, rows}, {stride * 2}, {kGemmBlockK, box_rows}});
}

bool encode_pairs(CUtensorMap* map, const void* matrix, cuuint64_t rows, cuuint64_t columns, cuuint32_t box_rows) {
  const cuuint64_t row_bytes = columns * 2;
  return encode(map, {matrix, 4, {columns, 8, 2, rows / 16}, {row_bytes, row_bytes * (rows / 2), row_bytes * 8}, {kGemmBlockK, 8, 2, box_rows / 16}});
}

}  // namespace

bool encode_w(CUtensorMap* map, const SkinnyGemmArgs& args, int box_rows) {
  const auto rows = static_cast<cuuint64_t>(args.outputs), columns = static_cast<cuuint64_t>(args.inputs);
  const auto box = static_cast<cuuint32_t>(box_rows);
  return args.output == GemmOutput::kSiluMul ? encode_pairs(map, args.w, rows, columns, box) : encode_matrix(map, args.w, rows, columns, columns, box);
}

bool encode_x(CUtensorMap* map, const SkinnyGemmArgs& args, int box_rows) {
  return encode_matrix(map, args.x, static_cast<cuuint64_t>(args.tokens), static_cast<cuuint64_t>(args.inputs),
                       static_cast<cuuint64_t>(args.x_stride), static_cast<cuuint32_t>(box_rows));
}

}  // namespace openlora
