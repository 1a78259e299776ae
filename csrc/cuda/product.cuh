// The product on its way into an operation: planes + bias + expand of the row's adapters, in float32, in registers.
//
// A lane holds two quads: twice four neighbouring columns of up to R rows, the two that the operation needs together (gate and up,
// the halves of a head). Neighbouring lanes hold neighbouring quads, so a warp reads 512 bytes of float32 or 256 of bf16 at a time.
//
// The expand is plain float32 multiply-adds: a lane has B of its 8 columns and 16 ranks of a page in 64 registers, sent for before
// the previous kernel has ended (8 KB a warp), and uses it for every row of the unit. On tensor cores, where one row costs what
// sixteen cost and only every eighth lane then has columns to finish, the same took more than twice as long with 64 adapters,
// and had to fetch v and split it in two for its precision. At D = 1, 256 rows, the multiply-adds of gate_up take 4 us.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "fused.h"

namespace openlora {

constexpr int kQuad = 4;
constexpr int kQuads = 2;  // a lane's

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
// idle for long. Parts of one row are the rows themselves.
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
  __device__ __forceinline__ int count() const {
    if (kLora && unit_rows == 1) return table.row_count;
    return tile_count() * tile_parts();
  }
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
    if constexpr (kLora) {
      if (unit_rows > 1) return at(i % table.tile_count, i / table.tile_count);
      const Tile tile = read_tile(table, __ldg(table.tile_of + i));
      return {tile, i - tile.place, i - tile.place + 1};
    } else {
      return at(0, i);
    }
  }
  // Row of y at place `place` of the span's tile.
  __device__ __forceinline__ int row(const RowSpan& span, int place) const {
    if constexpr (kLora) return __ldg(table.rows + span.tile.place + place);
    else return place;
  }
};

// Where a column finds its module in the pages.
struct ModuleColumn {
  int index;   // of the linear's modules; -1: none covers the column
  int column;  // inside the module
};

template <int G = kMaxLoraSpans>
__device__ __forceinline__ ModuleColumn module_of(const LoraWork& work, int column) {
  ModuleColumn found{-1, 0};
#pragma unroll
  for (int m = 0; m < G; ++m)
    if (m < work.span_count && column >= work.spans[m].column && column < work.spans[m].column + work.spans[m].outputs)
      found = {m, column - work.spans[m].column};
  return found;
}

__device__ __forceinline__ Entry read_entry(const TileTable& table, const Tile& tile, int entry) {
  return entry == 0 ? tile.entry : as_entry(__ldg(table.entries + tile.first_entry + entry));
}

struct NoFacts {};

// A lane's columns of the product; a lane without columns has -1.
struct LaneColumns {
  int column[kQuads];
};

// B of one entry's page at a lane's quads.
template <int G>
struct QuadPages {
  uint2 rank[kQuads][kPageRank];
  int place[kQuads];   // of the module among the linear's G
  int count[kQuads];   // ranks from this page on; 0 or less: nothing to add

  __device__ __forceinline__ void fetch(const ProductView& p, const Entry& entry, const LaneColumns& lane) {
    const auto* page = static_cast<const __nv_bfloat16*>(p.work.pages) + entry.page * p.work.page_elements;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const ModuleColumn found = module_of<G>(p.work, lane.column[q]);
      place[q] = found.index;
      count[q] = 0;
      if (found.index < 0) continue;
      const LoraSpan& span = p.work.spans[found.index];
      count[q] = ranks_left(p.work, span.module, entry);
      const auto* b = reinterpret_cast<const char*>(page + span.b_offset + found.column);
      const uint32_t step = static_cast<uint32_t>(span.outputs) * 2;  // bytes; 16 of them stay below 4 GB
      if (count[q] >= kPageRank) {
#pragma unroll
        for (uint32_t r = 0; r < kPageRank; ++r) rank[q][r] = __ldg(reinterpret_cast<const uint2*>(b + r * step));
      } else {
#pragma unroll
        for (uint32_t r = 0; r < kPageRank; ++r)
          rank[q][r] = static_cast<int>(r) < count[q] ? __ldg(reinterpret_cast<const uint2*>(b + r * step)) : make_uint2(0, 0);
      }
    }
  }
};

// v of R rows and one entry, all modules, for a warp: [R][G][16] in shared memory. Its planes are sent for together with those of
// the rows and added up when these have arrived.
template <int G, int R>
struct WarpRanks {
  static constexpr int kRow = G * kPageRank / 4;  // float4 of a row
  float4 v[R][G][kPageRank / 4];
  float4 planes[kMaxRankPlanes][R * kRow];

