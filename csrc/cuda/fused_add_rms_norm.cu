// residual += product, then the next norm. See fused.h, product.cuh.
//
// A cluster of CL blocks takes 8 rows of one tile and all columns at a time; a warp holds U blocks of 32 columns of them in
// registers. The sum of squares runs lane, row of lanes, warp, block, each in order and cut by H alone, through distributed shared
// memory; so nothing is read twice and the norm's bits do not depend on the batch. 8 * 8 + 2 * CL * 8 floats of shared memory.
// Bytes: S * T * H * 4 of planes, T * H * 2 of residual read and written, T * H * 2 out, B of every tile once (H = 4096, D = 64,
// r = 16: 8.4 MB, 2.7 us at 3.1 TB/s).
#include "launch.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 8;

struct Params {
  ProductView p;
  void* residual;
  const void* weight;
  float eps;
  void* out;
};

template <bool kLora, bool kFloatPlanes, int CL, int U>
__global__ void __launch_bounds__(kWarps* kWarp, U > 2 ? 2 : 3) add_rms_norm_kernel(const Params a) {
  __shared__ float warp_squares[kWarps][kRows];
  __shared__ float block_squares[2][CL][kRows];
  start_dependents();
  if constexpr (CL > 1) cluster_arrive();  // waited for before the first store into another block, which must have started
  const ProductView& p = a.p;
  const int rank = CL > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int first_block = (rank * kWarps + warp) * U, blocks = min(U, p.columns / kBlock - first_block);  // may be <= 0
  auto* residual = static_cast<__nv_bfloat16*>(a.residual);
  auto* out = static_cast<__nv_bfloat16*>(a.out);
  const RowParts<kLora> parts(p);
  const int count = parts.count(), stride = gridDim.x / CL;
  int part = blockIdx.x / CL;
  RowSpan span{};
  PageBlock pages[U];
  auto fetch = [&](int i) {
    span = parts[i];
    if constexpr (kLora) {
#pragma unroll
      for (int u = 0; u < U; ++u)
        pages[u] = u < blocks && span.first < span.last ? fetch_block(p, parts.table, span.tile, 0, (first_block + u) * kBlock) : PageBlock{};
    }
  };
  if (part < count) fetch(part);
  wait_for_previous();
  if constexpr (CL > 1) cluster_wait();
  for (int parity = 0; part < count; part += stride, parity ^= 1) {
    const RowSpan now = span;
    float x[U][1][kLaneColumns];
    int row[1] = {-1};
    float squares = 0.f;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u >= blocks) break;
      const int column[1] = {(first_block + u) * kBlock};
      const PageBlock page[1] = {pages[u]};
      float sum[1][1][kLaneColumns];
      finish<kLora, kFloatPlanes, 1, 1>(sum, row, p, parts, now, now.first, column, page);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row[0] < 0) {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[u][0][4 * half + j] = 0.f;
          continue;
        }
        auto* at = reinterpret_cast<uint2*>(residual + static_cast<int64_t>(row[0]) * p.columns + column[0] + lane_column(half));
        uint2 old = __ldcg(at);
        old.x = pack_bf16(low_half(old.x) + sum[0][0][4 * half], high_half(old.x) + sum[0][0][4 * half + 1]);
        old.y = pack_bf16(low_half(old.y) + sum[0][0][4 * half + 2], high_half(old.y) + sum[0][0][4 * half + 3]);
        *at = old;
        x[u][0][4 * half] = low_half(old.x);
        x[u][0][4 * half + 1] = high_half(old.x);
        x[u][0][4 * half + 2] = low_half(old.y);
        x[u][0][4 * half + 3] = high_half(old.y);
      }
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) squares += x[u][0][c] * x[u][0][c];
    }
    if (part + stride < count) fetch(part + stride);
    squares += __shfl_xor_sync(kAllLanes, squares, 1);
    squares += __shfl_xor_sync(kAllLanes, squares, 2);
    if (t == 0) warp_squares[warp][g] = squares;
    __syncthreads();
    if (threadIdx.x < CL * kRows) {
      const int r = threadIdx.x % kRows;
      float sum = warp_squares[0][r];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += warp_squares[w][r];
      if constexpr (CL > 1) store_remote(remote_address(&block_squares[parity][rank][r], threadIdx.x / kRows), sum);
      else block_squares[parity][0][r] = sum;
    }
    if constexpr (CL > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    float total = 0.f;
#pragma unroll
    for (int c = 0; c < CL; ++c) total += block_squares[parity][c][g];
    const float scale = rsqrtf(total / p.columns + a.eps);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u >= blocks || row[0] < 0) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = (first_block + u) * kBlock + lane_column(half);
        const uint2 w = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.weight) + column));
        const float* from = x[u][0] + 4 * half;
        const float y[4] = {from[0] * scale * low_half(w.x), from[1] * scale * high_half(w.x), from[2] * scale * low_half(w.y),
                            from[3] * scale * high_half(w.y)};
        store_bf16x4(out + static_cast<int64_t>(row[0]) * p.columns + column, y);
      }
    }
    __syncwarp();  // the cluster's barriers want whole warps
  }
}

