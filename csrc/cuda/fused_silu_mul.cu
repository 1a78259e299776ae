// silu(gate) * up of a finished gate_up product. See fused.h, product.cuh.
//
// A warp takes a unit at a time: a part of one tile (8, 16 or 64 rows) and 32 columns of gate with the same 32 of up. No shared
// memory, no barrier; B of a unit's first page is on its way before the previous kernel has ended, and B of the next unit while
// this one is finished. Bytes: S * T * 2 I * 4 of planes (from L2 in decode), B of every tile once (gate_up at D = 64, r = 16,
// I = 14336: 58.7 MB, 18.9 us at 3.1 TB/s), T * I * 2 out.
#include "launch.cuh"
#include "product.cuh"

namespace openlora {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocksPerProcessor = 6;

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

template <bool kLora, bool kFloatPlanes, int H>
__global__ void __launch_bounds__(kWarps* kWarp, kLora ? 4 : kBlocksPerProcessor) silu_mul_kernel(const ProductView p, __nv_bfloat16* out) {
  start_dependents();
  const int half = p.columns / 2, blocks = half / kBlock;
  const RowParts<kLora> parts(p);
  const int units = parts.count() * blocks, stride = gridDim.x * kWarps;
  int unit = blockIdx.x * kWarps + threadIdx.x / kWarp;
  RowSpan span{};
  PageBlock gate_page[1], up_page[1];
  auto fetch = [&](int u) {
    span = parts[u / blocks];
    if constexpr (kLora) {
      if (span.first >= span.last) return;
      gate_page[0] = fetch_block(p, parts.table, span.tile, 0, u % blocks * kBlock);
      up_page[0] = fetch_block(p, parts.table, span.tile, 0, half + u % blocks * kBlock);
    }
  };
  if (unit < units) fetch(unit);
  wait_for_previous();
  for (; unit < units; unit += stride) {
    const RowSpan now = span;
    const int column = unit % blocks * kBlock;
    const int gate_column[1] = {column}, up_column[1] = {half + column};
    const PageBlock gate_now[1] = {gate_page[0]}, up_now[1] = {up_page[0]};
    if (unit + stride < units) fetch(unit + stride);
    for (int place = now.first; place < now.last; place += 8 * H) {
      float gate[1][H][kLaneColumns], up[1][H][kLaneColumns];
      int row[H];
      finish<kLora, kFloatPlanes, H, 1>(gate, row, p, parts, now, place, gate_column, gate_now);
      finish<kLora, kFloatPlanes, H, 1>(up, row, p, parts, now, place, up_column, up_now);
#pragma unroll
      for (int h = 0; h < H; ++h) {
        if (row[h] < 0) continue;
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) gate[0][h][c] = silu(gate[0][h][c]) * up[0][h][c];
#pragma unroll
        for (int i = 0; i < 2; ++i) store_bf16x4(out + static_cast<int64_t>(row[h]) * half + column + lane_column(i), gate[0][h] + 4 * i);
      }
    }
  }
}

// A block takes a row at a time, a thread a column.
template <class T, bool kLora>
__global__ void __launch_bounds__(256) silu_mul_any_kernel(const ProductView p, T* out, bool has_float_planes) {
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
  if (fits_blocks(product) && product.columns % (2 * kBlock) == 0 && reinterpret_cast<uintptr_t>(args.out) % 8 == 0) {
    const ProductView view = view_of(product, unit_rows_for(product.rows));
    const int64_t units = static_cast<int64_t>(product.lora != nullptr ? product.rows : (product.rows + view.unit_rows - 1) / view.unit_rows) *
                          (product.columns / 2 / kBlock);
    const int blocks = static_cast<int>(std::min<int64_t>((units + kWarps - 1) / kWarps, processors * (product.lora != nullptr ? 4 : kBlocksPerProcessor)));
    auto* out = static_cast<__nv_bfloat16*>(args.out);
    return with_product_types(product, [&](auto lora, auto planes) {
      constexpr bool L = decltype(lora)::value, P = decltype(planes)::value;
      return view.unit_rows > 8 ? launch(silu_mul_kernel<L, P, 2>, {blocks, kWarps * kWarp}, product.follow, stream, view, out)
                                : launch(silu_mul_kernel<L, P, 1>, {blocks, kWarps * kWarp}, product.follow, stream, view, out);
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
