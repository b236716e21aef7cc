// Identity: an expert that gives back its input; for tests and for measuring what routing costs.
#include "core/cuda_check.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {
namespace {

class Identity : public MoESubLayer {
 public:
  using MoESubLayer::MoESubLayer;

  std::vector<ExpertTensor> tensors() const override { return {}; }

  size_t workspace_bytes(int64_t /*rows*/, int32_t /*groups*/) const override { return 0; }

  // Without weights all experts are resident, so the groups hold all rows.
  void run(SubLayerCall const& call) const override {
    size_t const bytes = static_cast<size_t>(call.rows * shape_.d_model) * size_of(shape_.dtype);
    MOE_CUDA_CHECK(cudaMemcpyAsync(call.output, call.input, bytes, cudaMemcpyDeviceToDevice, call.stream));
  }
};

MOE_REGISTER_SUBLAYER("Identity", Identity)

}  // namespace
}  // namespace moe_infer
