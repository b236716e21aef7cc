// How one warp chooses the experts of one token and their weights: every router's arithmetic, in float32.
//
// A lane holds what ranks experts lane, lane + 32, ... as sortable keys in registers. Each of the top_k rounds takes
// the largest key of the warp, and of those that have it the one of the lowest index.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/element.cuh"
#include "route/route.h"

namespace moe_infer {

constexpr int kSelectLanes = 32;
constexpr unsigned kSelectAll = 0xffffffffU;

// Items of a lane, a power of two, that select_token needs for so many experts: calls f with it as a constant.
template <class F>
void with_select_items(int32_t experts, F&& f) {
  if (experts <= 32) return f(std::integral_constant<int, 1>{});
  if (experts <= 64) return f(std::integral_constant<int, 2>{});
  if (experts <= 128) return f(std::integral_constant<int, 4>{});
  if (experts <= 256) return f(std::integral_constant<int, 8>{});
  if (experts <= 512) return f(std::integral_constant<int, 16>{});
  return f(std::integral_constant<int, 32>{});
}

__device__ inline float load_score(void const* scores, DataType dtype, int64_t i) {
  switch (dtype) {
    case DataType::kFloat16:
      return to_float(static_cast<__half const*>(scores)[i]);
    case DataType::kBFloat16:
      return to_float(static_cast<__nv_bfloat16 const*>(scores)[i]);
    default:
      return static_cast<float const*>(scores)[i];
  }
}

namespace select {

// Unsigned order of the result is the order of the floats; -0 equals +0. Never 0 for a number, so 0 marks "not there".
__device__ inline uint32_t sortable(float x) {
  uint32_t const bits = __float_as_uint(x + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

__device__ inline float value_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}

// exp of a negative number only, so that neither end overflows.
__device__ inline float sigmoid(float x) {
  float const small = expf(-fabsf(x));
  return (x >= 0.0F ? 1.0F : small) / (1.0F + small);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kSelectLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kSelectAll, x, offset);
  return x;
}

struct Largest {
  uint32_t key;
  int32_t index;
};

// The largest of the warp's keys, of equals that of the lowest index; key 0 and index -1: none is there. The same in
// all lanes.
template <int kItems>
__device__ Largest largest(uint32_t const (&keys)[kItems], int lane) {
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) own = max(own, keys[i]);
  uint32_t const best = __reduce_max_sync(kSelectAll, own);
  if (best == 0) return {0, -1};
  uint32_t index = ~0U;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (keys[i] == best) index = static_cast<uint32_t>(i * kSelectLanes + lane);
  }
  return {best, static_cast<int32_t>(__reduce_min_sync(kSelectAll, index))};
}

template <int kItems>
__device__ void remove(uint32_t (&keys)[kItems], int32_t index, int lane) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i * kSelectLanes + lane == index) keys[i] = 0;
  }
}

// Removes the keys of all experts outside the topk_group best groups. A group is as good as the sum of its two best
// experts; the lower group wins a tie.
template <int kItems>
__device__ void keep_best_groups(RouterParams const& params, uint32_t (&keys)[kItems], int lane) {
  constexpr int kGroupItems = (kItems + 1) / 2;  // a group has at least two experts
  int32_t const size = params.experts / params.n_group;
  uint32_t group_keys[kGroupItems];
#pragma unroll
  for (int item = 0; item < kGroupItems; ++item) {
    group_keys[item] = 0;
    int32_t const first_group = item * kSelectLanes;
    for (int32_t owner = 0; owner < kSelectLanes && first_group + owner < params.n_group; ++owner) {
      int32_t const begin = (first_group + owner) * size;
      float first = -INFINITY;
      float second = -INFINITY;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        int32_t const expert = i * kSelectLanes + lane;
        if (expert >= begin && expert < begin + size) {
          float const x = value_of(keys[i]);
          second = fmaxf(second, fminf(first, x));
          first = fmaxf(first, x);
        }
      }
#pragma unroll
      for (int offset = kSelectLanes / 2; offset > 0; offset /= 2) {
        float const other_first = __shfl_xor_sync(kSelectAll, first, offset);
        float const other_second = __shfl_xor_sync(kSelectAll, second, offset);
        second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
        first = fmaxf(first, other_first);
      }
      if (lane == owner) group_keys[item] = sortable(first + second);
    }
  }

  unsigned open[kGroupItems] = {};  // a bit a group, the same in all lanes
  for (int32_t k = 0; k < params.topk_group; ++k) {
    int32_t const group = largest(group_keys, lane).index;
    remove(group_keys, group, lane);
#pragma unroll
    for (int item = 0; item < kGroupItems; ++item) {
      if (group / kSelectLanes == item) open[item] |= 1U << (group % kSelectLanes);
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int32_t const group = (i * kSelectLanes + lane) / size;
    bool is_open = false;
#pragma unroll
    for (int item = 0; item < kGroupItems; ++item) {
      if (group / kSelectLanes == item) is_open = (open[item] >> (group % kSelectLanes) & 1U) != 0;
    }
    if (!is_open) keys[i] = 0;
  }
}

