// LoRA shrink. See lora_shrink.h. On Hopper lora_stream_sm90.cu has most shapes.
//
// A block takes one item (the up to 16 rows of a tile, page) at a time, all G modules of the group. The 16 ranks
// of a page are the M side of mma.m16n8k16, the rows of the tile the n side, so one row wastes 7/8 of an instruction and not
// 15/16. k is cut into 8 slices, one a warp; the cut depends on K alone. A goes from memory straight into registers in fragment
// order: lane (g, t) takes 8 neighbouring k of ranks g and g + 8, and x is taken with the same permutation of k, which a dot
// product does not notice.
//
// Sums: the warp's slice, then warp w + warp w + 4, then warps 0 to 3 in order through shared memory (at most 13.8 KB). No atomics,
// nothing to clear, and a row's bits do not depend on its tile. Bytes: items * G * 16 * K * 2 of A from memory, x from the cache.
#include "device.cuh"
#include "launch.cuh"
#include "lora_shrink.h"
#include "lora_stream.h"

namespace openlora {
namespace {

constexpr int kWarps = 8;       // of a block
constexpr int kStep = 32;       // k of one lane load: 4 lanes of 8
constexpr int kTiles = 2;       // n tiles of 8 rows a warp multiplies at a time
constexpr int kRowFloats = 18;  // 16 ranks and a pad: the fragment's stores meet no bank more than twice

struct Params {
  const void* x;
  int64_t x_stride;
  int inputs;
  bool waits_last;
  LoraWork work;
};

struct Item {
  int place;
  int rows;
  int entries;
  int first_pair;
  int index;  // of the entry in its tile
  Entry entry;

  // Pair of the tile's row `r`.
  __device__ __forceinline__ int64_t pair(int r) const { return first_pair + static_cast<int64_t>(r) * entries + index; }
};

__device__ __forceinline__ Item read_item(const TileTable& table, int index) {
  const int4 raw = __ldg(table.items + 2 * index), entry = __ldg(table.items + 2 * index + 1);
  return {raw.x, raw.y & 0xffff, raw.y >> 16, raw.z, raw.w, as_entry(entry)};
}

// A of one step of 32 k: ranks g and g + 8 of every module.
template <int G>
struct PageStep {
  uint4 rank[G][2];
};

// Where a lane finds A of an item: the page, and how many ranks of each module it holds.
template <int G>
struct PageView {
  const __nv_bfloat16* a[G];  // of rank g, this lane's k
  int count[G];

  __device__ __forceinline__ PageView(const Params& p, const Entry& entry) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const auto* page = static_cast<const __nv_bfloat16*>(p.work.pages) + entry.page * p.work.page_elements;
#pragma unroll
    for (int m = 0; m < G; ++m) {
      a[m] = page + p.work.spans[m].a_offset + static_cast<int64_t>(g) * p.inputs + t * 8;
      count[m] = ranks_left(p.work, p.work.spans[m].module, entry) - g;  // what is left from rank g on
    }
  }
  __device__ __forceinline__ void load(PageStep<G>& out, int inputs, int step) const {
#pragma unroll
    for (int m = 0; m < G; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* from = reinterpret_cast<const uint4*>(a[m] + static_cast<int64_t>(8 * half) * inputs + step * kStep);
        out.rank[m][half] = 8 * half < count[m] ? load_stream(from) : make_uint4(0, 0, 0, 0);
      }
  }
};

// x of one step, for the rows g and g + 8 of a group of 16.
struct RowStep {
  uint4 row[kTiles];
};

struct RowView {
  const __nv_bfloat16* x[kTiles];  // this lane's k; null where there is no row

  __device__ __forceinline__ RowView(const Params& p, const TileTable& table, const Item& item) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int r = n * 8 + g;
      x[n] = r < item.rows ? static_cast<const __nv_bfloat16*>(p.x) + __ldg(table.rows + item.place + r) * p.x_stride + t * 8 : nullptr;
    }
  }
  __device__ __forceinline__ void load(RowStep& out, int step) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      out.row[n] = x[n] == nullptr ? make_uint4(0, 0, 0, 0) : __ldcg(reinterpret_cast<const uint4*>(x[n] + step * kStep));
  }
};