  __device__ __forceinline__ void load(const ProductView& p, const Tile& tile, int place, int rows, int entry) {
    const float* from = p.work.v + (tile.first_pair + static_cast<int64_t>(place) * tile.entries + entry) * kRow * 4;
    for (int i = threadIdx.x % kWarp; i < rows * kRow; i += kWarp) {
      const float* at = from + static_cast<int64_t>(i / kRow) * tile.entries * kRow * 4 + i % kRow * 4;
      for (int c = 0; c < p.work.v_planes; ++c) copy_async(&planes[c][i], at + c * p.work.v_stride);
    }
  }
  __device__ __forceinline__ void finish(int rows, int count) {
    wait_for_copies();
    __syncwarp();  // the entry before has been read
    for (int i = threadIdx.x % kWarp; i < rows * kRow; i += kWarp) {  // by the lane that sent for it
      float4 sum = planes[0][i];
      for (int c = 1; c < count; ++c) {
        const float4& more = planes[c][i];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      (&v[0][0][0])[i] = sum;
    }
    __syncwarp();
  }
};

// sum[q][r] += v B for the first `rows` rows.
template <int G, int R, int kRows>
__device__ __forceinline__ void expand(float (&sum)[kQuads][R][kQuad], const WarpRanks<G, R>& ranks, const QuadPages<G>& pages) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (pages.count[q] <= 0) continue;
    const int m = G == 1 ? 0 : pages.place[q];
#pragma unroll
    for (int four = 0; four < kPageRank / 4; ++four) {
      float4 v[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) v[r] = ranks.v[r][m][four];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 raw = pages.rank[q][four * 4 + i];
        const float b[kQuad] = {low_half(raw.x), high_half(raw.x), low_half(raw.y), high_half(raw.y)};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float scale = i == 0 ? v[r].x : (i == 1 ? v[r].y : (i == 2 ? v[r].z : v[r].w));
#pragma unroll
          for (int c = 0; c < kQuad; ++c) sum[q][r][c] = fmaf(scale, b[c], sum[q][r][c]);
        }
      }
    }
  }
}

// Four columns of one row of float32 planes: these in order, then bias.
__device__ __forceinline__ void load_quad(float (&y)[kQuad], const ProductView& p, int64_t row, int column) {
  const float* from = static_cast<const float*>(p.y) + row * p.columns + column;
  float4 sum = __ldcg(reinterpret_cast<const float4*>(from));
  for (int first = 1; first < p.planes; first += 3) {  // three loads in flight, not one after another
    float4 more[3];
#pragma unroll
    for (int s = 0; s < 3; ++s)
      if (first + s < p.planes) more[s] = __ldcg(reinterpret_cast<const float4*>(from + (first + s) * p.plane_stride));
#pragma unroll
    for (int s = 0; s < 3; ++s)
      if (first + s < p.planes) sum.x += more[s].x, sum.y += more[s].y, sum.z += more[s].z, sum.w += more[s].w;
  }
  y[0] = sum.x, y[1] = sum.y, y[2] = sum.z, y[3] = sum.w;
  if (p.bias == nullptr) return;
  const uint2 raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.bias) + column));
  y[0] += low_half(raw.x), y[1] += high_half(raw.x), y[2] += low_half(raw.y), y[3] += high_half(raw.y);
}

// y += rows of bf16 planes, then bias; y begins at -0. All loads of kTogether planes are on their way together.
template <int R, int kTogether>
__device__ __forceinline__ void load_half_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const int (&row)[R], const int (&column)[kQuads]) {
  const auto* from = static_cast<const __nv_bfloat16*>(p.y);
  uint2 raw[kTogether][R][kQuads];
#pragma unroll 1
  for (int first = 0; first < p.planes; first += kTogether) {
#pragma unroll
    for (int s = 0; s < kTogether; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          raw[s][r][q] = make_uint2(0x80008000u, 0x80008000u);  // -0, which adds nothing to -0 or anything else
          if (first + s < p.planes && row[r] >= 0 && column[q] >= 0)
            raw[s][r][q] = __ldcg(reinterpret_cast<const uint2*>(from + (first + s) * p.plane_stride + static_cast<int64_t>(row[r]) * p.columns + column[q]));
        }
#pragma unroll
    for (int s = 0; s < kTogether; ++s)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const uint2 x = raw[s][r][q];
          y[q][r][0] += low_half(x.x), y[q][r][1] += high_half(x.x), y[q][r][2] += low_half(x.y), y[q][r][3] += high_half(x.y);
        }
  }
  if (p.bias == nullptr) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (column[q] < 0) continue;
    const uint2 x = __ldg(reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(p.bias) + column[q]));
#pragma unroll
    for (int r = 0; r < R; ++r) y[q][r][0] += low_half(x.x), y[q][r][1] += high_half(x.x), y[q][r][2] += low_half(x.y), y[q][r][3] += high_half(x.y);
  }
}

