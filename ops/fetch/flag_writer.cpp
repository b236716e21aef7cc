#include "fetch/flag_writer.h"

#include <string>

#include "core/cuda_check.h"

namespace moe_infer {
namespace {

using WriteValue = int (*)(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned flags);

}  // namespace

FlagWriter::FlagWriter() {
  constexpr unsigned kCuda12 = 12000;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  MOE_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &write_value_, kCuda12, cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess) write_value_ = nullptr;
}

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

int FlagWriter::try_write(cudaStream_t stream, uint32_t* flag, uint32_t value) const {
  auto const write = reinterpret_cast<WriteValue>(write_value_);
  return write(stream, reinterpret_cast<uintptr_t>(flag), value, 0);
}

}  // namespace moe_infer
