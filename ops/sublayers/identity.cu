// Identity: an expert gives back its rows. For tests of routing, and for layers whose experts lie elsewhere.
#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "gemm/group_search.cuh"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;

// The rows from the first group's first to the last group's last lie together.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(ExpertGroups groups, Unit const* __restrict__ input, int64_t columns, Unit* __restrict__ output) {
  int64_t const end = end_row(groups) * columns;
  for (int64_t i = first_row(groups) * columns + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < end;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    output[i] = input[i];
  }
}

template <class Unit>
void copy_rows(SubLayerCall const& call, int64_t row_bytes) {
  constexpr int64_t kMostBlocks = 4096;
  int64_t const columns = row_bytes / static_cast<int64_t>(sizeof(Unit));
  int64_t const blocks = std::min(kMostBlocks, (call.rows * columns + kThreads - 1) / kThreads);
  copy_rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, call.stream>>>(
      call.groups, static_cast<Unit const*>(call.input), columns, static_cast<Unit*>(call.output));
  MOE_CUDA_CHECK(cudaGetLastError());
}

class Identity final : public MoESubLayer {
 public:
  using MoESubLayer::MoESubLayer;

  std::vector<ExpertTensor> tensors() const override { return {}; }
  size_t workspace_bytes(int64_t, int32_t) const override { return 0; }

  void run(SubLayerCall const& call) const override {
    if (call.rows == 0 || call.groups.count == 0) return;
    int64_t const row_bytes = shape_.d_model * static_cast<int64_t>(size_of(shape_.dtype));
    if (row_bytes % 16 == 0 && is_aligned(call.input) && is_aligned(call.output)) {
      copy_rows<uint4>(call, row_bytes);
    } else if (shape_.dtype == DataType::kFloat32) {
      copy_rows<uint32_t>(call, row_bytes);
    } else {
      copy_rows<uint16_t>(call, row_bytes);
    }
  }
};

}  // namespace

MOE_REGISTER_SUBLAYER("Identity", Identity)

}  // namespace moe_infer
