// The skinny GEMM of gemm_sm90.h.
//
// Swap-AB: 64-row blocks of W are the m side of wgmma, the tokens its n side, so one token wastes 7/8 of an n8 tile instead of
// 63/64 of an m64 one, and each byte of W enters an SM once.
//
// A block is 8 consumer warps (two warpgroups, each with 64 rows of the tile) and one producer warp. The producer
// streams stages of [tile_rows, 64] of W and [tile_tokens, 64] of x through a ring of `stages` buffers; the ring never drains
// between work items, and its first round of W is asked for before the kernels ahead have finished.
//
// Shared memory: stages * (tile_rows + tile_tokens) * 128 bytes. Device memory: 2 N K bytes, once, evict-first; x and y stay
// in L2. Bound: those bytes up to about 200 tokens, then arithmetic.
#include "gemm_sm90.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>

#include "device.cuh"
#include "gemm_best.cuh"
#include "gemm_maps.h"
#include "gemm_plan.h"
#include "gemm_store.cuh"
#include "gemm_tall_sm90.h"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"
#include "gemm_wide_sm90.h"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kConsumerWarps = 8;
constexpr int kThreads = (kConsumerWarps + 1) * 32;
constexpr int kStoreBarrier = 1;  // and 2: named barriers of the two consumer warpgroups
constexpr int kRowBytes = kGemmBlockK * 2;  // one swizzle row

struct Work {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages, early;
  int stage_bytes;  // of W and x
  GemmOutput output;
  const int32_t* wanted;
  int2* bests;
};

// Where stage buffers and barriers lie.
struct Ring {
  uint32_t buffers, barriers, lines;
  int stage_bytes, w_bytes, stages;

  __device__ uint32_t w(int stage) const { return buffers + stage * stage_bytes; }
  __device__ uint32_t x(int stage) const { return w(stage) + w_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
  __device__ WantedRows wanted() const { return {barriers + kGemmWantedOffset}; }
};

struct RingPosition {
  int stage = 0;
  uint32_t round = 0;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      ++round;
    }
  }
};

// The work items of one block, in order: planes innermost.
struct Items {
  const Work& work;
  int item, row_tile, plane, first_k, end_k;

  __device__ explicit Items(const Work& w) : work(w), item(static_cast<int>(blockIdx.x)) { locate(); }
  __device__ bool is_done() const { return item >= work.row_tiles * work.planes; }
  __device__ void next() {
    item += static_cast<int>(gridDim.x);
    locate();
  }
  __device__ void locate() {
    row_tile = item / work.planes;
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

__device__ void load_w(const Ring& ring, const CUtensorMap* map, const Items& at, int k, int stage, int tile_rows, int bytes,
                       uint64_t policy) {
  barrier_expect(ring.full(stage), bytes);
  const int row = at.row_tile * tile_rows;
  if (at.work.output == GemmOutput::kSiluMul) {
    tensor_load_pairs(ring.w(stage), map, k * kGemmBlockK, row / 16, ring.full(stage), policy);
  } else {
    tensor_load(ring.w(stage), map, k * kGemmBlockK, row, ring.full(stage), policy);
  }
}

__device__ void load_x(const Ring& ring, const CUtensorMap* map, int k, int stage, uint64_t policy) {
  tensor_load(ring.x(stage), map, k * kGemmBlockK, 0, ring.full(stage), policy);
}

// One thread: the first `early` stages of W, which no kernel in flight writes.
__device__ void load_early(const Work& work, const Ring& ring, const CUtensorMap* w_map) {
  int stage = 0;
  for (Items items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, ++stage) {
      if (stage == work.early) return;
      load_w(ring, w_map, items, k, stage, work.tile_rows, work.stage_bytes, policy_evict_first());
    }
  }
}

// One thread: once the kernels ahead have ended, keeps the ring full.
__device__ void produce(const Work& work, const Ring& ring, const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const uint64_t once = policy_evict_first();
  const uint64_t keep = policy_evict_last();
  wait_for_dependencies();
  launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
  RingPosition at;
  for (Items items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (at.round > 0) barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
      const bool is_asked_for = at.round == 0 && at.stage < work.early;
      if (!is_asked_for) load_w(ring, w_map, items, k, at.stage, work.tile_rows, work.stage_bytes, once);
      load_x(ring, x_map, k, at.stage, keep);
    }
  }
}

