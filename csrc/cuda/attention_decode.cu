// Paged decode attention for bfloat16 caches; see attention_decode.h.
//
// A block of threads owns items of one key/value head; each of its warps owns every WARPS-th tile of 16 keys and nothing is shared
// between warps until the end: a ring of STAGES tiles in shared memory, private to the warp, filled by 16-byte asynchronous copies,
// emptied by ldmatrix. Scores are computed transposed, S^T = K Q^T, so that the 16-row side of the tensor-core instruction holds keys
// and its 8-column side the query heads of the group: a group of 4 heads wastes half of an instruction, not three quarters, and
// the online softmax, the rescaling and O^T = V^T P^T all have heads in the same place of a thread (no shuffle but the maximum's).
//
// Shared memory: WARPS x STAGES x 2 x 16 x head_dim x 2 bytes (48 KiB for 2 warps, 3 stages, head size 128: four blocks an SM).
// Bytes from memory: 4 x head_dim x groups a key, once. Bound: memory. A tile costs a warp 16 mma and about 120 instructions for
// 8 KiB: 1.5 us of issue an SM at batch 64, context 320, against 27 us of bytes.
#include "attention_decode.h"

#include <cstdint>

#include "device.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

constexpr int kTileKeys = 16;
constexpr float kMinusInfinity = -__builtin_inff();

// 16 bytes to shared memory; zeros where `bytes` is 0, so that an unwritten cache entry never enters a sum.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
        : "r"(from)
        : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
        : "r"(from)
        : "memory");
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a b: a 16 x 16, b 16 x 8, bfloat16; c float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

// Largest over the lanes that hold the other keys of the same heads.
__device__ __forceinline__ float max_over_keys(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}

