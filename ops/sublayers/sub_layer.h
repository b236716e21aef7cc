// What one expert computes. A new sub-layer is one file: a class on MoESubLayer and one registration line.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/data_type.h"
#include "fetch/expert_copy.h"
#include "route/route.h"

namespace moe_infer {

// What a sub-layer is made from.
struct SubLayerShape {
  int64_t d_model = 0;
  int64_t hidden_size = 0;
  DataType dtype = DataType::kFloat32;
  bool bias = false;  // attribute expert_bias: tensors() has the biases too, where the sub-layer knows any
  float activation_alpha = 1.702F;
  float activation_beta = 1.0F;
  float swiglu_limit = 7.0F;
};

// One tensor of an expert in the layout in which the kernels read it, row-major (rows, columns). A file holds it
// stacked over the experts under `name`, or for each expert e as the parts "e/PART"; with two parts the packed rows
// alternate: row 2i is row i of the first part, row 2i+1 row i of the second.
struct ExpertTensor {
  std::string name;
  std::vector<std::string> parts;
  int64_t rows = 0;  // packed
  int64_t columns = 0;
  bool vector = false;  // one-dimensional in the file: (rows * columns); with two parts the columns are 1
  bool late = false;    // MoESubLayer::run_token reads it only after all others: it may come last
};

// Where tensor i lies in a slot: 256-byte aligned, in the order of tensors(). The one place that knows this.
struct SlotLayout {
  std::vector<uint64_t> offsets;
  uint64_t bytes = 0;  // of a slot
  SlotLayout(std::vector<ExpertTensor> const& tensors, DataType dtype);
};

// Experts and the rows that chose them; the arrays are on the device. The groups of a call are consecutive experts:
// all of a layer, or one.
//   group g runs the expert whose weights lie at slots + slot_of_group[g] * slot_bytes
//   on rows row_begin[g] .. row_end[g] of input and output.
struct ExpertGroups {
  int32_t count = 0;
  int32_t const* row_begin = nullptr;
  int32_t const* row_end = nullptr;
  int32_t const* slot_of_group = nullptr;
  uint8_t const* slots = nullptr;
  uint64_t slot_bytes = 0;
  // With a flag for each slot: experts are on their way while the call's kernels start; who reads a slot waits for it
  // (fetch/arrivals.cuh). The first kernel of MoESubLayer::run then does not wait for the one before it, which may
  // still copy: what precedes that one is done. Kernels that do not know of it must not overlap.
  Arrivals arrivals;
};

constexpr int32_t kCountersOfCall = 4;
constexpr int32_t kMostLanes = 2;  // MoESubLayer::has_lanes
constexpr int32_t kCountersOfRun = kMostLanes * kCountersOfCall;

struct SubLayerCall {
  ExpertGroups groups;
  void const* input = nullptr;  // (rows, d_model), grouped by expert
  void* output = nullptr;       // (rows, d_model)
  int64_t rows = 0;             // rows of input in the whole call (all experts), known to the host; kernel choice may
                                // depend on this and on expert_count alone, so that resident and streaming agree in
                                // every bit
  int32_t expert_count = 0;
  int32_t* counters = nullptr;  // kCountersOfCall, zero before and after; the products of a call take two each
  bool single_token = false;    // the layer runs one token: a sub-layer that has run_token must give its bits
  bool overlap = false;         // kernels may start while the previous one runs: no stream but this one is involved
  void* workspace = nullptr;
  int32_t lane = 0;  // of kMostLanes
  cudaStream_t stream = nullptr;
};

// Up to so many experts are chosen as fast as what another kernel has chosen is read.
constexpr int32_t kMostChosenByAll = 32;

// A single token and its experts, on the device.
struct TokenChoices {
  void const* hidden_states = nullptr;  // (d_model)
  // With scores: nobody has chosen yet, and the sub-layer does. Of at most kMostChosenByAll experts, all resident.
  TokenRouter router;
  int32_t const* expert_of_choice = nullptr;  // (top_k)
  float* weight_of_choice = nullptr;          // (top_k), or room for them
  int32_t top_k = 0;
  bool keep = false;       // base_layer: output = weight * expert(x) + (1 - weight) * x
  void* output = nullptr;  // (d_model)
  // Not null: experts are on their way, and the slot of each choice, pending(slot) if so (ExpertGroups::arrivals).
  int32_t const* slot_of_choice = nullptr;
  ExpertCopy copy;  // what the kernels have to copy themselves, if it has blocks
};

class MoESubLayer {
 public:
  explicit MoESubLayer(SubLayerShape const& shape) : shape_(shape), layout_({}, shape.dtype) {}
  virtual ~MoESubLayer() = default;

  // The tensors of one expert; empty for a sub-layer without weights.
  virtual std::vector<ExpertTensor> tensors() const = 0;
  // Bytes of scratch that run needs for up to `rows` rows in up to `groups` groups.
  virtual size_t workspace_bytes(int64_t rows, int32_t groups) const = 0;
  // Enqueues the experts of call.groups. Must not synchronise or allocate.
  virtual void run(SubLayerCall const& call) const = 0;

  // Whether two calls of a run, on other groups, may run at the same time: call.lane is then 0 for the one and 1 for
  // the other. What they write to the workspace must lie where their own rows do, or where the lane says.
  virtual bool has_lanes() const { return false; }

  // Whether it reads activation_alpha, activation_beta and swiglu_limit: for one that does not, they are refused.
  virtual bool reads_activation_parameters() const { return false; }

  // A sub-layer may have a way of its own for a single token with all experts resident, from the token to the weighted
  // sum. `groups` gives the slots; its rows are not there. Must not synchronise or allocate.
  virtual bool has_run_token() const { return false; }
  virtual void run_token(ExpertGroups const&, TokenChoices const&, void* /*workspace*/, bool /*overlap*/,
                         cudaStream_t) const {}

  SubLayerShape const& shape() const { return shape_; }

 protected:
  SubLayerShape shape_;
  SlotLayout layout_;  // derived classes set it from tensors()
};

using SubLayerFactory = std::unique_ptr<MoESubLayer> (*)(SubLayerShape const&);

// Registered names, sorted.
std::vector<std::string> sub_layer_names();
// Throws Error(MOE_INFER_INVALID) for an unknown name.
std::unique_ptr<MoESubLayer> make_sub_layer(std::string const& name, SubLayerShape const& shape);

struct SubLayerRegistration {
  SubLayerRegistration(char const* name, SubLayerFactory factory);
};

}  // namespace moe_infer

// One line at the end of a sub-layer's file: MOE_REGISTER_SUBLAYER("T5_FF", T5FeedForward)
#define MOE_REGISTER_SUBLAYER(name, Class)                                                             \
  static ::moe_infer::SubLayerRegistration const moe_registration_##Class{                             \
      name, [](::moe_infer::SubLayerShape const& shape) -> std::unique_ptr<::moe_infer::MoESubLayer> { \
        return std::make_unique<Class>(shape);                                                         \
      }};
