#include "core/cuda_check.h"
#include "gemm/problems.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 128;

__global__ void fill(ExpertGroups groups, int64_t element_bytes, int32_t n, int32_t k, uint8_t const* a, uint8_t* c,
                     uint64_t weight_offset, Problems problems) {
  int const g = blockIdx.x * blockDim.x + threadIdx.x;
  if (g >= groups.count) return;
  int64_t const begin = groups.row_begin[g];
  problems.sizes[g] = {static_cast<int32_t>(groups.row_end[g] - begin), n, k};
  problems.a[g] = const_cast<uint8_t*>(a) + begin * k * element_bytes;
  problems.c[g] = c + begin * n * element_bytes;
  problems.w[g] = const_cast<uint8_t*>(groups.slots) +
                  static_cast<uint64_t>(groups.slot_of_group[g]) * groups.slot_bytes + weight_offset;
  problems.stride_k[g] = k;
  problems.stride_n[g] = n;
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

size_t Problems::layout(int32_t groups, uint8_t* base, Problems* problems) {
  auto const count = static_cast<size_t>(groups);
  size_t used = 0;
  auto take = [&](auto*& pointer, size_t bytes) {
    if (base != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += align(bytes);
  };
  Problems p;
  take(p.sizes, count * sizeof(ProblemSize));
  take(p.a, count * sizeof(void*));
  take(p.w, count * sizeof(void*));
  take(p.c, count * sizeof(void*));
  take(p.stride_k, count * sizeof(int64_t));
  take(p.stride_n, count * sizeof(int64_t));
  if (problems != nullptr) *problems = p;
  return used;
}

Problems make_problems(GroupedGemm const& gemm) {
  Problems problems;
  Problems::layout(gemm.groups.count, static_cast<uint8_t*>(gemm.workspace), &problems);
  fill<<<(gemm.groups.count + kThreads - 1) / kThreads, kThreads, 0, gemm.stream>>>(
      gemm.groups, static_cast<int64_t>(size_of(gemm.dtype)), static_cast<int32_t>(gemm.n),
      static_cast<int32_t>(gemm.k), static_cast<uint8_t const*>(gemm.a), static_cast<uint8_t*>(gemm.c),
      gemm.weight_offset, problems);
  MOE_CUDA_CHECK(cudaGetLastError());
  return problems;
}

}  // namespace moe_infer
