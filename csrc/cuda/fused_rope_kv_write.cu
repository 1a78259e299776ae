// Rotary embedding and the write into the paged cache, of a finished qkv product. See fused.h.
//
// With adapters on Hopper: expand_stream.cuh, 128 columns of heads a unit, four of a head's first half and those of its second half that
// rotate with them a lane. Else product.cuh, the same columns a lane; D / 8 neighbouring lanes hold a head, and the sum of q's and k's norm
// runs among them. A value head is written as it is. Bytes: S * T * N * 2 of planes, B of every tile once (qkv at D = 64, r = 16: 12.6 MB,
// 4.1 us at 3.1 TB/s), T * N * 2 out.
#include "expand_stream.cuh"

namespace openlora {
namespace {

constexpr int kLoraBlocks = 3;  // a processor
constexpr int kBaseBlocks = 6;
constexpr int kStreamWarps = 12;

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

// Of four columns of a row.
struct Angles {
  float4 cos, sin;
};

// What a lane needs of a row beside its product; written before the step began.
struct RowPlace {
  int slot;
  int position;
  // Of the lane's head, where few rows are finished at a time: the registers of more are too few.
  __nv_bfloat16* target;  // null: nowhere
  Angles angles;          // where it rotates
};

// Where the head of a row goes; null: nowhere (padding).
template <class T>
__device__ __forceinline__ T* head_target(const Params& a, int row, int slot, int head) {
  if (head < a.heads) return static_cast<T*>(a.q) + (static_cast<int64_t>(row) * a.heads + head) * a.head_size;
  if (slot < 0) return nullptr;
  const bool is_key = head < a.heads + a.groups;
  const int group = head - a.heads - (is_key ? 0 : a.groups);
  return static_cast<T*>(is_key ? a.key_cache : a.value_cache) + slot / a.block_size * a.block_stride + group * a.group_stride +
         slot % a.block_size * a.token_stride;
}

// Scales a head, held by `lanes` neighbouring lanes, to unit mean square and multiplies the norm's weights (null: neither).
__device__ __forceinline__ void norm_head(float (&first)[kQuad], float (&second)[kQuad], const __nv_bfloat16* weight, int column, int lanes, float eps) {
  float squares = 0.f;
#pragma unroll
  for (int c = 0; c < kQuad; ++c) squares += first[c] * first[c] + second[c] * second[c];
  for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
  if (weight == nullptr) return;
  const float scale = rsqrtf(squares / (2 * kQuad * lanes) + eps);
#pragma unroll
  for (int c = 0; c < kQuad; ++c) {
    first[c] *= scale * __bfloat162float(weight[column + c]);
    second[c] *= scale * __bfloat162float(weight[lanes * kQuad + column + c]);
  }
}

__device__ __forceinline__ Angles read_angles(const Params& a, int position, int column) {
  const int64_t at = static_cast<int64_t>(position) * (a.head_size / 2) + column;
  return {__ldg(reinterpret_cast<const float4*>(a.cos + at)), __ldg(reinterpret_cast<const float4*>(a.sin + at))};
}

__device__ __forceinline__ void rotate(bool rotates, float (&first)[kQuad], float (&second)[kQuad], const Angles& angles) {
  const float cosine[4] = {angles.cos.x, angles.cos.y, angles.cos.z, angles.cos.w};
  const float sine[4] = {angles.sin.x, angles.sin.y, angles.sin.z, angles.sin.w};
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const float turned[2] = {first[j] * cosine[j] - second[j] * sine[j], second[j] * cosine[j] + first[j] * sine[j]};
    first[j] = rotates ? turned[0] : first[j], second[j] = rotates ? turned[1] : second[j];
  }
}

template <bool kLora, bool kFloatPlanes, int G, int R>
__global__ void __launch_bounds__(kUnitWarps* kWarp, kLora ? kLoraBlocks : kBaseBlocks) rope_kv_kernel(const __grid_constant__ Params a) {
  constexpr bool kFewRows = R <= 2;
  const int half = a.head_size / 2, lanes = half / kQuad;  // of a head
  finish_units<kLora, kFloatPlanes, G, R>(
      a.p, (a.heads + 2 * a.groups) * lanes,
      [&](int i) {
        const int column = i / lanes * a.head_size + i % lanes * kQuad;
        return LaneColumns{{column, column + half}};
      },
      [&](int row, int number) {
        RowPlace known{__ldcg(a.kv_slots + row), __ldcg(a.positions + row), nullptr, {}};
        if constexpr (kFewRows) {
          known.target = head_target<__nv_bfloat16>(a, row, known.slot, number / lanes);
          if (number < (a.heads + a.groups) * lanes) known.angles = read_angles(a, known.position, number % lanes * kQuad);
        }
        return known;
      },
      [&](int number, const LaneColumns& lane, const int (&row)[R], const RowPlace (&known)[R], float (&y)[kQuads][R][kQuad]) {
        const int head = number / lanes, column = number % lanes * kQuad;
        const bool rotates = head < a.heads + a.groups, has_norm = a.q_norm != nullptr || a.k_norm != nullptr;
        const auto* weight = static_cast<const __nv_bfloat16*>(head < a.heads ? a.q_norm : (rotates ? a.k_norm : nullptr));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (row[r] < 0) continue;  // for all lanes or none
          if (has_norm) norm_head(y[0][r], y[1][r], weight, column, lanes, a.eps);
          if (lane.column[0] < 0) continue;
          auto* const target = kFewRows ? known[r].target : head_target<__nv_bfloat16>(a, row[r], known[r].slot, head);
          if (target == nullptr) continue;
          if constexpr (kFewRows) rotate(rotates, y[0][r], y[1][r], known[r].angles);
          else if (rotates) rotate(true, y[0][r], y[1][r], read_angles(a, known[r].position, column));
          store_quad(target + column, y[0][r]);
          store_quad(target + half + column, y[1][r]);
        }
        __syncwarp();
      });
}

