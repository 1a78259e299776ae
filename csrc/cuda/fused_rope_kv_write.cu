// Rotary embedding and the write into the paged cache, of a finished qkv product. See fused.h, product.cuh.
//
// With adapters: a stream (stream.cuh) of pairs of 32 columns of a head's first half and the 32 of its second half that rotate
// with them. Without, and where q or k is normed: a warp takes 8 or 16 rows and one such pair, or the whole head, at a time. A
// value head is written as it is. No shared memory, no barrier. Bytes: S * T * N * 4 of planes, B of every tile once (qkv at
// D = 64, r = 16: 12.6 MB, 4.1 us at 3.1 TB/s), T * N * 2 out.
#include "launch.cuh"
#include "stream.cuh"

namespace openlora {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocksPerProcessor = 5;

struct Params {
  ProductView p;
  const float* cos;
  const float* sin;
  const int32_t* positions;
  const int32_t* kv_slots;
  void* key_cache;
  void* value_cache;
  int64_t block_stride, group_stride, token_stride;
  int block_size, heads, groups, head_size;
  const void* q_norm;
  const void* k_norm;
  float eps;
  void* q;
  bool has_float_planes;
};

// Where the head of a row goes; null: nowhere (padding).
template <class T>
__device__ __forceinline__ T* head_target(const Params& a, int row, int head) {
  if (head < a.heads) return static_cast<T*>(a.q) + (static_cast<int64_t>(row) * a.heads + head) * a.head_size;
  const int slot = __ldcg(a.kv_slots + row);
  if (slot < 0) return nullptr;
  const bool is_key = head < a.heads + a.groups;
  const int group = head - a.heads - (is_key ? 0 : a.groups);
  return static_cast<T*>(is_key ? a.key_cache : a.value_cache) + slot / a.block_size * a.block_stride + group * a.group_stride +
         slot % a.block_size * a.token_stride;
}

// Scales a row's whole head to unit mean square and multiplies the norm's weights. NB pairs of blocks: the head is 2 NB * 32 wide.
template <int NB, int H>
__device__ __forceinline__ void norm_head(float (&x)[2 * NB][H][kLaneColumns], const __nv_bfloat16* weight, float eps) {
#pragma unroll
  for (int h = 0; h < H; ++h) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * NB; ++i)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) squares += x[i][h][c] * x[i][h][c];
    squares += __shfl_xor_sync(kAllLanes, squares, 1);
    squares += __shfl_xor_sync(kAllLanes, squares, 2);
    const float scale = rsqrtf(squares / (2 * NB * kBlock) + eps);
#pragma unroll
    for (int i = 0; i < 2 * NB; ++i)
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c)
        x[i][h][c] *= scale * __bfloat162float(weight[i * kBlock + lane_column(c / 4) + c % 4]);
  }
}

// Rotates this lane's 8 columns of a head's first half, from `offset` on, with those of its second half, and writes both.
__device__ __forceinline__ void write_pair(const Params& a, __nv_bfloat16* target, bool rotates, int64_t angle, int offset,
                                           float (&first)[kLaneColumns], float (&second)[kLaneColumns]) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = offset + lane_column(part);
    if (rotates) {
      const float4 c = __ldg(reinterpret_cast<const float4*>(a.cos + angle + column)), s = __ldg(reinterpret_cast<const float4*>(a.sin + angle + column));
      const float cosine[4] = {c.x, c.y, c.z, c.w}, sine[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float &x = first[4 * part + j], &y = second[4 * part + j];
        const float rotated = x * cosine[j] - y * sine[j];
        y = y * cosine[j] + x * sine[j];
        x = rotated;
      }
    }
    store_bf16x4(target + column, first + 4 * part);
    store_bf16x4(target + a.head_size / 2 + column, second + 4 * part);
  }
}

template <bool kFloatPlanes, int H>
__global__ void __launch_bounds__(kStreamWarps* kWarp, kStreamBlocks) rope_kv_lora_kernel(const __grid_constant__ Params a) {
  start_dependents();
  const int half = a.head_size / 2, slices = half / kBlock;
  stream_pairs<kFloatPlanes, H>(
      a.p, (a.heads + 2 * a.groups) * slices,
      [&](int i) {
        const int column = i / slices * a.head_size + i % slices * kBlock;
        return make_int2(column, column + half);
      },
      [&](int i, float (&y)[2][H][kLaneColumns], const int (&row)[H]) {
        const int head = i / slices;
#pragma unroll
        for (int h = 0; h < H; ++h) {
          if (row[h] < 0) continue;
          auto* target = head_target<__nv_bfloat16>(a, row[h], head);
          if (target == nullptr) continue;
          const int64_t angle = static_cast<int64_t>(__ldcg(a.positions + row[h])) * half;
          write_pair(a, target, head < a.heads + a.groups, angle, i % slices * kBlock, y[0][h], y[1][h]);
        }
      });
}

