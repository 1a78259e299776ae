// silu(gate) * up of a finished gate_up product. See fused.h.
//
// With adapters on Hopper: expand_stream.cuh, 64 columns of gate and the same of up a unit. Else product.cuh, 4 columns of both a lane.
// Bytes: S * T * 2 I * 2 of planes (from the cache in decode), B of every tile once (gate_up at D = 64, r = 16, I = 14336: 58.7 MB, 18.9 us
// at 3.1 TB/s), T * I * 2 out.
#include "expand_stream.cuh"

namespace openlora {
namespace {

constexpr int kLoraBlocks = 4;  // a processor
constexpr int kBaseBlocks = 8;
constexpr int kStreamWarps = 16;

template <bool kLora, bool kFloatPlanes, int G, int R>
__global__ void __launch_bounds__(kUnitWarps* kWarp, kLora ? kLoraBlocks : kBaseBlocks)
    silu_mul_kernel(const __grid_constant__ ProductView p, __nv_bfloat16* out) {
  const int half = p.columns / 2;
  finish_units<kLora, kFloatPlanes, G, R>(
      p, half / kQuad, [&](int i) { return LaneColumns{{i * kQuad, half + i * kQuad}}; }, [](int, int) { return NoFacts{}; },
      [&](int, const LaneColumns& lane, const int (&row)[R], const NoFacts (&)[R], float (&y)[kQuads][R][kQuad]) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (row[r] < 0 || lane.column[0] < 0) continue;
#pragma unroll
          for (int c = 0; c < kQuad; ++c) y[0][r][c] = silu(y[0][r][c]) * y[1][r][c];
          store_quad(out + static_cast<int64_t>(row[r]) * half + lane.column[0], y[0][r]);
        }
      });
}

// SiLU needs nothing of a row but its product.
struct NoRowFacts {
  __device__ __forceinline__ NoRowFacts of(int) const { return {}; }
};

template <bool kFloatPlanes>
__global__ void __launch_bounds__(kStreamWarps* kWarp, 1)
    silu_mul_stream_kernel(StreamPlan plan, __nv_bfloat16* out, const __grid_constant__ ProductView p, const __grid_constant__ StreamMaps maps) {
#if __CUDA_ARCH__ >= 900
  const int half = p.columns / 2, lane = static_cast<int>(threadIdx.x & 15);
  finish_stream<kFloatPlanes, kFloatPlanes ? 0 : 1, false, 2>(
      p, maps, plan, (half + kBoxColumns - 1) / kBoxColumns, LanePlaces{{kQuad * lane, kBoxColumns + kQuad * lane}},
      [&](int group) { return UnitColumns{{group * kBoxColumns, half + group * kBoxColumns}, {half, p.columns}}; }, [](int) { return NoRowFacts{}; },
      [](int2, NoRowFacts) { return NoRowFacts{}; },
      [&](int2 column, bool is_there, int row, NoRowFacts, NoRowFacts, float (&gate)[kQuad], const float (&up)[kQuad]) {
#pragma unroll
        for (int c = 0; c < kQuad; ++c) gate[c] = silu(gate[c]) * up[c];
        store_if(is_there, out + static_cast<int64_t>(row) * half + column.x, gate);
      });
#endif
}

// A block takes a row at a time, a thread a column.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) silu_mul_any_kernel(const __grid_constant__ ProductView p, T* out, bool has_float_planes) {
  wait_for_previous();
  start_dependents();
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

cudaError_t launch_stream(const SiluMulArgs& args, int processors, cudaStream_t stream) {
  const Product& product = args.product;
  const int groups = (product.columns / 2 + kBoxColumns - 1) / kBoxColumns;
  return with_stream(product, groups, processors, kStreamWarps, [&](auto planes, const StreamMaps& maps, const StreamPlan& plan, const Shape& shape) {
    return launch(silu_mul_stream_kernel<decltype(planes)::value>, shape, product.follow, stream, plan, static_cast<__nv_bfloat16*>(args.out),
                  view_of(product, kPassRows), maps);
  });
}

}  // namespace

cudaError_t launch_fused_silu_mul(const SiluMulArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product) || product.columns % 2 != 0) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  const int processors = processor_count();
  if (fits_quads(product) && product.columns % (2 * kQuad) == 0 && reinterpret_cast<uintptr_t>(args.out) % 8 == 0) {
    if (suits_stream(product, product.columns / 2, 1) && product.bias == nullptr && product.lora->span_count <= 2)
      return launch_stream(args, processors, stream);
    const int lanes = product.columns / 2 / kQuad;
    return with_product_types(product, [&](auto lora, auto planes, auto modules) {
      constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
      constexpr int G = decltype(modules)::value, R = 2, kMany = L ? R : 4;  // rows in flight
      const bool has_many = product.rows > 256;
      const ProductView view = view_of(product, L ? unit_rows_for(product.rows, lanes) : (has_many ? kMany : R));
      const int blocks = unit_blocks(product, view.unit_rows, lanes, processors * (L ? kLoraBlocks : kBaseBlocks));
      const Shape shape{blocks, kUnitWarps * kWarp};
      auto* out = static_cast<__nv_bfloat16*>(args.out);
      if (has_many) return launch(silu_mul_kernel<L, P, G, kMany>, shape, product.follow, stream, view, out);
      return launch(silu_mul_kernel<L, P, G, R>, shape, product.follow, stream, view, out);
    });
  }
  const ProductView view = view_of(product, 1);
  const Shape shape{std::min(product.rows, processors * 8), 256};
  return with_product_types(product, [&](auto lora, auto, auto) {
    constexpr bool L = decltype(lora)::value;
    if (product.is_float)
      return launch(silu_mul_any_kernel<float, L>, shape, product.follow, stream, view, static_cast<float*>(args.out), product.y_is_float);
    return launch(silu_mul_any_kernel<__nv_bfloat16, L>, shape, product.follow, stream, view, static_cast<__nv_bfloat16*>(args.out), product.y_is_float);
  });
}

}  // namespace openlora
