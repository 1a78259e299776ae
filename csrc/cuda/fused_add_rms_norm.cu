// residual += product, then the next norm. See fused.h, product.cuh; with adapters on Hopper, up to H = 4096, norm_lora.cuh, of few
// rows norm_pair.cuh.
//
// A block takes a part of a tile (1, 2 or 32 rows), R rows of it and all columns at a time, a thread two quads a pass, C passes: 512
// threads and one pass at H = 4096, whose B (256 bytes a thread, 128 KB a block), residual and weights are on their way before the
// previous kernel has ended. The sum of squares runs thread, lanes, warps, in an order cut by H alone; nothing is read twice. A
// part is one row where there are fewer rows than processors: then every row has a processor's bandwidth to itself. A cluster
// that shared a row lost: its barriers cost more than the row (2 us).
//
// Shared memory: 64 R bytes a warp for v. Bytes: S * T * H * 4 of planes, T * H * 2 of residual read and written, T * H * 2 out,
// B of every tile once (H = 4096, D = 64, r = 16: 8.4 MB, 2.7 us at 3.1 TB/s).
#include "launch.cuh"
#include "norm_pair.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kPrefillRows = 32;  // of a part, when B is kept for many rows

using Params = NormParams;

template <bool kLora, bool kFloatPlanes, int R, int C>
__global__ void __launch_bounds__(kMaxThreads, kLora ? 1 : 2) add_rms_norm_kernel(const __grid_constant__ Params a) {
  __shared__ WarpRanks<1, R> shared_ranks[kLora ? kMaxWarps : 1];
  __shared__ float warp_squares[2][R][kMaxWarps];
  const ProductView& p = a.p;
  const int warp = warp_index(), warps = blockDim.x / kWarp, quads = p.columns / kQuad;
  auto* residual = static_cast<__nv_bfloat16*>(a.residual);
  auto* out = static_cast<__nv_bfloat16*>(a.out);
  const RowParts<kLora> parts(p);
  const int count = parts.count();
  LaneColumns lane[C];
  uint2 weight[C][kQuads];
#pragma unroll
  for (int c = 0; c < C; ++c)
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int quad = threadIdx.x + (c * kQuads + q) * blockDim.x;
      lane[c].column[q] = quad < quads ? quad * kQuad : -1;
      if (quad < quads) weight[c][q] = __ldg(static_cast<const uint2*>(a.weight) + quad);
    }
  RowSpan span{};
  QuadPages<1> pages;
  int row[R];
  uint2 old[R][C][kQuads];
  auto locate = [&](int place) {  // the rows, and their residual, which no kernel in flight writes
#pragma unroll
    for (int r = 0; r < R; ++r) {
      row[r] = place + r < span.last ? parts.row(span, place + r) : -1;
      if (row[r] < 0) continue;
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
          if (lane[c].column[q] >= 0)
            old[r][c][q] = __ldcg(reinterpret_cast<const uint2*>(residual + static_cast<int64_t>(row[r]) * p.columns + lane[c].column[q]));
    }
  };
  bool has_waited = false;
  int parity = 0;
  for (int part = blockIdx.x; part < count; part += gridDim.x) {
    span = parts[part];
    if constexpr (kLora)
      if (span.first < span.last && span.tile.entries > 0) pages.fetch(p, span.tile.entry, lane[0]);
    locate(span.first);
    if (!has_waited) {
      has_waited = true;
      start_dependents();
      wait_for_previous();
    }
#pragma unroll 1
    for (int place = span.first; place < span.last; place += R, parity ^= 1) {
      if (place > span.first) locate(place);
      float y[C][kQuads][R][kQuad] = {};
      float squares[R] = {};
      const int rows = min(R, span.last - place);
      if constexpr (kLora)
        if (span.tile.entries > 0) shared_ranks[warp].load(p, span.tile, place, rows, 0);
#pragma unroll
      for (int c = 0; c < C; ++c) load_rows<kFloatPlanes, R>(y[c], p, row, lane[c]);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if constexpr (kLora) {
          if (C > 1 && (c > 0 || place > span.first) && span.tile.entries > 0) pages.fetch(p, span.tile.entry, lane[c]);
          if (c > 0 && span.tile.entries > 0) shared_ranks[warp].load(p, span.tile, place, rows, 0);
          expand_rows<1, R>(y[c], p, parts.table, span.tile, pages, shared_ranks[warp], lane[c], place, rows);
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            if (row[r] < 0 || lane[c].column[q] < 0) continue;
            float(&x)[kQuad] = y[c][q][r];
            float before[kQuad];
            unpack_quad(before, old[r][c][q]);
#pragma unroll
            for (int i = 0; i < kQuad; ++i) x[i] = rounded_bf16(x[i] + before[i]);
            store_quad(residual + static_cast<int64_t>(row[r]) * p.columns + lane[c].column[q], x);
#pragma unroll
            for (int i = 0; i < kQuad; ++i) squares[r] += x[i] * x[i];
          }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) squares[r] += __shfl_xor_sync(kAllLanes, squares[r], offset);
        if (threadIdx.x % kWarp == 0) warp_squares[parity][r][warp] = squares[r];
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (row[r] < 0) continue;
        float total = 0.f;
        for (int w = 0; w < warps; ++w) total += warp_squares[parity][r][w];
        const float scale = rsqrtf(total / p.columns + a.eps);
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            if (lane[c].column[q] < 0) continue;
            float by[kQuad];
            unpack_quad(by, weight[c][q]);
#pragma unroll
            for (int i = 0; i < kQuad; ++i) y[c][q][r][i] *= scale * by[i];
            store_quad(out + static_cast<int64_t>(row[r]) * p.columns + lane[c].column[q], y[c][q][r]);
          }
      }
    }
  }
  if (!has_waited) wait_for_previous();  // whoever waits for this kernel waits for those before it
}