// An item's accumulators to y, in the form that was asked for.
template <int kTokens, bool kIsHead>
__device__ __forceinline__ void store_item(const Work& work, const Ring& ring, const float (&d)[kTokens / 2], int row_tile, int plane) {
  const int group = static_cast<int>(threadIdx.x) / 128;
  const int first_row = row_tile * work.tile_rows, row_end = min(first_row + work.tile_rows, work.outputs);
  const int64_t offset = static_cast<int64_t>(plane) * work.tokens * work.outputs;
  const LineBuffer lines{ring.lines + group * gemm_line_bytes(kTokens), kStoreBarrier + group};
  const int row = first_row + group * 64;
  if constexpr (kIsHead) {
    store_lines<float, kTokens>(d, static_cast<float*>(work.y), work.tokens, work.outputs, row, row_end, lines, ring.wanted());
  } else if (work.output == GemmOutput::kFloatPlanes) {
    store_lines<float, kTokens>(d, static_cast<float*>(work.y) + offset, work.tokens, work.outputs, row, row_end, lines);
  } else if (work.output == GemmOutput::kBfloat16) {
    store_lines<__nv_bfloat16, kTokens>(d, static_cast<__nv_bfloat16*>(work.y) + offset, work.tokens, work.outputs, row, row_end, lines);
  } else {
    store_silu_mul<kTokens>(d, static_cast<__nv_bfloat16*>(work.y), work.tokens, work.outputs / 2, row / 2, row_end / 2, lines);
  }
}

template <int kTokens, bool kIsHead>
__device__ void consume(const Work& work, const Ring& ring) {
  const int group = static_cast<int>(threadIdx.x) / 128, lane = static_cast<int>(threadIdx.x) % 32;
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(ring.empty(stage));
  };
  Bests<kTokens> bests;
  if constexpr (kIsHead) {
    bests.clear();
    ring.wanted().read<kTokens>(work.wanted, work.tokens);
  }
  RingPosition at;
  for (Items items(work); !items.is_done(); items.next()) {
    float d[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
    wgmma_results<kTokens / 2>(d);
    int previous = -1;
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      barrier_wait(ring.full(at.stage), at.round & 1);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {
        Wgmma<kTokens>::add(d, wgmma_descriptor(ring.w(at.stage) + group * 64 * kRowBytes + step * 32),
                            wgmma_descriptor(ring.x(at.stage) + step * 32));
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = at.stage;
    }
    wgmma_wait<0>();
    wgmma_results<kTokens / 2>(d);
    if (previous >= 0) release(previous);
    store_item<kTokens, kIsHead>(work, ring, d, items.row_tile, items.plane);
    if constexpr (kIsHead) {
      const int first = items.row_tile * work.tile_rows, row = first + static_cast<int>(threadIdx.x) / kWarp * 16;
      bests.add(d, row, min(first + work.tile_rows, work.outputs));
    }
  }
  if constexpr (kIsHead) bests.write(ring.buffers, work.bests, work.tokens, static_cast<int>(gridDim.x));
}

template <int kTokens, bool kIsHead>
__global__ __launch_bounds__(kThreads, 1) void skinny_gemm(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                                                           const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  Ring ring;
  ring.w_bytes = work.tile_rows * kRowBytes;
  ring.stage_bytes = ring.w_bytes + kTokens * kRowBytes;
  ring.stages = work.stages;
  ring.buffers = (shared_address(shared) + 1023) & ~1023u;
  const int overrun = max(0, kGemmTileRows * kRowBytes - ring.stage_bytes);
  ring.barriers = ring.buffers + work.stages * ring.stage_bytes + overrun;
  ring.lines = ring.barriers + kGemmBarrierBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kConsumerWarps) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < work.stages) {
      barrier_init(ring.full(lane), 1);
      barrier_init(ring.empty(lane), kConsumerWarps);
    }
    barrier_init_fence();
    __syncwarp();
    if (lane == 0) load_early(work, ring, &w_map);  // its own barriers: no need to wait for the block
    __syncwarp();
  }
  __syncthreads();
  if (warp == kConsumerWarps) {
    if (threadIdx.x % 32 == 0) produce(work, ring, &w_map, &x_map);
    __syncwarp();
  } else {
    wait_for_dependencies();  // y may still be read by a kernel ahead
    consume<kTokens, kIsHead>(work, ring);
  }
#endif
}

using Kernel = void (*)(const CUtensorMap, const CUtensorMap, const Work);

template <bool kIsHead>
Kernel kernel_of(int tile_tokens) {
  switch (tile_tokens) {
    case 8: return skinny_gemm<8, kIsHead>;
    case 16: return skinny_gemm<16, kIsHead>;
    case 32: return skinny_gemm<32, kIsHead>;
    case 64: return skinny_gemm<64, kIsHead>;
    case 96: return skinny_gemm<96, kIsHead>;
    case 128: return skinny_gemm<128, kIsHead>;
    case 160: return skinny_gemm<160, kIsHead>;
    case 192: return skinny_gemm<192, kIsHead>;
    case 224: return skinny_gemm<224, kIsHead>;
    case 256: return skinny_gemm<256, kIsHead>;
    default: return nullptr;
  }
}

