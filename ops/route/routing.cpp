#include "route/route.h"
#include "route/sort.h"

namespace moe_infer {
namespace {

constexpr size_t kAlignment = 256;

// Hands out aligned slices one after another; without a base it only counts.
class Slicer {
 public:
  explicit Slicer(uint8_t* base) : base_(base) {}

  template <class T>
  T* take(size_t count) {
    T* slice = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return slice;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace

size_t Routing::layout(int64_t tokens, int32_t top_k, int32_t experts, bool has_logits, uint8_t* base,
                       Routing* routing) {
  auto const choices = static_cast<size_t>(tokens) * static_cast<size_t>(top_k);
  Slicer slicer(base);
  Routing r;
  if (!has_logits) r.scores = slicer.take<float>(static_cast<size_t>(tokens) * static_cast<size_t>(experts));
  r.expert_of_choice = slicer.take<int32_t>(choices);
  r.weight_of_choice = slicer.take<float>(choices);
  r.choice_of_row = slicer.take<int32_t>(choices);
  r.row_of_choice = slicer.take<int32_t>(choices);
  r.row_begin = slicer.take<int32_t>(static_cast<size_t>(experts) + 1);
  r.counts = slicer.take<int32_t>(static_cast<size_t>(experts));
  r.sort_scratch_bytes = moe_infer::sort_scratch_bytes(choices, experts);
  r.sort_scratch = slicer.take<uint8_t>(r.sort_scratch_bytes);
  if (routing != nullptr) *routing = r;
  return slicer.used();
}

}  // namespace moe_infer
