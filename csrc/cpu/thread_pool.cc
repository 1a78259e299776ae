#include "cpu/thread_pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace openlora {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Wait in the cheapest way that keeps the reaction time: pause, then yield the core, then say so (false).
template <class Ready>
bool spin(Ready ready) {
  int64_t start = 0;
  for (int round = 0;; ++round) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      _mm_pause();
    }
    const int64_t now = now_ns();
    if (start == 0) start = now;
    if (now - start > kSpinNs) return false;
    if (now - start > kPauseNs) sched_yield();
  }
}

class Pool {
 public:
  void run(int threads, int64_t chunks, Task task, void* context) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > chunks) threads = static_cast<int>(chunks);
    std::unique_lock<std::mutex> owner(mutex_, std::try_to_lock);
    if (threads <= 1 || !owner.owns_lock()) {
      for (int64_t i = 0; i < chunks; ++i) task(context, i);
      return;
    }
    while (started_ < threads - 1) start_worker();
    task_ = task;
    context_ = context;
    chunks_ = chunks;
    next_.store(0, std::memory_order_relaxed);
    // The gate holds: region number | helpers wanted | helpers inside. Odd region numbers are open.
    region_ += 1;
    gate_.store(pack(region_, threads - 1, 0), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
    work();
    close();
  }

 private:
  // 32 bits of region, 16 bits of free places, 16 bits of helpers inside.
  static uint64_t pack(uint32_t region, uint64_t places, uint64_t inside) {
    return (static_cast<uint64_t>(region) << 32) | (places << 16) | inside;
  }
  static uint32_t region_of(uint64_t gate) { return static_cast<uint32_t>(gate >> 32); }
  static uint64_t places_of(uint64_t gate) { return (gate >> 16) & 0xffff; }
  static uint64_t inside_of(uint64_t gate) { return gate & 0xffff; }

  void work() {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks_) return;
      task_(context_, chunk);
    }
  }

  // No helper may join any more; wait for those inside.
  void close() {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while (!gate_.compare_exchange_weak(gate, pack(region_of(gate), 0, inside_of(gate)), std::memory_order_acq_rel)) {
    }
    while (inside_of(gate_.load(std::memory_order_acquire)) != 0) {
      if (!spin([this] { return inside_of(gate_.load(std::memory_order_acquire)) == 0; })) sched_yield();
    }
  }

  void start_worker() {
    started_ += 1;
    std::thread([this] { serve(); }).detach();
  }

  void serve() {
    uint32_t seen = 0;
    for (;;) {
      wait_for_region(seen);
      uint64_t gate = gate_.load(std::memory_order_acquire);
      seen = region_of(gate);
      while (places_of(gate) > 0 && region_of(gate) == seen) {
        if (gate_.compare_exchange_weak(gate, pack(seen, places_of(gate) - 1, inside_of(gate) + 1), std::memory_order_acq_rel)) {
          work();
          gate_.fetch_sub(1, std::memory_order_acq_rel);
          break;
        }
      }
    }
  }

  void wait_for_region(uint32_t seen) {
    auto is_new = [this, seen] { return region_of(gate_.load(std::memory_order_acquire)) != seen; };
    while (!spin(is_new)) {
      const uint32_t ticket = bell_.load(std::memory_order_seq_cst);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (!is_new()) syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAIT_PRIVATE, ticket, nullptr, nullptr, 0);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void wake() {
    bell_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  std::mutex mutex_;
  int started_ = 0;
  uint32_t region_ = 0;
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> sleepers_{0};
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0;
};

// A child of fork() has none of the parent's workers: it gets a new pool, the old one is left as it was.
Pool*& current() {
  static Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { current() = new Pool(); });
    return new Pool();
  }();
  return pool;
}

struct Buffers {
  void* data[kScratchCount] = {};
  size_t bytes[kScratchCount] = {};
  ~Buffers() {
    for (void* buffer : data) std::free(buffer);
  }
};

}  // namespace

void run_parallel(int threads, int64_t chunks, Task task, void* context) { current()->run(threads, chunks, task, context); }

void* scratch(Scratch which, size_t bytes) {
  thread_local Buffers buffers;
  if (buffers.bytes[which] < bytes) {
    std::free(buffers.data[which]);
    buffers.bytes[which] = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.data[which] = std::aligned_alloc(64, rounded);
    if (buffers.data[which] == nullptr) throw std::bad_alloc();
    buffers.bytes[which] = rounded;
  }
  return buffers.data[which];
}

}  // namespace openlora
