// The ring of A in shared memory that both ways to shrink on Hopper share (lora_stream_sm90.cu, lora_wide.cuh), and their arguments.
#pragma once

#include "lora_work.h"

namespace openlora {

constexpr int kStreamWarps = 8;      // and stages of a task at most
constexpr int kStreamColumns = 512;  // inputs of a stage: 16 ranks, one behind the other
// With 64 bytes between ranks 8 lanes that read 16 bytes each of two of them meet no bank twice.
constexpr int kStreamPitch = kStreamColumns * 2 + 64;
constexpr int kStageBytes = 16 * kStreamPitch;
constexpr int kStreamRing = 12;
constexpr int kStreamBarriers = 32;  // at least the ring and a task's stages: a barrier's last stage has then been left by all
constexpr int kStreamStep = 32;      // k of one load: 4 lanes of 8
constexpr int kStreamFull = kStreamColumns / kStreamStep;  // steps of a stage
constexpr int kStreamDepth = kStreamFull;                  // loads of x in flight
constexpr int kSumPitch = 20;        // of 16 ranks: the fragments' stores meet no bank twice
constexpr int kSumBytes = kStreamWarps * 16 * kSumPitch * 4;
constexpr int kStreamSharedBytes = kStreamRing * kStageBytes + kSumBytes + kStreamBarriers * 8;

struct StreamParams {
  const void* x;
  int64_t x_stride;
  int inputs;
  int chunks;  // stages of a task
  bool waits_last;
  int processors;
  int readable;  // items that the block of tiles has room for: what may be read before it is known whether they are there
  LoraWork work;  // v_planes: ranges of k
};

// First of the inputs of a stage, and how many: none where k has ended.
__device__ __forceinline__ int stream_column(const StreamParams& p, int plane, int chunk) {
  return (plane * p.chunks + chunk) * kStreamColumns;
}
__device__ __forceinline__ int stream_columns(const StreamParams& p, int column) {
  return max(0, min(kStreamColumns, p.inputs - column));
}

}  // namespace openlora
