// How a user names a policy: NAME or NAME:HALF_LIFE, as in MOE_INFER_POLICY.
#pragma once

#include <string>

#include "core/policy.h"

namespace moe_infer {

// A half-life that is left away is the default. `source` begins the sentence of an error. Throws
// Error(MOE_INFER_INVALID).
PolicySettings parse_policy(std::string const& text, std::string const& source);

// What MOE_INFER_POLICY says; the default when it is not set or empty.
PolicySettings policy_from_environment();

// The text that parse_policy takes, with its half-life if it has one.
std::string to_text(PolicySettings const& settings);

}  // namespace moe_infer
