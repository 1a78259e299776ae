// residual += product, then the next norm. See fused.h, product.cuh.
//
// A block takes up to R rows of one tile and all columns at a time, a thread 8 C neighbouring columns of them: up to 512 threads at
// H = 4096. With adapters its warps first make the expand of the rows on tensor cores, in shared memory: 8 blocks of 32 columns a
// warp, whose B (8 KB a warp, 128 KB a block) is on its way before the previous kernel has ended. The sum of squares runs thread,
// lanes, warps, in an order cut by H alone; nothing is read twice. R is 1 where there are fewer rows than processors: then every
// row has a processor's bandwidth to itself. A cluster that shared a row lost: its barriers cost more than the row (2 us).
//
// Shared memory: R * H * 4 bytes with adapters, 16 KB at R = 1. Bytes: S * T * H * 4 of planes, T * H * 2 of residual read and
// written, T * H * 2 out, B of every tile once (H = 4096, D = 64, r = 16: 8.4 MB, 2.7 us at 3.1 TB/s).
#include "launch.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kWarpBlocks = 8;  // blocks of 32 columns whose B a warp holds in registers

struct Params {
  ProductView p;
  void* residual;
  const void* weight;
  float eps;
  void* out;
};

// The expand of a part's rows into `delta` [R][columns]. `pages`: B of the warp's first blocks and the tile's first entry.
template <int C>
__device__ __forceinline__ void expand_rows(const Params& a, const RowParts<true>& parts, const RowSpan& span, PageBlock (&pages)[kWarpBlocks],
                                            float* delta) {
  const ProductView& p = a.p;
  const Tile& tile = span.tile;
  const int warp = warp_index(), warps = blockDim.x / kWarp, g = threadIdx.x % kWarp / 4, blocks = p.columns / kBlock;
  const int64_t stride = static_cast<int64_t>(tile.entries) * kPageRank;  // one module, checked by the launcher
  const float* v = p.work.v + static_cast<int64_t>(tile.first_pair) * kPageRank + span.first * stride;
#pragma unroll 1
  for (int batch = 0; batch < C; ++batch)
#pragma unroll 1
    for (int entry = 0; entry < tile.entries; ++entry) {
      if (batch > 0 || entry > 0) {
        const PageCursor cursor(p, 0, read_entry(parts.table, tile, entry));
#pragma unroll
        for (int j = 0; j < kWarpBlocks; ++j) {
          const int block = warp + (batch * kWarpBlocks + j) * warps;
          pages[j] = block < blocks ? cursor.load(block * kBlock) : PageBlock{};
        }
      }
      const RowRanks<1> ranks = load_row_ranks<1>(v + entry * kPageRank, stride, span.last - span.first);
#pragma unroll
      for (int j = 0; j < kWarpBlocks; ++j) {
        const int block = warp + (batch * kWarpBlocks + j) * warps;
        if (block >= blocks) break;
        float* to = delta + g * p.columns + block * kBlock;
        const bool is_mine = span.first + g < span.last;
        float sum[1][kLaneColumns] = {};
        if (entry > 0 && is_mine) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float4 before = *reinterpret_cast<const float4*>(to + lane_column(half));
            sum[0][4 * half] = before.x, sum[0][4 * half + 1] = before.y, sum[0][4 * half + 2] = before.z, sum[0][4 * half + 3] = before.w;
          }
        }
        expand<1>(sum, ranks, pages[j]);
        if (is_mine) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* x = sum[0] + 4 * half;
            *reinterpret_cast<float4*>(to + lane_column(half)) = make_float4(x[0], x[1], x[2], x[3]);
          }
        }
      }
    }
}

