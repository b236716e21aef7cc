// How one warp chooses the experts of one token and their weights: every router's arithmetic, in float32.
//
// A lane holds what ranks kItems consecutive experts, as sortable keys in registers. Each of the top_k rounds takes the
// largest key of the warp; of those that have it, that of the lowest index is the first one of the first lane, which
// writes it down. A round waits for nothing but the one before; weights are the business of the lane whose number the
// choice has.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/element.cuh"
#include "route/route.h"

namespace moe_infer {

constexpr int kSelectLanes = 32;
constexpr unsigned kSelectAll = 0xffffffffU;

// What select_token is compiled for: items of a lane, a power of two; and whether experts are ranked by their scores
// alone and chosen at once, which takes far less code. A token waits for code, too: no multiprocessor has it at hand.
template <int kItems_, bool kPlain_>
struct SelectKind {
  static constexpr int kItems = kItems_;
  static constexpr bool kPlain = kPlain_;
};

// Whether experts are ranked by sigmoid(score) + bias. sigmoid changes no order, so by itself it need not be computed.
__host__ __device__ inline bool ranks_by_sigmoid(RouterParams const& params) {
  return params.router_bias != nullptr || params.topk_group < params.n_group;
}

// Items of a lane that serve so many experts: calls f with them as a constant.
template <class F>
void with_select_items(int32_t experts, F&& f) {
  if (experts <= 32) return f(std::integral_constant<int, 1>{});
  if (experts <= 64) return f(std::integral_constant<int, 2>{});
  if (experts <= 128) return f(std::integral_constant<int, 4>{});
  if (experts <= 256) return f(std::integral_constant<int, 8>{});
  if (experts <= 512) return f(std::integral_constant<int, 16>{});
  return f(std::integral_constant<int, 32>{});
}

// Calls f with the kind for this router, with items for `experts`, which are at least the router's.
template <class F>
void with_select_kind(RouterParams const& params, int32_t experts, F&& f) {
  bool const is_plain = !ranks_by_sigmoid(params) && params.router != Router::kSparseMixer;
  with_select_items(experts, [&](auto items) {
    constexpr int kItems = decltype(items)::value;
    is_plain ? f(SelectKind<kItems, true>{}) : f(SelectKind<kItems, false>{});
  });
}

// The scores of one token.
struct TokenScores {
  void const* data = nullptr;
  DataType dtype = DataType::kFloat32;
  int64_t first = 0;  // the first expert's
};

namespace select {

// Scores of experts first, first + 1, ... as far as there are any. All are asked for before the first one is used.
template <class T, int kItems>
__device__ void load_as(T const* scores, int32_t first, int32_t experts, float (&values)[kItems]) {
  T raw[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i < experts) raw[i] = scores[first + i];
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) values[i] = first + i < experts ? to_float(raw[i]) : 0.0F;
}

template <int kItems>
__device__ void load(TokenScores const& scores, int32_t first, int32_t experts, float (&values)[kItems]) {
  switch (scores.dtype) {
    case DataType::kFloat16:
      return load_as(static_cast<__half const*>(scores.data) + scores.first, first, experts, values);
    case DataType::kBFloat16:
      return load_as(static_cast<__nv_bfloat16 const*>(scores.data) + scores.first, first, experts, values);
    default:
      return load_as(static_cast<float const*>(scores.data) + scores.first, first, experts, values);
  }
}

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
  uint32_t key;    // the same in all lanes
  bool is_own;     // in the one lane that had it, which
  int32_t expert;  // knows this
};

// Removes the largest of the warp's keys, of equals that of the lowest index; a lane has those from lane * kItems on.
// The next call waits for this one, so there is little between the keys and their removal.
template <int kItems>
__device__ Largest take_largest(uint32_t (&keys)[kItems], int lane) {
  uint32_t top[kItems];  // of the items from i on; the tree keeps their order
  int item[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    top[i] = keys[i];
    item[i] = i;
  }
#pragma unroll
  for (int stride = 1; stride < kItems; stride *= 2) {
#pragma unroll
    for (int i = 0; i + stride < kItems; i += 2 * stride) {
      if (top[i + stride] > top[i]) {
        top[i] = top[i + stride];
        item[i] = item[i + stride];
      }
    }
  }
  uint32_t const best = __reduce_max_sync(kSelectAll, top[0]);
  bool const has = top[0] == best;
  unsigned const all = __ballot_sync(kSelectAll, has);
  bool const is_own = has && (all & ((1U << lane) - 1U)) == 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (is_own && i == item[0]) keys[i] = 0;
  }
  return {best, is_own, lane * kItems + item[0]};
}

// The lane's part of a group's two best experts, and all lanes' together.
template <int kItems>
__device__ float score_group(uint32_t const (&keys)[kItems], int lane, int32_t begin, int32_t end) {
  float first = -INFINITY;
  float second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int32_t const expert = lane * kItems + i;
    if (expert >= begin && expert < end) {
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
  return first + second;
}

// Removes the keys of all experts outside the topk_group best groups. A group is as good as the sum of its two best
// experts; the lower group wins a tie. A lane has kGroupItems consecutive groups.
template <int kItems>
__device__ void keep_best_groups(RouterParams const& params, uint32_t (&keys)[kItems], int lane) {
  constexpr int kGroupItems = (kItems + 1) / 2;  // a group has at least two experts
  int32_t const size = params.experts / params.n_group;
  uint32_t group_keys[kGroupItems] = {};
#pragma unroll 1
  for (int32_t group = 0; group < params.n_group; ++group) {
    uint32_t const key = sortable(score_group(keys, lane, group * size, (group + 1) * size));
#pragma unroll
    for (int item = 0; item < kGroupItems; ++item) {
      if (group == lane * kGroupItems + item) group_keys[item] = key;
    }
  }
#pragma unroll 1
  for (int32_t k = 0; k < params.topk_group; ++k) take_largest(group_keys, lane);
  // Those that are still there were not taken.
#pragma unroll 1
  for (int32_t group = 0; group < params.n_group; ++group) {
    bool is_left = false;
#pragma unroll
    for (int item = 0; item < kGroupItems; ++item) {
      is_left = is_left || (group == lane * kGroupItems + item && group_keys[item] != 0);
    }
    if (!__any_sync(kSelectAll, is_left)) continue;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      int32_t const expert = lane * kItems + i;
      if (expert >= group * size && expert < (group + 1) * size) keys[i] = 0;
    }
  }
}

