#include <algorithm>

#include "core/cuda_check.h"
#include "core/element.cuh"
#include "core/pack.h"

namespace moe_infer {
namespace {

constexpr int kThreads = 256;
// The bus feeds this kernel at about a hundredth of what the memory can: few blocks keep up and leave the rest to the
// experts that run meanwhile.
constexpr int64_t kMostBlocks = 128;

template <class Source, class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Source const* __restrict__ source, T* __restrict__ tensor, PackRun run) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < run.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t const element = run.first + i;
    int64_t const row = element / run.columns;
    int64_t const column = element - row * run.columns;
    tensor[(run.first_row + row * run.row_stride) * run.columns + column] = from_float<T>(to_float(source[i]));
  }
}

}  // namespace

void pack(void const* source, DataType source_dtype, void* tensor, DataType dtype, PackRun const& run,
          cudaStream_t stream) {
  if (run.count == 0) {
    return;
  }
  auto const blocks = static_cast<unsigned>(std::min(kMostBlocks, (run.count + kThreads - 1) / kThreads));
  with_element(source_dtype, [&](auto source_tag) {
    using Source = typename decltype(source_tag)::type;
    with_element(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      pack_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<Source const*>(source), static_cast<T*>(tensor), run);
    });
  });
  MOE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace moe_infer
