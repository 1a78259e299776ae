// Paged decode attention for bfloat16 caches; see attention_decode.h.
//
// A block of threads owns items of one key/value head; each of its warps owns every WARPS-th tile of 16 keys and nothing is shared
// between warps until the end: a ring of STAGES tiles in shared memory, private to the warp, filled by 16-byte asynchronous copies,
// emptied by ldmatrix. Scores are computed transposed, S^T = K Q^T, so that the 16-row side of the tensor-core instruction holds keys
// and its 8-column side the query heads of the group: a group of 4 heads wastes half of an instruction, not three quarters, and
// the online softmax, the rescaling and O^T = V^T P^T all have heads in the same place of a thread (no shuffle but the maximum's).
//
// From a block's start to its first keys stands one load: an item names its cache blocks. With a dependent launch the whole ring is on
// its way before the kernel ahead has ended, but for the newest key and value, which that kernel writes.
//
// Where a step has prompt chunks, an item may be several rows of one sequence: attention_chunk.cuh.
//
// Shared memory: WARPS x STAGES x 2 x 16 x head_dim x 2 bytes (48 KiB for 3 warps, 2 stages, head size 128: four blocks an SM).
// Bytes from memory: 4 x head_dim x groups a key, once. Bound: memory. A tile costs a warp 16 mma and about 120 instructions for
// 8 KiB: 1.5 us of issue an SM at batch 64, context 320, against 27 us of bytes.
#include "attention_decode.h"

#include <bit>
#include <cstdint>

#include "attention_chunk.cuh"
#include "attention_ring.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace openlora {
namespace {

// Two neighbouring dimensions of one head, summed over parts of the keys.
struct PairSum {
  float top = kMinusInfinity, total = 0.f;
  float2 value = {0.f, 0.f};

  __device__ __forceinline__ void add(float2 number, float2 part) {
    const float higher = fmaxf(top, number.x);
    const float left = exp2_fast(top - higher), right = exp2_fast(number.x - higher);
    value.x = value.x * left + part.x * right;
    value.y = value.y * left + part.y * right;
    total = total * left + number.y * right;
    top = higher;
  }
  __device__ __forceinline__ uint32_t result() const { return pack(value.x / total, value.y / total); }
};

// kHasChunks: items of several query tokens may be among them; rows without any are left alone then.
template <int kHead, int kColumns, int kWarps, int kStages, bool kHasChunks>
__global__ void __launch_bounds__(kWarps * 32, kHasChunks ? 12 / kWarps : 0)
  attention_decode(const __grid_constant__ AttentionDecodeArgs args) {
  using D = AttentionRing<kHead, kColumns, kWarps, kStages>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int group = blockIdx.x % args.groups, worker = blockIdx.x / args.groups;
  D self(args, group, static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
  start_dependents();
  const int lane = self.lane, warp = self.warp;
  const int heads = args.groups * args.heads_per_group;
  const int head0 = group * args.heads_per_group;
  int record = self.read_item(worker);  // beside the count, not after it; the launcher knows that there is room for it
  const int count = __ldg(args.counts);
  bool has_waited = false;

  for (int index = worker; index < count; index += args.workers) {
    self.take(record);
    const bool has_next = index + args.workers < count;
    if (has_next) record = self.read_item(index + args.workers);
    if constexpr (kHasChunks) {
      if (self.field(4) < 0) {
        Chunk<kHead, kColumns, kWarps, kStages>(self, static_cast<uint32_t>(__cvta_generic_to_shared(shared))).run(has_waited);
        if (has_next) __syncthreads();
        continue;
      }
    }
    const int tiles = self.tile_count;
    // All stages, but for the newest key, are on their way before the kernel ahead has ended.
    int block = 0;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (s < tiles) {
        block = self.block_of(s);
        self.fetch(s, block, has_waited ? -1 : self.newest);
      }
      commit_copies();
    }
    int next_block = kStages < tiles ? self.block_of(kStages) : 0;
    if (!has_waited) {
      wait_for_previous();
      has_waited = true;
      if (tiles > 0 && tiles <= kStages && self.holds_newest(tiles - 1)) self.fetch_newest(tiles - 1, block);
    }

    // Q^T as the 16 x 8 side: this lane holds dims 2 (lane % 4) + {0, 1, 8, 9} of head lane / 4.
    uint32_t q[kColumns][D::kSteps][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int head = n * 8 + lane / 4;
      const bool is_head = head < args.heads_per_group;
      const auto* row = static_cast<const __nv_bfloat16*>(args.q) + int64_t(self.field(7)) * args.q_stride +
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
      wait_for_copies<kStages - 1>();
      __syncwarp();
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
      const bool is_seen0 = key >= self.begin && key < self.end;
      const bool is_seen1 = key + 8 >= self.begin && key + 8 < self.end;
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
      const int ahead = tile + kStages;
      if (ahead < tiles) self.fetch(ahead, next_block, -1);
      commit_copies();
      if (ahead + 1 < tiles) next_block = self.block_of(ahead + 1);
    }

    // The ring is empty: it takes this warp's results, [head][kHead], then [head][2].
    float* results = reinterpret_cast<float*>(shared + warp * D::kWarpBytes);
    float* numbers = results + D::kHeads * kHead;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float sum0 = sum_over_keys(total[n][0]), sum1 = sum_over_keys(total[n][1]);
      const int head = n * 8 + (lane % 4) * 2;
      if (head >= args.heads_per_group) continue;
      float* mine = results + head * kHead + lane / 4;
#pragma unroll
      for (int step = 0; step < D::kSteps; ++step) {
        mine[step * 16] = acc[n][step][0];
        mine[step * 16 + kHead] = acc[n][step][1];
        mine[step * 16 + 8] = acc[n][step][2];
        mine[step * 16 + 8 + kHead] = acc[n][step][3];
      }
      if (lane < 4) *reinterpret_cast<float4*>(numbers + head * 2) = {top[n][0], sum0, top[n][1], sum1};
    }
    __syncthreads();

    results = reinterpret_cast<float*>(shared);
    numbers = results + D::kHeads * kHead;
    const int place = self.field(3), shares = self.field(4), first_place = self.field(5);
    auto* out = static_cast<__nv_bfloat16*>(args.out) + int64_t(self.field(7)) * args.out_stride + head0 * kHead;
    const int pairs = args.heads_per_group * (kHead / 2);
    for (int pair = threadIdx.x; pair < pairs; pair += kWarps * 32) {
      const int head = pair / (kHead / 2), dim = pair % (kHead / 2) * 2;
      PairSum all;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) all.top = fmaxf(all.top, numbers[w * D::kPitch + head * 2]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 number = *reinterpret_cast<const float2*>(numbers + w * D::kPitch + head * 2);
        const float2 part = *reinterpret_cast<const float2*>(results + w * D::kPitch + head * kHead + dim);
        const float share = exp2_fast(number.x - all.top);
        all.total += number.y * share;
        all.value.x += part.x * share;
        all.value.y += part.y * share;
      }
      if (shares == 1) {
        *reinterpret_cast<uint32_t*>(out + head * kHead + dim) = all.result();
      } else {
        const int64_t flat = int64_t(place) * heads + head0 + head;
        *reinterpret_cast<float2*>(args.partial + flat * kHead + dim) = all.value;
        if (dim == 0) *reinterpret_cast<float2*>(args.stats + flat * 2) = {all.top, all.total};
      }
    }
    if (shares > 1) {
      __syncthreads();
      int* is_last = reinterpret_cast<int*>(shared);  // over the results, which all have read
      if (threadIdx.x == 0) {
        int32_t* done = args.done + self.sequence * args.groups + group;
        __threadfence();  // for the whole block: its stores come before the barrier
        *is_last = atomicAdd(done, 1) == shares - 1;
        if (*is_last) *done = 0;
        __threadfence();
      }
      __syncthreads();
      if (*is_last) {
        for (int pair = threadIdx.x; pair < pairs; pair += kWarps * 32) {
          const int head = pair / (kHead / 2), dim = pair % (kHead / 2) * 2;
          PairSum all;
          for (int s = 0; s < shares; ++s) {
            const int64_t flat = int64_t(first_place + s) * heads + head0 + head;
            all.add(__ldcg(reinterpret_cast<const float2*>(args.stats + flat * 2)),
                    __ldcg(reinterpret_cast<const float2*>(args.partial + flat * kHead + dim)));
          }
          *reinterpret_cast<uint32_t*>(out + head * kHead + dim) = all.result();
        }
      }
    }
    if (has_next) __syncthreads();  // the ring is free for the next item
  }
  if (worker >= args.sequences) return;
  if (!has_waited) wait_for_previous();
  if constexpr (!kHasChunks) {
    // Padding rows have no item.
    for (int row = worker; row < args.sequences; row += args.workers) {
      if (__ldg(args.counts + 1 + row) != 0) continue;
      auto* out = static_cast<__nv_bfloat16*>(args.out) + int64_t(row) * args.out_stride + head0 * kHead;
      for (int i = threadIdx.x; i < args.heads_per_group * kHead; i += kWarps * 32) out[i] = __nv_bfloat16(0.f);
    }
  }
}