// What sparse_mixer divides by for a choice with score `best`, without its own exponential: those of the scores that
// are still there and near enough. 0 / 0 and infinity / infinity are NaN, which is not greater: such a score counts.
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

// What ranks the lane's experts, of those that may be chosen. Returns whether a score of the token is NaN.
template <bool kPlain, int kItems>
__device__ bool load_keys(RouterParams const& params, TokenScores const& scores, int lane, uint32_t (&keys)[kItems]) {
  bool const by_sigmoid = !kPlain && ranks_by_sigmoid(params);
  float values[kItems];
  load(scores, lane * kItems, params.experts, values);
  bool has_nan = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    int32_t const expert = lane * kItems + i;
    float x = values[i];
    has_nan = has_nan || isnan(x);
    if (by_sigmoid && expert < params.experts) {
      x = sigmoid(x) + (params.router_bias == nullptr ? 0.0F : params.router_bias[expert]);
    }
    keys[i] = expert < params.experts ? sortable(x) : 0;
  }
  if (__any_sync(kSelectAll, has_nan)) return true;
  if (!kPlain && params.topk_group < params.n_group) keep_best_groups(params, keys, lane);
  return false;
}

}  // namespace select

// Called by all 32 lanes of a warp. Only the experts, in the order of the choices.
template <class Kind>
__device__ void choose_token(RouterParams const& params, TokenScores const& scores, int lane, int32_t* chosen) {
  uint32_t keys[Kind::kItems];
  bool const has_nan = select::load_keys<Kind::kPlain>(params, scores, lane, keys);
#pragma unroll 1
  for (int32_t k = 0; k < params.top_k; ++k) {
    auto const best = select::take_largest(keys, lane);
    if (best.is_own) chosen[k] = has_nan ? k : best.expert;
  }
}

// Called by all 32 lanes of a warp, which has all scores in sight. Writes params.top_k entries to `chosen` and
// `weights`, in the order of the choices; a token with NaN among its scores gets experts 0, 1, ... with weights NaN.
template <class Kind>
__device__ void select_token(RouterParams const& params, TokenScores const& scores, int lane, int32_t* chosen,
                             float* weights) {
  using namespace select;
  constexpr int kItems = Kind::kItems;
  uint32_t keys[kItems];
  if (load_keys<Kind::kPlain>(params, scores, lane, keys)) {
    for (int32_t k = lane; k < params.top_k; k += kSelectLanes) {
      chosen[k] = k;
      weights[k] = nanf("");
    }
    return;
  }

  Router const router = params.router;
  bool const softmax = router == Router::kSoftmaxTopK || router == Router::kTopKSoftmax;
  bool const over_all = router == Router::kSoftmaxTopK && !params.normalize;
  float highest = 0.0F;  // score of the first choice
  float denominator = 0.0F;
  float newest = 0.0F;  // weight of the lane's last choice so far
  for (int32_t first = 0; first < params.top_k; first += kSelectLanes) {
    int32_t const count = min(kSelectLanes, params.top_k - first);
    uint32_t own = 0;  // key of the lane's choice
    float share = 1.0F;
    for (int32_t k = 0; k < count; ++k) {
      Largest const best = take_largest(keys, lane);
      if (best.is_own) chosen[first + k] = best.expert;
      if (lane == k) own = best.key;
      if (!Kind::kPlain && router == Router::kSparseMixer) {
        float const value = value_of(best.key);
        float const itself = expf(value - value);  // NaN of infinity, as in the reference
        float const all = itself + sum_near(keys, value, params.jitter);
        if (lane == k) share = itself / all;
      }
    }
    float const value = value_of(own);
    if (first == 0) {
      highest = __shfl_sync(kSelectAll, value, 0);
      if (over_all) {
        float sum = lane < count ? expf(value - highest) : 0.0F;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (keys[i] != 0) sum += expf(value_of(keys[i]) - highest);
        }
        denominator = warp_sum(sum);
      }
    }

    float weight = 1.0F;
    if (softmax) {
      weight = expf(value - highest);  // NaN when both are infinite, as in the reference
    } else if (router == Router::kBaseLayer) {
      weight = sigmoid(value);
    } else if (router == Router::kSigmoidTopK) {
      float score[1] = {value};
      if (!Kind::kPlain && ranks_by_sigmoid(params)) {
        __syncwarp();
        if (lane < count) load(scores, chosen[first + lane], params.experts, score);
      }
      weight = sigmoid(score[0]);
    } else if (!Kind::kPlain && router == Router::kSparseMixer) {
      weight = share;
    }
    if (!over_all) {  // in the order of the choices
#pragma unroll 8
      for (int32_t k = 0; k < count; ++k) denominator += __shfl_sync(kSelectAll, weight, k);
    }
    if (lane < count) {
      newest = weight;
      if (first + lane + kSelectLanes < params.top_k) weights[first + lane] = weight;
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
