#include "core/device_limits.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "core/device_memory.h"

namespace moe_infer {
namespace {

constexpr int kDevices = 64;

// The attribute of the current device; `known` holds it plus one.
int attribute(cudaDeviceAttr name, std::array<std::atomic<int>, kDevices>& known) {
  int const device = current_device();
  bool const keep = device < kDevices;
  if (keep) {
    int const value = known[static_cast<size_t>(device)];
    if (value != 0) {
      return value - 1;
    }
  }
  int value = 0;
  MOE_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  if (keep) {
    known[static_cast<size_t>(device)] = value + 1;
  }
  return value;
}

}  // namespace

int multiprocessors() {
  static std::array<std::atomic<int>, kDevices> known{};
  return attribute(cudaDevAttrMultiProcessorCount, known);
}

bool is_hopper() {
  static std::array<std::atomic<int>, kDevices> major{};
  static std::array<std::atomic<int>, kDevices> minor{};
  return attribute(cudaDevAttrComputeCapabilityMajor, major) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, minor) == 0;
}

void allow_shared_memory(void const* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, void const*>> allowed;
  std::pair<int, void const*> const key{current_device(), kernel};
  std::lock_guard<std::mutex> const lock(mutex);
  if (allowed.count(key) != 0) {
    return;
  }
  MOE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  allowed.insert(key);
}

}  // namespace moe_infer
