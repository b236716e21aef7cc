// What can be checked of the weights themselves when a layer loads them. Off unless the environment asks for it: it
// reads every weight of the layer once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/weight_file.h"

namespace moe_infer {

struct ContentChecks {
  bool finite = false;  // MOE_INFER_CHECK_FINITE: no NaN, no infinity
  bool crc = false;     // MOE_INFER_CHECK_CRC: stored npz members are what the archive says; deflated ones always are
};

// 1: on; unset, empty or 0: off. Throws Error(MOE_INFER_INVALID) for anything else.
ContentChecks content_checks();

struct CheckedTensor {
  std::string name;
  TensorEntry const* entry = nullptr;
  uint8_t const* inflated = nullptr;  // null: the bytes are in the file
  bool stacked = false;               // the first dimension is the expert
};

// Reads the tensors on several threads. Throws Error(MOE_INFER_FILE) that names the first bad tensor, and of a weight
// that is not finite its position and value, in the words of moe_infer/weights/experts.py.
void check_content(WeightFile const& file, std::vector<CheckedTensor> const& tensors, ContentChecks checks);

}  // namespace moe_infer
