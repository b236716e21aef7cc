// Device side of the experts of one layer: `max_concurrency` slots, kept across calls.
//
// A fetch enqueues copies on the cache's own copy stream; parts that the file holds in another type or row order go
// through a staging buffer on the device and a kernel on the pack stream. Three events keep the order: `used` of a slot
// (its readers are done) before the copies into it, `ready` of a slot (all of it is there) before its readers, and
// one for each half of the staging buffer. Nothing waits on the host, except for weights that are not pinned
// (host_ring.h).
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/copy_batch.h"
#include "core/device_memory.h"
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
    Call call = plan(counts);
    try {
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
  // One copy from the host: `count` elements of `piece` from element `first` on.
  struct Transfer {
    ExpertPiece const* piece = nullptr;
    int64_t first = 0;
    int64_t count = 0;
    bool direct = false;  // type and order are the slot's
    void const* source() const;
    uint64_t bytes() const { return static_cast<uint64_t>(count) * size_of(piece->dtype); }
  };

  // How far a call is, in entries of plan_, which are in the order in which they run.
  struct Call {
    int32_t needed = 0;
    int32_t run = 0;    // entries before this have run
    int32_t next = 0;   // misses before this entry have been brought
    int32_t ahead = 0;  // misses that have been brought and not run
  };

  Call plan(int32_t const* counts);
  void order_runs(int32_t hits, int32_t needed);
  // Brings the misses that may be brought by now, at least the next expert to run.
  void bring_ahead(Call* call, int32_t const* counts);
  void bring(PlannedExpert const& planned);
  // The call ended early: of what it was to fetch, only what has run is there.
  void forget(Call const& call) noexcept;
  void fetch(int32_t expert, int32_t slot);
  void list_transfers(int32_t expert, uint64_t most_direct_bytes, uint64_t most_staged_bytes);
  void send(Transfer const& transfer, void const* source, uint8_t* slot);
  void send_pageable(uint8_t* slot);
  bool is_direct(ExpertPiece const& piece) const { return piece.row_stride == 1 && piece.dtype == dtype_; }
  void ready(int32_t slot, cudaStream_t stream);
  void used(int32_t slot, cudaStream_t stream);
  void abandon(int32_t slot, cudaStream_t stream) noexcept;

  std::shared_ptr<ExpertStore> store_;
  SlotLayout layout_;
  DataType dtype_;
  int device_;
  DeviceMemory memory_, numbers_, staging_;
  uint64_t staging_bytes_ = 0;  // of each half
  Stream copy_stream_, pack_stream_;
  CopyBatch batch_;                // of what the copy stream gets next
  Event copied_;                   // the last copy that was enqueued
  Event taken_;                    // what was enqueued before set_tables
  Event staged_[2], unstaged_[2];  // half of the staging buffer is full, is read
  uint64_t staging_turn_ = 0;
  std::shared_ptr<HostRing> ring_;  // only if some expert is not pinned

  std::vector<Event> ready_, used_;  // of each slot
  PolicySettings policy_;
  std::vector<int32_t> slot_of_expert_, expert_of_slot_;
  std::vector<ExpertHistory> histories_;
  CacheTables tables_;  // points into the three above
  std::vector<PlannedExpert> plan_;
  std::vector<PlannedExpert> ordered_;  // scratch
  std::vector<int32_t> place_in_call_;  // of needed experts, in plan_
  std::unique_ptr<UseHistoryFile> use_history_;
  std::vector<Transfer> transfers_;
  ExpertUse use_;
  std::atomic<int64_t> hits_{0}, misses_{0}, evictions_{0}, bytes_fetched_{0};
};

}  // namespace moe_infer
