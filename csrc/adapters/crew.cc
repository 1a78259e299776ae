#include "adapters/crew.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <system_error>

namespace openlora {
namespace {

constexpr int kNice = 10;

// Others go first: who launches steps and who sends tokens is neither interrupted by a thread that wakes up here nor shares its core with
// one evenly. Where the system does not allow that, all are equal.
void stand_back() {
  const sched_param none{};
  sched_setscheduler(0, SCHED_BATCH, &none);
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
}

}  // namespace

Crew::Crew(int size) {
  for (int member = 1; member < size; ++member) {
    try {
      threads_.emplace_back([this, member] { wait_for_work(member); });
    } catch (const std::system_error&) {
      return;
    }
  }
}

Crew::~Crew() {
  {
    std::lock_guard<std::mutex> lock(state_);
    is_over_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Crew::run(const std::function<void(int)>& task) {
  std::lock_guard<std::mutex> call(calls_);
  {
    std::lock_guard<std::mutex> lock(state_);
    task_ = &task;
    busy_ = static_cast<int>(threads_.size());
    ++round_;
  }
  wake_.notify_all();
  task(0);
  std::unique_lock<std::mutex> lock(state_);
  done_.wait(lock, [this] { return busy_ == 0; });
}

void Crew::wait_for_work(int member) {
  stand_back();
  uint64_t seen = 0;
  for (;;) {
    const std::function<void(int)>* task;
    {
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [&] { return is_over_ || round_ != seen; });
      if (is_over_) return;
      seen = round_;
      task = task_;
    }
    (*task)(member);
    std::lock_guard<std::mutex> lock(state_);
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace openlora
