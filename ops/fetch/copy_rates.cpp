#include "fetch/copy_rates.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/cuda_check.h"
#include "core/device_memory.h"
#include "fetch/fetch_kernels.h"

namespace moe_infer {
namespace {

constexpr uint64_t kLeastBytes = uint64_t{8} << 20U;
constexpr uint64_t kMostBytes = uint64_t{64} << 20U;

class Stopwatch {
 public:
  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
    MOE_CUDA_CHECK(cudaEventCreate(&begin_));
    MOE_CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(Stopwatch const&) = delete;
  Stopwatch& operator=(Stopwatch const&) = delete;

  // Of the second time: the first one is slower.
  template <class Work>
  double seconds(Work&& work) {
    float milliseconds = 0;
    for (int i = 0; i < 2; ++i) {
      MOE_CUDA_CHECK(cudaEventRecord(begin_, stream_));
      work();
      MOE_CUDA_CHECK(cudaEventRecord(end_, stream_));
      MOE_CUDA_CHECK(cudaEventSynchronize(end_));
      MOE_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin_, end_));
    }
    return milliseconds / 1e3;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

CopyRates measure(ExpertCopy copy, CopySource const& source, int32_t count, uint64_t expert_bytes) {
  Stream const own;
  cudaStream_t const stream = own.get();
  Stopwatch watch(stream);
  auto const& tables = copy.tables;
  std::vector<FetchItem> items;
  for (int32_t i = 0; i < count; ++i) items.push_back({i, i});
  MOE_CUDA_CHECK(cudaMemcpy(tables.items, items.data(), sizeof(FetchItem) * items.size(), cudaMemcpyHostToDevice));
  MOE_CUDA_CHECK(cudaMemcpy(tables.item_count, &count, sizeof(count), cudaMemcpyHostToDevice));
  auto const most = static_cast<int32_t>(std::max<uint64_t>(1, kMostBytes / kChunkBytes));
  copy.source.chunk_count = std::min(copy.source.chunk_count, most);
  uint64_t const bytes = std::min(expert_bytes, static_cast<uint64_t>(copy.source.chunk_count) * kChunkBytes);

  CopyRates rates;
  double const total = static_cast<double>(bytes) * count;
  rates.kernel = watch.seconds([&] { copy_experts(copy, false, stream); }) / total;
  rates.engine = watch.seconds([&] {
    for (int32_t i = 0; i < count; ++i) {
      uint64_t left = bytes;
      for (size_t part = 0; part < source.parts.size() && left > 0; ++part) {
        auto const& what = source.parts[part];
        uint64_t const now = std::min(left, what.bytes);
        uint8_t* const to = source.slot(i) + what.offset_in_slot;
        MOE_CUDA_CHECK(cudaMemcpyAsync(to, source.address(i, part), now, cudaMemcpyHostToDevice, stream));
        left -= now;
      }
    }
  }) / total;
  return rates;
}

}  // namespace

CopyRates copy_rates(ExpertCopy const& copy, CopySource const& source, int32_t experts, int32_t slots) {
  static std::mutex mutex;
  static std::map<int, CopyRates> known;
  std::lock_guard<std::mutex> const lock(mutex);
  auto& rates = known[current_device()];
  uint64_t const expert_bytes = source.expert_bytes();
  if (rates.engine == 0 && expert_bytes > 0) {
    uint64_t const wanted = (kMostBytes + expert_bytes - 1) / expert_bytes;
    auto const count =
        static_cast<int32_t>(std::min<uint64_t>(wanted, static_cast<uint64_t>(std::min(experts, slots))));
    if (static_cast<uint64_t>(count) * expert_bytes >= kLeastBytes) rates = measure(copy, source, count, expert_bytes);
  }
  return rates;
}

}  // namespace moe_infer