// NB: pairs of blocks a warp holds; kNorm: they are the whole head and q or k is normed.
template <bool kLora, bool kFloatPlanes, int H, int NB, bool kNorm>
__global__ void __launch_bounds__(kWarps* kWarp, kNorm ? 2 : kBlocksPerProcessor) rope_kv_kernel(const __grid_constant__ Params a) {
  start_dependents();
  const ProductView& p = a.p;
  const int half = a.head_size / 2, slices = half / (NB * kBlock), per_row = (a.heads + 2 * a.groups) * slices;
  const RowParts<kLora> parts(p);
  const int units = parts.count() * per_row, stride = gridDim.x * kWarps;
  int unit = blockIdx.x * kWarps + threadIdx.x / kWarp;
  RowSpan span{};
  PageBlock pages[2 * NB];
  int columns[2 * NB];
  auto fetch = [&](int u) {
    span = parts[u / per_row];
    const int head = u % per_row / slices, first = head * a.head_size + u % slices * NB * kBlock;
#pragma unroll
    for (int i = 0; i < 2 * NB; ++i) columns[i] = first + (i < NB ? i * kBlock : half + (i - NB) * kBlock);
    if constexpr (kLora) {
#pragma unroll
      for (int i = 0; i < 2 * NB; ++i) pages[i] = span.first < span.last ? fetch_block(p, parts.table, span.tile, 0, columns[i]) : PageBlock{};
    }
  };
  if (unit < units) fetch(unit);
  wait_for_previous();
  for (; unit < units; unit += stride) {
    const int head = unit % per_row / slices, offset = unit % slices * NB * kBlock;  // inside the head's half
    for (int place = span.first; place < span.last; place += 8 * H) {
      float x[2 * NB][H][kLaneColumns];
      int row[H];
      finish<kLora, kFloatPlanes, H, 2 * NB>(x, row, p, parts, span, place, columns, pages);
      if constexpr (kNorm) {
        const void* weight = head < a.heads ? a.q_norm : (head < a.heads + a.groups ? a.k_norm : nullptr);
        if (weight != nullptr) norm_head<NB, H>(x, static_cast<const __nv_bfloat16*>(weight), a.eps);
      }
#pragma unroll
      for (int h = 0; h < H; ++h) {
        if (row[h] < 0) continue;
        auto* target = head_target<__nv_bfloat16>(a, row[h], head);
        if (target == nullptr) continue;
        const int64_t angle = static_cast<int64_t>(__ldcg(a.positions + row[h])) * half;
#pragma unroll
        for (int i = 0; i < NB; ++i) write_pair(a, target, head < a.heads + a.groups, angle, offset + i * kBlock, x[i][h], x[NB + i][h]);
      }
    }
    if (unit + stride < units) fetch(unit + stride);
  }
}

// A warp takes a row's head at a time, a lane a pair of columns at a time; the norm's sum is a pass of its own.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) rope_kv_any_kernel(const __grid_constant__ Params a) {
  start_dependents();
  wait_for_previous();
  const ProductView& p = a.p;
  const RowParts<kLora> parts(p);
  const int all = a.heads + 2 * a.groups, half = a.head_size / 2, lane = threadIdx.x % kWarp;
  for (int part = blockIdx.x; part < parts.count(); part += gridDim.x) {
    const RowSpan span = parts[part];
    for (int place = span.first; place < span.last; ++place)
      for (int head = threadIdx.x / kWarp; head < all; head += blockDim.x / kWarp) {
        const int row = parts.row(span, place);
        const bool rotates = head < a.heads + a.groups;
        const T* weight = static_cast<const T*>(head < a.heads ? a.q_norm : (rotates ? a.k_norm : nullptr));
        float scale = 1.f;
        if (weight != nullptr) {
          float squares = 0.f;
          for (int d = lane; d < a.head_size; d += kWarp) {
            const float x = product_at<T, kLora>(p, parts, span, place, head * a.head_size + d, a.has_float_planes);
            squares += x * x;
          }
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
          scale = rsqrtf(squares / a.head_size + a.eps);
        }
        T* target = head_target<T>(a, row, head);
        if (target == nullptr) continue;
        for (int d = lane; d < half; d += kWarp) {
          float first = product_at<T, kLora>(p, parts, span, place, head * a.head_size + d, a.has_float_planes);
          float second = product_at<T, kLora>(p, parts, span, place, head * a.head_size + half + d, a.has_float_planes);
          if (weight != nullptr) {
            first *= scale * to_float(weight[d]);
            second *= scale * to_float(weight[half + d]);
          }
          if (rotates) {
            const int64_t at = static_cast<int64_t>(__ldcg(a.positions + row)) * half + d;
            const float rotated = first * a.cos[at] - second * a.sin[at];
            second = second * a.cos[at] + first * a.sin[at];
            first = rotated;
          }
          target[d] = from_float<T>(first);
          target[half + d] = from_float<T>(second);
        }
      }
  }
}

