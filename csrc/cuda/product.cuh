// The product on its way into an operation: one warp's block of 32 columns and 8 or 16 rows, finished in registers.
//
// Lane (g, t) = (lane / 4, lane % 4) holds rows g (and g + 8) and the columns t * 4 + {0..3} and 16 + t * 4 + {0..3} of a block:
// the four lanes of a row read 64 neighbouring bytes of float32 at a time, and eight rows go together.
//
// The expand runs on tensor cores for one row as for sixteen, so that a row's bits do not depend on its tile: rows are the M side
// of mma.m16n8k16, ranks its k, columns its n. v is split into two bf16 (v = hi + lo, exact to 2^-17), B is bf16 as it is.
// B goes from memory straight into fragments: lane (g, t) takes 4 columns of ranks 2t, 2t + 1, 2t + 8, 2t + 9; which columns
// an instruction's n means is free, and chosen so that the result lies as above. 1 KB of B a block and page.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "fused.h"

namespace openlora {

constexpr int kBlock = 32;      // columns of a block
constexpr int kLaneColumns = 8;  // of them, a lane's

// First of the four columns that index `i` (0 or 1) of a lane's halves stands for.
__device__ __forceinline__ int lane_column(int half) { return half * 16 + (threadIdx.x % 4) * 4; }

// Column of B that lane group g loads for the expand: n = 2t and 2t + 1 of an instruction are the lane's two halves.
__device__ __forceinline__ int page_column() {
  const int g = threadIdx.x % kWarp / 4;
  return (g % 2) * 16 + (g / 2) * 4;
}

// A device view of Product, with the LoRA work by value.
struct ProductView {
  const void* y;
  const void* bias;
  int64_t plane_stride;  // elements
  int planes;
  int rows;
  int columns;
  int unit_rows;  // rows a warp (or cluster) takes at a time: 8 to 64, fixed per launch
  LoraWork work;
};

inline ProductView view_of(const Product& product, int unit_rows) {
  ProductView view{};
  view.y = product.y;
  view.bias = product.bias;
  view.plane_stride = static_cast<int64_t>(product.rows) * product.columns;
  view.planes = product.planes;
  view.rows = product.rows;
  view.columns = product.columns;
  view.unit_rows = unit_rows;
  if (product.lora != nullptr) view.work = *product.lora;
  return view;
}

// Rows that a unit of work finishes: a part of one tile, or of the whole step where there are no adapters.
struct RowSpan {
  Tile tile;
  int first;  // of the tile
  int last;
};

// The parts of every tile. Part `i` is part i / tile count of tile i % tile count: tiles shorter than a part then leave no warp
// idle for long.
template <bool kLora>
struct RowParts {
  TileTable table;
  int rows;
  int unit_rows;

  __device__ __forceinline__ explicit RowParts(const ProductView& p) : table{}, rows(p.rows), unit_rows(p.unit_rows) {
    if constexpr (kLora) table = read_tile_table(p.work.tiles);
  }
  __device__ __forceinline__ int tile_parts() const {  // of the largest tile
    if constexpr (kLora) return (table.largest + unit_rows - 1) / unit_rows;
    else return (rows + unit_rows - 1) / unit_rows;
  }
  __device__ __forceinline__ int tile_count() const {
    if constexpr (kLora) return table.tile_count;
    else return 1;
  }
  __device__ __forceinline__ int count() const { return tile_count() * tile_parts(); }
  __device__ __forceinline__ RowSpan at(int tile_index, int part) const {
    const int first = part * unit_rows;
    if constexpr (kLora) {
      const Tile tile = read_tile(table, tile_index);
      return {tile, first, min(first + unit_rows, tile.rows)};
    } else {
      return {{}, first, min(first + unit_rows, rows)};
    }
  }
  __device__ __forceinline__ RowSpan operator[](int i) const {
    if constexpr (kLora) return at(i % table.tile_count, i / table.tile_count);
    else return at(0, i);
  }
  // Row of y at place `place` of the span's tile.
  __device__ __forceinline__ int row(const RowSpan& span, int place) const {
    if constexpr (kLora) return __ldg(table.rows + span.tile.place + place);
    else return place;
  }
};

// One page's B of one block of columns, as loaded.
struct PageBlock {
  uint2 rank[4];  // ranks 2t, 2t + 1, 2t + 8, 2t + 9; four columns each
};

__device__ __forceinline__ PageBlock load_page_block(const __nv_bfloat16* b, int outputs, int column, int count) {
  const int t = threadIdx.x % 4;
  const __nv_bfloat16* from = b + column + page_column();
  PageBlock block;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int rank = 2 * t + i % 2 + 8 * (i / 2);
    block.rank[i] = rank < count ? __ldg(reinterpret_cast<const uint2*>(from + static_cast<int64_t>(rank) * outputs)) : make_uint2(0, 0);
  }
  return block;
}