template <bool kFloatPlanes, int R>
__device__ __forceinline__ void load_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const int (&row)[R], const LaneColumns& lane) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if constexpr (kFloatPlanes) {
        if (row[r] >= 0 && lane.column[q] >= 0) load_quad(y[q][r], p, row[r], lane.column[q]);
      } else {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) y[q][r][i] = -0.f;
      }
    }
  if constexpr (!kFloatPlanes) load_half_rows<R, R == 1 ? 4 : R == 2 ? 2 : 1>(y, p, row, lane.column);
}

// y += expand of the rows at places [place, place + rows) of a tile, every entry in order. `pages` holds the tile's first entry and
// does so again afterwards; v of that entry is on its way.
template <int G, int R>
__device__ __forceinline__ void expand_rows(float (&y)[kQuads][R][kQuad], const ProductView& p, const TileTable& table, const Tile& tile,
                                            QuadPages<G>& pages, WarpRanks<G, R>& ranks, const LaneColumns& lane, int place, int rows) {
#pragma unroll 1
  for (int entry = 0; entry < tile.entries; ++entry) {
    if (entry > 0) ranks.load(p, tile, place, rows, entry);
    ranks.finish(rows, p.work.v_planes);
    if (R == 1 || rows == 1) expand<G, R, 1>(y, ranks, pages);
    else expand<G, R, R>(y, ranks, pages);
    if (tile.entries > 1) pages.fetch(p, read_entry(table, tile, entry + 1 < tile.entries ? entry + 1 : 0), lane);
  }
}

__device__ __forceinline__ void store_quad(__nv_bfloat16* out, const float (&x)[kQuad]) {
  *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// Warps take units in turn: a part of a tile (unit_rows rows) and 32 lanes' quads of `lanes` in all. For every R rows of it,
// finish(lane number, columns, row, facts, y) gets y finished; rows that are not there are -1.
// `columns(i)`: the columns of lane number i. `facts(row, i)`: what else the operation reads of a row; it must have been written
// before the kernel before this one began, because it is read before the wait.
constexpr int kUnitWarps = 4;

template <bool kLora, bool kFloatPlanes, int G, int R, class Columns, class Facts, class Finish>
__device__ __forceinline__ void finish_units(const ProductView& p, int lanes, Columns columns, Facts facts, Finish finish) {
  __shared__ WarpRanks<G, R> shared_ranks[kLora ? kUnitWarps : 1];
  const RowParts<kLora> parts(p);
  const int warp = warp_index(), per_part = (lanes + kWarp - 1) / kWarp, units = parts.count() * per_part, stride = gridDim.x * kUnitWarps;
  WarpRanks<G, R>& ranks = shared_ranks[kLora ? warp : 0];
  RowSpan span{};
  LaneColumns lane{};
  int number = 0;
  QuadPages<G> pages;
  int row[R];
  decltype(facts(0, 0)) known[R];
  auto locate = [&](int place) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      row[r] = place + r < span.last ? parts.row(span, place + r) : -1;
      if (row[r] >= 0) known[r] = facts(row[r], number);
    }
  };
  auto start = [&](int unit) {
    number = unit % per_part * kWarp + static_cast<int>(threadIdx.x) % kWarp;
    lane = number < lanes ? columns(number) : LaneColumns{{-1, -1}};
    span = parts[unit / per_part];
    if constexpr (kLora)
      if (span.first < span.last && span.tile.entries > 0) pages.fetch(p, span.tile.entry, lane);
    locate(span.first);
  };
  bool has_waited = false;
  for (int unit = blockIdx.x * kUnitWarps + warp; unit < units; unit += stride) {
    start(unit);
    if (!has_waited) {  // here and not before the loop, so that there is one copy of the loads
      has_waited = true;
      start_dependents();
      wait_for_previous();
    }
#pragma unroll 1
    for (int place = span.first; place < span.last; place += R) {
      if (place > span.first) locate(place);
      float y[kQuads][R][kQuad];
      const int rows = min(R, span.last - place);
      if constexpr (kLora)
        if (span.tile.entries > 0) ranks.load(p, span.tile, place, rows, 0);
      load_rows<kFloatPlanes, R>(y, p, row, lane);
      if constexpr (kLora) expand_rows<G, R>(y, p, parts.table, span.tile, pages, ranks, lane, place, rows);
      finish(number, lane, row, known, y);
    }
  }
  if (!has_waited) wait_for_previous();  // whoever waits for this kernel waits for those before it
}