template <int NB, bool kNorm>
cudaError_t launch_blocks(const RopeKvArgs& args, Params& params, cudaStream_t stream) {
  const Product& product = args.product;
  params.p = view_of(product, stream_rows(product.rows));
  const int64_t parts = product.lora != nullptr ? product.rows : (product.rows + params.p.unit_rows - 1) / params.p.unit_rows;
  const int64_t units = parts * (product.columns / (2 * NB * kBlock));
  const int most = processor_count() * (kNorm ? 2 : kBlocksPerProcessor);
  const Shape shape{static_cast<int>(std::min<int64_t>((units + kWarps - 1) / kWarps, most)), kWarps * kWarp};
  return with_product_types(product, [&](auto lora, auto planes) {
    constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
    if constexpr (L && !kNorm) {
      const Shape all{processor_count() * kStreamBlocks, kStreamWarps * kWarp};
      return params.p.unit_rows > 8 ? launch(rope_kv_lora_kernel<P, 2>, all, product.follow, stream, params)
                                    : launch(rope_kv_lora_kernel<P, 1>, all, product.follow, stream, params);
    } else {
      return params.p.unit_rows > 8 ? launch(rope_kv_kernel<L, P, 2, NB, kNorm>, shape, product.follow, stream, params)
                                    : launch(rope_kv_kernel<L, P, 1, NB, kNorm>, shape, product.follow, stream, params);
    }
  });
}

}  // namespace

cudaError_t launch_fused_rope_kv_write(const RopeKvArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product) || args.head_size % 2 != 0 || product.columns != (args.heads + 2 * args.groups) * args.head_size || args.block_size < 1)
    return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  Params params{view_of(product, 1), args.cos, args.sin, args.positions, args.kv_slots, args.key_cache, args.value_cache, args.block_stride,
                args.group_stride, args.token_stride, args.block_size, args.heads, args.groups, args.head_size, args.q_norm, args.k_norm,
                args.eps, args.q, product.y_is_float};
  const bool has_norm = args.q_norm != nullptr || args.k_norm != nullptr;
  bool fits = fits_blocks(product) && args.head_size % (2 * kBlock) == 0 && (!has_norm || args.head_size <= 128);
  for (const int64_t stride : {args.block_stride, args.group_stride, args.token_stride}) fits = fits && stride % 4 == 0;
  for (const void* target : {args.key_cache, args.value_cache, args.q}) fits = fits && reinterpret_cast<uintptr_t>(target) % 8 == 0;
  for (const float* table : {args.cos, args.sin}) fits = fits && reinterpret_cast<uintptr_t>(table) % 16 == 0;
  if (product.lora != nullptr)
    for (int m = 0; m < product.lora->span_count; ++m)
      fits = fits && product.lora->spans[m].column % args.head_size == 0 && product.lora->spans[m].outputs % args.head_size == 0;
  if (fits && !has_norm) return launch_blocks<1, false>(args, params, stream);
  if (fits) return args.head_size == 64 ? launch_blocks<1, true>(args, params, stream) : launch_blocks<2, true>(args, params, stream);
  const Shape shape{std::min(product.rows, processor_count() * 8), 256};
  return with_product_types(product, [&](auto lora, auto) {
    constexpr bool L = decltype(lora)::value;
    return product.is_float ? launch(rope_kv_any_kernel<float, L>, shape, product.follow, stream, params)
                            : launch(rope_kv_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, params);
  });
}

}  // namespace openlora
