// Rules and texts are those of moe_infer/weights/experts.py.
#include "core/expert_names.h"

#include <algorithm>
#include <memory>
#include <set>

#include "core/error.h"
#include "core/file_index.h"
#include "core/sub_layer_shape.h"

namespace moe_infer {
namespace {

std::vector<ExpertTensor> tensors_for(LayerConfig const& config, int64_t d_model) {
  return make_sub_layer(config.sublayer_type, sub_layer_shape(config, d_model))->tensors();
}

// Packed (rows, columns), or one dimension where the file has one.
std::vector<int64_t> packed_shape(ExpertTensor const& tensor) {
  return tensor.vector ? std::vector<int64_t>{tensor.rows * tensor.columns}
                       : std::vector<int64_t>{tensor.rows, tensor.columns};
}

std::vector<int64_t> expected_shape(LayerConfig const& config, ExpertForm form, ExpertTensor const& tensor) {
  auto shape = packed_shape(tensor);
  if (form == ExpertForm::kStacked) {
    shape.insert(shape.begin(), config.expert_count);
  } else {
    shape.front() /= static_cast<int64_t>(tensor.parts.size());
  }
  return shape;
}

// The names of one expert's tensors without the prefix, or of the stacked ones.
std::vector<std::string> expected_names(LayerConfig const& config, ExpertForm form,
                                        std::vector<ExpertTensor> const& tensors) {
  std::vector<std::string> names;
  if (form == ExpertForm::kStacked) {
    for (auto const& tensor : tensors) {
      names.push_back(tensor.name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  for (int32_t expert = 0; expert < config.expert_count; ++expert) {
    for (auto const& tensor : tensors) {
      for (auto const& part : tensor.parts) {
        names.push_back(std::to_string(expert) + "/" + part);
      }
    }
  }
  return names;
}

// Sorts "10/x" behind "9/x".
std::pair<int64_t, std::string> expert_order(std::string const& name) {
  auto const slash = name.find('/');
  bool const number = slash != std::string::npos && slash > 0 && slash <= 10 && slash + 1 < name.size() &&
                      std::all_of(name.begin(), name.begin() + static_cast<int64_t>(slash),
                                  [](char c) { return c >= '0' && c <= '9'; }) &&
                      (name[0] != '0' || slash == 1);
  return number ? std::make_pair(std::stoll(name.substr(0, slash)), name.substr(slash + 1))
                : std::make_pair(-1LL, name);
}

std::string listed_names(std::string const& prefix, std::vector<std::string> const& names) {
  std::vector<std::string> quoted;
  for (auto const& name : names) {
    quoted.push_back(shown(prefix + name));
  }
  return listed(quoted);
}

std::vector<std::string> all_names(WeightFile const& file) {
  std::vector<std::string> names;
  for (auto const& [name, entry] : file.tensors()) {
    names.push_back(name);
  }
  return names;
}

std::string experts_text(LayerConfig const& config) {
  return std::to_string(config.expert_count) + " experts of " + config.sublayer_type +
         (config.expert_bias ? " with biases" : "");
}

void check_missing(LayerConfig const& config, WeightFile const& file, std::set<std::string> const& under,
                   std::vector<std::string> const& expected) {
  std::vector<std::string> missing;
  std::copy_if(expected.begin(), expected.end(), std::back_inserter(missing),
               [&](std::string const& name) { return under.count(name) == 0; });
  if (missing.empty()) {
    return;
  }
  auto const held = listed_names("", all_names(file));
  throw bad_file(
      file.path() + ": " + std::to_string(missing.size()) + " of " + std::to_string(expected.size()) + " tensors for " +
      experts_text(config) + " are missing: " + listed_names(config.weight_prefix, missing) + "; the file holds " +
      (held.empty() ? "nothing" : held) +
      "; check attributes 'expert_count', 'expert_sublayer_type', 'expert_bias' and 'expert_weight_prefix', or "
      "write the file again");
}

void check_surplus(LayerConfig const& config, WeightFile const& file, std::set<std::string> const& under,
                   std::vector<std::string> const& expected) {
  std::set<std::string> const wanted(expected.begin(), expected.end());
  std::vector<std::string> surplus;
  std::copy_if(under.begin(), under.end(), std::back_inserter(surplus),
               [&](std::string const& name) { return wanted.count(name) == 0; });
  if (surplus.empty()) {
    return;
  }
  std::sort(surplus.begin(), surplus.end(),
            [](std::string const& a, std::string const& b) { return expert_order(a) < expert_order(b); });
  throw bad_file(
      file.path() + ": " + std::to_string(surplus.size()) + " tensors under prefix '" + config.weight_prefix +
      "' do not belong to " + experts_text(config) + ": " + listed_names(config.weight_prefix, surplus) +
      "; check attributes 'expert_count', 'expert_sublayer_type', 'expert_bias' and 'expert_weight_prefix' (a "
      "file with more than one layer needs a prefix for each)");
}

void check_entry(LayerConfig const& config, WeightFile const& file, std::string const& name, int64_t d_model,
                 std::vector<int64_t> const& shape, std::string const& first_name) {
  auto const& entry = file.tensors().at(name);
  if (entry.shape != shape) {
    throw bad_file(file.path() + ": tensor " + shown(name) + " has shape " + shape_text(entry.shape) + ", expected " +
                   shape_text(shape) + " (expert_count " + std::to_string(config.expert_count) + ", hidden_size " +
                   std::to_string(config.hidden_size) + ", d_model " + std::to_string(d_model) +
                   "); correct the attributes or write the file again");
  }
  auto const& first = file.tensors().at(first_name);
  if (entry.dtype != first.dtype) {
    throw bad_file(file.path() + ": tensor " + shown(name) + " is " + name_of(entry.dtype) + ", but " +
                   shown(first_name) + " is " + name_of(first.dtype) +
                   "; the experts' tensors of one kind must have one type, convert them");
  }
}

}  // namespace

std::string stacked_name(LayerConfig const& config, ExpertTensor const& tensor) {
  return config.weight_prefix + tensor.name;
}

std::string separate_name(LayerConfig const& config, int32_t expert, std::string const& part) {
  return config.weight_prefix + std::to_string(expert) + "/" + part;
}

ExpertForm check_names(LayerConfig const& config, WeightFile const& file, std::vector<ExpertTensor> const& tensors) {
  auto const& prefix = config.weight_prefix;
  std::set<std::string> under;
  for (auto const& name : all_names(file)) {
    if (name.compare(0, prefix.size(), prefix) == 0) {
      under.insert(name.substr(prefix.size()));
    }
  }
  bool const stacked = std::any_of(tensors.begin(), tensors.end(),
                                   [&](ExpertTensor const& tensor) { return under.count(tensor.name) != 0; });
  auto const form = stacked ? ExpertForm::kStacked : ExpertForm::kSeparate;
  auto const expected = expected_names(config, form, tensors);
  check_missing(config, file, under, expected);
  check_surplus(config, file, under, expected);
  return form;
}

int64_t infer_d_model(LayerConfig const& config, WeightFile const& file, ExpertForm form) {
  // How a tensor's sizes depend on d_model is asked of the sub-layer itself, with two values.
  constexpr int64_t kProbe = 1024;
  auto const small = tensors_for(config, kProbe);
  auto const large = tensors_for(config, 2 * kProbe);
  for (size_t i = 0; i < small.size(); ++i) {
    auto const shape = expected_shape(config, form, small[i]);
    auto const larger = expected_shape(config, form, large[i]);
    auto const name = form == ExpertForm::kStacked ? stacked_name(config, small[i])
                                                   : separate_name(config, 0, small[i].parts.front());
    auto const& found = file.tensors().at(name).shape;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      auto const factor = (larger[axis] - shape[axis]) / kProbe;
      if (factor > 0) {
        return axis < found.size() ? std::max<int64_t>(found[axis] / factor, 1) : 1;
      }
    }
  }
  return 1;
}

void check_tensors(LayerConfig const& config, WeightFile const& file, ExpertForm form, int64_t d_model,
                   std::vector<ExpertTensor> const& tensors) {
  for (auto const& tensor : tensors) {
    auto const shape = expected_shape(config, form, tensor);
    if (form == ExpertForm::kStacked) {
      auto const name = stacked_name(config, tensor);
      check_entry(config, file, name, d_model, shape, name);
      continue;
    }
    auto const first = separate_name(config, 0, tensor.parts.front());
    for (int32_t expert = 0; expert < config.expert_count; ++expert) {
      for (auto const& part : tensor.parts) {
        check_entry(config, file, separate_name(config, expert, part), d_model, shape, first);
      }
    }
  }
}

}  // namespace moe_infer
