// Top-k and routing weights, one warp a token.
//
// A lane holds the scores of experts lane, lane + 32, ... as sortable keys in registers. Each of the top_k rounds takes
// the largest key of the warp; a key ends in the complement of the expert's index, so the lower index wins a tie.
#include "core/cuda_check.h"
#include "core/element.cuh"
#include "route/route.h"

namespace moe_infer {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr unsigned kAll = 0xffffffffU;

__device__ float load_score(void const* scores, DataType dtype, int64_t i) {
  switch (dtype) {
    case DataType::kFloat16:
      return to_float(static_cast<__half const*>(scores)[i]);
    case DataType::kBFloat16:
      return to_float(static_cast<__nv_bfloat16 const*>(scores)[i]);
    default:
      return static_cast<float const*>(scores)[i];
  }
}

// Unsigned order of the result is the order of the floats; -0 equals +0. Never 0 for a number, so 0 marks "not there".
__device__ uint32_t sortable(float score) {
  uint32_t const bits = __float_as_uint(score + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

__device__ float score_of(uint32_t key) { return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key); }

// exp of a negative number only, so that neither end overflows.
__device__ float sigmoid(float x) {
  float const small = expf(-fabsf(x));
  return (x >= 0.0F ? 1.0F : small) / (1.0F + small);
}

template <int kItems>
__global__ void __launch_bounds__(kLanes* kWarps)
    select_kernel(void const* __restrict__ scores, DataType dtype, Router router, bool normalize, int64_t tokens,
                  int32_t experts, int32_t top_k, int32_t* __restrict__ expert_of_choice,
                  float* __restrict__ weight_of_choice) {
  int const lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t const token = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kLanes;
  if (token >= tokens) return;  // the whole warp

  uint32_t keys[kItems];
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int32_t const expert = i * kLanes + lane;
    float const score = expert < experts ? load_score(scores, dtype, token * experts + expert) : 0.0F;
    has_nan = has_nan || isnan(score);
    keys[i] = expert < experts ? sortable(score) : 0;
  }
  int32_t* const chosen = expert_of_choice + token * top_k;
  float* const weights = weight_of_choice + token * top_k;
  if (__any_sync(kAll, has_nan)) {
    for (int32_t k = lane; k < top_k; k += kLanes) {
      chosen[k] = k;
      weights[k] = nanf("");
    }
    return;
  }

  float highest = 0.0F;      // score of the first choice
  float denominator = 0.0F;  // of the softmax
  bool const over_all = router == Router::kSoftmaxTopK && !normalize;
  for (int32_t k = 0; k < top_k; ++k) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      uint64_t const candidate = static_cast<uint64_t>(keys[i]) << 32 | static_cast<uint32_t>(~(i * kLanes + lane));
      if (keys[i] != 0 && candidate > best) best = candidate;
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      uint64_t const other = __shfl_xor_sync(kAll, best, offset);
      best = other > best ? other : best;
    }
    int32_t const expert = static_cast<int32_t>(~static_cast<uint32_t>(best));
    float const score = score_of(static_cast<uint32_t>(best >> 32));
    if (k == 0) {
      highest = score;
      if (over_all) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (keys[i] != 0) denominator += expf(score_of(keys[i]) - highest);
        }
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          denominator += __shfl_xor_sync(kAll, denominator, offset);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i * kLanes + lane == expert) keys[i] = 0;
    }

    float weight = 1.0F;
    if (router == Router::kBaseLayer) {
      weight = sigmoid(score);
    } else if (router == Router::kSoftmaxTopK || router == Router::kTopKSoftmax) {
      weight = expf(score - highest);  // NaN when both are infinite, as in the reference
      if (!over_all) denominator += weight;
    }
    if (lane == k % kLanes) {
      chosen[k] = expert;
      weights[k] = weight;
    }
  }
  if (router == Router::kSoftmaxTopK || router == Router::kTopKSoftmax) {
    // The lane that wrote a weight divides it, so no lane reads what another wrote.
    for (int32_t k = lane; k < top_k; k += kLanes) weights[k] /= denominator;
  }
}

}  // namespace

void select_experts(void const* scores, DataType scores_dtype, Router router, bool normalize, int64_t tokens,
                    int32_t experts, int32_t top_k, Routing const& routing, cudaStream_t stream) {
  if (tokens == 0) return;
  auto const grid = static_cast<unsigned>((tokens + kWarps - 1) / kWarps);
  auto* kernel = &select_kernel<32>;
  if (experts <= 32) {
    kernel = &select_kernel<1>;
  } else if (experts <= 64) {
    kernel = &select_kernel<2>;
  } else if (experts <= 128) {
    kernel = &select_kernel<4>;
  } else if (experts <= 256) {
    kernel = &select_kernel<8>;
  } else if (experts <= 512) {
    kernel = &select_kernel<16>;
  }
  kernel<<<grid, kLanes * kWarps, 0, stream>>>(scores, scores_dtype, router, normalize, tokens, experts, top_k,
                                               routing.expert_of_choice, routing.weight_of_choice);
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