// A block takes a row at a time and reads its own residual back for the second pass.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) add_rms_norm_any_kernel(const __grid_constant__ Params a, bool has_float_planes) {
  __shared__ float warp_squares[8];
  wait_for_previous();
  start_dependents();
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

template <int C>
cudaError_t launch_blocks(const Product& product, Params params, cudaStream_t stream) {
  const int processors = processor_count(), pairs = (product.columns / kQuad + kQuads - 1) / kQuads;
  const int threads = std::min(kMaxThreads, (pairs + kWarp - 1) / kWarp * kWarp);
  return with_product_types(product, [&](auto lora, auto planes, auto) {
    constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
    auto go = [&](auto kernel, int unit_rows, int blocks) {
      params.p.unit_rows = unit_rows;
      return launch(kernel, {std::min(product.rows, blocks), threads}, product.follow, stream, params);
    };
    if constexpr (!L) {
      if (C > 1 || product.rows <= 1024) return go(add_rms_norm_kernel<L, P, 1, C>, 1, processors * 2);
      return go(add_rms_norm_kernel<L, P, 2, 1>, 2, processors * 2);
    } else {
      if (C == 1 && fits_norm_lora(product)) {
        const Shape shape{std::min(product.rows, processors), threads + kNormHelpers * kWarp, norm_lora_shared_bytes(product.columns)};
        params.processors = processors;
        if (product.rows <= processors / kPairBlocks) {
          const Shape pairs{product.rows * kPairBlocks, (pair_warps(product.columns) + kNormHelpers) * kWarp, norm_pair_shared_bytes(product.columns)};
          return launch(add_rms_norm_pair_kernel<P>, pairs, product.follow, stream, params);
        }
        if (product.rows <= processors) return launch(add_rms_norm_lora_kernel<P, 1>, shape, product.follow, stream, params);
        return launch(add_rms_norm_lora_kernel<P, 3>, shape, product.follow, stream, params);
      }
      if (C > 1 || product.rows <= processors) return go(add_rms_norm_kernel<L, P, 1, C>, 1, processors);
      return go(add_rms_norm_kernel<L, P, 2, 1>, product.rows <= 2 * processors ? 2 : kPrefillRows, processors);
    }
  });
}

}  // namespace

cudaError_t launch_fused_add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product)) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  Params params{view_of(product, 1), args.residual, args.weight, args.eps, args.out};
  bool fits = fits_quads(product) && (product.lora == nullptr || product.lora->span_count == 1);
  for (const void* pointer : {static_cast<const void*>(args.residual), args.weight, static_cast<const void*>(args.out)})
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 8 == 0;
  const int pass = kMaxThreads * kQuads * kQuad;  // the choice depends on H alone: it decides the order of the sum
  if (fits && product.columns <= pass) return launch_blocks<1>(product, params, stream);
  if (fits && product.columns <= 2 * pass) return launch_blocks<2>(product, params, stream);
  const Shape shape{std::min(product.rows, processor_count() * 8), 256};
  return with_product_types(product, [&](auto lora, auto, auto) {
    constexpr bool L = decltype(lora)::value;
    return product.is_float ? launch(add_rms_norm_any_kernel<float, L>, shape, product.follow, stream, params, product.y_is_float)
                            : launch(add_rms_norm_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, params, product.y_is_float);
  });
}

}  // namespace openlora
