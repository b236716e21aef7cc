// Activations of gated feed-forward layers, in float32.
#pragma once

#include <cstdint>

namespace moe_infer {

enum class Activation : int32_t {
  kNone,  // the product is the result
  kSilu,  // the rest: gated. Columns 2j and 2j+1 of the product become act(column 2j) * column 2j+1
  kGeluTanh,
};

#ifdef __CUDACC__
__device__ inline float apply(Activation activation, float x) {
  if (activation == Activation::kSilu) return x / (1.0F + expf(-x));
  constexpr float kSqrtTwoOverPi = 0.7978845608028654F;
  return 0.5F * x * (1.0F + tanhf(kSqrtTwoOverPi * (x + 0.044715F * x * x * x)));
}
#endif

}  // namespace moe_infer
