#include "core/expert_cache.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/cuda_check.h"
#include "core/pack.h"

namespace moe_infer {
namespace {

// Half of the staging buffer on the device: from 16 MiB on the copy engine runs at the bus's full speed.
constexpr uint64_t kStagingBytes = uint64_t{16} << 20U;
constexpr uint64_t kUnlimited = UINT64_MAX;

uint64_t slots_bytes(int32_t slots, uint64_t slot_bytes) {
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<uint64_t>(slots), slot_bytes, &bytes)) {
    throw invalid("MoELayer: " + std::to_string(slots) + " slots of " + std::to_string(slot_bytes) +
                  " bytes exceed any memory; lower attribute 'max_concurrency'");
  }
  return bytes;
}

}  // namespace

void const* ExpertCache::Transfer::source() const {
  return static_cast<uint8_t const*>(piece->data) + static_cast<uint64_t>(first) * size_of(piece->dtype);
}

ExpertCache::ExpertCache(std::shared_ptr<ExpertStore> store, int32_t expert_count, int32_t slots, SlotLayout layout,
                         DataType dtype)
    : store_(std::move(store)),
      layout_(std::move(layout)),
      dtype_(dtype),
      device_(current_device()),
      memory_(allocate_device(slots_bytes(slots, layout_.bytes),
                              std::to_string(slots) + " experts of " + store_->path(),
                              "lower attribute 'max_concurrency'")),
      numbers_(allocate_device(sizeof(int32_t) * static_cast<size_t>(slots), "slot numbers", "free some")),
      ready_(static_cast<size_t>(slots)),
      used_(static_cast<size_t>(slots)),
      policy_(policy_from_environment()),
      slot_of_expert_(static_cast<size_t>(expert_count), -1),
      expert_of_slot_(static_cast<size_t>(slots), -1),
      histories_(static_cast<size_t>(expert_count)),
      tables_{expert_count, slots, slot_of_expert_.data(), expert_of_slot_.data(), histories_.data(), 0},
      plan_(static_cast<size_t>(expert_count)),
      place_in_call_(static_cast<size_t>(expert_count)),
      use_(expert_count) {
  ordered_.reserve(static_cast<size_t>(expert_count));  // a call allocates nothing once it is planned
  std::vector<int32_t> numbers(static_cast<size_t>(slots));
  std::iota(numbers.begin(), numbers.end(), 0);
  MOE_CUDA_CHECK(
      cudaMemcpy(numbers_.bytes(), numbers.data(), sizeof(int32_t) * numbers.size(), cudaMemcpyHostToDevice));
  uint64_t largest_staged = 0;
  bool all_pinned = true;
  for (int32_t expert = 0; expert < expert_count; ++expert) {
    for (auto const& piece : store_->pieces(expert)) {
      largest_staged = std::max(largest_staged, is_direct(piece) ? 0 : piece.bytes());
    }
    all_pinned = all_pinned && store_->is_pinned(expert);
  }
  if (largest_staged > 0) {
    staging_bytes_ = (std::min(largest_staged, kStagingBytes) + 255) / 256 * 256;
    staging_ = allocate_device(2 * staging_bytes_, "staging of experts that change type or row order",
                               "lower attribute 'max_concurrency'");
  }
  if (!all_pinned) {
    ring_ = HostRing::shared(device_);
  }
}

ExpertCache::~ExpertCache() {
  DeviceGuard const guard(device_);
  cudaStreamSynchronize(copy_stream_.get());  // copies read the store's memory, which may go now
  cudaStreamSynchronize(pack_stream_.get());
  if (use_history_ != nullptr) {
    use_history_->save(tables_);
  }
}

void ExpertCache::remember(std::string const& prefix) {
  auto path = UseHistoryFile::path_from_environment();
  if (!path.empty()) {
    use_history_ = std::make_unique<UseHistoryFile>(std::move(path), store_->digest(), prefix, policy_);
    use_history_->load(&tables_);
  }
}

std::string ExpertCache::note() const {
  auto note = store_->pinning_note();
  if (use_history_ != nullptr && !use_history_->note().empty()) {
    note += (note.empty() ? "" : "; ") + use_history_->note();
  }
  return note;
}

void ExpertCache::load_all() {
  for (int32_t expert = 0; expert < tables_.expert_count; ++expert) {
    fetch(expert, expert);
    slot_of_expert_[static_cast<size_t>(expert)] = expert;
    expert_of_slot_[static_cast<size_t>(expert)] = expert;
    use_.lies_in(expert, expert);
  }
  MOE_CUDA_CHECK(cudaStreamSynchronize(copy_stream_.get()));
  MOE_CUDA_CHECK(cudaStreamSynchronize(pack_stream_.get()));
  ring_.reset();  // nothing will be fetched any more
}