// Whether the accumulators can leave in the form that is asked for.
bool has_valid_output(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  if (args.output == GemmOutput::kLogits) return plan.form == GemmForm::kNarrow && plan.planes == 1 && args.wanted != nullptr && args.bests != nullptr;
  return args.output != GemmOutput::kSiluMul || (plan.planes == 1 && args.outputs % 16 == 0 && plan.tile_rows % 16 == 0);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_valid(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  return can_run_skinny_gemm(args.tokens, args.outputs, args.inputs) && args.tokens <= plan.tile_tokens && plan.tile_rows % 8 == 0 &&
         plan.tile_rows <= 64 * gemm_groups(plan.form) && gemm_shared_bytes(plan) <= kGemmSharedBytes && args.x_stride % 8 == 0 &&
         args.x_stride >= args.inputs && is_aligned(args.x) && is_aligned(args.w) && is_aligned(args.y) && has_valid_output(args, plan);
}

}  // namespace

bool can_run_skinny_gemm(int64_t tokens, int64_t outputs, int64_t inputs) { return gemm_can_run(tokens, outputs, inputs); }

bool is_skinny_gemm_faster(int64_t tokens, int64_t outputs, int64_t inputs, bool has_adapters) {
  return gemm_is_faster(tokens, outputs, inputs, has_adapters);
}

int skinny_gemm_planes(int64_t outputs, int64_t inputs) { return gemm_planes(outputs, inputs); }

int skinny_gemm_parts(int64_t outputs, int64_t inputs) { return gemm_parts(outputs, inputs); }

cudaError_t launch_skinny_gemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  if (!can_run_skinny_gemm(args.tokens, args.outputs, args.inputs)) return cudaErrorInvalidValue;
  const SkinnyGemmPlan plan = gemm_plan(args.tokens, args.outputs, args.inputs);
  if (is_valid(args, plan) && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
    const bool is_half = args.output == GemmOutput::kBfloat16 || args.output == GemmOutput::kSiluMul;
    if (is_half && gemm_is_wide(args.tokens, args.outputs, args.inputs, kGemmWideRows)) return launch_wide_gemm(args, stream);
    const bool is_head = args.output == GemmOutput::kLogits;
    if (is_head && gemm_is_wide_head(args.tokens, args.outputs, args.inputs)) return launch_wide_head(args, stream);
  }
  return launch_skinny_gemm_as(args, plan, stream);
}

cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const bool is_head = args.output == GemmOutput::kLogits;
  if (plan.form != GemmForm::kNarrow && is_valid(args, plan) && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
    return launch_tall_gemm(args, plan, stream);
  }
  const Kernel kernel = !is_valid(args, plan) ? nullptr : is_head ? kernel_of<true>(plan.tile_tokens) : kernel_of<false>(plan.tile_tokens);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  CUtensorMap w_map, x_map;
  if (!(args.output == GemmOutput::kSiluMul ? encode_pairs(&w_map, args.w, args.outputs, args.inputs, plan.tile_rows)
                                            : encode_matrix(&w_map, args.w, args.outputs, args.inputs, args.inputs, plan.tile_rows)) ||
      !encode_matrix(&x_map, args.x, args.tokens, args.inputs, args.x_stride, plan.tile_tokens)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, sm_count = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess && major != 9) status = cudaErrorNotSupported;
  const int shared_bytes = gemm_shared_bytes(plan);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;

  Work work{args.y, args.tokens, args.outputs};
  work.k_blocks = args.inputs / kGemmBlockK;
  work.planes = plan.planes;
  work.row_tiles = gemm_row_tiles(args.outputs, plan.tile_rows);
  work.tile_rows = plan.tile_rows;
  work.stage_bytes = (plan.tile_rows + plan.tile_tokens) * kRowBytes;
  work.stages = plan.stages;
  work.early = plan.early > 0 ? std::min(plan.early, plan.stages) : plan.stages;
  work.output = args.output;
  work.wanted = args.wanted;
  work.bests = static_cast<int2*>(args.bests);
  const int items = work.row_tiles * plan.planes;
  const int resident = sm_count * (2 * shared_bytes <= kGemmSharedBytes - 2048 ? 2 : 1);

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = args.use_pdl ? 1 : 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(is_head ? std::min(items, kGemmProcessors) : std::min(items, resident));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, w_map, x_map, work);
}

}  // namespace openlora
