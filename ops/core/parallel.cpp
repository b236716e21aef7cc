#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_infer {
namespace {

constexpr unsigned kMostThreads = 8;

}  // namespace

void for_each_parallel(size_t count, std::function<void(size_t)> const& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto const worker = [&] {
    try {
      for (auto i = next++; i < count; i = next++) {
        work(i);
      }
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> const lock(mutex);
      error = error ? error : std::current_exception();
    }
  };
  auto const wanted = std::min<size_t>({count, kMostThreads, std::max(1U, std::thread::hardware_concurrency())});
  std::vector<std::thread> threads;
  try {
    while (threads.size() + 1 < wanted) {
      threads.emplace_back(worker);
    }
  } catch (std::exception const&) {  // no more threads to be had: with those that are there, it takes longer
  }
  worker();
  for (auto& thread : threads) {
    thread.join();
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

}  // namespace moe_infer
