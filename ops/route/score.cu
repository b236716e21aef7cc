// scores (tokens, experts) = hidden_states (tokens, d_model) @ centroids (d_model, experts), in float32.
//
// A block takes 8 tokens and 32 experts. Its 8 warps share the sum over d_model: the hidden states go through shared
// memory in chunks, and each warp adds its part of every chunk with one expert a lane. The partial sums meet at the end
// in the order of the warps, so results are the same in every run.
#include "core/cuda_check.h"
#include "core/element.cuh"
#include "route/route.h"

namespace moe_infer {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kTokens = kWarps;  // of a block; warp w loads token w
constexpr int kChunk = 128;      // of d_model
constexpr int kStride = 12;      // floats between two columns of the chunk: keeps 16-byte alignment, fewer conflicts
constexpr int kColumnsOfWarp = kChunk / kWarps;

// For cpm_2, n = layernorm_weight * x / sqrt(mean(x^2) + eps): the weight goes into the product, and the division, the
// same for all of a token's products, is applied to their sum.
template <class T, bool kNormalize>
__global__ void __launch_bounds__(kLanes* kWarps)
    score_kernel(T const* __restrict__ hidden_states, float const* __restrict__ centroids,
                 float const* __restrict__ layernorm_weight, int64_t tokens, int64_t d_model, int32_t experts,
                 float* __restrict__ scores) {
  __shared__ alignas(16) float chunk[kChunk * kStride];
  __shared__ float partial[kWarps][kTokens][kLanes];

  int const lane = static_cast<int>(threadIdx.x) % kLanes;
  int const warp = static_cast<int>(threadIdx.x) / kLanes;
  int64_t const token = static_cast<int64_t>(blockIdx.x) * kTokens + warp;
  int32_t const expert = static_cast<int32_t>(blockIdx.y) * kLanes + lane;
  bool const has_token = token < tokens;
  bool const has_expert = expert < experts;

  float sums[kTokens] = {};
  float squares = 0.0F;
  for (int64_t first = 0; first < d_model; first += kChunk) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kChunk / kLanes; ++i) {
      int const column = i * kLanes + lane;
      float x = 0.0F;
      if (has_token && first + column < d_model) {
        x = to_float(hidden_states[token * d_model + first + column]);
        if constexpr (kNormalize) {
          squares += x * x;
          x *= layernorm_weight[first + column];
        }
      }
      chunk[column * kStride + warp] = x;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < kColumnsOfWarp; ++i) {
      int const column = warp * kColumnsOfWarp + i;
      // Beyond the end there is nothing to add; 0 * centroid would not be 0 if a centroid were infinite.
      if (first + column >= d_model) break;
      float const centroid = has_expert ? centroids[(first + column) * experts + expert] : 0.0F;
      float4 const low = *reinterpret_cast<float4 const*>(&chunk[column * kStride]);
      float4 const high = *reinterpret_cast<float4 const*>(&chunk[column * kStride + 4]);
      sums[0] = fmaf(low.x, centroid, sums[0]);
      sums[1] = fmaf(low.y, centroid, sums[1]);
      sums[2] = fmaf(low.z, centroid, sums[2]);
      sums[3] = fmaf(low.w, centroid, sums[3]);
      sums[4] = fmaf(high.x, centroid, sums[4]);
      sums[5] = fmaf(high.y, centroid, sums[5]);
      sums[6] = fmaf(high.z, centroid, sums[6]);
      sums[7] = fmaf(high.w, centroid, sums[7]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) partial[warp][t][lane] = sums[t];
  __syncthreads();
  float score = 0.0F;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) score += partial[w][warp][lane];
  if constexpr (kNormalize) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffU, squares, offset);
    score /= sqrtf(squares / static_cast<float>(d_model) + kRmsNormEpsilon);
  }
  if (has_token && has_expert) scores[token * experts + expert] = score;
}

}  // namespace

void compute_scores(void const* hidden_states, DataType dtype, RouterWeights const& weights, Router router,
                    int64_t tokens, int64_t d_model, int32_t experts, float* scores, cudaStream_t stream) {
  if (tokens == 0) return;
  dim3 const grid(static_cast<unsigned>((tokens + kTokens - 1) / kTokens),
                  static_cast<unsigned>((experts + kLanes - 1) / kLanes));
  with_element(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* const kernel = router == Router::kCpm2 ? &score_kernel<T, true> : &score_kernel<T, false>;
    kernel<<<grid, kLanes * kWarps, 0, stream>>>(static_cast<T const*>(hidden_states), weights.centroids,
                                                 weights.layernorm_weight, tokens, d_model, experts, scores);
  });
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
