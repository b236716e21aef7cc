// The one place that sizes and slices the routing's workspace.
#include "core/slices.h"
#include "route/group_scratch.h"
#include "route/route.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

size_t Routing::layout(int64_t tokens, int32_t top_k, int32_t experts, bool has_logits, uint8_t* base,
                       Routing* routing) {
  size_t const rows = static_cast<size_t>(tokens) * static_cast<size_t>(top_k);
  size_t const columns = static_cast<size_t>(experts);
  Slices slices(base);
  Routing r;
  r.scores = slices.take<float>(has_logits ? 0 : static_cast<size_t>(tokens) * columns);
  r.expert_of_choice = slices.take<int32_t>(rows);
  r.weight_of_choice = slices.take<float>(rows);
  r.row_of_choice = slices.take<int32_t>(rows);
  r.row_begin = slices.take<int32_t>(columns + 1);
  r.counts = slices.take<int32_t>(columns);
  r.counters = slices.take<int32_t>(kCountersOfRun);
  r.group_scratch = slices.take<uint8_t>(group_scratch_bytes(static_cast<int64_t>(rows), experts));
  if (routing != nullptr) *routing = r;
  return slices.bytes();
}

}  // namespace moe_infer
