#include "core/copy_batch.h"

#include "core/cuda_check.h"
#include "core/driver_function.h"

namespace moe_infer {
namespace {

// As of CUDA 12.8. Later ones say nothing of the copy that failed, and keep this form for who asks for it.
constexpr unsigned kCuda12Point8 = 12080;
using CopyAll = CUresult (*)(CUdeviceptr* destinations, CUdeviceptr* sources, size_t* sizes, size_t count,
                             CUmemcpyAttributes* attributes, size_t* first_of_attributes, size_t attributes_count,
                             size_t* failed, CUstream stream);

}  // namespace

CopyBatch::CopyBatch() : copy_(driver_function("cuMemcpyBatchAsync", kCuda12Point8)) {}

void CopyBatch::add(void* to, void const* from, uint64_t bytes) {
  if (bytes == 0) return;
  destinations_.push_back(reinterpret_cast<CUdeviceptr>(to));
  sources_.push_back(reinterpret_cast<CUdeviceptr>(from));
  sizes_.push_back(bytes);
  bytes_ += bytes;
}

void CopyBatch::enqueue(cudaStream_t stream) {
  if (sizes_.size() < 2 || !enqueue_at_once(stream)) {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      MOE_CUDA_CHECK(cudaMemcpyAsync(reinterpret_cast<void*>(destinations_[i]),
                                     reinterpret_cast<void const*>(sources_[i]), sizes_[i], cudaMemcpyHostToDevice,
                                     stream));
    }
  }
  clear();
}

// False: nothing is enqueued.
bool CopyBatch::enqueue_at_once(cudaStream_t stream) {
  if (copy_ == nullptr) return false;
  CUmemcpyAttributes attributes = {};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t first = 0;
  size_t failed = 0;
  auto const copy = reinterpret_cast<CopyAll>(copy_);
  CUresult const status = copy(destinations_.data(), sources_.data(), sizes_.data(), sizes_.size(), &attributes, &first,
                               1, &failed, stream);
  if (status == CUDA_SUCCESS) return true;
  if (status != CUDA_ERROR_NOT_SUPPORTED) {
    throw Error(MOE_INFER_CUDA, "CUDA: cuMemcpyBatchAsync failed with " + std::to_string(status));
  }
  copy_ = nullptr;
  return false;
}

void CopyBatch::clear() {
  destinations_.clear();
  sources_.clear();
  sizes_.clear();
  bytes_ = 0;
}

}  // namespace moe_infer