template <int G>
__device__ __forceinline__ void multiply(float (&acc)[G][kTiles][4], const PageStep<G>& page, const RowStep& rows, int count) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n * 8 >= count) break;
    const uint4& b = rows.row[n];
#pragma unroll
    for (int m = 0; m < G; ++m) {
      const uint4 &low = page.rank[m][0], &high = page.rank[m][1];
      mma_bf16(acc[m][n], low.x, high.x, low.y, high.y, b.x, b.y);
      mma_bf16(acc[m][n], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }
}

// acc += A x^T over the steps [first, last), U of them in flight. `pages` holds the first U already.
template <int G, int U>
__device__ __forceinline__ void multiply_slice(float (&acc)[G][kTiles][4], PageStep<G> (&pages)[U], const PageView<G>& view, const RowView& rows,
                                               int row_count, int inputs, int first, int last) {
  RowStep x[U];
#pragma unroll
  for (int u = 0; u < U; ++u)
    if (first + u < last) rows.load(x[u], first + u);
#pragma unroll 1
  for (int step = first; step < last; step += U)
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (step + u >= last) break;
      multiply<G>(acc, pages[u], x[u], row_count);
      if (step + u + U < last) {
        view.load(pages[u], inputs, step + u + U);
        rows.load(x[u], step + u + U);
      }
    }
}

__device__ __forceinline__ void store_value(const Params& p, const Item& item, int modules, int m, int r, int rank, float sum) {
  const LoraSpan& span = p.work.spans[m];
  const float scale = __ldg(p.work.scales + static_cast<int64_t>(span.module) * p.work.slots + item.entry.slot);
  const bool wanted = rank < ranks_left(p.work, span.module, item.entry);
  p.work.v[(item.pair(r) * modules + m) * kPageRank + rank] = wanted ? sum * (scale * item.entry.weight) : 0.f;
}

// Adds the fragments of this warp to `slots[warp % 4]`: first warps 4 to 7 store, then 0 to 3 add their own.
template <int G>
__device__ __forceinline__ void gather_warps(const float (&acc)[G][kTiles][4], float* slots, int rows) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  float* slot = slots + (warp % 4) * G * kTiles * 8 * kRowFloats;
  for (int phase = 0; phase < 2; ++phase) {
    if ((warp >= 4) == (phase == 0)) {
#pragma unroll
      for (int m = 0; m < G; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (n * 8 >= rows) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* place = slot + (m * kTiles * 8 + n * 8 + 2 * t + i % 2) * kRowFloats + g + 8 * (i / 2);
            *place = phase == 0 ? acc[m][n][i] : acc[m][n][i] + *place;
          }
        }
    }
    __syncthreads();
  }
}

template <int G, int U>
__global__ void __launch_bounds__(kWarps* kWarp, 2) shrink_kernel(const __grid_constant__ Params p) {
  __shared__ float slots[4 * G * kTiles * 8 * kRowFloats];
  if (p.waits_last) start_dependents();
  const int steps = p.inputs / kStep, slice = (steps + kWarps - 1) / kWarps;
  const int first = warp_index() * slice, last = min(first + slice, steps);
  const TileTable table = read_tile_table(p.work.tiles);
  const int stride = gridDim.x, count = table.item_count;
  int index = blockIdx.x;
  Item item{};
  PageStep<G> pages[U];
  auto fetch = [&](int i) {
    item = read_item(table, i);
    const PageView<G> view(p, item.entry);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (first + u < last) view.load(pages[u], p.inputs, first + u);
  };
  if (index < count) fetch(index);
  if (!p.waits_last) {
    wait_for_previous();
    start_dependents();
  }
  for (; index < count; index += stride) {
    const Item now = item;
    float acc[G][kTiles][4] = {};
    multiply_slice<G, U>(acc, pages, PageView<G>(p, now.entry), RowView(p, table, now), now.rows, p.inputs, first, last);
    if (index + stride < count) fetch(index + stride);  // its pages arrive while this item is summed
    gather_warps<G>(acc, slots, now.rows);
    const int values = now.rows * kPageRank;  // of one module
    for (int i = threadIdx.x; i < G * values; i += blockDim.x) {
      const int m = i / values, r = i % values / kPageRank;
      const float* place = slots + (m * kTiles * 8 + r) * kRowFloats + i % kPageRank;
      float sum = place[0];
#pragma unroll
      for (int w = 1; w < 4; ++w) sum += place[w * G * kTiles * 8 * kRowFloats];
      store_value(p, now, G, m, r, i % kPageRank, sum);
    }
    __syncthreads();  // the sums have been read
  }
  if (p.waits_last && blockIdx.x == 0) wait_for_previous();
}