template <int kHead, int kColumns, int kWarps, int kStages, bool kHasChunks = false>
cudaError_t launch_shape(const AttentionDecodeArgs& args, cudaStream_t stream) {
  const Shape shape{args.groups * args.workers, kWarps * 32, AttentionRing<kHead, kColumns, kWarps, kStages>::kSharedBytes};
  return launch(attention_decode<kHead, kColumns, kWarps, kStages, kHasChunks>, shape, args.follow, stream, args);
}

template <int kHead, int kColumns>
cudaError_t launch_variant(const AttentionDecodeArgs& args, int variant, cudaStream_t stream) {
  switch (variant) {
    case 0: return launch_shape<kHead, kColumns, 3, 2>(args, stream);
    case 1: return launch_shape<kHead, kColumns, 6, 2>(args, stream);
    case 2: return launch_shape<kHead, kColumns, 8, 3>(args, stream);
    case 3: return launch_shape<kHead, kColumns, 4, 2, true>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool can_attend_decode(int32_t head_dim, int32_t heads_per_group, int32_t block_size) {
  const bool is_power_of_two = (block_size & (block_size - 1)) == 0;
  return (head_dim == 64 || head_dim == 128) && heads_per_group >= 1 && heads_per_group <= 16 && block_size >= kTileKeys &&
     is_power_of_two;
}

bool has_attention_chunks(int64_t variant) { return variant == 3; }

cudaError_t launch_attention_decode(const AttentionDecodeArgs& args, int variant, cudaStream_t stream) {
  if (args.sequences == 0) return cudaSuccess;
  if (!can_attend_decode(args.head_dim, args.heads_per_group, args.block_size)) return cudaErrorInvalidValue;
  const bool is_wide = args.heads_per_group > 8;
  AttentionDecodeArgs a = args;
  a.block_bits = std::countr_zero(static_cast<uint32_t>(args.block_size));
  if (args.head_dim == 64) return is_wide ? launch_variant<64, 2>(a, variant, stream) : launch_variant<64, 1>(a, variant, stream);
  return is_wide ? launch_variant<128, 2>(a, variant, stream) : launch_variant<128, 1>(a, variant, stream);
}

}  // namespace openlora
