// CUDA objects with an owner: freed in the destructor, never copied. Destructors report nothing: at the end of the
// process the CUDA runtime may already be gone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "core/cuda_check.h"

namespace moe_infer {

// Makes `device` current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) noexcept {
    restore_ = cudaGetDevice(&previous_) == cudaSuccess && previous_ != device;
    if (restore_) {
      cudaSetDevice(device);
    }
  }
  ~DeviceGuard() {
    if (restore_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(DeviceGuard const&) = delete;
  DeviceGuard& operator=(DeviceGuard const&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

// While it lives, this thread may do what a capture by another thread forbids to all.
class RelaxedCapture {
 public:
  RelaxedCapture() noexcept { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(RelaxedCapture const&) = delete;
  RelaxedCapture& operator=(RelaxedCapture const&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline int current_device() {
  int device = 0;
  MOE_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

inline void free_device(void* pointer) noexcept { cudaFree(pointer); }
inline void free_pinned(void* pointer) noexcept { cudaFreeHost(pointer); }

template <void (*Free)(void*) noexcept>
class Memory {
 public:
  Memory() = default;
  explicit Memory(void* data) : data_(data) {}
  ~Memory() {
    if (data_ != nullptr) {
      Free(data_);
    }
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  Memory(Memory const&) = delete;
  Memory& operator=(Memory const&) = delete;

  uint8_t* bytes() const { return static_cast<uint8_t*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};
using DeviceMemory = Memory<free_device>;
using PinnedMemory = Memory<free_pinned>;

// `what` and `remedy` go into the error: "not enough GPU memory for WHAT: ... ; REMEDY".
inline DeviceMemory allocate_device(size_t bytes, std::string const& what, std::string const& remedy) {
  void* data = nullptr;
  cudaError_t const status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is reported here; later launches must not see it
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    MOE_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    throw Error(MOE_INFER_CUDA, "not enough GPU memory for " + what + ": " + std::to_string(bytes) +
                                    " bytes are needed, " + std::to_string(free_bytes) + " of " +
                                    std::to_string(total_bytes) + " are free; " + remedy);
  }
  MOE_CUDA_CHECK(status);
  return DeviceMemory(data);
}

inline PinnedMemory allocate_pinned(size_t bytes) {
  void* data = nullptr;
  MOE_CUDA_CHECK(cudaMallocHost(&data, bytes));
  return PinnedMemory(data);
}

class Event {
 public:
  Event() { MOE_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() {
    if (event_ != nullptr) {
      cudaEventDestroy(event_);
    }
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event(Event const&) = delete;
  Event& operator=(Event const&) = delete;
  Event& operator=(Event&&) = delete;

  void record(cudaStream_t stream) const { MOE_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  // Work enqueued on `stream` from now on waits for the last record. No wait if there was none.
  void order_before(cudaStream_t stream) const { MOE_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
  void wait() const { MOE_CUDA_CHECK(cudaEventSynchronize(event_)); }
  // cudaErrorNotReady: the last record has not been reached.
  cudaError_t query() const { return cudaEventQuery(event_); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Does not wait for the legacy default stream.
class Stream {
 public:
  Stream() { MOE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(Stream const&) = delete;
  Stream& operator=(Stream const&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace moe_infer
