// Runs of an expert cache on a CUDA runtime that does what streams allow in any order (fake_cuda.h). When an expert
// runs it must lie in its slot, whole, and the run's input must be there; what comes after the run finds all its
// experts done.
//
//   cache_order PATH EXPERTS HIDDEN_SIZE SLOTS SEED CALLS
//
// Some calls fail at one of their experts. Prints a line for each call: what was enqueued, "use" for each expert and
// "copy" for each copy. Ends with 1 and a sentence when an expert was not there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/expert_cache.h"
#include "core/expert_store.h"
#include "core/pack.h"
#include "fake_cuda.h"
#include "place_rows.h"

namespace moe_infer {

// The kernel's work, for weights that keep their type.
void pack(void const* source, DataType source_dtype, void* tensor, DataType dtype, PackRun const& run,
          cudaStream_t stream) {
  if (source_dtype != dtype) throw invalid("cache_order: pack changes no types");
  fake_cuda::enqueue(stream, [=] {
    size_t const size = size_of(dtype);
    for (int64_t i = 0; i < run.count; ++i) {
      int64_t const element = run.first + i;
      int64_t const row = run.first_row + element / run.columns * run.row_stride;
      std::memcpy(static_cast<uint8_t*>(tensor) + static_cast<size_t>(row * run.columns + element % run.columns) * size,
                  static_cast<uint8_t const*>(source) + static_cast<size_t>(i) * size, size);
    }
  });
}

namespace {

using Bytes = std::vector<uint8_t>;

Bytes slot_with(ExpertStore const& store, SlotLayout const& layout, int32_t expert) {
  Bytes slot(layout.bytes, 0);
  for (auto const& piece : store.pieces(expert)) {
    place_rows(store, piece, slot.data() + layout.offsets[static_cast<size_t>(piece.tensor)]);
  }
  return slot;
}

bool holds(uint8_t const* slot, ExpertStore const& store, SlotLayout const& layout, Bytes const& expected) {
  for (size_t t = 0; t < layout.offsets.size(); ++t) {
    auto const& tensor = store.tensors()[t];
    auto const bytes = static_cast<size_t>(tensor.rows * tensor.columns) * sizeof(float);
    if (std::memcmp(slot + layout.offsets[t], expected.data() + layout.offsets[t], bytes) != 0) return false;
  }
  return true;
}

int run(char** words) {
  LayerConfig config;
  config.sublayer_type = "T5_FF";
  config.weight_file = words[0];
  config.expert_count = std::atoi(words[1]);
  config.hidden_size = std::atoi(words[2]);
  int32_t const slots = std::atoi(words[3]);
  uint64_t const seed = std::strtoull(words[4], nullptr, 10);
  int const calls = std::atoi(words[5]);
  fake_cuda::seed(seed);
  std::mt19937_64 random(seed);
  auto const store = ExpertStore::open(config, 0);
  store->load();
  SlotLayout const layout(store->tensors(), DataType::kFloat32);
  std::vector<Bytes> expected;
  for (int32_t e = 0; e < config.expert_count; ++e) expected.push_back(slot_with(*store, layout, e));

  ExpertCache cache(store, config.expert_count, slots, layout, DataType::kFloat32);
  Stream const streams[2];
  RunLanes lanes(seed % 2 == 1);
  int wrong = 0;
  int early = 0;  // experts before their input, and ends of runs before their experts
  std::vector<int> given(static_cast<size_t>(calls), 0), done(given);  // of each run, on the device
  for (int call = 0; call < calls; ++call) {
    // Few experts, some, or all, as tokens, batches and prompts need them.
    std::vector<int32_t> counts(static_cast<size_t>(config.expert_count));
    auto const part = random() % 4;
    for (auto& count : counts) count = part == 3 || random() % 4 < part ? 1 : 0;
    cudaStream_t const stream = streams[random() % 2].get();
    std::vector<int> used(counts.size(), 0);
    uint64_t left = random() % 8 == 0 ? random() % counts.size() : UINT64_MAX;  // experts until one fails
    bool failed = false;
    auto* const input = &given[static_cast<size_t>(call)];
    auto* const ran = &done[static_cast<size_t>(call)];
    int enqueued = 0;
    fake_cuda::enqueue(stream, [input] { ++*input; });
    lanes.fork(stream);
    try {
      cache.run_needed(counts.data(), lanes, [&](int32_t expert, int32_t slot, int32_t lane) {
        if (left-- == 0) throw invalid("one that fails");
        fake_cuda::note("use");
        ++used[static_cast<size_t>(expert)];
        auto const* const at = cache.slots() + static_cast<uint64_t>(slot) * cache.slot_bytes();
        ++enqueued;
        fake_cuda::enqueue(lanes.stream(lane), [&wrong, &early, &store, &layout, &expected, at, expert, input, ran] {
          ++*ran;
          early += *input > 0 ? 0 : 1;
          wrong += holds(at, *store, layout, expected[static_cast<size_t>(expert)]) ? 0 : 1;
        });
      });
    } catch (Error const&) {
      failed = true;
    }
    lanes.join();
    fake_cuda::enqueue(stream, [&early, enqueued, ran] { early += *ran == enqueued ? 0 : 1; });
    for (size_t e = 0; e < counts.size(); ++e) {
      if (!failed && used[e] != (counts[e] > 0 ? 1 : 0)) {
        std::fprintf(stderr, "call %d used expert %zu %d times\n", call, e, used[e]);
        return 1;
      }
    }
    std::printf("%s\n", fake_cuda::take_log().c_str());
  }
  fake_cuda::finish();
  if (wrong > 0) std::fprintf(stderr, "%d experts were not in their slots when they were used\n", wrong);
  if (early > 0) std::fprintf(stderr, "%d times a run began before its input or ended before its experts\n", early);
  return wrong + early > 0 ? 1 : 0;
}

}  // namespace
}  // namespace moe_infer

int main(int count, char** words) {
  if (count != 7) return 2;
  try {
    return moe_infer::run(words + 1);
  } catch (std::exception const& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
