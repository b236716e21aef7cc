// The part of the C entry that needs no GPU: errors, checks, digests.
#include <cstdio>
#include <memory>
#include <string>

#include "core/capi_error.h"
#include "core/content_check.h"
#include "core/expert_store.h"
#include "core/layer_config.h"
#include "core/weight_file.h"

namespace moe_infer {
namespace {

constexpr size_t kDigestRoom = 64;  // promised by moe_infer.h

thread_local std::string last_error;
thread_local char const* last_error_text = "";

}  // namespace

DataType parse_dtype(char const* input, int32_t number) {
  switch (number) {
    case MOE_INFER_FLOAT32:
      return DataType::kFloat32;
    case MOE_INFER_FLOAT16:
      return DataType::kFloat16;
    case MOE_INFER_BFLOAT16:
      return DataType::kBFloat16;
    default:
      throw invalid(std::string("MoELayer: input ") + input +
                    " must be float32, float16 or bfloat16, got type number " + std::to_string(number));
  }
}

void set_last_error(char const* message) noexcept {
  try {
    last_error = message;
    last_error_text = last_error.c_str();
  } catch (...) {
    last_error_text = "moe_infer: not enough host memory for the error's text";
  }
}

LayerInputs parse_inputs(moe_infer_inputs const& inputs) {
  LayerInputs parsed;
  parsed.d_model = inputs.d_model;
  parsed.dtype = parse_dtype("hidden_states", inputs.dtype);
  parsed.has_logits = inputs.has_logits != 0;
  parsed.logits_dtype = parsed.has_logits ? parse_dtype("router_logits", inputs.logits_dtype) : DataType::kFloat32;
  return parsed;
}

}  // namespace moe_infer

using moe_infer::guarded;
using moe_infer::invalid;

extern "C" {

const char* moe_infer_last_error(void) { return moe_infer::last_error_text; }

void moe_infer_clear_last_error(void) { moe_infer::set_last_error(""); }

int moe_infer_check(const moe_infer_attribute* attributes, int32_t count, const moe_infer_inputs* inputs) {
  return guarded([&] {
    auto const config = moe_infer::LayerConfig::from_attributes(attributes, count);
    int64_t d_model = config.embedding_size;  // 0 unless the attribute says it: then taken from the file
    if (inputs != nullptr) {
      auto const parsed = moe_infer::parse_inputs(*inputs);
      config.check_inputs(parsed);
      d_model = parsed.d_model;
    }
    auto const store = moe_infer::ExpertStore::open(config, d_model);
    auto const checks = moe_infer::content_checks();
    if (checks.finite || checks.crc) {
      store->load(/*pin=*/false);
    }
  });
}

int moe_infer_weight_digest(const char* path, char* digest) {
  return guarded([&] {
    if (path == nullptr || digest == nullptr) {
      throw invalid("moe_infer_weight_digest: path and digest must not be NULL");
    }
    auto const file = moe_infer::WeightFile::open(path);
    std::snprintf(digest, moe_infer::kDigestRoom, "%s", file->digest().c_str());
  });
}

}  // extern "C"
