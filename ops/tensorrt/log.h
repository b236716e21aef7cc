// Messages into TensorRT's log, and the rule of every method that TensorRT calls: catch everything.
#pragma once

#include <NvInferRuntime.h>

#include <utility>

#include "core/capi_error.h"

namespace moe_infer {

// Takes its text literally. Without a TensorRT logger it goes to stderr.
void log_message(nvinfer1::ILogger::Severity severity, char const* message) noexcept;

// Runs `function`. Returns 0, or -1 after the sentence of what it threw went to the log and to moe_infer_last_error.
template <class Function>
int32_t guarded_by_log(Function&& function) noexcept {
  int const status = guarded(std::forward<Function>(function));
  if (status == MOE_INFER_OK) {
    return 0;
  }
  if (status == MOE_INFER_CUDA) {
    cudaGetLastError();  // reported now; the next launch must not report it again
  }
  log_message(nvinfer1::ILogger::Severity::kERROR, moe_infer_last_error());
  return -1;
}

}  // namespace moe_infer
