// Device side of the experts of one layer: `max_concurrency` slots, kept across calls.
//
// The cache decides which expert goes into which slot; expert_loader.h brings it there. Two events of a slot keep the
// order: `used` (its readers are done) before the copies into it, and `ready` (all of it is there) before its readers.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/device_memory.h"
#include "core/expert_loader.h"
#include "core/expert_store.h"
#include "core/expert_use.h"
#include "core/host_ring.h"
#include "core/policy.h"
#include "core/policy_settings.h"
#include "core/run_lanes.h"
#include "core/statistics.h"
#include "core/use_history.h"
#include "moe_infer.h"

namespace moe_infer {

class ExpertCache {
 public:
  // Allocates slots and staging on the current device. Loads nothing; store->load was called.
  ExpertCache(std::shared_ptr<ExpertStore> store, int32_t expert_count, int32_t slots, SlotLayout layout,
              DataType dtype);
  ~ExpertCache();
  ExpertCache(ExpertCache const&) = delete;
  ExpertCache& operator=(ExpertCache const&) = delete;

  // Loads every expert into the slot of its number and waits. Only when slots >= expert_count.
  void load_all();

  // Streaming: brings the needed experts into the slots that plan_call decides (policy.h), while `use` runs those that
  // are there. For each, `use(expert, slot, lane)` is called once its bytes are ordered before what the lane gets, and
  // enqueues its work there; a slot is reused only when that is done. `counts` (host): rows of each expert. Not for two
  // threads at once. After an exception the cache can be used again; what failed is not in it.
  template <class Use>
  void run_needed(int32_t const* counts, RunLanes const& lanes, Use&& use) {
    Call call;
    plan(counts, &call);
    try {
      call.loads.emplace(*loader_, missing_);
      while (call.run < call.needed) {
        // The bus begins before the experts that are there are enqueued, and stays ahead of what runs.
        bring_ahead(&call, counts);
        auto const& planned = plan_[static_cast<size_t>(call.run)];
        int32_t const lane = call.run % lanes.count();
        cudaStream_t const stream = lanes.stream(lane);
        ready(planned.slot, stream);
        try {
          use(planned.expert, planned.slot, lane);
        } catch (...) {
          abandon(planned.slot, stream);
          throw;
        }
        used(planned.slot, stream);
        ++call.run;
        if (planned.hit == 0) --call.ahead;
      }
    } catch (...) {
      forget(call);
      throw;
    }
  }

  uint8_t const* slots() const { return memory_.bytes(); }
  uint64_t slot_bytes() const { return layout_.bytes; }
  // Before the first call: goes on counting uses from where MOE_INFER_STATISTICS_FILE has them, for the experts with
  // this prefix in the weight file, and writes them there when the cache is destroyed. Nothing if it is not set.
  void remember(std::string const& prefix);
  bool remembers() const { return use_history_ != nullptr; }
  // What another way to bring experts into these slots goes by (fetch/device_fetch.h).
  ExpertStore const& store() const { return *store_; }
  SlotLayout const& layout() const { return layout_; }
  DataType dtype() const { return dtype_; }
  PolicySettings const& policy() const { return policy_; }
  CacheTables const& tables() const { return tables_; }
  // Takes what another has decided and brought in. Copies of this cache are then ordered behind what is enqueued on
  // `stream` so far.
  void set_tables(CacheTables const& tables, cudaStream_t stream);
  // Device array 0, 1, 2, ...: slot_of_group for groups of one expert point into it; resident layers use all of it.
  int32_t const* slot_numbers() const { return numbers_.as<int32_t>(); }
  // Slots, counters, and where each expert lies. Any thread, also while another runs the layer.
  void add_statistics(LayerStatistics* statistics) const;
  // True while the weight file on disk is the one whose experts lie here.
  bool unchanged() const { return store_->unchanged(); }
  std::string note() const;

 private:
  // How far a call is, in entries of plan_, which are in the order in which they run.
  struct Call {
    int32_t needed = 0;
    int32_t run = 0;    // entries before this have run
    int32_t next = 0;   // misses before this entry have been brought
    int32_t ahead = 0;  // misses that have been brought and not run
    std::optional<ExpertLoader::Loads> loads;
  };

  void plan(int32_t const* counts, Call* call);
  void order_runs(int32_t hits, int32_t needed);
  // Brings the misses that may be brought by now, at least the next expert to run.
  void bring_ahead(Call* call, int32_t const* counts);
  void bring(PlannedExpert const& planned, ExpertLoader::Loads* loads);
  // The call ended early: of what it was to fetch, only what has run is there.
  void forget(Call const& call) noexcept;
  void load(int32_t expert, int32_t slot, ExpertLoader::Loads* loads);
  void ready(int32_t slot, cudaStream_t stream);
  void used(int32_t slot, cudaStream_t stream);
  void abandon(int32_t slot, cudaStream_t stream) noexcept;

  std::shared_ptr<ExpertStore> store_;
  SlotLayout layout_;
  DataType dtype_;
  DeviceMemory memory_, numbers_;
  std::vector<Event> ready_, used_;       // of each slot
  std::unique_ptr<ExpertLoader> loader_;  // null once all experts are here to stay
  // The loader's, if all experts stay: the next layer loads through it, too, and making one takes milliseconds.
  std::shared_ptr<HostRing> ring_;
  PolicySettings policy_;
  std::vector<int32_t> slot_of_expert_, expert_of_slot_;
  std::vector<ExpertHistory> histories_;
  CacheTables tables_;  // points into the three above
  std::vector<PlannedExpert> plan_;
  std::vector<PlannedExpert> ordered_;  // scratch
  std::vector<int32_t> missing_;        // experts of the call's misses, in the order in which they run
  std::vector<int32_t> place_in_call_;  // of needed experts, in plan_
  std::unique_ptr<UseHistoryFile> use_history_;
  ExpertUse use_;
  std::atomic<int64_t> hits_{0}, misses_{0}, evictions_{0}, bytes_fetched_{0};
};

}  // namespace moe_infer
