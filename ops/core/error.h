// Errors inside the library: thrown here, caught at every entry point (C entry, TensorRT adapter).
#pragma once

#include <stdexcept>
#include <string>

#include "moe_infer.h"

namespace moe_infer {

class Error : public std::runtime_error {
 public:
  Error(moe_infer_status status, std::string const& message) : std::runtime_error(message), status_(status) {}
  moe_infer_status status() const { return status_; }

 private:
  moe_infer_status status_;
};

// An attribute or input is wrong.
inline Error invalid(std::string const& message) { return {MOE_INFER_INVALID, message}; }
// A weight file is missing, malformed or does not fit the attributes.
inline Error bad_file(std::string const& message) { return {MOE_INFER_FILE, message}; }

}  // namespace moe_infer
