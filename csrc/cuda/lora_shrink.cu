// LoRA shrink. See lora_shrink.h.
//
// bfloat16: a cluster of CL blocks takes one item (tile, page) at a time, all G modules of the group. The 16 ranks of a page are
// the M side of mma.m16n8k16, the rows of the tile the n side, so one row wastes 7/8 of an instruction and not 15/16. k is cut
// into CL * 8 slices, one a warp; the cut depends on K alone. A goes from memory straight into registers in fragment order: lane
// (g, t) takes 8 neighbouring k of ranks g and g + 8, and x is taken with the same permutation of k, which a dot product does
// not notice. No shared memory is needed for A, so up to U * G * 1 KB a warp are in flight.
//
// Sums: the warp's slice, then warp w + warp w + 4, then warps 0 to 3 in order, then blocks 0 to CL - 1 in order through
// distributed shared memory. No atomics, nothing to clear, and a row's bits do not depend on its tile.
//
// Shared memory: G * rows * 20 * 4 * 4 bytes for the warps, G * rows * 16 * 4 * 2 for the cluster: 21.5 KB at G = 3, 16 rows.
// Bytes: items * G * 16 * K * 2 of A from memory, x from L2. Bound by memory: qkv at D = 64, K = 4096: 25 MB, 8.1 us at 3.1 TB/s.
#include "device.cuh"
#include "launch.cuh"
#include "lora_shrink.h"

namespace openlora {
namespace {

constexpr int kWarps = 8;
constexpr int kStep = 32;      // k of one lane load: 4 lanes of 8
constexpr int kRowFloats = 20;  // 16 ranks and a pad: the fragment's stores meet no bank twice

struct Params {
  const void* x;
  int64_t x_stride;
  int inputs;
  bool waits_last;
  LoraWork work;
};

struct Item {
  Tile tile;
  int entry;  // of the tile
  int page;
  int slot;
  int ordinal;
  float weight;
};

__device__ __forceinline__ Item read_item(const TileTable& table, int index) {
  const int2 item = __ldg(table.items + index);
  const Tile tile = read_tile(table, item.x);
  const int4 entry = __ldg(table.entries + tile.first_entry + item.y);
  return {tile, item.y, entry.x, entry.y, entry.z, __int_as_float(entry.w)};
}

template <int G, int U>
struct Pages {
  uint4 a[U][G][2];  // ranks g and g + 8
};

template <int G, int U>
__device__ __forceinline__ void load_pages(Pages<G, U>& out, const Params& p, const Item& item, const int (&count)[G], int step, int last) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const auto* page = static_cast<const __nv_bfloat16*>(p.work.pages) + item.page * p.work.page_elements;
#pragma unroll
  for (int m = 0; m < G; ++m) {
    const __nv_bfloat16* a = page + p.work.spans[m].a_offset + static_cast<int64_t>(g) * p.inputs + t * 8;
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool wanted = step + u < last && g + 8 * half < count[m];
        out.a[u][m][half] = wanted ? load_stream(reinterpret_cast<const uint4*>(a + static_cast<int64_t>(8 * half) * p.inputs + (step + u) * kStep))
                                   : make_uint4(0, 0, 0, 0);
      }
  }
}

template <int G, int NT, int U>
__device__ __forceinline__ void multiply(float (&acc)[G][NT][4], const Pages<G, U>& pages, const __nv_bfloat16* const (&x)[NT], int rows, int step, int last) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (step + u >= last) break;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if (n * 8 >= rows) break;
      const uint4 b = x[n] == nullptr ? make_uint4(0, 0, 0, 0) : __ldcg(reinterpret_cast<const uint4*>(x[n] + (step + u) * kStep));
#pragma unroll
      for (int m = 0; m < G; ++m) {
        const uint4 &lo = pages.a[u][m][0], &hi = pages.a[u][m][1];
        mma_bf16(acc[m][n], lo.x, hi.x, lo.y, hi.y, b.x, b.y);
        mma_bf16(acc[m][n], lo.z, hi.z, lo.w, hi.w, b.z, b.w);
      }
    }
  }
}

