// The GEMMs of gemm_tall_sm90.h.
//
// As gemm_sm90.cu: kGroups warpgroups, each with 64 rows of the tile of W, and one warp that keeps a ring of stages full. A thread holds
// kHalves * kSide / 2 accumulators, more than a block of nine warps has room for: the producer's warp has a warpgroup, which gives its
// registers away. A stage is [tile_rows, 64] of W and kHalves times [kSide, 64] of x.
//
// Bound: shared memory, of which wgmma reads 26 KB and the copies write 13 KB for 16 inputs at 288 tokens, 307 clocks where the
// tensor cores take 288; and the chip's power, which lowers its clock to 1.4 GHz where such steps follow one another.
#include "gemm_tall_sm90.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>

#include "device.cuh"
#include "gemm_maps.h"
#include "gemm_plan.h"
#include "gemm_store.cuh"
#include "gemm_tma.cuh"
#include "gemm_wgmma.cuh"

namespace openlora {
namespace {

constexpr int kProducerRegisters = 40;
constexpr int kStoreBarrier = 1;  // and the next: named barriers of the consumer warpgroups
constexpr int kRowBytes = kGemmBlockK * 2;  // one swizzle row

struct Work {
  void* y;
  int tokens, outputs;
  int k_blocks, planes, row_tiles, tile_rows, stages;
  GemmOutput output;
};

// What a block has.
template <int kGroups_, int kHalves_, int kSide_>
struct Form {
  static constexpr int kGroups = kGroups_, kHalves = kHalves_, kSide = kSide_;
  static constexpr int kBlocks = 2 / kHalves;                            // neighbours with the same rows of W
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRegisters = kGroups == 2 ? 232 : 152;            // of a consumer
  static constexpr int kXBytes = kHalves * kSide * kRowBytes;            // of a stage
  static_assert(kGroups * kRegisters + kProducerRegisters <= 512);
};

// Where stage buffers and barriers lie: W, then x.
template <class F>
struct Ring {
  uint32_t buffers, barriers;
  int w_bytes, stage_bytes;

  __device__ Ring(const Work& work, uint32_t shared) {
    buffers = (shared + 1023) & ~1023u;
    w_bytes = work.tile_rows * kRowBytes;
    stage_bytes = w_bytes + F::kXBytes;
    barriers = buffers + work.stages * stage_bytes;
  }
  __device__ uint32_t w(int stage) const { return buffers + stage * stage_bytes; }
  __device__ uint32_t x(int stage) const { return w(stage) + w_bytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 16; }
  __device__ uint32_t empty(int stage) const { return barriers + stage * 16 + 8; }
  __device__ uint32_t lines(int group) const { return barriers + kGemmBarrierBytes + group * gemm_line_bytes(F::kSide); }
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
template <class F>
struct Items {
  const Work& work;
  int item, row_tile, plane, first_k, end_k;

