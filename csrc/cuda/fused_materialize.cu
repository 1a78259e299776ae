// A finished product as a tensor: logits in float32, or the model's type. See fused.h, product.cuh.
//
// A lane's quads are 4 columns of the product's first half and the same 4 of its second. Bytes: S * T * N * 4 of planes, B of
// every tile once, T * N * 2 or 4 out.
#include "launch.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kLoraBlocks = 4;  // a processor
constexpr int kBaseBlocks = 8;

template <bool kLora, bool kFloatPlanes, int G, int R>
__global__ void __launch_bounds__(kUnitWarps* kWarp, kLora ? kLoraBlocks : kBaseBlocks)
    materialize_kernel(const __grid_constant__ ProductView p, void* out, bool out_is_float) {
  const int half = p.columns / 2;
  finish_units<kLora, kFloatPlanes, G, R>(
      p, half / kQuad, [&](int i) { return LaneColumns{{i * kQuad, half + i * kQuad}}; }, [](int, int) { return NoFacts{}; },
      [&](int, const LaneColumns& lane, const int (&row)[R], const NoFacts (&)[R], float (&y)[kQuads][R][kQuad]) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (row[r] < 0 || lane.column[0] < 0) continue;
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            const int64_t at = static_cast<int64_t>(row[r]) * p.columns + lane.column[q];
            const float* x = y[q][r];
            if (out_is_float) *reinterpret_cast<float4*>(static_cast<float*>(out) + at) = make_float4(x[0], x[1], x[2], x[3]);
            else store_quad(static_cast<__nv_bfloat16*>(out) + at, y[q][r]);
          }
        }
      });
}

template <class T, class Out, bool kLora>
__global__ void __launch_bounds__(256) materialize_any_kernel(const __grid_constant__ ProductView p, Out* out, bool has_float_planes) {
  wait_for_previous();
  start_dependents();
  const RowParts<kLora> parts(p);
  for (int part = blockIdx.x; part < parts.count(); part += gridDim.x) {
    const RowSpan span = parts[part];
    for (int place = span.first; place < span.last; ++place)
      for (int i = threadIdx.x; i < p.columns; i += blockDim.x)
        out[static_cast<int64_t>(parts.row(span, place)) * p.columns + i] =
            from_float<Out>(product_at<T, kLora>(p, parts, span, place, i, has_float_planes));
  }
}

}  // namespace

cudaError_t launch_materialize(const MaterializeArgs& args, cudaStream_t stream) {
  const Product& product = args.product;
  if (!is_valid(product) || (product.is_float && !args.out_is_float)) return cudaErrorInvalidValue;
  if (product.rows == 0) return cudaSuccess;
  const int processors = processor_count();
  if (fits_quads(product) && product.columns % (2 * kQuad) == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0) {
    const int lanes = product.columns / 2 / kQuad;
    return with_product_types(product, [&](auto lora, auto planes, auto modules) {
      constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
      constexpr int G = decltype(modules)::value, R = 2;
      const ProductView view = view_of(product, L ? unit_rows_for(product.rows, lanes) : R);
      const int blocks = unit_blocks(product, view.unit_rows, lanes, processors * (L ? kLoraBlocks : kBaseBlocks));
      return launch(materialize_kernel<L, P, G, R>, {blocks, kUnitWarps * kWarp}, product.follow, stream, view, args.out, args.out_is_float);
    });
  }
  const ProductView view = view_of(product, 1);
  const Shape shape{std::min(product.rows, processors * 8), 256};
  return with_product_types(product, [&](auto lora, auto, auto) {
    constexpr bool L = decltype(lora)::value;
    auto* wide = static_cast<float*>(args.out);
    auto* narrow = static_cast<__nv_bfloat16*>(args.out);
    if (product.is_float) return launch(materialize_any_kernel<float, float, L>, shape, product.follow, stream, view, wide, product.y_is_float);
    if (args.out_is_float)
      return launch(materialize_any_kernel<__nv_bfloat16, float, L>, shape, product.follow, stream, view, wide, product.y_is_float);
    return launch(materialize_any_kernel<__nv_bfloat16, __nv_bfloat16, L>, shape, product.follow, stream, view, narrow, product.y_is_float);
  });
}

}  // namespace openlora
