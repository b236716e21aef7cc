// Way to the device of weights that are not pinned: a few threads read chunks of them into a ring of pinned buffers,
// from which the copy engine takes them. So reading (from the page cache, the disk or memory) overlaps with copying.
// One ring for a device in the process.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/device_memory.h"

namespace moe_infer {

class HostRing {
 public:
  // Enough chunks in an expert of a few MiB for all threads, and large enough for the bus.
  static constexpr uint64_t kChunkBytes = uint64_t{1} << 20U;
  static constexpr int kChunks = 32;

  // That of the device; made on first use, freed with its last user.
  static std::shared_ptr<HostRing> shared(int device);
  explicit HostRing(int device);
  ~HostRing();
  HostRing(HostRing const&) = delete;
  HostRing& operator=(HostRing const&) = delete;

  // Use of the ring by one thread, from its first chunk to its last.
  class Session {
   public:
    explicit Session(HostRing& ring) : ring_(ring), lock_(ring.users_) {}
    ~Session();  // waits until no thread reads what was submitted
    Session(Session const&) = delete;
    Session& operator=(Session const&) = delete;

    // Has `fill`, on a thread of the ring, write a chunk of at most kChunkBytes to where it is told. At most kChunks
    // chunks may be between submit and release.
    using Fill = std::function<void(void*)>;
    void submit(Fill fill);
    // The oldest submitted chunk that was not released, in pinned memory. Blocks until it is filled; throws what its
    // `fill` threw.
    void const* take();
    // What was enqueued on `stream` so far reads the chunk given by take; then its buffer is used again.
    void release(cudaStream_t stream);

   private:
    HostRing& ring_;
    std::unique_lock<std::mutex> lock_;
  };

 private:
  struct Chunk {
    Event free;  // recorded when the copy engine is done with it
    std::function<void(void*)> fill;
    bool filled = false;
    std::exception_ptr error;
  };

  void work();
  void fill(Chunk& chunk, uint8_t* buffer);
  void stop();
  Chunk& chunk(uint64_t ticket) { return chunks_[ticket % kChunks]; }
  uint8_t* buffer(uint64_t ticket) const { return memory_.bytes() + ticket % kChunks * kChunkBytes; }

  int device_;
  PinnedMemory memory_;
  std::vector<Chunk> chunks_;
  std::mutex users_;

  std::mutex mutex_;  // of what follows
  std::condition_variable to_fill_, filled_;
  uint64_t submitted_ = 0;  // tickets 0, 1, 2, ...: given,
  uint64_t started_ = 0;    // taken by a thread,
  uint64_t released_ = 0;   // handed to the copy engine
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace moe_infer
