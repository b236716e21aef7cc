#include "fetch/host_copy.h"

#include <cstring>
#include <utility>

#include "core/cuda_check.h"
#include "core/slices.h"

namespace moe_infer {
namespace {

// Looks between two questions whether the stream still works; a question takes as long as hundreds of looks.
constexpr int kLooks = 4096;
// Looks between two pieces for the guess, which take longer still.
constexpr int kLooksAhead = 16;

CopyOrders take_orders(Slices* slices, int32_t slots) {
  CopyOrders orders;
  orders.number = slices->take<uint32_t>(1);
  orders.count = slices->take<int32_t>(1);
  orders.guess = slices->take<int32_t>(1);
  orders.items = slices->take<FetchItem>(static_cast<size_t>(slots));
  return orders;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

HostCopy::HostCopy(CopySource source, int32_t slots)
    : source_(std::move(source)), bus_(ExpertBus::of_device()), id_(bus_->enter(&source_)) {
  Slices sizes(nullptr);
  take_orders(&sizes, slots);
  memory_ = allocate_pinned(sizes.bytes());
  std::memset(memory_.bytes(), 0, sizes.bytes());
  Slices slices(memory_.bytes());
  orders_ = take_orders(&slices, slots);  // page-locked memory has one address, on the host and on the device
}

HostCopy::~HostCopy() { bus_->leave(id_); }

void HostCopy::copy(int64_t next_layer, cudaStream_t stream) {
  wait_for_orders(stream);
  bus_->bring(id_, orders_.items, *orders_.count, stream);
  if (next_layer != 0) bus_->guess(next_layer, *orders_.guess);
}

void HostCopy::wait_for_orders(cudaStream_t stream) {
  auto const has_come = [this] { return __atomic_load_n(orders_.number, __ATOMIC_ACQUIRE) == orders_.wanted; };
  for (;;) {
    for (int i = 0; i < kLooks; ++i) {
      if (has_come()) return;
      if (i % kLooksAhead == 0) bus_->feed();
      pause();
    }
    cudaError_t const status = cudaStreamQuery(stream);
    if (status == cudaErrorNotReady) continue;
    MOE_CUDA_CHECK(status);
    if (has_come()) return;
    throw Error(MOE_INFER_INTERNAL, "MoELayer: the kernel that plans a fetch ended without orders");
  }
}

}  // namespace moe_infer
