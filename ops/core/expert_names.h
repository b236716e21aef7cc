// Which tensors of a weight file belong to a layer, and whether they are what the layer needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/layer_config.h"
#include "core/weight_file.h"
#include "sublayers/sub_layer.h"

namespace moe_infer {

// How a file holds a layer's experts: one tensor for all of them, or one for each and part.
enum class ExpertForm { kStacked, kSeparate };

std::string stacked_name(LayerConfig const& config, ExpertTensor const& tensor);
std::string separate_name(LayerConfig const& config, int32_t expert, std::string const& part);

// Checks that each expected name is there and no other under the prefix. Throws Error(MOE_INFER_FILE).
ExpertForm check_names(LayerConfig const& config, WeightFile const& file, std::vector<ExpertTensor> const& tensors);

// The d_model that the shapes in the file fit, at least 1; what does not fit is reported by check_tensors.
int64_t infer_d_model(LayerConfig const& config, WeightFile const& file, ExpertForm form);

// Checks shapes, and that each tensor has one type in all experts. Throws Error(MOE_INFER_FILE).
void check_tensors(LayerConfig const& config, WeightFile const& file, ExpertForm form, int64_t d_model,
                   std::vector<ExpertTensor> const& tensors);

}  // namespace moe_infer
