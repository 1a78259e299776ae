// A tiny pool for parallel regions of a few microseconds.
//
// Ownership: workers belong to the process and are started on first use; one region runs at a time, and a second caller
// meanwhile simply runs its own region alone. Chunks are claimed one by one, so a thread that lost its core to another
// process delays only the chunk it holds: the caller never waits for a worker that has not joined.
// Idle workers spin for at most kSpinNs, giving way to other processes from kPauseNs on, then sleep in the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openlora {

using Task = void (*)(void* context, int64_t chunk);

constexpr int kMaxThreads = 64;
constexpr int64_t kPauseNs = 30'000;
constexpr int64_t kSpinNs = 500'000;

// Run task(context, 0 .. chunks - 1) on at most `threads` threads, the caller among them; returns when all are done.
void run_parallel(int threads, int64_t chunks, Task task, void* context);

// A buffer of this thread, 64-byte aligned, kept for the next call; `which` separates buffers that live at the same time.
enum Scratch { kPlanScratch, kShrinkScratch, kRowScratch, kTileScratch, kScratchCount };
void* scratch(Scratch which, size_t bytes);

}  // namespace openlora