__device__ __forceinline__ float sum_over_keys(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// kHead: head size. kColumns: tiles of 8 query heads. kWarps, kStages: see the top.
template <int kHead, int kColumns, int kWarps, int kStages>
struct Decode {
  static constexpr int kRowBytes = kHead * 2;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;           // 16-byte pieces of a row
  static constexpr int kRowsACopy = 32 / kChunks;          // rows that one instruction of a warp copies
  static constexpr int kSteps = kHead / 16;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kTileBytes;
  static constexpr int kHeads = kColumns * 8;
  // The ring is reused for the warps' results: kWarps x kHeads x (kHead + 2) floats, and one flag.
  static constexpr int kResultBytes = kWarps * kHeads * (kHead + 2) * 4 + 16;
  static constexpr int kSharedBytes = kRingBytes > kResultBytes ? kRingBytes : kResultBytes;

  struct Item {
    int sequence, begin, end, place;
  };

  const AttentionDecodeArgs& args;
  const int group, warp, lane;
  const uint32_t ring;  // this warp's, shared-memory address
  Item item;
  int first_key;   // of this warp's first tile
  int tile_count;  // of this warp

  __device__ Decode(const AttentionDecodeArgs& a, int g, uint32_t shared)
    : args(a), group(g), warp(threadIdx.x / 32), lane(threadIdx.x % 32), ring(shared + warp * (kStages * 2 * kTileBytes)) {}

  __device__ __forceinline__ void take(int index) {
    const int4 raw = __ldg(reinterpret_cast<const int4*>(args.items) + index);
    item = {raw.x, raw.y, raw.z, raw.w};
    const int aligned = item.begin & ~(kTileKeys - 1);
    const int tiles = (item.end - aligned + kTileKeys - 1) / kTileKeys;
    first_key = aligned + warp * kTileKeys;
    tile_count = tiles > warp ? (tiles - warp + kWarps - 1) / kWarps : 0;
  }

  __device__ __forceinline__ int key_of(int tile) const { return first_key + tile * (kWarps * kTileKeys); }

  // The cache block of a tile; blocks are at least as long as tiles.
  __device__ __forceinline__ int block_of(int tile) const {
    return __ldg(args.tables + int64_t(item.sequence) * args.table_stride + key_of(tile) / args.block_size);
  }

  // Copy one tile's keys and values; rows at or after the item's end become zeros.
  __device__ __forceinline__ void fetch(int tile, int block) const {
    const int key = key_of(tile);
    const int row = lane / kChunks, chunk = lane % kChunks;
    const int64_t offset = int64_t(block) * args.block_stride + int64_t((key & (args.block_size - 1)) + row) * args.token_stride +
               group * kHead + chunk * 8;
    const auto* keys = static_cast<const __nv_bfloat16*>(args.keys) + offset;
    const auto* values = static_cast<const __nv_bfloat16*>(args.values) + offset;
    const int64_t step = int64_t(kRowsACopy) * args.token_stride;
    const uint32_t stage = ring + (tile % kStages) * (2 * kTileBytes);
#pragma unroll
    for (int i = 0; i < kTileKeys / kRowsACopy; ++i) {
      const int r = row + i * kRowsACopy;
      const uint32_t to = stage + r * kRowBytes + ((chunk ^ (r & 7)) * 16);
      const int bytes = key + r < item.end ? 16 : 0;
      copy_async(to, keys + i * step, bytes);
      copy_async(to + kTileBytes, values + i * step, bytes);
    }
  }

  // A tile that holds the sequence's newest key waits for the kernel that writes it.
  __device__ __forceinline__ bool is_old(int tile) const { return key_of(tile) + kTileKeys < item.end; }
};

template <int kHead, int kColumns, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32) attention_decode(const __grid_constant__ AttentionDecodeArgs args) {
  using D = Decode<kHead, kColumns, kWarps, kStages>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const int group = blockIdx.x % args.groups, worker = blockIdx.x / args.groups;
  D self(args, group, static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  start_dependents();
  const int lane = self.lane, warp = self.warp;
  const int heads = args.groups * args.heads_per_group;
  const int head0 = group * args.heads_per_group;
  const int count = __ldg(args.counts);
  bool has_waited = false;

  for (int index = worker; index < count; index += args.workers) {
    self.take(index);
    const int tiles = self.tile_count;
    int blocks[kStages];
#pragma unroll
    for (int s = 0; s < kStages; ++s) blocks[s] = s < tiles ? self.block_of(s) : 0;
    int fetched = 0;  // tiles whose copies were committed before the wait
    if (!has_waited) {
#pragma unroll
      for (int s = 0; s < kStages - 1; ++s) {
        if (s < tiles && self.is_old(s)) {
          self.fetch(s, blocks[s]);
          commit_copies();
          fetched = s + 1;
        }
      }
      wait_for_previous();
      has_waited = true;
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < fetched) continue;
      if (s < tiles) self.fetch(s, blocks[s]);
      commit_copies();
    }
    int next_block = blocks[kStages - 1];

    // Q^T as the 16 x 8 side: this lane holds dims 2 (lane % 4) + {0, 1, 8, 9} of head lane / 4.
    uint32_t q[kColumns][D::kSteps][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int head = n * 8 + lane / 4;
      const bool is_head = head < args.heads_per_group;
      const auto* row = static_cast<const __nv_bfloat16*>(args.q) + int64_t(self.item.sequence) * args.q_stride +
               (head0 + head) * kHead + (lane % 4) * 2;
#pragma unroll
      for (int step = 0; step < D::kSteps; ++step) {
        q[n][step][0] = is_head ? *reinterpret_cast<const uint32_t*>(row + step * 16) : 0;
        q[n][step][1] = is_head ? *reinterpret_cast<const uint32_t*>(row + step * 16 + 8) : 0;
      }
    }

    float acc[kColumns][D::kSteps][4];
    float top[kColumns][2], total[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      top[n][0] = top[n][1] = kMinusInfinity;
      total[n][0] = total[n][1] = 0.f;
#pragma unroll
      for (int step = 0; step < D::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][step][i] = 0.f;
    }

    for (int tile = 0; tile < tiles; ++tile) {
      wait_for_copies<kStages - 2>();
      __syncwarp();
      // The tile before this one is read by now, so its place in the ring takes the tile after the ones in flight.
      const int ahead = tile + kStages - 1;
      if (ahead < tiles) self.fetch(ahead, next_block);
      commit_copies();
      if (ahead + 1 < tiles) next_block = self.block_of(ahead + 1);

      const uint32_t stage = self.ring + (tile % kStages) * (2 * D::kTileBytes);
      float score[kColumns][4];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.f;
      {
        const int row = lane & 15;
        const uint32_t base = stage + row * D::kRowBytes;
#pragma unroll
        for (int step = 0; step < D::kSteps; ++step) {
          uint32_t a[4];
          load_matrices(a, base + (((step * 2 + (lane >> 4)) ^ (row & 7)) * 16));
#pragma unroll
          for (int n = 0; n < kColumns; ++n) multiply_add(score[n], a, q[n][step][0], q[n][step][1]);
        }
      }
      const int key = self.key_of(tile) + lane / 4;
      const bool is_seen0 = key >= self.item.begin && key < self.item.end;
      const bool is_seen1 = key + 8 >= self.item.begin && key + 8 < self.item.end;
      uint32_t p[kColumns][2];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float x[4];
        x[0] = is_seen0 ? score[n][0] * args.scale_log2 : kMinusInfinity;
        x[1] = is_seen0 ? score[n][1] * args.scale_log2 : kMinusInfinity;
        x[2] = is_seen1 ? score[n][2] * args.scale_log2 : kMinusInfinity;
        x[3] = is_seen1 ? score[n][3] * args.scale_log2 : kMinusInfinity;
        const float new0 = fmaxf(top[n][0], max_over_keys(fmaxf(x[0], x[2])));
        const float new1 = fmaxf(top[n][1], max_over_keys(fmaxf(x[1], x[3])));
        // Nothing seen yet: keep exp2(-inf - 0) = 0 instead of NaN.
        const float safe0 = new0 == kMinusInfinity ? 0.f : new0, safe1 = new1 == kMinusInfinity ? 0.f : new1;
        if (__any_sync(~0u, new0 != top[n][0] || new1 != top[n][1])) {
          const float shrink0 = exp2_fast(top[n][0] - safe0), shrink1 = exp2_fast(top[n][1] - safe1);
          total[n][0] *= shrink0;
          total[n][1] *= shrink1;
#pragma unroll
          for (int step = 0; step < D::kSteps; ++step) {
            acc[n][step][0] *= shrink0;
            acc[n][step][1] *= shrink1;
            acc[n][step][2] *= shrink0;
            acc[n][step][3] *= shrink1;
          }
          top[n][0] = new0;
          top[n][1] = new1;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = exp2_fast(x[i] - (i & 1 ? safe1 : safe0));
        total[n][0] += x[0] + x[2];
        total[n][1] += x[1] + x[3];
        p[n][0] = transpose_8x8(pack(x[0], x[1]));
        p[n][1] = transpose_8x8(pack(x[2], x[3]));
      }
      {
        const int row = (lane & 7) + ((lane >> 4) & 1) * 8;
        const uint32_t base = stage + D::kTileBytes + row * D::kRowBytes;
#pragma unroll
        for (int step = 0; step < D::kSteps; ++step) {
          uint32_t a[4];
          load_matrices_transposed(a, base + (((step * 2 + ((lane >> 3) & 1)) ^ (row & 7)) * 16));
#pragma unroll
          for (int n = 0; n < kColumns; ++n) multiply_add(acc[n][step], a, p[n][0], p[n][1]);
        }
      }
      __syncwarp();
    }
    wait_for_copies<0>();
    __syncthreads();  // the ring now holds the warps' results: [warp][head][kHead] float32, then [warp][head][2]

    float* results = reinterpret_cast<float*>(shared);
    float* numbers = results + kWarps * D::kHeads * kHead;
    volatile int& is_last = *reinterpret_cast<int*>(numbers + kWarps * D::kHeads * 2);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float sum0 = sum_over_keys(total[n][0]), sum1 = sum_over_keys(total[n][1]);
      const int head = n * 8 + (lane % 4) * 2;
      float* mine = results + (warp * D::kHeads + head) * kHead + lane / 4;
#pragma unroll
      for (int step = 0; step < D::kSteps; ++step) {
        mine[step * 16] = acc[n][step][0];
        mine[step * 16 + kHead] = acc[n][step][1];
        mine[step * 16 + 8] = acc[n][step][2];
        mine[step * 16 + 8 + kHead] = acc[n][step][3];
      }
      if (lane < 4) {
        float* number = numbers + (warp * D::kHeads + head) * 2;
        number[0] = top[n][0];
        number[1] = sum0;
        number[2] = top[n][1];
        number[3] = sum1;
      }
    }
    __syncthreads();

    const int shares = __ldg(args.counts + 1 + self.item.sequence);
    auto* out = static_cast<__nv_bfloat16*>(args.out) + int64_t(self.item.sequence) * args.out_stride + head0 * kHead;
    const int pairs = args.heads_per_group * (kHead / 2);
    for (int pair = threadIdx.x; pair < pairs; pair += kWarps * 32) {
      const int head = pair / (kHead / 2), dim = pair % (kHead / 2) * 2;
      float best = kMinusInfinity, sum = 0.f;
      float2 value = {0.f, 0.f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) best = fmaxf(best, numbers[(w * D::kHeads + head) * 2]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float share = exp2_fast(numbers[(w * D::kHeads + head) * 2] - best);
        sum += numbers[(w * D::kHeads + head) * 2 + 1] * share;
        const float2 part = *reinterpret_cast<const float2*>(results + (w * D::kHeads + head) * kHead + dim);
        value.x += part.x * share;
        value.y += part.y * share;
      }
      if (shares == 1) {
        *reinterpret_cast<uint32_t*>(out + head * kHead + dim) = pack(value.x / sum, value.y / sum);
      } else {
        const int64_t flat = int64_t(self.item.place) * heads + head0 + head;
        *reinterpret_cast<float2*>(args.partial + flat * kHead + dim) = value;
        if (dim == 0) *reinterpret_cast<float2*>(args.stats + flat * 2) = {best, sum};
      }
    }
    if (shares > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        int32_t* done = args.done + self.item.sequence * args.groups + group;
        is_last = atomicAdd(done, 1) == shares - 1;
        if (is_last) *done = 0;
      }
      __syncthreads();
      if (is_last) {
        __threadfence();
        const int64_t first = __ldg(args.firsts + self.item.sequence);
        for (int pair = threadIdx.x; pair < pairs; pair += kWarps * 32) {
          const int head = pair / (kHead / 2), dim = pair % (kHead / 2) * 2;
          float best = kMinusInfinity, sum = 0.f;
          float2 value = {0.f, 0.f};
          for (int s = 0; s < shares; ++s) {
            const int64_t flat = (first + s) * heads + head0 + head;
            const float2 number = __ldcg(reinterpret_cast<const float2*>(args.stats + flat * 2));
            const float2 part = __ldcg(reinterpret_cast<const float2*>(args.partial + flat * kHead + dim));
            const float higher = fmaxf(best, number.x);
            const float left = exp2_fast(best - higher), right = exp2_fast(number.x - higher);
            value.x = value.x * left + part.x * right;
            value.y = value.y * left + part.y * right;
            sum = sum * left + number.y * right;
            best = higher;
          }
          *reinterpret_cast<uint32_t*>(out + head * kHead + dim) = pack(value.x / sum, value.y / sum);
        }
      }
    }
    __syncthreads();  // the ring is free for the next item
  }
  if (!has_waited) wait_for_previous();
  // Padding rows have no item.
  for (int row = worker; row < args.sequences; row += args.workers) {
    if (__ldg(args.counts + 1 + row) != 0) continue;
    auto* out = static_cast<__nv_bfloat16*>(args.out) + int64_t(row) * args.out_stride + head0 * kHead;
    for (int i = threadIdx.x; i < args.heads_per_group * kHead; i += kWarps * 32) out[i] = __nv_bfloat16(0.f);
  }
}

