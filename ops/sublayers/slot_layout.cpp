#include "sublayers/sub_layer.h"

namespace moe_infer {

SlotLayout::SlotLayout(std::vector<ExpertTensor> const& tensors, DataType dtype) {
  constexpr uint64_t kAlignment = 256;
  for (ExpertTensor const& tensor : tensors) {
    offsets.push_back(bytes);
    uint64_t const size = static_cast<uint64_t>(tensor.rows) * static_cast<uint64_t>(tensor.columns) * size_of(dtype);
    bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
  }
}

}  // namespace moe_infer
