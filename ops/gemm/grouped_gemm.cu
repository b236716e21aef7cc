// Chooses the kernel of a grouped product and prepares what it reads.
#include <limits>
#include <string>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/slices.h"
#include "gemm/grouped_gemm.h"
#include "gemm/hopper.h"
#include "gemm/instances.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 128;

// Rows an expert, on average over the call, up to which the narrow tile wins: there the product is bound by reading
// the weights, and a wide tile would compute mostly rows that are not there.
constexpr int64_t kNarrowRows = 32;

bool is_narrow(GroupedGemm const& gemm) { return gemm.rows <= kNarrowRows * gemm.expert_count; }

// What all kernels but the slow ones ask for: every row of every operand begins at 16 bytes.
bool is_vectorizable(GroupedGemm const& gemm) {
  int64_t const unit = 16 / static_cast<int64_t>(size_of(gemm.dtype));
  return gemm.n % unit == 0 && gemm.k % unit == 0 && gemm.input_stride % unit == 0 && is_aligned(gemm.input) &&
         is_aligned(gemm.output) && is_aligned(gemm.source) && is_aligned(gemm.groups.slots) &&
         gemm.groups.slot_bytes % 16 == 0 && gemm.weight_offset % 16 == 0 && gemm.bias_offset % 16 == 0;
}

// CUTLASS counts columns, strides and tiles in int32.
void check_sizes(GroupedGemm const& gemm) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int64_t kSmallestTile = 16 * 64;
  bool const fits = gemm.rows <= kMost && gemm.n <= kMost && gemm.k <= kMost && gemm.input_stride <= kMost &&
                    (gemm.rows + 16 * static_cast<int64_t>(gemm.groups.count)) <= kMost / 2 * kSmallestTile / gemm.n;
  if (!fits) {
    throw invalid("MoELayer: a product of " + std::to_string(gemm.rows) + " rows, " + std::to_string(gemm.n) +
                  " columns and inner size " + std::to_string(gemm.k) + " is too large; give fewer tokens in a run");
  }
}

void check_source(GroupedGemm const& gemm) {
  if (gemm.source != nullptr && (gemm.has_bias || !gemm.activation.is_none())) {
    throw Error(MOE_INFER_INTERNAL, "MoELayer: a product with a source has neither a bias nor an activation");
  }
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(ExpertGroups groups, uint8_t* input, int64_t input_row_bytes, uint8_t* source, uint8_t* output,
                int64_t output_row_bytes, int32_t n, int32_t k, int64_t input_stride, int64_t output_stride,
                uint64_t weight_offset, bool has_bias, uint64_t bias_offset, GroupArrays arrays) {
  int32_t const g = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int32_t>(threadIdx.x);
  if (g >= groups.count) return;
  int64_t const begin = groups.row_begin[g];
  int64_t const rows = groups.row_end[g] - begin;
  arrays.problems[3 * g] = static_cast<int32_t>(rows > 0 ? rows : 0);
  arrays.problems[3 * g + 1] = n;
  arrays.problems[3 * g + 2] = k;
  arrays.inputs[g] = input + begin * input_row_bytes;
  // A group without rows may have no slot; its weights are not read.
  uint64_t const slot = rows > 0 ? static_cast<uint64_t>(groups.slot_of_group[g]) : 0;
  uint8_t* const expert = const_cast<uint8_t*>(groups.slots) + slot * groups.slot_bytes;
  arrays.weights[g] = expert + weight_offset;
  arrays.outputs[g] = output + begin * output_row_bytes;
  arrays.sources[g] = source == nullptr ? arrays.outputs[g] : source + begin * output_row_bytes;
  arrays.source_strides[g] = output_stride;
  if (has_bias) {
    arrays.sources[g] = expert + bias_offset;
    arrays.source_strides[g] = 0;  // one row for all
  }
  arrays.input_strides[g] = input_stride;
  arrays.weight_strides[g] = k;
  arrays.output_strides[g] = output_stride;
}

}  // namespace

size_t GroupArrays::layout(int32_t groups, uint8_t* base, GroupArrays* arrays) {
  auto const count = static_cast<size_t>(groups);
  Slices slices(base);
  GroupArrays a;
  a.problems = slices.take<int32_t>(3 * count);
  a.inputs = slices.take<void*>(count);
  a.weights = slices.take<void*>(count);
  a.sources = slices.take<void*>(count);
  a.outputs = slices.take<void*>(count);
  a.input_strides = slices.take<int64_t>(count);
  a.weight_strides = slices.take<int64_t>(count);
  a.source_strides = slices.take<int64_t>(count);
  a.output_strides = slices.take<int64_t>(count);
  if (arrays != nullptr) *arrays = a;
  return slices.bytes();
}

size_t grouped_gemm_workspace(int32_t groups) { return GroupArrays::layout(groups, nullptr, nullptr); }

void fill_group_arrays(GroupedGemm const& gemm, GroupArrays const& arrays) {
  auto const element = static_cast<int64_t>(size_of(gemm.dtype));
  int64_t const columns = gemm.activation.gated ? gemm.n / 2 : gemm.n;
  // With a gated activation the kernel stores n units of half an element a row (see gated_epilogue.cuh): a stride of n
  // too.
  auto const blocks = static_cast<unsigned>((gemm.groups.count + kThreads - 1) / kThreads);
  fill_kernel<<<blocks, kThreads, 0, gemm.stream>>>(
      gemm.groups, static_cast<uint8_t*>(const_cast<void*>(gemm.input)), gemm.input_stride * element,
      static_cast<uint8_t*>(const_cast<void*>(gemm.source)), static_cast<uint8_t*>(gemm.output), columns * element,
      static_cast<int32_t>(gemm.n), static_cast<int32_t>(gemm.k), gemm.input_stride, gemm.n, gemm.weight_offset,
      gemm.has_bias, gemm.bias_offset, arrays);
  MOE_CUDA_CHECK(cudaGetLastError());
}

void grouped_gemm(GroupedGemm const& gemm) {
  if (gemm.rows == 0 || gemm.groups.count == 0) return;
  check_sizes(gemm);
  check_source(gemm);
  bool const narrow = is_narrow(gemm);
  bool const vectorizable = is_vectorizable(gemm);
  if (gemm.dtype == DataType::kFloat32) return run_float32(gemm, narrow, vectorizable);
  if (!vectorizable) return run_unaligned(gemm, narrow);
  if (hopper::can_run(gemm)) return hopper::run(gemm);
  // In gated_epilogue.cuh an access of the source has half the bytes that a bias has.
  if (gemm.activation.gated && gemm.has_bias) return run_unaligned(gemm, narrow);
  GroupArrays arrays;
  GroupArrays::layout(gemm.groups.count, static_cast<uint8_t*>(gemm.workspace), &arrays);
  fill_group_arrays(gemm, arrays);
  if (gemm.dtype == DataType::kFloat16) {
    narrow ? run_float16_narrow(gemm, arrays) : run_float16_wide(gemm, arrays);
  } else {
    narrow ? run_bfloat16_narrow(gemm, arrays) : run_bfloat16_wide(gemm, arrays);
  }
}

}  // namespace moe_infer