  __device__ explicit Items(const Work& w) : work(w), item(static_cast<int>(blockIdx.x) / F::kBlocks) { locate(); }
  __device__ bool is_done() const { return item >= work.row_tiles * work.planes; }
  __device__ void next() {
    item += static_cast<int>(gridDim.x) / F::kBlocks;
    locate();
  }
  __device__ void locate() {
    row_tile = item / work.planes;
    plane = item % work.planes;
    first_k = gemm_plane_start(work.k_blocks, work.planes, plane);
    end_k = gemm_plane_start(work.k_blocks, work.planes, plane + 1);
  }
};

// The first token of a block.
template <class F>
__device__ __forceinline__ int first_token() {
  return static_cast<int>(blockIdx.x) % F::kBlocks * F::kSide;
}

template <class F>
__device__ __forceinline__ void load_w(const Work& work, const Ring<F>& ring, const CUtensorMap* map, int row_tile, int k, int stage) {
  barrier_expect(ring.full(stage), ring.stage_bytes);
  const int row = row_tile * work.tile_rows;
  if (work.output == GemmOutput::kSiluMul) {
    tensor_load_pairs(ring.w(stage), map, k * kGemmBlockK, row / 16, ring.full(stage), policy_evict_first());
  } else {
    tensor_load(ring.w(stage), map, k * kGemmBlockK, row, ring.full(stage), policy_evict_first());
  }
}

template <class F>
__device__ __forceinline__ void load_x(const Ring<F>& ring, const CUtensorMap* map, int k, int stage) {
#pragma unroll
  for (int half = 0; half < F::kHalves; ++half) {
    tensor_load(ring.x(stage) + half * F::kSide * kRowBytes, map, k * kGemmBlockK, first_token<F>() + half * F::kSide, ring.full(stage),
                policy_evict_last());
  }
}

// One thread: the first round of W, which no kernel in flight writes.
template <class F>
__device__ __forceinline__ void load_early(const Work& work, const Ring<F>& ring, const CUtensorMap* w_map) {
  int stage = 0;
  for (Items<F> items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, ++stage) {
      if (stage == work.stages) return;
      load_w(work, ring, w_map, items.row_tile, k, stage);
    }
  }
}

// One thread: once the kernels ahead have ended, keeps the ring full.
template <class F>
__device__ __forceinline__ void produce(const Work& work, const Ring<F>& ring, const CUtensorMap* w_map, const CUtensorMap* x_map) {
  wait_for_dependencies();
  launch_dependents();  // not before the wait: whoever starts now may read the same x (lora_work.h, Follow::kWaitLast)
  RingPosition at;
  for (Items<F> items(work); !items.is_done(); items.next()) {
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      if (at.round > 0) {
        barrier_wait(ring.empty(at.stage), (at.round - 1) & 1);
        load_w(work, ring, w_map, items.row_tile, k, at.stage);
      }
      load_x(ring, x_map, k, at.stage);
    }
  }
}

// One half's accumulators to y, in the form that was asked for.
template <class F>
__device__ __forceinline__ void store_half(const Work& work, const Ring<F>& ring, const float (&d)[F::kSide / 2], int row_tile, int plane,
                                           int token) {
  const int group = fresh_thread() / 128, tokens = work.tokens - token;
  const int first_row = row_tile * work.tile_rows, row_end = min(first_row + work.tile_rows, work.outputs), row = first_row + group * 64;
  const LineBuffer lines{ring.lines(group), kStoreBarrier + group};
  if (work.output == GemmOutput::kSiluMul) {
    const int columns = work.outputs / 2;
    __nv_bfloat16* y = static_cast<__nv_bfloat16*>(work.y) + static_cast<int64_t>(token) * columns;
    store_silu_mul<F::kSide>(d, y, tokens, columns, row / 2, row_end / 2, lines);
    return;
  }
  const int64_t offset = (static_cast<int64_t>(plane) * work.tokens + token) * work.outputs;
  if (work.output == GemmOutput::kFloatPlanes) {
    store_lines<float, F::kSide>(d, static_cast<float*>(work.y) + offset, tokens, work.outputs, row, row_end, lines);
  } else {
    store_lines<__nv_bfloat16, F::kSide>(d, static_cast<__nv_bfloat16*>(work.y) + offset, tokens, work.outputs, row, row_end, lines);
  }
}

template <class F>
__device__ __forceinline__ void consume(const Work& work, const Ring<F>& ring) {
  const auto release = [&](int stage) {
    if (fresh_thread() % kWarp == 0) barrier_arrive(ring.empty(stage));
  };
  const uint32_t w_offset = threadIdx.x / 128 * 64 * kRowBytes;
  RingPosition at;
  for (Items<F> items(work); !items.is_done(); items.next()) {
    float d[F::kHalves][F::kSide / 2];
#pragma unroll
    for (int half = 0; half < F::kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < F::kSide / 2; ++i) d[half][i] = 0.0f;
      wgmma_results<F::kSide / 2>(d[half]);
    }
    int previous = -1;
#pragma unroll 1
    for (int k = items.first_k; k < items.end_k; ++k, at.advance(work.stages)) {
      barrier_wait(ring.full(at.stage), at.round & 1);
      wgmma_fence();
      const uint64_t a = wgmma_descriptor(ring.w(at.stage) + w_offset), b = wgmma_descriptor(ring.x(at.stage));
#pragma unroll
      for (int step = 0; step < kGemmBlockK / 16; ++step) {  // 32 bytes, in units of 16
#pragma unroll
        for (int half = 0; half < F::kHalves; ++half) {
          Wgmma<F::kSide>::add(d[half], a + step * 2, b + half * F::kSide * kRowBytes / 16 + step * 2);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = at.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < F::kHalves; ++half) wgmma_results<F::kSide / 2>(d[half]);
    if (previous >= 0) release(previous);
#pragma unroll
    for (int half = 0; half < F::kHalves; ++half) {
      store_half<F>(work, ring, d[half], items.row_tile, items.plane, first_token<F>() + half * F::kSide);
    }
  }
}

template <class F>
__global__ __launch_bounds__(F::kThreads, 1) void tall_gemm(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_map,
                                                            const Work work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the body is empty and the launcher refuses
  extern __shared__ uint8_t shared[];
  constexpr int kConsumerWarps = F::kGroups * 4;
  const Ring<F> ring(work, shared_address(shared));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warp == kConsumerWarps) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane < work.stages) {
      barrier_init(ring.full(lane), 1);
      barrier_init(ring.empty(lane), kConsumerWarps);
    }
    barrier_init_fence();
    __syncwarp();
    if (lane == 0) load_early<F>(work, ring, &w_map);  // its own barriers: no need to wait for the block
    __syncwarp();
  }
  __syncthreads();
  if (warp >= kConsumerWarps) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumerWarps * kWarp) produce<F>(work, ring, &w_map, &x_map);
    __syncwarp();
  } else {
    take_registers<F::kRegisters>();
    wait_for_dependencies();  // y may still be read by a kernel ahead
    consume<F>(work, ring);
  }
