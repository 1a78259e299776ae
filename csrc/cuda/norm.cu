// Norms that no product precedes, the embedding, and rows by their numbers. See norm.h.
//
// A block takes a row. Up to 4,096 columns a thread keeps its own, asked for together: behind a token's number there is one trip to
// memory. The weights are there by then. More columns are read twice, the second time from the first cache. 9 floats of shared memory.
// Bytes: T * H * 2 read and written once (embedding: written twice); decode is a launch and nothing more.
//
// The embedding begins a step. Whoever follows may start once its rows have been asked for: before that, the first weights of the GEMM
// behind it, half of them at once, would stand ahead of them in the memory's queue (16 us instead of 5).
#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "norm.h"

namespace openlora {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 16;  // columns of a thread
constexpr int kSpan = kHeld * kThreads;

struct Params {
  const void* ids;
  bool ids_are_long;
  int64_t id_count;
  const int32_t* sources;  // null: row t's id is the t-th
  int64_t vocabulary;
  const void* from;  // x, or the embedding
  void* residual;    // null: `from` holds the rows themselves
  const void* weight;
  void* out;
  int rows;
  int size;
  float eps;
};

// The row of the embedding; -1 where there is none.
__device__ __forceinline__ int64_t token_of(const Params& a, int row) {
  const int64_t at = a.sources == nullptr ? row : a.sources[row];
  if (at < 0 || at >= a.id_count) return -1;
  const int64_t id = a.ids_are_long ? static_cast<const int64_t*>(a.ids)[at] : static_cast<const int32_t*>(a.ids)[at];
  return id < a.vocabulary ? id : -1;
}

// A thread's columns of a span that begins at its own `first`.
template <class T>
__device__ __forceinline__ void load_columns(T (&held)[kHeld], const T* from, int first, int size) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (first + i * kThreads < size) held[i] = from[first + i * kThreads];
}

template <class T, bool kEmbed>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const Params a) {
  __shared__ float warp_squares[kThreads / kWarp];
  const T* const weight = static_cast<const T*>(a.weight);
  T by[kHeld], x[kHeld];
  load_columns(by, weight, threadIdx.x, a.size);
  wait_for_previous();
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    int64_t source = row;
    if constexpr (kEmbed) source = token_of(a, row);
    const T* const from = static_cast<const T*>(a.from) + source * a.size;
    if (source >= 0) load_columns(x, from, threadIdx.x, a.size);
    start_dependents();
    if (source < 0) continue;
    float squares = 0.f;
    for (int first = threadIdx.x; first < a.size; first += kSpan) {
      if (first >= kSpan) load_columns(x, from, first, a.size);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int column = first + i * kThreads;
        if (column >= a.size) break;
        if constexpr (kEmbed) static_cast<T*>(a.residual)[static_cast<int64_t>(row) * a.size + column] = x[i];
        squares += to_float(x[i]) * to_float(x[i]);
      }
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
    T* const out = static_cast<T*>(a.out) + static_cast<int64_t>(row) * a.size;
    for (int first = threadIdx.x; first < a.size; first += kSpan) {
      if (a.size > kSpan) load_columns(x, from, first, a.size), load_columns(by, weight, first, a.size);
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (first + i * kThreads < a.size) out[first + i * kThreads] = from_float<T>(to_float(x[i]) * scale * to_float(by[i]));
    }
  }
  start_dependents();
}

// 16 bytes a thread and pass.
__global__ void __launch_bounds__(kThreads) take_rows_kernel(const uint4* x, const int32_t* rows, uint4* out, int count, int row_count, int size) {
  wait_for_previous();
  start_dependents();
  for (int place = blockIdx.x; place < count; place += gridDim.x) {
    const int row = rows[place];
    if (row < 0 || row >= row_count) continue;
    for (int i = threadIdx.x; i < size; i += kThreads) out[static_cast<int64_t>(place) * size + i] = x[static_cast<int64_t>(row) * size + i];
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
  return launch_norm<false>(a, {nullptr, false, 0, nullptr, 0, a.x, nullptr, a.weight, a.out, a.rows, a.size, a.eps}, stream);
}

cudaError_t launch_embed_rms_norm(const EmbedRmsNormArgs& a, cudaStream_t stream) {
  const RmsNormArgs& n = a.norm;
  return launch_norm<true>(
    n, {a.token_ids, a.ids_are_long, a.id_count, a.sources, a.vocabulary, a.embedding, a.residual, n.weight, n.out, n.rows, n.size, n.eps}, stream);
}

cudaError_t launch_take_rows(const TakeRowsArgs& a, cudaStream_t stream) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
  if (a.row_bytes % 16 != 0 || !is_aligned) return cudaErrorInvalidValue;
  if (a.count == 0) return cudaSuccess;
  const Shape shape{std::min(a.count, processor_count() * 8), kThreads};
  return launch(take_rows_kernel, shape, a.follow, stream, static_cast<const uint4*>(a.x), a.rows, static_cast<uint4*>(a.out), a.count, a.row_count,
                a.row_bytes / 16);
}

}  // namespace openlora