// What sparse_mixer divides by for a choice with score `best`: the exponentials of the scores that are still there and
// near enough. 0 / 0 and infinity / infinity are NaN, which is not greater: such a score counts.
template <int kItems>
__device__ float sum_near(uint32_t const (&keys)[kItems], float best, float jitter) {
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keys[i] == 0) continue;
    float const score = value_of(keys[i]);
    bool const far = (best - score) / fmaxf(fabsf(score), best) > 2.0F * jitter;
    if (!far) sum += expf(score - best);
  }
  return warp_sum(sum);
}

}  // namespace select

// Called by all 32 lanes of a warp. `score(expert)` gives a score in float32 and may be called by any lane for any
// expert below params.experts, so the scores lie in memory that the whole warp sees. Writes params.top_k entries to
// `chosen` and `weights`, in the order of the choices; a token with NaN among its scores gets experts 0, 1, ... with
// weights NaN.
template <int kItems, class Score>
__device__ void select_token(RouterParams const& params, Score const& score, int lane, int32_t* __restrict__ chosen,
                             float* __restrict__ weights) {
  using namespace select;
  // sigmoid changes no order, so by itself it need not be computed for all.
  bool const limited = params.topk_group < params.n_group;
  bool const by_sigmoid = params.router_bias != nullptr || limited;
  uint32_t keys[kItems];
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int32_t const expert = i * kSelectLanes + lane;
    keys[i] = 0;
    if (expert < params.experts) {
      float x = score(expert);
      has_nan = has_nan || isnan(x);
      if (by_sigmoid) x = sigmoid(x) + (params.router_bias == nullptr ? 0.0F : params.router_bias[expert]);
      keys[i] = sortable(x);
    }
  }
  if (__any_sync(kSelectAll, has_nan)) {
    for (int32_t k = lane; k < params.top_k; k += kSelectLanes) {
      chosen[k] = k;
      weights[k] = nanf("");
    }
    return;
  }
  if (limited) keep_best_groups(params, keys, lane);

  Router const router = params.router;
  bool const softmax = router == Router::kSoftmaxTopK || router == Router::kTopKSoftmax;
  bool const over_all = router == Router::kSoftmaxTopK && !params.normalize;
  float highest = 0.0F;  // score of the first choice
  float newest = 0.0F;   // weight of the lane's last choice so far
  float denominator = 0.0F;
  for (int32_t k = 0; k < params.top_k; ++k) {
    Largest const best = largest(keys, lane);
    int32_t const expert = best.index;
    float const value = value_of(best.key);
    if (k == 0) {
      highest = value;
      if (over_all) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (keys[i] != 0) denominator += expf(value_of(keys[i]) - highest);
        }
        denominator = warp_sum(denominator);
      }
    }

    float weight = 1.0F;
    if (softmax) {
      weight = expf(value - highest);  // NaN when both are infinite, as in the reference
    } else if (router == Router::kBaseLayer) {
      weight = sigmoid(value);
    } else if (router == Router::kSigmoidTopK) {
      weight = sigmoid(by_sigmoid ? score(expert) : value);
    } else if (router == Router::kSparseMixer) {
      weight = expf(value - value) / sum_near(keys, value, params.jitter);
    }
    remove(keys, expert, lane);
    if (!over_all) denominator += weight;
    if (lane == k % kSelectLanes) {
      chosen[k] = expert;
      newest = weight;
      if (k + kSelectLanes < params.top_k) weights[k] = weight;
    }
  }
  if (router == Router::kSigmoidTopK) denominator += 1e-20F;
  bool const top_k_router = softmax || router == Router::kSigmoidTopK || router == Router::kSparseMixer;
  bool const divide = softmax || (top_k_router && params.normalize);
  float const factor = top_k_router ? params.scaling_factor : 1.0F;
  // The lane that made a weight finishes it. Its last one, with up to 32 choices the only one, has not been to memory.
  for (int32_t k = lane; k < params.top_k; k += kSelectLanes) {
    float const weight = k + kSelectLanes < params.top_k ? weights[k] : newest;
    weights[k] = (divide ? weight / denominator : weight) * factor;
  }
}

}  // namespace moe_infer
