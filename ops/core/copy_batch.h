// Copies that the copy engine gets at once. Between two copies of a batch the bus rests for less than a microsecond,
// between two calls of cudaMemcpyAsync for 2.5 (docs/fetching.md).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moe_infer {

class CopyBatch {
 public:
  // Throws Error(MOE_INFER_CUDA).
  CopyBatch();

  // From page-locked memory to the device. Nothing for no bytes.
  void add(void* to, void const* from, uint64_t bytes);
  uint64_t bytes() const { return bytes_; }
  // Enqueues the copies, which may be done in any order, and forgets them. Throws Error(MOE_INFER_CUDA).
  void enqueue(cudaStream_t stream);
  void clear();

 private:
  bool enqueue_at_once(cudaStream_t stream);

  void* copy_;  // the driver's cuMemcpyBatchAsync; null: it has none, and copies are enqueued one by one
  std::vector<CUdeviceptr> destinations_, sources_;
  std::vector<size_t> sizes_;
  uint64_t bytes_ = 0;
};

}  // namespace moe_infer
