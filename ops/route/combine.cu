// output[t] = weighted sum of the rows of t's choices, in float32 and in the order of the choices; a block a token.
#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/grid_dependency.cuh"
#include "core/launch.h"
#include "route/route.h"

namespace moe_infer {
namespace {

// Up to so many tokens all rows of one are asked for at once: there are few blocks, and what counts is how often each
// of them waits. With more, many blocks that wait in turn are faster, and registers are better spent on these.
constexpr int64_t kFewTokens = 256;
constexpr int kAtOnce = 8;

// kCount: elements a thread handles at once. kKeep: base_layer, which keeps (1 - weight) of the hidden states.
// kTogether: rows of a token that are asked for at once.
template <class T, int kCount, bool kKeep, int kTogether>
__global__ void combine_kernel(T const* __restrict__ expert_output, T const* __restrict__ hidden_states,
                               int32_t const* __restrict__ row_of_choice, float const* __restrict__ weight_of_choice,
                               int64_t d_model, int32_t top_k, T* __restrict__ output) {
  using Unit = Pack<T, kCount>;
  int64_t const token = blockIdx.x;
  // The routing has long been written (grid_dependency.cuh), only the experts' output may still be on its way.
  int32_t rows[kTogether];
  float weights[kTogether];
  auto const load_choices = [&](int32_t first) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= top_k) break;
      rows[i] = row_of_choice[token * top_k + first + i];
      weights[i] = weight_of_choice[token * top_k + first + i];
    }
  };
  if constexpr (kTogether > 1) load_choices(0);
  wait_for_previous_kernel();
  start_next_kernel();
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kCount; column < d_model;
       column += static_cast<int64_t>(blockDim.x) * kCount) {
    float sums[kCount] = {};
    for (int32_t first = 0; first < top_k; first += kTogether) {
      if (kTogether == 1 || top_k > kTogether) load_choices(first);
      Unit units[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= top_k) break;
        units[i] = *reinterpret_cast<Unit const*>(expert_output + rows[i] * d_model + column);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k >= top_k) break;
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] = fmaf(weights[k], to_float(units[k].value[i]), sums[i]);
      }
    }
    if constexpr (kKeep) {
      float const kept = 1.0F - weight_of_choice[token * top_k];
      Unit const unit = *reinterpret_cast<Unit const*>(hidden_states + token * d_model + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = fmaf(kept, to_float(unit.value[i]), sums[i]);
    }
    Unit result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.value[i] = from_float<T>(sums[i]);
    *reinterpret_cast<Unit*>(output + token * d_model + column) = result;
  }
}

}  // namespace

void combine(void const* expert_output, void const* hidden_states, DataType dtype, Router router, int64_t tokens,
             int64_t d_model, int32_t top_k, Routing const& routing, void* output, bool overlap, cudaStream_t stream) {
  if (tokens == 0) return;
  bool const keep = router == Router::kBaseLayer;
  with_element(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWide = kPackSize<T>;
    bool const wide =
        d_model % kWide == 0 && is_aligned(expert_output) && is_aligned(output) && (!keep || is_aligned(hidden_states));
    auto* const kernel = wide ? (keep                   ? &combine_kernel<T, kWide, true, 1>
                                 : tokens <= kFewTokens ? &combine_kernel<T, kWide, false, kAtOnce>
                                                        : &combine_kernel<T, kWide, false, 1>)
                              : (keep ? &combine_kernel<T, 1, true, 1> : &combine_kernel<T, 1, false, 1>);
    int64_t const units = wide ? d_model / kWide : d_model;
    auto const threads = static_cast<unsigned>(std::min<int64_t>(256, (units + 31) / 32 * 32));
    LaunchShape shape;
    shape.blocks = static_cast<unsigned>(tokens);
    shape.threads = threads;
    shape.overlap = overlap;
    shape.stream = stream;
    launch(kernel, shape, static_cast<T const*>(expert_output), static_cast<T const*>(hidden_states),
           routing.row_of_choice, routing.weight_of_choice, d_model, top_k, static_cast<T*>(output));
  });
}

}  // namespace moe_infer
