// Copies by the copy engine of what a kernel planned: the kernel writes into page-locked memory which experts are
// missing, the host sees it there without a synchronisation, and enqueues the copies on a stream of their own, each
// followed by the rise of the slot's flag. The kernels that compute are enqueued after that and wait for the flags. So
// nothing that a kernel waits for is enqueued after it: streams need not run side by side for this to come to an end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "core/device_memory.h"
#include "fetch/copy_source.h"
#include "fetch/expert_bus.h"
#include "fetch/fetch_tables.h"

namespace moe_infer {

class HostCopy {
 public:
  // Throws Error(MOE_INFER_CUDA).
  HostCopy(CopySource source, int32_t slots);
  ~HostCopy();
  HostCopy(HostCopy const&) = delete;
  HostCopy& operator=(HostCopy const&) = delete;

  // False where the driver cannot raise flags in a stream; then the rest is of no use.
  bool works() const { return bus_->works(); }
  // For the kernel that plans the next call.
  CopyOrders const& next_orders() {
    ++orders_.wanted;
    return orders_;
  }
  CopySource const& source() const { return source_; }
  // Waits until the kernel that was given next_orders(), enqueued on `stream`, has written them, and enqueues the
  // copies. `next_layer`: for which ExpertBus the kernel guessed, 0: none. One thread at a time. Throws
  // Error(MOE_INFER_CUDA), also for what went wrong in `stream`.
  void copy(int64_t next_layer, cudaStream_t stream);
  // When all kernels of the call are enqueued: the bus may work for the next layer.
  void fetch_ahead() { bus_->feed(); }
  // What is enqueued on `stream` from now on waits for all copies so far. Throws Error(MOE_INFER_CUDA).
  void order_before(cudaStream_t stream) const { bus_->order_before(stream); }

  // This layer among those for which ExpertBus fetches.
  int64_t id() const { return id_; }
  AheadCounters ahead_counters() const { return bus_->counters(id_); }

 private:
  void wait_for_orders(cudaStream_t stream);

  CopySource source_;
  PinnedMemory memory_;
  CopyOrders orders_;
  std::shared_ptr<ExpertBus> bus_;
  int64_t id_;
};

}  // namespace moe_infer
