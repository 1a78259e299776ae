// silu(gate) * up of a finished gate_up product. See fused.h, product.cuh.
//
// With adapters: a stream of pairs of 32 columns, gate and up (stream.cuh). Without: a thread takes 8 neighbouring columns of
// both. No shared memory, no barrier. Bytes: S * T * 2 I * 4 of planes (from the cache in decode), B of every tile once (gate_up
// at D = 64, r = 16, I = 14336: 58.7 MB, 18.9 us at 3.1 TB/s), T * I * 2 out.
#include "launch.cuh"
#include "stream.cuh"

namespace openlora {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

template <bool kFloatPlanes, int H>
__global__ void __launch_bounds__(kStreamWarps* kWarp, kStreamBlocks) silu_mul_lora_kernel(const __grid_constant__ ProductView p, __nv_bfloat16* out) {
  start_dependents();
  const int half = p.columns / 2;
  stream_pairs<kFloatPlanes, H>(
      p, half / kBlock, [&](int i) { return make_int2(i * kBlock, half + i * kBlock); },
      [&](int i, float (&y)[2][H][kLaneColumns], const int (&row)[H]) {
#pragma unroll
        for (int h = 0; h < H; ++h) {
          if (row[h] < 0) continue;
          float act[kLaneColumns];
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) act[c] = silu(y[0][h][c]) * y[1][h][c];
#pragma unroll
          for (int part = 0; part < 2; ++part)
            store_bf16x4(out + static_cast<int64_t>(row[h]) * half + i * kBlock + lane_column(part), act + 4 * part);
        }
      });
}

template <bool kFloatPlanes>
__global__ void __launch_bounds__(kThreads, 6) silu_mul_kernel(const __grid_constant__ ProductView p, __nv_bfloat16* out) {
  start_dependents();
  const int half = p.columns / 2, chunks = half / 8;
  const int64_t count = static_cast<int64_t>(p.rows) * chunks, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  wait_for_previous();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const int64_t row = i / chunks;
    const int column = static_cast<int>(i - row * chunks) * 8;
    float gate[8], up[8];
    load_eight<kFloatPlanes>(gate, p, row, column);
    load_eight<kFloatPlanes>(up, p, row, half + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) gate[c] = silu(gate[c]) * up[c];
    store_bf16x8(out + row * half + column, gate);
  }
}

// A block takes a row at a time, a thread a column.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) silu_mul_any_kernel(const __grid_constant__ ProductView p, T* out, bool has_float_planes) {
  start_dependents();
  wait_for_previous();
  const RowParts<kLora> parts(p);
  const int half = p.columns / 2;
  for (int part = blockIdx.x; part < parts.count(); part += gridDim.x) {
    const RowSpan span = parts[part];
    for (int place = span.first; place < span.last; ++place)
      for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float gate = product_at<T, kLora>(p, parts, span, place, i, has_float_planes);
        const float up = product_at<T, kLora>(p, parts, span, place, half + i, has_float_planes);
        out[static_cast<int64_t>(parts.row(span, place)) * half + i] = from_float<T>(gate / (1.f + expf(-gate)) * up);
      }
  }
}

}  // namespace

cudaError_t launch_fused_silu_mul(const SiluMulArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product) || product.columns % 2 != 0) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  const int processors = processor_count();
  if (fits_blocks(product) && product.columns % (2 * kBlock) == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0 &&
      reinterpret_cast<uintptr_t>(product.bias) % 16 == 0) {
    auto* out = static_cast<__nv_bfloat16*>(args.out);
    return with_product_types(product, [&](auto lora, auto planes) {
      constexpr bool P = decltype(planes)::value;
      const ProductView view = view_of(product, stream_rows(product.rows));
      if constexpr (decltype(lora)::value) {
        const Shape shape{processors * kStreamBlocks, kStreamWarps * kWarp};
        return view.unit_rows > 8 ? launch(silu_mul_lora_kernel<P, 2>, shape, product.follow, stream, view, out)
                                  : launch(silu_mul_lora_kernel<P, 1>, shape, product.follow, stream, view, out);
      } else {
        const int64_t threads = static_cast<int64_t>(product.rows) * (product.columns / 16);
        const int blocks = static_cast<int>(std::min<int64_t>((threads + kThreads - 1) / kThreads, processors * 8));
        return launch(silu_mul_kernel<P>, {blocks, kThreads}, product.follow, stream, view, out);
      }
    });
  }
  const ProductView view = view_of(product, 1);
  const Shape shape{std::min(product.rows, processors * 8), 256};
  return with_product_types(product, [&](auto lora, auto) {
    constexpr bool L = decltype(lora)::value;
    if (product.is_float)
      return launch(silu_mul_any_kernel<float, L>, shape, product.follow, stream, view, static_cast<float*>(args.out), product.y_is_float);
    return launch(silu_mul_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, view, static_cast<__nv_bfloat16*>(args.out), product.y_is_float);
  });
}

}  // namespace openlora
