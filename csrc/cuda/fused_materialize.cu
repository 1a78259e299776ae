// A finished product as a tensor: logits in float32, or the model's type. See fused.h, product.cuh.
//
// A warp takes a part of one tile (8, 16 or 64 rows) and 32 columns at a time. Bytes: S * T * N * 4 of planes, B of every tile
// once, T * N * 2 or 4 out.
#include "launch.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocksPerProcessor = 6;

template <bool kLora, bool kFloatPlanes, int H>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksPerProcessor) materialize_kernel(const __grid_constant__ ProductView p, void* out, bool out_is_float) {
  start_dependents();
  const int blocks = p.columns / kBlock;
  const RowParts<kLora> parts(p);
  const int units = parts.count() * blocks;
  wait_for_previous();
  for (int unit = blockIdx.x * kWarps + warp_index(); unit < units; unit += gridDim.x * kWarps) {
    const RowSpan span = parts[unit / blocks];
    if (span.first >= span.last) continue;
    const int columns[1] = {unit % blocks * kBlock};
    PageBlock page[1];
    if constexpr (kLora) page[0] = fetch_block(p, parts.table, span.tile, 0, columns[0]);
    for (int place = span.first; place < span.last; place += 8 * H) {
      float sum[1][H][kLaneColumns];
      int row[H];
      finish<kLora, kFloatPlanes, H, 1>(sum, row, p, parts, span, place, columns, page);
#pragma unroll
      for (int h = 0; h < H; ++h) {
        if (row[h] < 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t at = static_cast<int64_t>(row[h]) * p.columns + columns[0] + lane_column(i);
          const float* x = sum[0][h] + 4 * i;
          if (out_is_float) *reinterpret_cast<float4*>(static_cast<float*>(out) + at) = make_float4(x[0], x[1], x[2], x[3]);
          else store_bf16x4(static_cast<__nv_bfloat16*>(out) + at, x);
        }
      }
    }
  }
}

template <class T, class Out, bool kLora>
__global__ void __launch_bounds__(256) materialize_any_kernel(const __grid_constant__ ProductView p, Out* out, bool has_float_planes) {
  start_dependents();
  wait_for_previous();
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
  if (fits_blocks(product) && reinterpret_cast<uintptr_t>(args.out) % 16 == 0) {
    const ProductView view = view_of(product, unit_rows_for(product.rows));
    const int64_t units = static_cast<int64_t>(product.lora != nullptr ? product.rows : (product.rows + view.unit_rows - 1) / view.unit_rows) *
                          (product.columns / kBlock);
    const int blocks = static_cast<int>(std::min<int64_t>((units + kWarps - 1) / kWarps, processors * kBlocksPerProcessor));
    return with_product_types(product, [&](auto lora, auto planes) {
      constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
      const Shape shape{blocks, kWarps * kWarp};
      return view.unit_rows > 8 ? launch(materialize_kernel<L, P, 2>, shape, product.follow, stream, view, args.out, args.out_is_float)
                                : launch(materialize_kernel<L, P, 1>, shape, product.follow, stream, view, args.out, args.out_is_float);
    });
  }
  const ProductView view = view_of(product, 1);
  const Shape shape{std::min(product.rows, processors * 8), 256};
  return with_product_types(product, [&](auto lora, auto) {
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