// v of 8 or 16 rows and one page, as the mma's A: hi and lo parts.
template <int H>
struct RowRanks {
  uint32_t hi[H][2];  // ranks 2t, 2t + 1; 2t + 8, 2t + 9 of row g (and g + 8)
  uint32_t lo[H][2];
};

// `v`: of the tile's place `first`, this entry and module; a place is `stride` floats further.
template <int H>
__device__ __forceinline__ RowRanks<H> load_row_ranks(const float* v, int64_t stride, int places) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  RowRanks<H> out;
#pragma unroll
  for (int h = 0; h < H; ++h)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int place = g + 8 * h;
      const float2 pair = place < places ? __ldcg(reinterpret_cast<const float2*>(v + place * stride + 2 * t + 8 * i)) : make_float2(0.f, 0.f);
      out.hi[h][i] = pack_bf16(pair.x, pair.y);
      out.lo[h][i] = pack_bf16(pair.x - low_half(out.hi[h][i]), pair.y - high_half(out.hi[h][i]));
    }
  return out;
}

// sum[h][4 * half + j] += v B for row g + 8 h and column lane_column(half) + j.
template <int H>
__device__ __forceinline__ void expand(float (&sum)[H][kLaneColumns], const RowRanks<H>& v, const PageBlock& b) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t select = j % 2 == 0 ? 0x5410 : 0x7632;
    const uint32_t b0 = __byte_perm(j < 2 ? b.rank[0].x : b.rank[0].y, j < 2 ? b.rank[1].x : b.rank[1].y, select);
    const uint32_t b1 = __byte_perm(j < 2 ? b.rank[2].x : b.rank[2].y, j < 2 ? b.rank[3].x : b.rank[3].y, select);
    float c[4] = {sum[0][j], sum[0][4 + j], H > 1 ? sum[H - 1][j] : 0.f, H > 1 ? sum[H - 1][4 + j] : 0.f};
    mma_bf16(c, v.hi[0][0], H > 1 ? v.hi[H - 1][0] : 0u, v.hi[0][1], H > 1 ? v.hi[H - 1][1] : 0u, b0, b1);
    mma_bf16(c, v.lo[0][0], H > 1 ? v.lo[H - 1][0] : 0u, v.lo[0][1], H > 1 ? v.lo[H - 1][1] : 0u, b0, b1);
    sum[0][j] = c[0];
    sum[0][4 + j] = c[1];
    if (H > 1) {
      sum[H - 1][j] = c[2];
      sum[H - 1][4 + j] = c[3];
    }
  }
}

// Where a block of columns finds its module in the pages.
struct ModuleBlock {
  int index;   // of the linear's modules; -1: none covers the block
  int column;  // inside the module
};

__device__ __forceinline__ ModuleBlock module_of(const LoraWork& work, int column) {
  ModuleBlock found{-1, 0};
#pragma unroll
  for (int m = 0; m < kMaxLoraSpans; ++m)
    if (m < work.span_count && column >= work.spans[m].column && column < work.spans[m].column + work.spans[m].outputs)
      found = {m, column - work.spans[m].column};
  return found;
}

__device__ __forceinline__ Entry read_entry(const TileTable& table, const Tile& tile, int entry) {
  return entry == 0 ? tile.entry : as_entry(__ldg(table.entries + tile.first_entry + entry));
}

// A module's B in an entry's page.
struct PageCursor {
  const __nv_bfloat16* b;
  int outputs;
  int count;  // ranks the page holds; 0: the module is not touched, or there is none

  __device__ __forceinline__ PageCursor() : b(nullptr), outputs(0), count(0) {}
  __device__ __forceinline__ PageCursor(const ProductView& p, int module, const Entry& entry) : PageCursor() {
    if (module < 0) return;
    const LoraSpan& span = p.work.spans[module];
    b = static_cast<const __nv_bfloat16*>(p.work.pages) + entry.page * p.work.page_elements + span.b_offset;
    outputs = span.outputs;
    count = ranks_in_page(p.work, span.module, entry);
  }
  __device__ __forceinline__ PageBlock load(int column) const { return load_page_block(b, outputs, column, count); }
};

// B of entry `entry` of a tile for the block that begins at `column` of the product.
__device__ __forceinline__ PageBlock fetch_block(const ProductView& p, const TileTable& table, const Tile& tile, int entry, int column) {
  const ModuleBlock module = module_of(p.work, column);
  if (module.index < 0 || entry >= tile.entries) return {};
  return PageCursor(p, module.index, read_entry(table, tile, entry)).load(module.column);
}

