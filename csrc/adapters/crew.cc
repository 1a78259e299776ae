#include "adapters/crew.h"

#include <system_error>

namespace openlora {

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