// Adds the fragments of this warp to `slots[warp % 4]`: first warps 4 to 7 store, then 0 to 3 add their own.
template <int G, int NT>
__device__ __forceinline__ void gather_warps(const float (&acc)[G][NT][4], float* slots, int rows) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  float* slot = slots + (warp % 4) * G * NT * 8 * kRowFloats;
  for (int phase = 0; phase < 2; ++phase) {
    if ((warp >= 4) == (phase == 0)) {
#pragma unroll
      for (int m = 0; m < G; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (n * 8 >= rows) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* place = slot + (m * NT * 8 + n * 8 + 2 * t + i % 2) * kRowFloats + g + 8 * (i / 2);
            *place = phase == 0 ? acc[m][n][i] : acc[m][n][i] + *place;
          }
        }
    }
    __syncthreads();
  }
}

template <int G, int NT, int CL, int U>
__global__ void __launch_bounds__(kWarps* kWarp, NT > 2 ? 1 : 2) shrink_kernel(const Params p) {
  extern __shared__ float shared[];
  float* slots = shared;                                  // [4][G][NT * 8][20]
  float* sums = shared + 4 * G * NT * 8 * kRowFloats;     // [2][G][NT * 8][16]
  start_dependents();
  const int rank = CL > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int steps = p.inputs / kStep, slice = (steps + CL * kWarps - 1) / (CL * kWarps);
  const int first = (rank * kWarps + warp) * slice, last = min(first + slice, steps);
  const TileTable table = read_tile_table(p.work.tiles);
  const int stride = gridDim.x / CL;
  int index = blockIdx.x / CL;
  Item item;
  int count[G];
  Pages<G, U> pages;
  auto fetch = [&](int i) {
    item = read_item(table, i);
#pragma unroll
    for (int m = 0; m < G; ++m) count[m] = ranks_in_page(p.work, p.work.spans[m].module, item.slot, item.ordinal);
    load_pages<G, U>(pages, p, item, count, first, last);
  };
  if (index < table.item_count) fetch(index);
  if (!p.waits_last) wait_for_previous();
  for (int parity = 0; index < table.item_count; index += stride, parity ^= 1) {
    const Item now = item;
    const __nv_bfloat16* x[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int r = n * 8 + g;
      x[n] = r < now.tile.rows ? static_cast<const __nv_bfloat16*>(p.x) + __ldg(table.rows + now.tile.place + r) * p.x_stride + t * 8 : nullptr;
    }
    float acc[G][NT][4] = {};
    multiply<G, NT, U>(acc, pages, x, now.tile.rows, first, last);
    for (int step = first + U; step < last; step += U) {
      load_pages<G, U>(pages, p, now, count, step, last);
      multiply<G, NT, U>(acc, pages, x, now.tile.rows, step, last);
    }
    if (index + stride < table.item_count) fetch(index + stride);  // its pages arrive while this item is summed
    gather_warps<G, NT>(acc, slots, now.tile.rows);
    float* mine = sums + parity * G * NT * 8 * kPageRank;
    const int values = now.tile.rows * kPageRank;  // of one module
    for (int i = threadIdx.x; i < G * values; i += blockDim.x) {
      const int m = i / values, r = i % values / kPageRank;
      const float* place = slots + (m * NT * 8 + r) * kRowFloats + i % kPageRank;
      float sum = place[0];
#pragma unroll
      for (int w = 1; w < 4; ++w) sum += place[w * G * NT * 8 * kRowFloats];
      mine[i] = sum;
    }
    if constexpr (CL > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    const int share = (G * values + CL - 1) / CL;
    for (int i = rank * share + threadIdx.x; i < min((rank + 1) * share, G * values); i += blockDim.x) {
      float sum = 0.f;
      if constexpr (CL > 1) {
#pragma unroll
        for (int c = 0; c < CL; ++c) sum += load_remote(remote_address(mine + i, c));
      } else {
        sum = mine[i];
      }
      const int m = i / values, r = i % values / kPageRank;
      const LoraSpan span = span_at(p.work, m);
      const float scale = __ldg(p.work.scales + static_cast<int64_t>(span.module) * p.work.slots + now.slot);
      const int64_t pair = now.tile.first_pair + static_cast<int64_t>(r) * now.tile.entries + now.entry;
      const int ranks = ranks_in_page(p.work, span.module, now.slot, now.ordinal);
      p.work.v[(pair * G + m) * kPageRank + i % kPageRank] = i % kPageRank < ranks ? sum * (scale * now.weight) : 0.f;
    }
  }
  if constexpr (CL > 1) {  // nobody leaves while another reads its sums
    cluster_arrive();
    cluster_wait();
  }
  if (p.waits_last) wait_for_previous();
}

// Any K, float32 or bfloat16: a block takes an item, a warp one (row, module, rank) at a time. For the correctness runs.
template <class T>
__global__ void __launch_bounds__(256) shrink_any_kernel(const Params p) {
  start_dependents();
  wait_for_previous();
  const TileTable table = read_tile_table(p.work.tiles);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, modules = p.work.span_count;
  for (int index = blockIdx.x; index < table.item_count; index += gridDim.x) {
    const Item item = read_item(table, index);
    const T* page = static_cast<const T*>(p.work.pages) + item.page * p.work.page_elements;
    for (int i = warp; i < item.tile.rows * modules * kPageRank; i += kWarps) {
      const int r = i / (modules * kPageRank), m = i / kPageRank % modules, rank = i % kPageRank;
      const LoraSpan span = span_at(p.work, m);
      float sum = 0.f;
      if (rank < ranks_in_page(p.work, span.module, item.slot, item.ordinal)) {
        const T* x = static_cast<const T*>(p.x) + __ldg(table.rows + item.tile.place + r) * p.x_stride;
        const T* a = page + span.a_offset + static_cast<int64_t>(rank) * p.inputs;
        for (int k = lane; k < p.inputs; k += kWarp) sum += to_float(x[k]) * to_float(a[k]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (lane == 0) {
        const float scale = __ldg(p.work.scales + static_cast<int64_t>(span.module) * p.work.slots + item.slot);
        const int64_t pair = item.tile.first_pair + static_cast<int64_t>(r) * item.tile.entries + item.entry;
        const bool wanted = rank < ranks_in_page(p.work, span.module, item.slot, item.ordinal);
        p.work.v[(pair * modules + m) * kPageRank + rank] = wanted ? sum * (scale * item.weight) : 0.f;
      }
    }
  }
}

template <int G, int NT, int CL, int U>
cudaError_t launch_shape(const LoraShrinkArgs& args, const Params& p, cudaStream_t stream) {
  constexpr int kFloats = 4 * G * NT * 8 * kRowFloats + 2 * G * NT * 8 * kPageRank;
  constexpr int kPerProcessor = NT > 2 ? 1 : 2;
  // A GPC of an H100 has 16 or 18 processors and a cluster stays in one: what would start late would finish late.
  const int clusters = CL > 1 ? max(1, processor_count() / 16 * (16 * kPerProcessor / CL)) : processor_count() * kPerProcessor;
  return launch(shrink_kernel<G, NT, CL, U>, {clusters * CL, kWarps * kWarp, kFloats * 4, CL}, args.follow, stream, p);
}

template <int G, int U>
cudaError_t launch_modules(const LoraShrinkArgs& args, const Params& p, cudaStream_t stream) {
  const bool is_wide = args.work.tile_rows > 16;
  if (!is_hopper()) return is_wide ? launch_shape<G, 8, 1, U>(args, p, stream) : launch_shape<G, 2, 1, U>(args, p, stream);
  return is_wide ? launch_shape<G, 8, 8, U>(args, p, stream) : launch_shape<G, 2, 8, U>(args, p, stream);
}

bool fits_tensor_cores(const LoraShrinkArgs& args) {
  bool fits = !args.is_float && args.inputs % kStep == 0 && args.x_stride % 8 == 0 && args.work.page_elements % 8 == 0;
  for (int m = 0; m < args.work.span_count; ++m) fits = fits && args.work.spans[m].a_offset % 8 == 0;
  return fits && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && reinterpret_cast<uintptr_t>(args.work.pages) % 16 == 0;
}

}  // namespace

cudaError_t launch_lora_shrink(const LoraShrinkArgs& args, cudaStream_t stream) {
  if (args.work.span_count < 1 || args.work.span_count > kMaxLoraSpans || args.work.tile_rows < 1 || args.work.tile_rows > 64)
    return cudaErrorInvalidValue;
  const Params p{args.x, args.x_stride, args.inputs, args.follow == Follow::kWaitLast, args.work};
  if (!fits_tensor_cores(args)) {
    const Shape shape{processor_count() * 4, 256};
    const Follow follow = args.follow == Follow::kWaitLast ? Follow::kWaitFirst : args.follow;
    if (args.is_float) return launch(shrink_any_kernel<float>, shape, follow, stream, p);
    return launch(shrink_any_kernel<__nv_bfloat16>, shape, follow, stream, p);
  }
  switch (args.work.span_count) {
    case 1: return launch_modules<1, 4>(args, p, stream);
    case 2: return launch_modules<2, 2>(args, p, stream);
    default: return launch_modules<3, 2>(args, p, stream);
  }
}

}  // namespace openlora
