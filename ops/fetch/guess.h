// A guess of what the layer that runs next will miss: the first of the experts that its router would choose, given what
// it makes of this layer's token (input next_router_logits), that lies in none of its slots.
#pragma once

#include <cstdint>

#include "core/data_type.h"
#include "route/route.h"

namespace moe_infer {

// What the kernel that plans needs to guess.
struct Guess {
  RouterParams router;                      // of the next layer; at most kMostPlannedChoices experts a token
  void const* scores = nullptr;             // (experts) of a single token; null: nothing is guessed
  DataType dtype = DataType::kFloat32;      // of scores
  int32_t const* slot_of_expert = nullptr;  // (experts) of the next layer
};

}  // namespace moe_infer
