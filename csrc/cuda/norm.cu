// Norms that no product precedes, and the embedding. See norm.h.
//
// A block takes a row; a thread's columns are read twice, the second time from the first cache. 9 floats of shared memory.
// Bytes: T * H * 2 read and written once (embedding: written twice); decode is a launch and nothing more.
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "norm.h"

namespace openlora {
namespace {

constexpr int kThreads = 256;

struct Params {
  const void* ids;
  bool ids_are_long;
  int64_t vocabulary;
  const void* from;  // x, or the embedding
  void* residual;    // null: `from` holds the rows themselves
  const void* weight;
  void* out;
  int rows;
  int size;
  float eps;
};

template <class T, bool kEmbed>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const Params a) {
  __shared__ float warp_squares[kThreads / kWarp];
  wait_for_previous();
  start_dependents();
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    int64_t source = row;
    if constexpr (kEmbed) {
      source = a.ids_are_long ? static_cast<const int64_t*>(a.ids)[row] : static_cast<const int32_t*>(a.ids)[row];
      if (source < 0 || source >= a.vocabulary) continue;
    }
    const T* x = static_cast<const T*>(a.from) + source * a.size;
    float squares = 0.f;
    for (int i = threadIdx.x; i < a.size; i += kThreads) {
      const T value = x[i];
      if constexpr (kEmbed) static_cast<T*>(a.residual)[static_cast<int64_t>(row) * a.size + i] = value;
      squares += to_float(value) * to_float(value);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) warp_squares[threadIdx.x / kWarp] = squares;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) total += warp_squares[w];
    const float scale = rsqrtf(total / a.size + a.eps);
    for (int i = threadIdx.x; i < a.size; i += kThreads)
      static_cast<T*>(a.out)[static_cast<int64_t>(row) * a.size + i] = from_float<T>(to_float(x[i]) * scale * to_float(static_cast<const T*>(a.weight)[i]));
  }
}

template <bool kEmbed>
cudaError_t launch_norm(const RmsNormArgs& norm, const Params& params, cudaStream_t stream) {
  if (norm.rows < 0 || norm.size < 1) return cudaErrorInvalidValue;
  if (norm.rows == 0) return cudaSuccess;
  const Shape shape{std::min(norm.rows, processor_count() * 8), kThreads};
  return norm.is_float ? launch(rms_norm_kernel<float, kEmbed>, shape, norm.follow, stream, params)
                       : launch(rms_norm_kernel<__nv_bfloat16, kEmbed>, shape, norm.follow, stream, params);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormArgs& a, cudaStream_t stream) {
  return launch_norm<false>(a, {nullptr, false, 0, a.x, nullptr, a.weight, a.out, a.rows, a.size, a.eps}, stream);
}

cudaError_t launch_embed_rms_norm(const EmbedRmsNormArgs& a, cudaStream_t stream) {
  const RmsNormArgs& n = a.norm;
  return launch_norm<true>(n, {a.token_ids, a.ids_are_long, a.vocabulary, a.embedding, a.residual, n.weight, n.out, n.rows, n.size, n.eps}, stream);
}

}  // namespace openlora