// The product's planes, in order, then bias. Rows whose `row` is negative give zeros and are not read.
template <bool kFloatPlanes, int H>
__device__ __forceinline__ void load_product(float (&sum)[H][kLaneColumns], const ProductView& p, const int (&row)[H], int column) {
#pragma unroll
  for (int h = 0; h < H; ++h)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* out = sum[h] + 4 * half;
      const int64_t at = static_cast<int64_t>(row[h]) * p.columns + column + lane_column(half);
      if (row[h] < 0) {
        out[0] = out[1] = out[2] = out[3] = 0.f;
      } else if constexpr (kFloatPlanes) {
        const float* y = static_cast<const float*>(p.y) + at;
        float4 total = __ldcg(reinterpret_cast<const float4*>(y));
#pragma unroll 4
        for (int s = 1; s < p.planes; ++s) {
          const float4 more = __ldcg(reinterpret_cast<const float4*>(y + s * p.plane_stride));
          total.x += more.x;
          total.y += more.y;
          total.z += more.z;
          total.w += more.w;
        }
        out[0] = total.x, out[1] = total.y, out[2] = total.z, out[3] = total.w;
      } else {
        const uint2 y = __ldcg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.y) + at));
        out[0] = low_half(y.x), out[1] = high_half(y.x), out[2] = low_half(y.y), out[3] = high_half(y.y);
      }
    }
}

template <int H>
__device__ __forceinline__ void add_bias(float (&sum)[H][kLaneColumns], const ProductView& p, int column) {
  if (p.bias == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint2 b = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.bias) + column + lane_column(half)));
#pragma unroll
    for (int h = 0; h < H; ++h) {
      sum[h][4 * half] += low_half(b.x);
      sum[h][4 * half + 1] += high_half(b.x);
      sum[h][4 * half + 2] += low_half(b.y);
      sum[h][4 * half + 3] += high_half(b.y);
    }
  }
}

// Finishes NB blocks of one module, 8 H rows of a tile from place `place` on: planes + bias + expand, in float32.
//
// `columns` are the blocks' first columns, `pages` the tile's first entry for them (fetched before the wait) and again afterwards.
// `row` is set to the rows, -1 where the span has none.
template <bool kLora, bool kFloatPlanes, int H, int NB>
__device__ __forceinline__ void finish(float (&sum)[NB][H][kLaneColumns], int (&row)[H], const ProductView& p, const RowParts<kLora>& parts,
                                       const RowSpan& span, int place, const int (&columns)[NB], PageBlock (&pages)[NB]) {
  const int g = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int h = 0; h < H; ++h) row[h] = place + g + 8 * h < span.last ? parts.row(span, place + g + 8 * h) : -1;
#pragma unroll
  for (int i = 0; i < NB; ++i) load_product<kFloatPlanes, H>(sum[i], p, row, columns[i]);
  if constexpr (kLora) {
    float delta[NB][H][kLaneColumns] = {};
    const int modules = p.work.span_count, module = module_of(p.work, columns[0]).index;
    const int64_t stride = static_cast<int64_t>(span.tile.entries) * modules * kPageRank;
    const float* v = p.work.v + (static_cast<int64_t>(span.tile.first_pair) * modules + module) * kPageRank + place * stride;
    const int entries = module < 0 ? 0 : span.tile.entries;
#pragma unroll 1
    for (int entry = 0; entry < entries; ++entry) {
      const RowRanks<H> ranks = load_row_ranks<H>(v + entry * modules * kPageRank, stride, span.last - place);
#pragma unroll
      for (int i = 0; i < NB; ++i) {
        expand<H>(delta[i], ranks, pages[i]);
        if (entries > 1) pages[i] = fetch_block(p, parts.table, span.tile, entry + 1 < entries ? entry + 1 : 0, columns[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < NB; ++i) add_bias<H>(sum[i], p, columns[i]);
#pragma unroll
    for (int i = 0; i < NB; ++i)
#pragma unroll
      for (int h = 0; h < H; ++h)
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) sum[i][h][c] += delta[i][h][c];
  } else {
#pragma unroll
    for (int i = 0; i < NB; ++i) add_bias<H>(sum[i], p, columns[i]);
  }
}

__device__ __forceinline__ void store_bf16x4(__nv_bfloat16* out, const float* x) {
  *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// ---- Eight neighbouring columns of one row a thread: where no tensor core is needed, or after it.

__device__ __forceinline__ void unpack_bf16x8(float (&x)[8], const uint4& raw) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = low_half(pairs[i]), x[2 * i + 1] = high_half(pairs[i]);
}

__device__ __forceinline__ uint4 pack_bf16x8(const float (&x)[8]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ void store_bf16x8(__nv_bfloat16* out, const float (&x)[8]) { *reinterpret_cast<uint4*>(out) = pack_bf16x8(x); }

// Planes in order, then bias.
template <bool kFloatPlanes>
__device__ __forceinline__ void load_eight(float (&y)[8], const ProductView& p, int64_t row, int column) {
  const int64_t at = row * p.columns + column;
  if constexpr (kFloatPlanes) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = static_cast<const float*>(p.y) + at + 4 * half;
      float4 sum = __ldcg(reinterpret_cast<const float4*>(from));
      for (int s = 1; s < p.planes; ++s) {
        const float4 more = __ldcg(reinterpret_cast<const float4*>(from + s * p.plane_stride));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      y[4 * half] = sum.x, y[4 * half + 1] = sum.y, y[4 * half + 2] = sum.z, y[4 * half + 3] = sum.w;
    }
  } else {
    unpack_bf16x8(y, __ldcg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.y) + at)));
  }
  if (p.bias == nullptr) return;
  float bias[8];
  unpack_bf16x8(bias, __ldg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.bias) + column)));
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] += bias[i];
}

