#include "fetch/host_copy.h"

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "core/cuda_check.h"
#include "core/slices.h"

namespace moe_infer {
namespace {

// Looks between two questions whether the stream still works; a question takes as long as hundreds of looks.
constexpr int kLooks = 4096;

using WriteValue = int (*)(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned flags);

void* find_write_value() {
  constexpr unsigned kCuda12 = 12000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  MOE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &found, kCuda12, cudaEnableDefault, &result));
  return result == cudaDriverEntryPointSuccess ? found : nullptr;
}

// One for all layers of the current device: they fetch one after the other.
std::shared_ptr<Stream> shared_stream() {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Stream>> streams;
  std::lock_guard<std::mutex> const lock(mutex);
  auto& known = streams[current_device()];
  auto stream = known.lock();
  if (stream == nullptr) {
    stream = std::make_shared<Stream>();
    known = stream;
  }
  return stream;
}

CopyOrders take_orders(Slices* slices, int32_t slots) {
  CopyOrders orders;
  orders.number = slices->take<uint32_t>(1);
  orders.count = slices->take<int32_t>(1);
  orders.items = slices->take<FetchItem>(static_cast<size_t>(slots));
  return orders;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

uint64_t CopySource::expert_bytes() const {
  uint64_t bytes = 0;
  for (auto const& part : parts) bytes += part.bytes;
  return bytes;
}

HostCopy::HostCopy(CopySource source, int32_t slots)
    : source_(std::move(source)), stream_(shared_stream()), write_value_(find_write_value()) {
  Slices sizes(nullptr);
  take_orders(&sizes, slots);
  memory_ = allocate_pinned(sizes.bytes());
  std::memset(memory_.bytes(), 0, sizes.bytes());
  Slices slices(memory_.bytes());
  orders_ = take_orders(&slices, slots);  // page-locked memory has one address, on the host and on the device
  // Some drivers have the function and refuse to do it. The flags mean nothing yet.
  works_ = write_value_ != nullptr && raise(0, kAllThere) == 0;
  if (works_) MOE_CUDA_CHECK(cudaStreamSynchronize(stream_->get()));
}

void HostCopy::copy(cudaStream_t stream) {
  wait_for_orders(stream);
  for (int32_t i = 0; i < *orders_.count; ++i) copy_expert(orders_.items[i]);
}

void HostCopy::order_before(cudaStream_t stream) const {
  copied_.record(stream_->get());
  copied_.order_before(stream);
}

void HostCopy::wait_for_orders(cudaStream_t stream) {
  auto const has_come = [this] { return __atomic_load_n(orders_.number, __ATOMIC_ACQUIRE) == orders_.wanted; };
  for (;;) {
    for (int i = 0; i < kLooks; ++i) {
      if (has_come()) return;
      pause();
    }
    cudaError_t const status = cudaStreamQuery(stream);
    if (status == cudaErrorNotReady) continue;
    MOE_CUDA_CHECK(status);
    if (has_come()) return;
    throw Error(MOE_INFER_INTERNAL, "MoELayer: the kernel that plans a fetch ended without orders");
  }
}

void HostCopy::copy_expert(FetchItem const& item) {
  uint8_t* const slot = source_.slots + static_cast<uint64_t>(item.slot) * source_.slot_bytes;
  size_t const parts = source_.parts.size();
  int status = 0;
  for (size_t i = 0; i < parts && status == 0; ++i) {
    auto const& part = source_.parts[i];
    if (part.late && i > 0 && !source_.parts[i - 1].late) status = raise(item.slot, kFirstThere);
    void const* const from = source_.addresses[static_cast<size_t>(item.expert) * parts + i];
    MOE_CUDA_CHECK(
        cudaMemcpyAsync(slot + part.offset_in_slot, from, part.bytes, cudaMemcpyHostToDevice, stream_->get()));
  }
  if (status == 0) status = raise(item.slot, kAllThere);
  if (status != 0) {
    throw Error(MOE_INFER_CUDA, "CUDA: cuStreamWriteValue32 failed with " + std::to_string(status));
  }
}

int HostCopy::raise(int32_t slot, uint32_t value) {
  auto const write = reinterpret_cast<WriteValue>(write_value_);
  return write(stream_->get(), reinterpret_cast<uintptr_t>(source_.there + slot), value, 0);
}

}  // namespace moe_infer