void ExpertCache::set_tables(CacheTables const& tables, cudaStream_t stream) {
  std::copy_n(tables.histories, tables_.expert_count, histories_.begin());
  std::copy_n(tables.slot_of_expert, tables_.expert_count, slot_of_expert_.begin());
  std::copy_n(tables.expert_of_slot, tables_.slot_count, expert_of_slot_.begin());
  tables_.clock = tables.clock;
  for (int32_t expert = 0; expert < tables.expert_count; ++expert) {
    use_.lies_in(expert, slot_of_expert_[static_cast<size_t>(expert)]);
  }
  // Kernels that were enqueued without this cache may still read or fill slots.
  taken_.record(stream);
  taken_.order_before(copy_stream_.get());
}

ExpertCache::Call ExpertCache::plan(int32_t const* counts) {
  Call call;
  call.needed = plan_call(policy_, &tables_, counts, plan_.data());
  int32_t hits = 0;
  for (int32_t i = 0; i < call.needed; ++i) {
    auto const& planned = plan_[static_cast<size_t>(i)];
    use_.needed(planned.expert);
    hits += planned.hit;
  }
  hits_ += hits;
  order_runs(hits, call.needed);
  return call;
}

// Hits may run in any order, and misses in theirs (policy.h). First the hits whose slots misses take, for which the bus
// waits; then the misses, with the other hits evenly between them: a miss takes much longer to come than any to run,
// and the slot that it leaves may be the next one's.
void ExpertCache::order_runs(int32_t hits, int32_t needed) {
  auto const place = [this](PlannedExpert const& planned) -> int32_t& {
    return place_in_call_[static_cast<size_t>(planned.expert)];
  };
  auto const first_miss = plan_.begin() + hits;
  for (auto hit = plan_.begin(); hit != first_miss; ++hit) place(*hit) = needed;
  for (int32_t i = needed - 1; i >= hits; --i) {  // of several misses into one slot the first one counts
    int32_t const evicted = plan_[static_cast<size_t>(i)].evicted;
    if (evicted >= 0) place_in_call_[static_cast<size_t>(evicted)] = i;
  }
  std::stable_sort(plan_.begin(), first_miss,
                   [&](PlannedExpert const& a, PlannedExpert const& b) { return place(a) < place(b); });
  auto const taken =
      std::count_if(plan_.begin(), first_miss, [&](PlannedExpert const& hit) { return place(hit) < needed; });

  ordered_.assign(plan_.begin(), plan_.begin() + taken);
  int64_t const others = hits - taken;
  int64_t const misses = needed - hits;
  auto other = plan_.begin() + taken;
  for (int64_t i = 0; i < misses; ++i) {
    for (int64_t last = others * (i + 1) / misses; other - plan_.begin() - taken < last; ++other) {
      ordered_.push_back(*other);
    }
    ordered_.push_back(*(first_miss + i));
  }
  ordered_.insert(ordered_.end(), other, first_miss);
  std::copy(ordered_.begin(), ordered_.end(), plan_.begin());
  for (int32_t i = 0; i < needed; ++i) place(plan_[static_cast<size_t>(i)]) = i;
}

void ExpertCache::bring_ahead(Call* call, int32_t const* counts) {
  for (; call->next < call->needed; ++call->next) {
    auto const& planned = plan_[static_cast<size_t>(call->next)];
    if (planned.hit != 0) continue;
    // An expert that the call needs, too, has to run before it leaves its slot.
    bool const waits = planned.evicted >= 0 && counts[planned.evicted] > 0 &&
                       place_in_call_[static_cast<size_t>(planned.evicted)] >= call->run;
    if (waits || call->ahead >= std::max(1, fills_in_flight(tables_.slot_count))) return;
    bring(planned);
    ++call->ahead;
  }
}

void ExpertCache::bring(PlannedExpert const& planned) {
  if (planned.evicted >= 0) {
    use_.lies_in(planned.evicted, -1);
    ++evictions_;
  }
  fetch(planned.expert, planned.slot);
  use_.lies_in(planned.expert, planned.slot);
  ++misses_;
}

void ExpertCache::forget(Call const& call) noexcept {
  // What was brought ahead may still be on its way into a slot that is empty from now on.
  cudaStreamSynchronize(copy_stream_.get());
  cudaStreamSynchronize(pack_stream_.get());
  for (int32_t i = call.run; i < call.needed; ++i) {
    auto const& planned = plan_[static_cast<size_t>(i)];
    if (planned.hit != 0) continue;
    use_.lies_in(planned.expert, -1);
    if (planned.evicted >= 0) {
      use_.lies_in(planned.evicted, -1);
    }
    // The slot may hold an expert that the tables have given up: an empty slot is right whatever is in it.
    auto& expert = expert_of_slot_[static_cast<size_t>(planned.slot)];
    if (expert >= 0) {
      slot_of_expert_[static_cast<size_t>(expert)] = -1;
      expert = -1;
    }
  }
}