// Any K, float32 or bfloat16: a block takes an item, a warp one (row, module, rank) at a time. For the correctness runs.
template <class T>
__global__ void __launch_bounds__(256) shrink_any_kernel(const __grid_constant__ Params p) {
  wait_for_previous();
  if (p.waits_last) start_dependents();
  const TileTable table = read_tile_table(p.work.tiles);
  const int warp = warp_index(), lane = threadIdx.x % kWarp, modules = p.work.span_count;
  for (int index = blockIdx.x; index < table.item_count; index += gridDim.x) {
    const Item item = read_item(table, index);
    const T* page = static_cast<const T*>(p.work.pages) + item.entry.page * p.work.page_elements;
    for (int i = warp; i < item.rows * modules * kPageRank; i += kWarps) {
      const int r = i / (modules * kPageRank), m = i / kPageRank % modules, rank = i % kPageRank;
      const LoraSpan& span = p.work.spans[m];
      float sum = 0.f;
      if (rank < ranks_left(p.work, span.module, item.entry)) {
        const T* x = static_cast<const T*>(p.x) + __ldg(table.rows + item.place + r) * p.x_stride;
        const T* a = page + span.a_offset + static_cast<int64_t>(rank) * p.inputs;
        for (int k = lane; k < p.inputs; k += kWarp) sum += to_float(x[k]) * to_float(a[k]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (lane == 0) store_value(p, item, modules, m, r, rank, sum);
    }
  }
}

template <int G, int U>
cudaError_t launch_modules(const LoraShrinkArgs& args, const Params& p, cudaStream_t stream) {
  return launch(shrink_kernel<G, U>, {processor_count() * 2, kWarps * kWarp}, args.follow, stream, p);
}

bool fits_tensor_cores(const LoraShrinkArgs& args) {
  bool fits = !args.is_float && args.inputs % kStep == 0 && args.x_stride % 8 == 0 && args.work.page_elements % 8 == 0;
  for (int m = 0; m < args.work.span_count; ++m) fits = fits && args.work.spans[m].a_offset % 8 == 0;
  return fits && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && reinterpret_cast<uintptr_t>(args.work.pages) % 16 == 0;
}

}  // namespace

int lora_shrink_planes(int64_t inputs) { return std::max(1, lora_stream_planes(inputs)); }

cudaError_t launch_lora_shrink(const LoraShrinkArgs& args, cudaStream_t stream) {
  if (args.work.span_count < 1 || args.work.span_count > kMaxLoraSpans || args.work.tile_rows < 1 || args.work.tile_rows > kMostTileRows)
    return cudaErrorInvalidValue;
  const Params p{args.x, args.x_stride, args.inputs, args.follow == Follow::kWaitLast, args.work};
  if (!fits_tensor_cores(args)) {
    if (args.work.v_planes != 1) return cudaErrorInvalidValue;
    const Shape shape{processor_count() * 4, 256};
    const Follow follow = args.follow == Follow::kWaitLast ? Follow::kWaitFirst : args.follow;
    if (args.is_float) return launch(shrink_any_kernel<float>, shape, follow, stream, p);
    return launch(shrink_any_kernel<__nv_bfloat16>, shape, follow, stream, p);
  }
  if (is_hopper() && can_stream_lora(args)) return launch_lora_stream(args, stream);
  if (args.work.v_planes != 1) return cudaErrorInvalidValue;
  switch (args.work.span_count) {
    case 1: return launch_modules<1, 4>(args, p, stream);
    case 2: return launch_modules<2, 3>(args, p, stream);
    default: return launch_modules<3, 2>(args, p, stream);
  }
}

}  // namespace openlora