template <int kHead, int kColumns, int kWarps, int kStages>
cudaError_t launch_shape(const AttentionDecodeArgs& args, cudaStream_t stream) {
  const Shape shape{args.groups * args.workers, kWarps * 32, Decode<kHead, kColumns, kWarps, kStages>::kSharedBytes};
  return launch(attention_decode<kHead, kColumns, kWarps, kStages>, shape, args.follow, stream, args);
}

template <int kHead, int kColumns>
cudaError_t launch_variant(const AttentionDecodeArgs& args, int variant, cudaStream_t stream) {
  switch (variant) {
    case 0: return launch_shape<kHead, kColumns, 2, 3>(args, stream);
    case 1: return launch_shape<kHead, kColumns, 4, 3>(args, stream);
#ifdef OPENLORA_ATTENTION_VARIANTS
    case 2: return launch_shape<kHead, kColumns, 4, 2>(args, stream);
    case 3: return launch_shape<kHead, kColumns, 2, 4>(args, stream);
    case 4: return launch_shape<kHead, kColumns, 1, 3>(args, stream);
    case 5: return launch_shape<kHead, kColumns, 3, 3>(args, stream);
    case 6: return launch_shape<kHead, kColumns, 1, 6>(args, stream);
    case 7: return launch_shape<kHead, kColumns, 4, 4>(args, stream);
#endif
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool can_attend_decode(int32_t head_dim, int32_t heads_per_group, int32_t block_size) {
  const bool is_power_of_two = (block_size & (block_size - 1)) == 0;
  return (head_dim == 64 || head_dim == 128) && heads_per_group >= 1 && heads_per_group <= 16 && block_size >= kTileKeys &&
     is_power_of_two;
}

cudaError_t launch_attention_decode(const AttentionDecodeArgs& args, int variant, cudaStream_t stream) {
  if (args.sequences == 0) return cudaSuccess;
  if (!can_attend_decode(args.head_dim, args.heads_per_group, args.block_size)) return cudaErrorInvalidValue;
  const bool is_wide = args.heads_per_group > 8;
  if (args.head_dim == 64) return is_wide ? launch_variant<64, 2>(args, variant, stream) : launch_variant<64, 1>(args, variant, stream);
  return is_wide ? launch_variant<128, 2>(args, variant, stream) : launch_variant<128, 1>(args, variant, stream);
}

}  // namespace openlora