// What the streaming kernel needs of a row: where its keys and values go (elements; -1: nowhere) and its angles.
struct RowTarget {
  int64_t offset;
  int position;

  __device__ __forceinline__ RowTarget of(int lane) const { return {__shfl_sync(kAllLanes, offset, lane), __shfl_sync(kAllLanes, position, lane)}; }
};

// Half heads as boxes where a head has 128 columns or more; heads of 64 two at a time. `head_bits`: log2 of the head size.
template <bool kFloatPlanes, bool kHasNorm>
__global__ void __launch_bounds__(kStreamWarps* kWarp, 1) rope_kv_stream_kernel(StreamPlan plan, int groups, int head_bits,
                                                                                const __grid_constant__ Params a,
                                                                                const __grid_constant__ StreamMaps maps) {
#if __CUDA_ARCH__ >= 900
  const ProductView& p = a.p;
  const int half = a.head_size / 2, lane = static_cast<int>(threadIdx.x & 15), slice_bits = head_bits - 7;  // slices of 64 of half a head
  const int first = slice_bits >= 0 ? kQuad * lane : lane / 8 * kBoxColumns + lane % 8 * kQuad;
  finish_stream<kFloatPlanes, kFloatPlanes ? 0 : 2, true, kMaxLoraSpans>(
      p, maps, plan, groups, LanePlaces{{first, first + (slice_bits >= 0 ? kBoxColumns : half)}},
      [&](int group) {
        const int slice = slice_bits > 0 ? group & ((1 << slice_bits) - 1) : 0;
        const int column = slice_bits > 0 ? ((group >> slice_bits) << head_bits) + slice * kBoxColumns : group * 2 * kBoxColumns;
        return UnitColumns{{column, column + (slice_bits > 0 ? half : kBoxColumns)}, {p.columns, p.columns}};
      },
      [&](int row) {
        const int slot = load_known(a.kv_slots + row);
        const int64_t offset = slot / a.block_size * a.block_stride + slot % a.block_size * a.token_stride;
        return RowTarget{slot < 0 ? -1 : offset, load_known(a.positions + row)};
      },
      [&](int2 column, const RowTarget& known) {
        return read_angles(a, known.position, column.x & (a.head_size - 1));
      },
      [&](int2 column, bool is_there, int row, const RowTarget& known, const Angles& angles, float (&x)[kQuad], float (&y)[kQuad]) {
        const int head = column.x >> head_bits, offset = column.x & (a.head_size - 1);  // below half
        const bool is_query = head < a.heads, rotates = head < a.heads + a.groups;
        if constexpr (kHasNorm) {
          const auto* weight = static_cast<const __nv_bfloat16*>(head < a.heads ? a.q_norm : (rotates ? a.k_norm : nullptr));
          norm_head(x, y, weight, offset, half / kQuad, a.eps);
        }
        // Without branches, so that the rows of a pass go side by side.
        const int64_t in_cache = (head - a.heads - (rotates ? 0 : a.groups)) * a.group_stride + offset;
        auto* const target = static_cast<__nv_bfloat16*>(is_query ? a.q : (rotates ? a.key_cache : a.value_cache)) +
                             (is_query ? static_cast<int64_t>(row) * a.heads * a.head_size + column.x : known.offset + in_cache);
        is_there = is_there && (is_query || known.offset >= 0);
        rotate(rotates, x, y, angles);
        store_if(is_there, target, x);
        store_if(is_there, target + half, y);
      });
#endif
}