void ExpertCache::fetch(int32_t expert, int32_t slot) {
  // A file that was written to would give weights that nobody checked.
  if (!store_->unchanged()) {
    throw bad_file(store_->path() + " has changed since the layer was made; make the session again");
  }
  uint8_t* const destination = memory_.bytes() + static_cast<uint64_t>(slot) * layout_.bytes;
  try {
    used_[static_cast<size_t>(slot)].order_before(copy_stream_.get());
    batch_.clear();  // after a fetch that failed
    if (store_->is_pinned(expert)) {
      list_transfers(expert, kUnlimited, staging_bytes_);
      for (auto const& transfer : transfers_) {
        send(transfer, transfer.source(), destination);
      }
      batch_.enqueue(copy_stream_.get());
    } else {
      list_transfers(expert, HostRing::kChunkBytes, std::min(staging_bytes_, HostRing::kChunkBytes));
      send_pageable(destination);
    }
    // Packing of this expert comes after its copies, so the pack stream's end is the expert's. The copy stream goes on
    // with the next expert meanwhile.
    copied_.record(copy_stream_.get());
    copied_.order_before(pack_stream_.get());
    ready_[static_cast<size_t>(slot)].record(pack_stream_.get());
  } catch (...) {
    // The next fetch into this slot must not meet what this one left on its way.
    cudaStreamSynchronize(copy_stream_.get());
    cudaStreamSynchronize(pack_stream_.get());
    throw;
  }
}

void ExpertCache::list_transfers(int32_t expert, uint64_t most_direct_bytes, uint64_t most_staged_bytes) {
  transfers_.clear();
  for (auto const& piece : store_->pieces(expert)) {
    bool const direct = is_direct(piece);
    uint64_t const most_bytes = direct ? most_direct_bytes : most_staged_bytes;
    int64_t const elements = piece.rows * piece.columns;
    auto const most = static_cast<int64_t>(
        std::min(most_bytes / size_of(piece.dtype), static_cast<uint64_t>(std::max<int64_t>(elements, 1))));
    for (int64_t first = 0; first < elements; first += most) {
      transfers_.push_back({&piece, first, std::min(most, elements - first), direct});
    }
  }
}

void ExpertCache::send(Transfer const& transfer, void const* source, uint8_t* slot) {
  auto const& piece = *transfer.piece;
  uint8_t* const tensor = slot + layout_.offsets[static_cast<size_t>(piece.tensor)];
  cudaStream_t const copies = copy_stream_.get();
  if (transfer.direct) {
    auto const element = piece.first_row * piece.columns + transfer.first;
    batch_.add(tensor + static_cast<uint64_t>(element) * size_of(dtype_), source, transfer.bytes());
  } else {
    size_t const half = staging_turn_++ % 2;
    uint8_t* const staging = staging_.bytes() + half * staging_bytes_;
    unstaged_[half].order_before(copies);
    MOE_CUDA_CHECK(cudaMemcpyAsync(staging, source, transfer.bytes(), cudaMemcpyHostToDevice, copies));
    staged_[half].record(copies);
    staged_[half].order_before(pack_stream_.get());
    pack(staging, piece.dtype, tensor, dtype_,
         {transfer.first, transfer.count, piece.columns, piece.first_row, piece.row_stride}, pack_stream_.get());
    unstaged_[half].record(pack_stream_.get());
  }
  bytes_fetched_ += static_cast<int64_t>(transfer.bytes());
}

void ExpertCache::send_pageable(uint8_t* slot) {
  HostRing::Session session(*ring_);
  try {
    size_t submitted = 0;
    for (size_t i = 0; i < transfers_.size(); ++i) {
      for (; submitted < transfers_.size() && submitted < i + HostRing::kChunks; ++submitted) {
        // Two pointers: small enough for std::function to hold without allocating.
        session.submit([this, transfer = &transfers_[submitted]](void* chunk) {
          auto const first = static_cast<uint64_t>(transfer->first) * size_of(transfer->piece->dtype);
          store_->read(*transfer->piece, first, chunk, transfer->bytes());
        });
      }
      send(transfers_[i], session.take(), slot);
      batch_.enqueue(copy_stream_.get());
      session.release(copy_stream_.get());
    }
  } catch (...) {
    cudaStreamSynchronize(copy_stream_.get());  // before another user of the ring gets its buffers
    throw;
  }
}

void ExpertCache::ready(int32_t slot, cudaStream_t stream) {
  ready_[static_cast<size_t>(slot)].order_before(stream);
  // The last reader may run on another stream. used() is about to record its event anew on this one, so what it stands
  // for so far must come before: else the next fetch into the slot would not wait for that reader.
  used_[static_cast<size_t>(slot)].order_before(stream);
}

void ExpertCache::used(int32_t slot, cudaStream_t stream) { used_[static_cast<size_t>(slot)].record(stream); }

void ExpertCache::abandon(int32_t slot, cudaStream_t stream) noexcept {
  try {
    used(slot, stream);  // part of the work may be enqueued
  } catch (...) {
    // CUDA itself fails; the first error is the one to tell.
  }
}

void ExpertCache::add_statistics(LayerStatistics* statistics) const {
  statistics->weight_file = store_->path();
  statistics->slots = tables_.slot_count;
  statistics->slot_bytes = layout_.bytes;
  statistics->slot_of_expert = use_.slots();
  if (statistics->streams) {
    statistics->uses = use_.uses();
  }
  auto& counters = statistics->counters;
  counters.hits += hits_;
  counters.misses += misses_;
  counters.evictions += evictions_;
  counters.bytes_fetched += bytes_fetched_;
}

}  // namespace moe_infer
