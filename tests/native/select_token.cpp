// ops/route/select_token.cuh on the host: the 32 lanes of a warp are 32 contexts that take turns at every warp-wide
// operation. The same code as on a GPU, but for the exponential function's last bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "warp.h"

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

using std::isnan;
using std::max;
using std::min;

#include "route/select_token.cuh"

namespace {

// What the lanes of the token at hand are called with.
struct Token {
  moe_infer::RouterParams params;
  float const* scores;
  int32_t* chosen;
  float* weights;
  int32_t* chosen_alone;
} token;

template <class Kind>
void run_lane() {
  moe_infer::TokenScores const scores{token.scores, moe_infer::DataType::kFloat32, 0};
  auto const lane = static_cast<int>(turns.thread());
  moe_infer::select_token<Kind>(token.params, scores, lane, token.chosen, token.weights);
  moe_infer::choose_token<Kind>(token.params, scores, lane, token.chosen_alone);
}

}  // namespace

extern "C" void select_tokens(int32_t router, int32_t normalize, int32_t experts, int32_t top_k, int32_t n_group,
                              int32_t topk_group, float scaling_factor, float jitter, float const* router_bias,
                              int64_t tokens, float const* scores, int32_t* chosen, float* weights,
                              int32_t* chosen_alone) {
  token.params.router = static_cast<moe_infer::Router>(router);
  token.params.normalize = normalize != 0;
  token.params.experts = experts;
  token.params.top_k = top_k;
  token.params.n_group = n_group;
  token.params.topk_group = topk_group;
  token.params.scaling_factor = scaling_factor;
  token.params.jitter = jitter;
  token.params.router_bias = router_bias;
  for (int64_t t = 0; t < tokens; ++t) {
    token.scores = scores + t * experts;
    token.chosen = chosen + t * top_k;
    token.weights = weights + t * top_k;
    token.chosen_alone = chosen_alone + t * top_k;
    moe_infer::with_select_kind(token.params, experts,
                                [](auto kind) { turns.run(Turns::kWarp, run_lane<decltype(kind)>); });
  }
}
