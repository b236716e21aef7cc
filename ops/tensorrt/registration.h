// Meets the TensorRT that the process has loaded; the library does not link one.
#pragma once

#include <string>

namespace moe_infer {

// Version of the headers: "10.16.1".
char const* tensorrt_headers_version();

// Registers the creators with the loaded TensorRT, once. Throws Error(MOE_INFER_INVALID) when none is loaded or its
// major version is not the headers'; the message names versions, paths and the fix.
void register_creators();

// Writes to TensorRT's log, and keeps the message for moe_infer_last_error.
void log_error(std::string const& message) noexcept;

}  // namespace moe_infer