// A block takes a row at a time and reads its own residual back for the second pass.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) add_rms_norm_any_kernel(const Params a, bool has_float_planes) {
  __shared__ float warp_squares[8];
  start_dependents();
  wait_for_previous();
  const ProductView& p = a.p;
  const RowParts<kLora> parts(p);
  for (int part = blockIdx.x; part < parts.count(); part += gridDim.x) {
    const RowSpan span = parts[part];
    for (int place = span.first; place < span.last; ++place) {
      const int64_t at = static_cast<int64_t>(parts.row(span, place)) * p.columns;
      T* residual = static_cast<T*>(a.residual) + at;
      float squares = 0.f;
      for (int i = threadIdx.x; i < p.columns; i += blockDim.x) {
        residual[i] = from_float<T>(to_float(residual[i]) + product_at<T, kLora>(p, parts, span, place, i, has_float_planes));
        squares += to_float(residual[i]) * to_float(residual[i]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
      __syncthreads();
      if (threadIdx.x % kWarp == 0) warp_squares[threadIdx.x / kWarp] = squares;
      __syncthreads();
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < 8; ++w) total += warp_squares[w];
      const float scale = rsqrtf(total / p.columns + a.eps);
      for (int i = threadIdx.x; i < p.columns; i += blockDim.x)
        static_cast<T*>(a.out)[at + i] = from_float<T>(to_float(residual[i]) * scale * to_float(static_cast<const T*>(a.weight)[i]));
    }
  }
}

template <int CL, int U>
cudaError_t launch_cluster(const Product& product, const Params& params, cudaStream_t stream) {
  const int parts = product.lora != nullptr ? product.rows : (product.rows + kRows - 1) / kRows;
  const int processors = processor_count();
  const int most = CL > 1 ? processors / 16 * (16 * (U > 2 ? 2 : 3) / CL) : processors * 3;
  const Shape shape{std::min(parts, std::max(most, 1)) * CL, kWarps * kWarp, 0, CL};
  return with_product_types(product, [&](auto lora, auto planes) {
    return launch(add_rms_norm_kernel<decltype(lora)::value, decltype(planes)::value, CL, U>, shape, product.follow, stream, params);
  });
}

}  // namespace

cudaError_t launch_fused_add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product)) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  Params params{view_of(product, kRows), args.residual, args.weight, args.eps, args.out};
  bool fits = fits_blocks(product);
  for (const void* pointer : {static_cast<const void*>(args.residual), args.weight, static_cast<const void*>(args.out)})
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 8 == 0;
  const int blocks = product.columns / kBlock;  // the choice depends on H alone: it decides the order of the sum
  if (fits && is_hopper()) {
    if (blocks <= kWarps) return launch_cluster<1, 1>(product, params, stream);
    if (blocks <= 4 * kWarps) return launch_cluster<4, 1>(product, params, stream);
    if (blocks <= 8 * kWarps) return launch_cluster<8, 1>(product, params, stream);
    if (blocks <= 16 * kWarps) return launch_cluster<8, 2>(product, params, stream);
    if (blocks <= 32 * kWarps) return launch_cluster<8, 4>(product, params, stream);
  } else if (fits && blocks <= 4 * kWarps) {
    return launch_cluster<1, 4>(product, params, stream);
  }
  params.p.unit_rows = 1;
  const Shape shape{std::min(product.rows, processor_count() * 8), 256};
  return with_product_types(product, [&](auto lora, auto) {
    constexpr bool L = decltype(lora)::value;
    return product.is_float ? launch(add_rms_norm_any_kernel<float, L>, shape, product.follow, stream, params, product.y_is_float)
                            : launch(add_rms_norm_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, params, product.y_is_float);
  });
}

}  // namespace openlora
