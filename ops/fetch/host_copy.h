// Copies by the copy engine of what a kernel planned: the kernel writes into page-locked memory which experts are
// missing, the host sees it there without a synchronisation, and enqueues the copies on a stream of their own, each
// followed by the rise of the slot's flag. The kernels that compute are enqueued after that and wait for the flags. So
// nothing that a kernel waits for is enqueued after it: streams need not run side by side for this to come to an end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/device_memory.h"
#include "fetch/fetch_tables.h"

namespace moe_infer {

// An expert is copied in parts: its tensors.
struct CopyPart {
  uint64_t offset_in_slot = 0;
  uint64_t bytes = 0;
  bool late = false;  // late ones come after the others
};
struct CopySource {
  std::vector<CopyPart> parts;         // late ones last
  std::vector<void const*> addresses;  // (experts, parts): page-locked memory
  uint8_t* slots = nullptr;
  uint64_t slot_bytes = 0;
  uint32_t* there = nullptr;  // of each slot

  uint64_t expert_bytes() const;
};

class HostCopy {
 public:
  // Throws Error(MOE_INFER_CUDA).
  HostCopy(CopySource source, int32_t slots);

  // False where the driver cannot raise flags in a stream; then the rest is of no use.
  bool works() const { return works_; }
  // For the kernel that plans the next call.
  CopyOrders const& next_orders() {
    ++orders_.wanted;
    return orders_;
  }
  CopySource const& source() const { return source_; }
  // Waits until the kernel that was given next_orders(), enqueued on `stream`, has written them, and enqueues the
  // copies. One thread at a time. Throws Error(MOE_INFER_CUDA), also for what went wrong in `stream`.
  void copy(cudaStream_t stream);
  // What is enqueued on `stream` from now on waits for all copies so far. Throws Error(MOE_INFER_CUDA).
  void order_before(cudaStream_t stream) const;

 private:
  void wait_for_orders(cudaStream_t stream);
  void copy_expert(FetchItem const& item);
  int raise(int32_t slot, uint32_t value);  // the driver's status, 0: done

  CopySource source_;
  PinnedMemory memory_;
  CopyOrders orders_;
  Event copied_;
  std::shared_ptr<Stream> stream_;
  void* write_value_;  // the driver's cuStreamWriteValue32; null: it has none
  bool works_ = false;
};

}  // namespace moe_infer
