// Threads that wait for work, for a reader that is called again and again: starting twelve threads and giving each fresh memory takes as
// long as a tenth of their work.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace openlora {

class Crew {
 public:
  // The caller is one of `size`. Fewer where the system gives no more threads.
  explicit Crew(int size);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  // task(0) .. task(size - 1), each on a thread of its own, 0 on the caller's; returns when all are done. One call at a time.
  void run(const std::function<void(int)>& task);

 private:
  void wait_for_work(int member);

  std::mutex calls_, state_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  uint64_t round_ = 0;
  int busy_ = 0;
  bool is_over_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace openlora