// ---- Any shape and float32: one element at a time. For the correctness runs; nothing here is fast.

// y at place `place` of the span (one row of it), column `column`.
template <class T, bool kLora>
__device__ __forceinline__ float product_at(const ProductView& p, const RowParts<kLora>& parts, const RowSpan& span, int place, int column,
                                            bool has_float_planes) {
  const int row = parts.row(span, place);
  const int64_t at = static_cast<int64_t>(row) * p.columns + column;
  float sum = 0.f;
  if (has_float_planes) {
    for (int s = 0; s < p.planes; ++s) sum += __ldcg(static_cast<const float*>(p.y) + at + s * p.plane_stride);
  } else {
    sum = __bfloat162float(static_cast<const __nv_bfloat16*>(p.y)[at]);
  }
  if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[column]);
  if constexpr (kLora) {
    const ModuleBlock module = module_of(p.work, column);
    if (module.index < 0) return sum;
    const LoraSpan& lora = p.work.spans[module.index];
    float delta = 0.f;
    for (int entry = 0; entry < span.tile.entries; ++entry) {
      const Entry found = read_entry(parts.table, span.tile, entry);
      const int ranks = ranks_in_page(p.work, lora.module, found);
      const int64_t pair = span.tile.first_pair + static_cast<int64_t>(place) * span.tile.entries + entry;
      const float* v = p.work.v + (pair * p.work.span_count + module.index) * kPageRank;
      const T* b = static_cast<const T*>(p.work.pages) + found.page * p.work.page_elements + lora.b_offset + module.column;
      for (int rank = 0; rank < ranks; ++rank) delta += __ldcg(v + rank) * to_float(b[static_cast<int64_t>(rank) * lora.outputs]);
    }
    sum += delta;
  }
  return sum;
}

// Whether the tensor-core path can run: bf16, blocks of 32 columns that no module's border cuts, everything aligned.
inline bool fits_blocks(const Product& product) {
  bool fits = !product.is_float && product.columns % kBlock == 0 && reinterpret_cast<uintptr_t>(product.y) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(product.bias) % 8 == 0 && (product.y_is_float || product.planes == 1);
  if (product.lora == nullptr) return fits;
  const LoraWork& work = *product.lora;
  fits = fits && reinterpret_cast<uintptr_t>(work.pages) % 8 == 0 && work.page_elements % 4 == 0 && reinterpret_cast<uintptr_t>(work.v) % 8 == 0;
  for (int m = 0; m < work.span_count; ++m)
    fits = fits && work.spans[m].b_offset % 4 == 0 && work.spans[m].outputs % kBlock == 0 && work.spans[m].column % kBlock == 0;
  return fits;
}

// Rows a warp takes at a time: few where rows are few, so that every processor has work; many where B can be used again.
inline int unit_rows_for(int rows) { return rows <= 64 ? 8 : (rows <= 256 ? 16 : 64); }

inline bool is_valid(const Product& product) {
  const LoraWork* work = product.lora;
  return product.rows >= 0 && product.columns > 0 && product.planes >= 1 && (product.y_is_float || product.planes == 1) &&
         (work == nullptr || (work->span_count >= 1 && work->span_count <= kMaxLoraSpans && work->tile_rows >= 1));
}

// Calls `go` with the template arguments (is there LoRA, are the planes float32) as std::bool_constant.
template <class Go>
cudaError_t with_product_types(const Product& product, Go go) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (product.lora != nullptr) return product.y_is_float ? go(Yes{}, Yes{}) : go(Yes{}, No{});
  return product.y_is_float ? go(No{}, Yes{}) : go(No{}, No{});
}

}  // namespace openlora
