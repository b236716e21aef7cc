// Activations of feed-forward layers, in float32.
#pragma once

#include <cstdint>
#include <limits>

namespace moe_infer {

enum class ActivationKind : int32_t {
  kNone,  // the product is the result
  kSilu,
  kGelu,  // with the error function
  kGeluTanh,
  kRelu,
  kClampedSwiGlu,  // always gated; reads alpha, beta and limit
};

// What becomes of a product y. Plain: act(y), column by column. Gated: gate and up columns alternate, and columns 2j
// and 2j+1 become act(y[2j]) * y[2j+1], half as many columns.
struct Activation {
  ActivationKind kind = ActivationKind::kNone;
  bool gated = false;
  float alpha = 1.702F;
  float beta = 1.0F;
  float limit = std::numeric_limits<float>::infinity();  // infinity: none

  static constexpr Activation none() { return {}; }
  static constexpr Activation plain(ActivationKind kind) { return with(kind, false); }
  static constexpr Activation gate(ActivationKind kind) { return with(kind, true); }
  // `limit` 0: none, as in the attribute.
  static constexpr Activation clamped_swiglu(float alpha, float beta, float limit) {
    Activation made = with(ActivationKind::kClampedSwiGlu, true);
    made.alpha = alpha;
    made.beta = beta;
    if (limit > 0.0F) made.limit = limit;
    return made;
  }
  constexpr bool is_none() const { return kind == ActivationKind::kNone; }

 private:
  static constexpr Activation with(ActivationKind kind, bool gated) {
    Activation made;
    made.kind = kind;
    made.gated = gated;
    return made;
  }
};

#ifdef __CUDACC__
// x * sigmoid(alpha * x). kFast: to about 2 units in the last place of float32's exponential and division, which is
// nothing where the result is rounded to 16 bits right after.
template <bool kFast = false>
__device__ inline float swish(float x, float alpha) {
  if constexpr (kFast) return __fdividef(x, 1.0F + __expf(-alpha * x));
  return x / (1.0F + expf(-alpha * x));
}

template <bool kFast = false>
__device__ inline float apply_plain(Activation const& activation, float x) {
  switch (activation.kind) {
    case ActivationKind::kSilu:
      return swish<kFast>(x, 1.0F);
    case ActivationKind::kGelu:
      return 0.5F * x * (1.0F + erff(0.7071067811865476F * x));
    case ActivationKind::kGeluTanh:
      return 0.5F * x * (1.0F + tanhf(0.7978845608028654F * (x + 0.044715F * x * x * x)));
    case ActivationKind::kRelu:
      return x < 0.0F ? 0.0F : x;  // NaN stays NaN
    default:
      return x;
  }
}

template <bool kFast = false>
__device__ inline float apply_gated(Activation const& activation, float gate, float up) {
  if (activation.kind != ActivationKind::kClampedSwiGlu) return apply_plain<kFast>(activation, gate) * up;
  // Written so that NaN stays NaN.
  float const limit = activation.limit;
  float const g = gate > limit ? limit : gate;
  float const u = up > limit ? limit : up < -limit ? -limit : up;
  return swish<kFast>(g, activation.alpha) * (u + activation.beta);
}
#endif

}  // namespace moe_infer
