#include "fetch/flag_writer.h"

#include <string>

#include "core/cuda_check.h"
#include "core/driver_function.h"

namespace moe_infer {
namespace {

using WriteValue = CUresult (*)(CUstream stream, CUdeviceptr address, cuuint32_t value, unsigned flags);
using WriteValues = CUresult (*)(CUstream stream, unsigned count, CUstreamBatchMemOpParams* writes, unsigned flags);

}  // namespace

FlagWriter::FlagWriter()
    : write_value_(driver_function("cuStreamWriteValue32")), write_values_(driver_function("cuStreamBatchMemOp")) {}

bool FlagWriter::works_for(cudaStream_t stream, uint32_t* flag) const {
  // Some drivers have the function and refuse to do it.
  if (write_value_ == nullptr || try_write(stream, flag, 0) != 0) return false;
  MOE_CUDA_CHECK(cudaStreamSynchronize(stream));
  return true;
}

void FlagWriter::write(cudaStream_t stream, uint32_t* flag, uint32_t value) const {
  int const status = try_write(stream, flag, value);
  if (status != 0) throw Error(MOE_INFER_CUDA, "CUDA: cuStreamWriteValue32 failed with " + std::to_string(status));
}

void FlagWriter::add(uint32_t* flag, uint32_t value) {
  CUstreamBatchMemOpParams one = {};
  one.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  one.writeValue.address = reinterpret_cast<CUdeviceptr>(flag);
  one.writeValue.value = value;
  added_.push_back(one);
}

void FlagWriter::write_added(cudaStream_t stream) {
  std::vector<CUstreamBatchMemOpParams> writes;
  writes.swap(added_);
  if (writes.size() > 1 && write_values_ != nullptr) {
    auto const write_all = reinterpret_cast<WriteValues>(write_values_);
    if (write_all(stream, static_cast<unsigned>(writes.size()), writes.data(), 0) == CUDA_SUCCESS) return;
    write_values_ = nullptr;  // an error of the stream shows itself below
  }
  for (auto const& one : writes) {
    write(stream, reinterpret_cast<uint32_t*>(one.writeValue.address), static_cast<uint32_t>(one.writeValue.value));
  }
}

int FlagWriter::try_write(cudaStream_t stream, uint32_t* flag, uint32_t value) const {
  auto const write = reinterpret_cast<WriteValue>(write_value_);
  return write(stream, reinterpret_cast<uintptr_t>(flag), value, 0);
}

}  // namespace moe_infer
