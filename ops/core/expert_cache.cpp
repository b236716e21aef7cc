#include "core/expert_cache.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/cuda_check.h"

namespace moe_infer {
namespace {

uint64_t slots_bytes(int32_t slots, uint64_t slot_bytes) {
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<uint64_t>(slots), slot_bytes, &bytes)) {
    throw invalid("MoELayer: " + std::to_string(slots) + " slots of " + std::to_string(slot_bytes) +
                  " bytes exceed any memory; lower attribute 'max_concurrency'");
  }
  return bytes;
}

}  // namespace

ExpertCache::ExpertCache(std::shared_ptr<ExpertStore> store, int32_t expert_count, int32_t slots, SlotLayout layout,
                         DataType dtype)
    : store_(std::move(store)),
      layout_(std::move(layout)),
      dtype_(dtype),
      memory_(allocate_device(slots_bytes(slots, layout_.bytes),
                              std::to_string(slots) + " experts of " + store_->path(),
                              "lower attribute 'max_concurrency'")),
      numbers_(allocate_device(sizeof(int32_t) * static_cast<size_t>(slots), "slot numbers", "free some")),
      ready_(static_cast<size_t>(slots)),
      used_(static_cast<size_t>(slots)),
      loader_(std::make_unique<ExpertLoader>(store_, expert_count, layout_, dtype)),
      policy_(policy_from_environment()),
      slot_of_expert_(static_cast<size_t>(expert_count), -1),
      expert_of_slot_(static_cast<size_t>(slots), -1),
      histories_(static_cast<size_t>(expert_count)),
      tables_{expert_count, slots, slot_of_expert_.data(), expert_of_slot_.data(), histories_.data(), 0},
      plan_(static_cast<size_t>(expert_count)),
      place_in_call_(static_cast<size_t>(expert_count)),
      use_(expert_count) {
  ordered_.reserve(static_cast<size_t>(expert_count));
  missing_.reserve(static_cast<size_t>(expert_count));
  std::vector<int32_t> numbers(static_cast<size_t>(slots));
  std::iota(numbers.begin(), numbers.end(), 0);
  MOE_CUDA_CHECK(
      cudaMemcpy(numbers_.bytes(), numbers.data(), sizeof(int32_t) * numbers.size(), cudaMemcpyHostToDevice));
}

ExpertCache::~ExpertCache() {
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
  std::vector<int32_t> experts(static_cast<size_t>(tables_.expert_count));
  std::iota(experts.begin(), experts.end(), 0);
  {
    ExpertLoader::Loads loads(*loader_, experts);
    for (int32_t const expert : experts) {
      load(expert, expert, &loads);
      slot_of_expert_[static_cast<size_t>(expert)] = expert;
      expert_of_slot_[static_cast<size_t>(expert)] = expert;
      use_.lies_in(expert, expert);
    }
  }
  loader_->finish();
  ring_ = loader_->ring();
  loader_.reset();
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
  loader_->order_behind(stream);
}

void ExpertCache::plan(int32_t const* counts, Call* call) {
  call->needed = plan_call(policy_, &tables_, counts, plan_.data());
  missing_.clear();
  for (int32_t i = 0; i < call->needed; ++i) {
    auto const& planned = plan_[static_cast<size_t>(i)];
    use_.needed(planned.expert);
    if (planned.hit == 0) missing_.push_back(planned.expert);
  }
  auto const hits = call->needed - static_cast<int32_t>(missing_.size());
  hits_ += hits;
  order_runs(hits, call->needed);
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
    bring(planned, &*call->loads);
    ++call->ahead;
  }
}

void ExpertCache::bring(PlannedExpert const& planned, ExpertLoader::Loads* loads) {
  if (planned.evicted >= 0) {
    use_.lies_in(planned.evicted, -1);
    ++evictions_;
  }
  load(planned.expert, planned.slot, loads);
  use_.lies_in(planned.expert, planned.slot);
  ++misses_;
}

void ExpertCache::forget(Call const& call) noexcept {
  // What was brought ahead may still be on its way into a slot that is empty from now on.
  loader_->wait();
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

void ExpertCache::load(int32_t expert, int32_t slot, ExpertLoader::Loads* loads) {
  auto const place = static_cast<size_t>(slot);
  auto* const address = memory_.bytes() + place * layout_.bytes;
  bytes_fetched_ += static_cast<int64_t>(loads->load(expert, address, used_[place], ready_[place]));
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