// A warp takes a row's head at a time, a lane a pair of columns at a time; the norm's sum is a pass of its own.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) rope_kv_any_kernel(const __grid_constant__ Params a) {
  wait_for_previous();
  start_dependents();
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
        T* target = head_target<T>(a, row, __ldcg(a.kv_slots + row), head);
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
  const int lanes = args.head_size / (2 * kQuad);  // of a head
  bool fits = fits_quads(product) && args.head_size % (2 * kQuad) == 0 && (!has_norm || (lanes <= kWarp && kWarp % lanes == 0));
  for (const int64_t stride : {args.block_stride, args.group_stride, args.token_stride}) fits = fits && stride % kQuad == 0;
  for (const void* target : {args.key_cache, args.value_cache, args.q}) fits = fits && reinterpret_cast<uintptr_t>(target) % 8 == 0;
  for (const float* table : {args.cos, args.sin}) fits = fits && reinterpret_cast<uintptr_t>(table) % 16 == 0;
  const int head_bits = args.head_size == 64 ? 6 : (args.head_size == 128 ? 7 : (args.head_size == 256 && !has_norm ? 8 : 0));
  if (fits && head_bits > 0 && suits_stream(product, product.columns, 2)) {
    const int processors = processor_count(), groups = (product.columns + 2 * kBoxColumns - 1) / (2 * kBoxColumns);
    return with_stream(product, groups, processors, kStreamWarps, [&](auto planes, const StreamMaps& maps, const StreamPlan& plan, const Shape& shape) {
      constexpr bool P = decltype(planes)::value;
      auto* const kernel = has_norm ? rope_kv_stream_kernel<P, true> : rope_kv_stream_kernel<P, false>;
      return launch(kernel, shape, product.follow, stream, plan, groups, head_bits, params, maps);
    });
  }
  if (fits) {
    return with_product_types(product, [&](auto lora, auto planes, auto modules) {
      constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
      constexpr int G = decltype(modules)::value, R = 2, kMany = L ? R : 4;  // rows in flight
      const bool has_many = product.rows > 256;
      params.p.unit_rows = L ? unit_rows_for(product.rows, (args.heads + 2 * args.groups) * lanes) : (has_many ? kMany : R);
      const int most = processor_count() * (L ? kLoraBlocks : kBaseBlocks);
      const int blocks = unit_blocks(product, params.p.unit_rows, (args.heads + 2 * args.groups) * lanes, most);
      const Shape shape{blocks, kUnitWarps * kWarp};
      if (has_many) return launch(rope_kv_kernel<L, P, G, kMany>, shape, product.follow, stream, params);
      return launch(rope_kv_kernel<L, P, G, R>, shape, product.follow, stream, params);
    });
  }
  const Shape shape{std::min(product.rows, processor_count() * 8), 256};
  return with_product_types(product, [&](auto lora, auto, auto) {
    constexpr bool L = decltype(lora)::value;
    return product.is_float ? launch(rope_kv_any_kernel<float, L>, shape, product.follow, stream, params)
                            : launch(rope_kv_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, params);
  });
}

}  // namespace openlora
