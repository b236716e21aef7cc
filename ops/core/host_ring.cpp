#include "core/host_ring.h"

#include <algorithm>
#include <map>
#include <utility>

namespace moe_infer {
namespace {

// One thread reads about 6 GB/s out of the page cache and copies 8 to 12 GB/s from memory; eight read 34 to 38.
constexpr unsigned kMostThreads = 8;

}  // namespace

std::shared_ptr<HostRing> HostRing::shared(int device) {
  static std::mutex mutex;
  // Never destroyed: at the end of the process a ring may outlive what is destroyed there.
  static auto* const rings = new std::map<int, std::weak_ptr<HostRing>>();
  std::lock_guard<std::mutex> const lock(mutex);
  auto ring = (*rings)[device].lock();
  if (ring == nullptr) {
    ring = std::make_shared<HostRing>(device);
    (*rings)[device] = ring;
  }
  return ring;
}

HostRing::HostRing(int device)
    : device_(device), memory_(allocate_pinned(kChunkBytes * kChunks)), chunks_(static_cast<size_t>(kChunks)) {
  unsigned const count = std::clamp(std::thread::hardware_concurrency() / 2, 1U, kMostThreads);
  try {
    for (unsigned i = 0; i < count; ++i) {
      threads_.emplace_back([this] { work(); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

HostRing::~HostRing() {
  stop();
  DeviceGuard const guard(device_);
  for (auto const& chunk : chunks_) {
    try {
      chunk.free.wait();  // the copy engine may still read the buffers
    } catch (...) {       // the context is gone, and with it the copies
    }
  }
}

void HostRing::stop() {
  {
    std::lock_guard<std::mutex> const lock(mutex_);
    stopping_ = true;
  }
  to_fill_.notify_all();
  for (auto& thread : threads_) {
    thread.join();
  }
}

void HostRing::work() {
  cudaSetDevice(device_);
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    to_fill_.wait(lock, [&] { return stopping_ || started_ < submitted_; });
    if (stopping_) {
      return;
    }
    uint64_t const ticket = started_++;
    lock.unlock();
    fill(chunk(ticket), buffer(ticket));
    lock.lock();
    chunk(ticket).filled = true;
    filled_.notify_all();
  }
}

void HostRing::fill(Chunk& chunk, uint8_t* buffer) {
  try {
    chunk.free.wait();
    chunk.fill(buffer);
  } catch (...) {
    chunk.error = std::current_exception();
  }
}

void HostRing::Session::submit(Fill fill) {
  {
    std::lock_guard<std::mutex> const lock(ring_.mutex_);
    auto& chunk = ring_.chunk(ring_.submitted_);
    chunk.fill = std::move(fill);
    chunk.filled = false;
    chunk.error = nullptr;
    ++ring_.submitted_;
  }
  ring_.to_fill_.notify_one();
}

void const* HostRing::Session::take() {
  std::unique_lock<std::mutex> lock(ring_.mutex_);
  auto& chunk = ring_.chunk(ring_.released_);
  ring_.filled_.wait(lock, [&] { return chunk.filled; });
  if (chunk.error != nullptr) {
    std::rethrow_exception(chunk.error);
  }
  return ring_.buffer(ring_.released_);
}

void HostRing::Session::release(cudaStream_t stream) {
  auto& chunk = ring_.chunk(ring_.released_);
  chunk.free.record(stream);
  std::lock_guard<std::mutex> const lock(ring_.mutex_);
  ++ring_.released_;
}

HostRing::Session::~Session() {
  std::unique_lock<std::mutex> lock(ring_.mutex_);
  // Only after an error: chunks that nobody took. A copy from one may be enqueued without its event: hence the wait
  // for the stream in the caller, which is over when this runs.
  for (; ring_.released_ < ring_.submitted_; ++ring_.released_) {
    auto& chunk = ring_.chunk(ring_.released_);
    ring_.filled_.wait(lock, [&] { return chunk.filled; });
  }
}

}  // namespace moe_infer
