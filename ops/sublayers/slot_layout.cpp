// Where an expert's tensors lie in its slot.
#include "core/error.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

SlotLayout::SlotLayout(std::vector<ExpertTensor> const& tensors, DataType dtype) {
  constexpr uint64_t kAlignment = 256;
  for (ExpertTensor const& tensor : tensors) {
    uint64_t size = 0;
    uint64_t end = 0;
    bool const bad =
        tensor.rows < 0 || tensor.columns < 0 ||
        __builtin_mul_overflow(static_cast<uint64_t>(tensor.rows), static_cast<uint64_t>(tensor.columns), &size) ||
        __builtin_mul_overflow(size, static_cast<uint64_t>(size_of(dtype)), &size) ||
        __builtin_add_overflow(bytes, size, &end) || __builtin_add_overflow(end, kAlignment - 1, &end);
    if (bad) {
      throw invalid("MoELayer: an expert's tensor '" + tensor.name + "' of " + std::to_string(tensor.rows) + " x " +
                    std::to_string(tensor.columns) + " values is too large; check attribute 'hidden_size'");
    }
    offsets.push_back(bytes);
    bytes = end / kAlignment * kAlignment;
  }
}

}  // namespace moe_infer
