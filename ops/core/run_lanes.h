// Streams on which the experts of a call run in turn. The last blocks of an expert leave most multiprocessors idle, and
// the next one's begin there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "core/device_memory.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

class RunLanes {
 public:
  // One lane or kMostLanes. The first one is the stream of the call. Throws Error(MOE_INFER_CUDA), as all here do.
  explicit RunLanes(bool two) {
    if (two) second_.emplace();
  }

  int32_t count() const { return second_ ? kMostLanes : 1; }
  cudaStream_t stream(int32_t lane) const { return lane == 0 ? first_ : second_->stream.get(); }

  // What the lanes get from now on comes after what is enqueued on `stream`.
  void fork(cudaStream_t stream) {
    first_ = stream;
    if (!second_) return;
    second_->forked.record(stream);
    second_->forked.order_before(second_->stream.get());
  }
  // What is enqueued on `stream` from now on comes after what the lanes got.
  void join() const {
    if (!second_) return;
    second_->ended.record(second_->stream.get());
    second_->ended.order_before(first_);
  }

 private:
  static_assert(kMostLanes == 2, "the stream of the call and one more");
  struct Second {
    Stream stream;
    Event forked, ended;
  };
  cudaStream_t first_ = nullptr;
  std::optional<Second> second_;
};

}  // namespace moe_infer
