#include <algorithm>

#include "core/cuda_check.h"
#include "core/device_types.cuh"
#include "core/layer_config.h"
#include "gemm/grouped_gemm.h"
#include "sublayers/gated_feed_forward.h"
#include "sublayers/group_rows.cuh"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;

__device__ float block_sum(float x) {
  __shared__ float parts[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffU, x, offset);
  __syncthreads();  // parts may still be read by the previous row
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (float const part : parts) sum += part;  // in one order in every thread
  return sum;
}

// A block normalises one row after another with the norm weight of the row's expert.
template <class T>
__global__ void rms_norm(ExpertGroups groups, uint64_t weight_offset, int64_t d_model, T const* input, T* output) {
  RowSpan const span(groups);
  for (int64_t row = span.begin + blockIdx.x; row < span.end; row += gridDim.x) {
    auto const* weight = reinterpret_cast<T const*>(slot_of_row(groups, row) + weight_offset);
    float squares = 0;
    for (int64_t c = threadIdx.x; c < d_model; c += kThreads) {
      float const x = to_float(input[row * d_model + c]);
      squares += x * x;
    }
    float const scale = 1 / sqrtf(block_sum(squares) / static_cast<float>(d_model) + kRmsNormEpsilon);
    for (int64_t c = threadIdx.x; c < d_model; c += kThreads) {
      output[row * d_model + c] = from_float<T>(to_float(weight[c]) * to_float(input[row * d_model + c]) * scale);
    }
  }
}

template <Activation kActivation>
__device__ float activate(float x) {
  if (kActivation == Activation::kSilu) return x / (1 + expf(-x));
  constexpr float kSqrtTwoOverPi = 0.7978845608028654F;
  return 0.5F * x * (1 + tanhf(kSqrtTwoOverPi * (x + 0.044715F * x * x * x)));
}

// hidden[r, i] = act(gate_up[r, 2i]) * gate_up[r, 2i + 1]
template <class T, Activation kActivation>
__global__ void activate_pairs(ExpertGroups groups, int64_t hidden_size, T const* gate_up, T* hidden) {
  RowSpan const span(groups);
  for (int64_t row = span.begin + blockIdx.x; row < span.end; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < hidden_size; i += kThreads) {
      float const gate = to_float(gate_up[(row * hidden_size + i) * 2]);
      float const up = to_float(gate_up[(row * hidden_size + i) * 2 + 1]);
      hidden[row * hidden_size + i] = from_float<T>(activate<kActivation>(gate) * up);
    }
  }
}

template <class T>
__global__ void add_residual(ExpertGroups groups, int64_t d_model, T const* input, T* output) {
  RowSpan const span(groups);
  for (int64_t row = span.begin + blockIdx.x; row < span.end; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < d_model; c += kThreads) {
      int64_t const i = row * d_model + c;
      output[i] = from_float<T>(to_float(output[i]) + to_float(input[i]));
    }
  }
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

struct GatedFeedForward::Workspace {
  void* normalised = nullptr;  // (rows, d_model), only with a norm
  void* gate_up = nullptr;     // (rows, 2 * hidden_size)
  void* hidden = nullptr;      // (rows, hidden_size)
  void* gemm = nullptr;
};

GatedFeedForward::GatedFeedForward(SubLayerShape const& shape, Activation activation, std::string norm_part,
                                   std::string gate_part, std::string up_part, std::string down_part)
    : MoESubLayer(shape),
      activation_(activation),
      norm_part_(std::move(norm_part)),
      gate_part_(std::move(gate_part)),
      up_part_(std::move(up_part)),
      down_part_(std::move(down_part)) {
  layout_ = SlotLayout(GatedFeedForward::tensors(), shape.dtype);
}

std::vector<ExpertTensor> GatedFeedForward::tensors() const {
  std::vector<ExpertTensor> tensors;
  if (!norm_part_.empty()) tensors.push_back({"layer_norm", {norm_part_}, 1, shape_.d_model, true});
  tensors.push_back({"gate_up", {gate_part_, up_part_}, 2 * shape_.hidden_size, shape_.d_model, false});
  tensors.push_back({"down", {down_part_}, shape_.d_model, shape_.hidden_size, false});
  return tensors;
}

// The one place that sizes and slices the workspace.
GatedFeedForward::Workspace GatedFeedForward::slice(int64_t rows, int32_t groups, uint8_t* base, size_t* bytes) const {
  size_t const row_bytes = static_cast<size_t>(rows) * size_of(shape_.dtype);
  size_t used = 0;
  auto take = [&](size_t size) -> void* {
    void* const slice = base == nullptr ? nullptr : base + used;
    used += align(size);
    return slice;
  };
  Workspace w;
  if (!norm_part_.empty()) w.normalised = take(row_bytes * static_cast<size_t>(shape_.d_model));
  w.gate_up = take(row_bytes * static_cast<size_t>(2 * shape_.hidden_size));
  w.hidden = take(row_bytes * static_cast<size_t>(shape_.hidden_size));
  w.gemm = take(grouped_gemm_workspace_bytes(groups));
  if (bytes != nullptr) *bytes = used;
  return w;
}

size_t GatedFeedForward::workspace_bytes(int64_t rows, int32_t groups) const {
  size_t bytes = 0;
  slice(rows, groups, nullptr, &bytes);
  return bytes;
}

void GatedFeedForward::run(SubLayerCall const& call) const {
  if (call.rows == 0 || call.groups.count == 0) return;
  Workspace const w = slice(call.rows, call.groups.count, static_cast<uint8_t*>(call.workspace), nullptr);
  size_t const first = norm_part_.empty() ? 0 : 1;  // of the tensors after the norm
  // Rows are taken in turns: with one group of many, most blocks of a grid of all rows would find nothing to do.
  auto const blocks = static_cast<unsigned>(std::min<int64_t>(call.rows, 2048));

  with_type(shape_.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto const* input = static_cast<T const*>(call.input);
    auto const* gemm_input = input;
    if (!norm_part_.empty()) {
      auto* normalised = static_cast<T*>(w.normalised);
      rms_norm<T>
          <<<blocks, kThreads, 0, call.stream>>>(call.groups, layout_.offsets[0], shape_.d_model, input, normalised);
      MOE_CUDA_CHECK(cudaGetLastError());
      gemm_input = normalised;
    }
    grouped_gemm({call.groups, shape_.dtype, 2 * shape_.hidden_size, shape_.d_model, gemm_input, w.gate_up,
                  layout_.offsets[first], w.gemm, call.stream});
    auto* activation = activation_ == Activation::kSilu ? activate_pairs<T, Activation::kSilu>
                                                        : activate_pairs<T, Activation::kGeluTanh>;
    activation<<<blocks, kThreads, 0, call.stream>>>(call.groups, shape_.hidden_size, static_cast<T const*>(w.gate_up),
                                                     static_cast<T*>(w.hidden));
    MOE_CUDA_CHECK(cudaGetLastError());
    grouped_gemm({call.groups, shape_.dtype, shape_.d_model, shape_.hidden_size, w.hidden, call.output,
                  layout_.offsets[first + 1], w.gemm, call.stream});
    if (!norm_part_.empty()) {
      add_residual<T>
          <<<blocks, kThreads, 0, call.stream>>>(call.groups, shape_.d_model, input, static_cast<T*>(call.output));
      MOE_CUDA_CHECK(cudaGetLastError());
    }
  });
}

}  // namespace moe_infer
