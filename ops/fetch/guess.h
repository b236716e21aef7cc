// A guess of what the layer that runs next will miss: the first of the experts that its router would choose, given what
// it makes of this layer's token (input next_router_logits), that lies in none of its slots.
#pragma once

#include <cstdint>

#include "route/route.h"

namespace moe_infer {

// What the kernel that plans needs to guess.
struct Guess {
  TokenRouter router;  // of the next layer; at most kMostPlannedChoices experts a token; no scores: nothing is guessed
  int32_t const* slot_of_expert = nullptr;  // (experts) of the next layer
};

}  // namespace moe_infer
