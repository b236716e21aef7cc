// safetensors: 8 length bytes, a JSON header, then the tensors without gaps.
#pragma once

#include <string>

#include "core/weight_file.h"

namespace moe_infer {

class SafetensorsFile : public WeightFile {
 public:
  // Throws Error(MOE_INFER_FILE): not by the format's rules, or a tensor of another type than F32, F16, BF16.
  explicit SafetensorsFile(std::string const& path);
  void inflate(TensorEntry const& entry, void* out) const override;  // never deflated: throws
};

}  // namespace moe_infer