#endif
}

struct Kernel {
  void (*run)(const CUtensorMap, const CUtensorMap, const Work) = nullptr;
  int threads = 0, neighbours = 0;
};

template <class F>
Kernel kernel() {
  return {tall_gemm<F>, F::kThreads, F::kBlocks};
}

Kernel kernel_of(GemmForm form, int side) {
  const bool is_broad = form == GemmForm::kBroad;
  switch (side) {
    case 112: return is_broad ? kernel<Form<3, 1, 112>>() : Kernel{};
    case 128: return is_broad ? kernel<Form<3, 1, 128>>() : Kernel{};
    case 144: return is_broad ? kernel<Form<3, 1, 144>>() : kernel<Form<2, 2, 144>>();
    case 160: return is_broad ? kernel<Form<3, 1, 160>>() : kernel<Form<2, 2, 160>>();
    default: return {};
  }
}

}  // namespace

cudaError_t launch_tall_gemm(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const int side = gemm_side_tokens(plan);
  const Kernel kernel = kernel_of(plan.form, side);
  CUtensorMap w_map, x_map;
  if (kernel.run == nullptr ||
      !(args.output == GemmOutput::kSiluMul ? encode_pairs(&w_map, args.w, args.outputs, args.inputs, plan.tile_rows)
                                            : encode_matrix(&w_map, args.w, args.outputs, args.inputs, args.inputs, plan.tile_rows)) ||
      !encode_matrix(&x_map, args.x, args.tokens, args.inputs, args.x_stride, side)) {
    return cudaErrorInvalidValue;
  }
  const int shared_bytes = gemm_shared_bytes(plan);
  const cudaError_t status = cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  Work work{args.y, args.tokens, args.outputs};
  work.k_blocks = args.inputs / kGemmBlockK;
  work.planes = plan.planes;
  work.row_tiles = gemm_row_tiles(args.outputs, plan.tile_rows);
  work.tile_rows = plan.tile_rows;
  work.stages = plan.stages;
  work.output = args.output;

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = args.use_pdl ? 1 : 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(work.row_tiles * plan.planes * kernel.neighbours, kGemmProcessors));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel.run, w_map, x_map, work);
}

}  // namespace openlora
