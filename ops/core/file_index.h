// What both formats check in a weight file's index. Texts and rules are those of moe_infer/weights/index.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data_type.h"

namespace moe_infer {

inline constexpr uint64_t kMaxIndexBytes = 100'000'000;         // of a JSON header or zip directory
inline constexpr uint64_t kMaxTensorBytes = (1ULL << 63U) - 1;  // also the largest dimension and offset

bool is_utf8(std::string const& text);

// A name from an untrusted file, quoted, escaped and of bounded length, for a message.
std::string shown(std::string const& name);

// "a, b, c, d and 7 more".
std::string listed(std::vector<std::string> const& items);

// "(2, 3)", "(2,)" or "()".
std::string shape_text(std::vector<int64_t> const& shape);

// Bytes of a tensor; throws Error(MOE_INFER_FILE) when the rank is over 8 or the size overflows. Dimensions are not
// negative.
uint64_t tensor_bytes(std::string const& where, std::string const& name, DataType dtype,
                      std::vector<int64_t> const& shape);

struct Span {
  uint64_t begin = 0;
  uint64_t end = 0;
  std::string name;
};

// Checks that spans lie in begin .. end without overlap and, unless allowed, without holes.
void check_layout(std::string const& where, std::vector<Span> spans, uint64_t begin, uint64_t end, bool holes);

}  // namespace moe_infer