// Rows of a unit: few where rows are few, so that every processor has work; many where B can be used again. `lanes`: of a row.
inline int unit_rows_for(int rows, int lanes) {
  const int64_t warps = static_cast<int64_t>(rows) * lanes / kWarp;  // if each took one row
  return warps <= 4096 ? 2 : (warps <= 8192 ? 4 : (warps <= 32768 ? 8 : (warps <= 65536 ? 16 : 64)));
}

// Blocks of a launch of finish_units.
inline int unit_blocks(const Product& product, int unit_rows, int lanes, int most) {
  const int64_t parts = product.lora != nullptr ? product.rows : (product.rows + unit_rows - 1) / unit_rows;
  const int64_t units = parts * ((lanes + kWarp - 1) / kWarp);
  return static_cast<int>(std::min<int64_t>((units + kUnitWarps - 1) / kUnitWarps, most));
}

// ---- Any shape and float32: one element at a time. For the correctness runs; nothing here is fast.

// y at place `place` of the span (one row of it), column `column`.
template <class T, bool kLora>
__device__ __forceinline__ float product_at(const ProductView& p, const RowParts<kLora>& parts, const RowSpan& span, int place, int column,
                                            bool has_float_planes) {
  const int row = parts.row(span, place);
  const int64_t at = static_cast<int64_t>(row) * p.columns + column;
  float sum = 0.f;
  for (int s = 0; s < p.planes; ++s) {
    const int64_t plane = at + s * p.plane_stride;
    sum += has_float_planes ? __ldcg(static_cast<const float*>(p.y) + plane) : __bfloat162float(static_cast<const __nv_bfloat16*>(p.y)[plane]);
  }
  if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[column]);
  if constexpr (kLora) {
    const ModuleColumn module = module_of(p.work, column);
    if (module.index < 0) return sum;
    const LoraSpan& lora = p.work.spans[module.index];
    float delta = 0.f;
    for (int entry = 0; entry < span.tile.entries; ++entry) {
      const Entry found = read_entry(parts.table, span.tile, entry);
      const int ranks = ranks_left(p.work, lora.module, found);
      const int64_t pair = span.tile.first_pair + static_cast<int64_t>(place) * span.tile.entries + entry;
      const float* v = p.work.v + (pair * p.work.span_count + module.index) * kPageRank;
      const T* b = static_cast<const T*>(p.work.pages) + found.page * p.work.page_elements + lora.b_offset + module.column;
      for (int rank = 0; rank < kPageRank && rank < ranks; ++rank) {
        float of_rank = __ldcg(v + rank);
        for (int c = 1; c < p.work.v_planes; ++c) of_rank += __ldcg(v + c * p.work.v_stride + rank);
        delta += of_rank * to_float(b[static_cast<int64_t>(rank) * lora.outputs]);
      }
    }
    sum += delta;
  }
  return sum;
}

// Whether the fast path can run: bf16, quads that no module's border cuts, everything aligned.
inline bool fits_quads(const Product& product) {
  bool fits = !product.is_float && product.columns % kQuad == 0 && reinterpret_cast<uintptr_t>(product.y) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(product.bias) % 8 == 0;
  if (product.lora == nullptr) return fits;
  const LoraWork& work = *product.lora;
  fits = fits && reinterpret_cast<uintptr_t>(work.pages) % 8 == 0 && work.page_elements % kQuad == 0 && reinterpret_cast<uintptr_t>(work.v) % 16 == 0;
  for (int m = 0; m < work.span_count; ++m)
    fits = fits && work.spans[m].b_offset % kQuad == 0 && work.spans[m].outputs % kQuad == 0 && work.spans[m].column % kQuad == 0;
  return fits;
}

inline bool is_valid(const Product& product) {
  const LoraWork* work = product.lora;
  return product.rows >= 0 && product.columns > 0 && product.planes >= 1 && (product.y_is_float || !product.is_float) &&
         (work == nullptr || (work->span_count >= 1 && work->span_count <= kMaxLoraSpans && work->tile_rows >= 1));
}

// Calls `go` with the template arguments as types: is there LoRA, are the planes float32, and the modules of the linear.
template <class Go>
cudaError_t with_product_types(const Product& product, Go go) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (product.lora == nullptr) return product.y_is_float ? go(No{}, Yes{}, std::integral_constant<int, 1>{}) : go(No{}, No{}, std::integral_constant<int, 1>{});
  auto with_modules = [&](auto modules) { return product.y_is_float ? go(Yes{}, Yes{}, modules) : go(Yes{}, No{}, modules); };
  switch (product.lora->span_count) {
    case 1: return with_modules(std::integral_constant<int, 1>{});
    case 2: return with_modules(std::integral_constant<int, 2>{});
    default: return with_modules(std::integral_constant<int, 3>{});
  }
}

}  // namespace openlora
