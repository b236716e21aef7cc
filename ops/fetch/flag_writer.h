// Words that a stream writes when all that was enqueued on it before is done.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moe_infer {

class FlagWriter {
 public:
  // Throws Error(MOE_INFER_CUDA).
  FlagWriter();
  // False where the driver does not do it; then the rest is of no use. `flag`: in memory that the device can write.
  bool works_for(cudaStream_t stream, uint32_t* flag) const;
  // Throws Error(MOE_INFER_CUDA).
  void write(cudaStream_t stream, uint32_t* flag, uint32_t value) const;

  // Several at once: they hold the stream up as long as one. Throws Error(MOE_INFER_CUDA).
  void add(uint32_t* flag, uint32_t value);
  void write_added(cudaStream_t stream);
  size_t added() const { return added_.size(); }
  void clear() { added_.clear(); }

 private:
  int try_write(cudaStream_t stream, uint32_t* flag, uint32_t value) const;  // the driver's status, 0: done
  void* write_value_;   // the driver's cuStreamWriteValue32; null: it has none
  void* write_values_;  // its cuStreamBatchMemOp; null: it has none
  std::vector<CUstreamBatchMemOpParams> added_;
};

}  // namespace moe_infer
