#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/layer_config.h"
#include "gemm/group_search.cuh"
#include "sublayers/row_kernels.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int64_t kMostBlocks = 2048;

// The sum over the block, the same in every thread; added in an order that depends on nothing.
__device__ float block_sum(float value) {
  __shared__ float partial[kThreads / kLanes];
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffU, value, offset);
  __syncthreads();  // the previous row's sums have been read
  if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = value;
  __syncthreads();
  float sum = 0.0F;
#pragma unroll
  for (int warp = 0; warp < kThreads / kLanes; ++warp) sum += partial[warp];
  return sum;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(ExpertGroups groups, T const* __restrict__ input, uint64_t weight_offset, int64_t d_model,
                    T* __restrict__ output) {
  using Unit = Pack<T, kCount>;
  int64_t const first = static_cast<int64_t>(threadIdx.x) * kCount;
  constexpr int64_t kStep = static_cast<int64_t>(kThreads) * kCount;
  for (int64_t row = first_row(groups) + blockIdx.x; row < end_row(groups); row += gridDim.x) {
    int32_t const group = group_of_row(groups, row);
    if (group < 0) continue;  // the same for the whole block
    auto const* const weight = reinterpret_cast<T const*>(expert_tensor(groups, group, weight_offset));
    T const* const x = input + row * d_model;
    float squares = 0.0F;
    for (int64_t column = first; column < d_model; column += kStep) {
      Unit const unit = *reinterpret_cast<Unit const*>(x + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares = fmaf(to_float(unit.value[i]), to_float(unit.value[i]), squares);
    }
    float const root = sqrtf(block_sum(squares) / static_cast<float>(d_model) + kRmsNormEpsilon);
    for (int64_t column = first; column < d_model; column += kStep) {
      Unit unit = *reinterpret_cast<Unit const*>(x + column);
      Unit const scale = *reinterpret_cast<Unit const*>(weight + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        unit.value[i] = from_float<T>(to_float(scale.value[i]) * (to_float(unit.value[i]) / root));
      }
      *reinterpret_cast<Unit*>(output + row * d_model + column) = unit;
    }
  }
}

unsigned blocks_for(SubLayerCall const& call) { return static_cast<unsigned>(std::min(kMostBlocks, call.rows)); }

}  // namespace

void rms_norm_rows(SubLayerCall const& call, DataType dtype, int64_t d_model, uint64_t weight_offset, void* output) {
  with_element(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWide = kPackSize<T>;
    bool const wide = d_model % kWide == 0 && is_aligned(call.input) && is_aligned(output) &&
                      is_aligned(call.groups.slots) && call.groups.slot_bytes % 16 == 0 && weight_offset % 16 == 0;
    auto* const kernel = wide ? &rms_norm_kernel<T, kWide> : &rms_norm_kernel<T, 1>;
    kernel<<<blocks_for(call), kThreads, 0, call.stream>>>(call.groups, static_cast<T const*>(call.input),
                                                           weight_offset, d_model, static_cast<T*>(output));
  });
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