template <bool kLora, bool kFloatPlanes, int R, int C>
__global__ void __launch_bounds__(kMaxThreads, kLora ? 1 : 2) add_rms_norm_kernel(const __grid_constant__ Params a) {
  extern __shared__ float delta[];  // [R][columns], with adapters
  __shared__ float warp_squares[2][R][kMaxWarps];
  start_dependents();
  const ProductView& p = a.p;
  const int warp = warp_index(), warps = blockDim.x / kWarp, blocks = p.columns / kBlock, chunks = p.columns / 8;
  auto* residual = static_cast<__nv_bfloat16*>(a.residual);
  auto* out = static_cast<__nv_bfloat16*>(a.out);
  const RowParts<kLora> parts(p);
  const int count = parts.count();
  int part = blockIdx.x;
  RowSpan span{};
  PageBlock pages[kLora ? kWarpBlocks : 1];
  auto fetch = [&](int i) {
    span = parts[i];
    if constexpr (kLora) {
      if (span.first >= span.last || span.tile.entries == 0) return;
      const PageCursor cursor(p, 0, span.tile.entry);
#pragma unroll
      for (int j = 0; j < kWarpBlocks; ++j)
        pages[j] = warp + j * warps < blocks ? cursor.load((warp + j * warps) * kBlock) : PageBlock{};
    }
  };
  if (part < count) fetch(part);
  uint4 weight[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int chunk = threadIdx.x + c * blockDim.x;
    if (chunk < chunks) weight[c] = __ldg(static_cast<const uint4*>(a.weight) + chunk);
  }
  wait_for_previous();
  for (int parity = 0; part < count; part += gridDim.x, parity ^= 1) {
    const RowSpan now = span;
    float x[R][C][8];
    uint4 old[R][C];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (now.first + r >= now.last) break;
      const int64_t row = parts.row(now, now.first + r);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int chunk = threadIdx.x + c * blockDim.x;
        if (chunk >= chunks) continue;
        old[r][c] = __ldcg(reinterpret_cast<const uint4*>(residual + row * p.columns) + chunk);
        load_eight<kFloatPlanes>(x[r][c], p, row, chunk * 8);
      }
    }
    if constexpr (kLora) {
      if (now.tile.entries > 0 && now.first < now.last) expand_rows<C>(a, parts, now, pages, delta);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (now.first + r >= now.last) break;
      const int64_t row = parts.row(now, now.first + r);
      float squares = 0.f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int chunk = threadIdx.x + c * blockDim.x;
        if (chunk >= chunks) continue;
        if constexpr (kLora) {
          if (now.tile.entries > 0) {
            const float4* from = reinterpret_cast<const float4*>(delta + r * p.columns) + 2 * chunk;
            const float4 low = from[0], high = from[1];
            x[r][c][0] += low.x, x[r][c][1] += low.y, x[r][c][2] += low.z, x[r][c][3] += low.w;
            x[r][c][4] += high.x, x[r][c][5] += high.y, x[r][c][6] += high.z, x[r][c][7] += high.w;
          }
        }
        float before[8];
        unpack_bf16x8(before, old[r][c]);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[r][c][i] += before[i];
        const uint4 rounded = pack_bf16x8(x[r][c]);
        reinterpret_cast<uint4*>(residual + row * p.columns)[chunk] = rounded;
        unpack_bf16x8(x[r][c], rounded);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += x[r][c][i] * x[r][c][i];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
      if (threadIdx.x % kWarp == 0) warp_squares[parity][r][warp] = squares;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (now.first + r >= now.last) break;
      const int64_t row = parts.row(now, now.first + r);
      float total = 0.f;
      for (int w = 0; w < warps; ++w) total += warp_squares[parity][r][w];
      const float scale = rsqrtf(total / p.columns + a.eps);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int chunk = threadIdx.x + c * blockDim.x;
        if (chunk >= chunks) continue;
        float by[8];
        unpack_bf16x8(by, weight[c]);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[r][c][i] *= scale * by[i];
        store_bf16x8(out + row * p.columns + chunk * 8, x[r][c]);
      }
    }
    if (part + gridDim.x < count) fetch(part + gridDim.x);
  }
}

// A block takes a row at a time and reads its own residual back for the second pass.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) add_rms_norm_any_kernel(const __grid_constant__ Params a, bool has_float_planes) {
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

template <int C>
cudaError_t launch_blocks(const Product& product, Params params, cudaStream_t stream) {
  const int processors = processor_count(), chunks = product.columns / 8;
  const int threads = std::min(kMaxThreads, (chunks + kWarp - 1) / kWarp * kWarp);
  return with_product_types(product, [&](auto lora, auto planes) {
    constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
    auto go = [&](auto kernel, int rows, int blocks) {
      params.p.unit_rows = rows;
      return launch(kernel, {std::min(product.rows, blocks), threads, L ? rows * product.columns * 4 : 0}, product.follow, stream, params);
    };
    if constexpr (!L) {
      return go(add_rms_norm_kernel<L, P, 1, C>, 1, processors * 3);
    } else {
      const int fits = C == 1 ? product.rows / processors : 0;  // more rows a block need more registers and shared memory
      if (fits < 1) return go(add_rms_norm_kernel<L, P, 1, C>, 1, processors);
      if (fits < 2) return go(add_rms_norm_kernel<L, P, 2, 1>, 2, processors);
      return go(add_rms_norm_kernel<L, P, 4, 1>, 4, processors);
    }
  });
}

}  // namespace

cudaError_t launch_fused_add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product)) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  Params params{view_of(product, 1), args.residual, args.weight, args.eps, args.out};
  bool fits = fits_blocks(product);
  for (const void* pointer : {static_cast<const void*>(args.residual), args.weight, static_cast<const void*>(args.out), product.bias})
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (product.lora != nullptr)  // one module over all columns
    fits = fits && product.lora->span_count == 1 && product.lora->spans[0].column == 0 && product.lora->spans[0].outputs == product.columns;
  const int chunks = product.columns / 8;
  if (fits && chunks <= kMaxThreads) return launch_blocks<1>(product, params, stream);
  if (fits && chunks <= 2 * kMaxThreads) return launch_blocks<2>(product, params, stream);
  const Shape shape{std::min(product.rows, processor_count() * 8), 256};
  return with_product_types(product, [&](auto lora, auto) {
    constexpr bool L = decltype(lora)::value;
    return product.is_float ? launch(add_rms_norm_any_kernel<float, L>, shape, product.follow, stream, params, product.y_is_float)
                            : launch(add_rms_norm_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, params, product.y_is_float);
  });
}

}  // namespace openlora
