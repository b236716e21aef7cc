// The header of an .npy array: a Python dict, read without evaluating it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data_type.h"

namespace moe_infer {

inline constexpr uint64_t kNpyStartBytes = 12;  // enough for npy_header_bytes

struct NpyHeader {
  DataType dtype = DataType::kFloat32;
  std::vector<int64_t> shape;
};

// Bytes before the data, from the array's first 12 bytes (or all, if it has fewer). `where` and `member` are for the
// message. Throws Error(MOE_INFER_FILE) when this is no .npy array of version 1, 2 or 3.
uint64_t npy_header_bytes(std::string const& where, std::string const& member, std::vector<uint8_t> const& start);

// Throws Error(MOE_INFER_FILE) when this is not a row-major little-endian array of float32, float16 or bfloat16.
NpyHeader parse_npy_header(std::string const& where, std::string const& member, std::vector<uint8_t> const& header);

}  // namespace moe_infer
