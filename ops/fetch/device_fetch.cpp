#include "fetch/device_fetch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "core/cuda_check.h"
#include "core/device_limits.h"
#include "fetch/copy_rates.h"

namespace moe_infer {
namespace {

constexpr uint64_t kAlignment = 16;
// 256 KiB on their way. A copy alone has the bus's full speed with half as much; more reaches no more.
constexpr unsigned kBlocks = 8;
// That copy while the host notices what was ordered, which takes it about as long: 10 us.
constexpr uint32_t kHeadChunks = 32;

// What the host's part of a call costs where little is missing: it waits for the plan, and the copies that it then
// enqueues hide that. So chosen that both ways take as long at 0.3 misses a call of 9.4 MB each (docs/fetching.md).
constexpr double kHostSeconds = 3e-6;
// Before a layer has run.
constexpr float kMissesExpected = 1;

unsigned blocks_from_environment() {
  // For benchmarks/streaming.py, which measures what kBlocks should be.
  char const* const text = std::getenv("MOE_INFER_FETCH_BLOCKS");
  int const blocks = text == nullptr ? 0 : std::atoi(text);
  return blocks >= 1 && blocks <= 64 ? static_cast<unsigned>(blocks) : kBlocks;
}

template <class T>
DeviceMemory upload(std::vector<T> const& values) {
  size_t const bytes = sizeof(T) * values.size();
  auto memory = allocate_device(bytes, "the list of what a fetch copies", "free some GPU memory");
  MOE_CUDA_CHECK(cudaMemcpy(memory.bytes(), values.data(), bytes, cudaMemcpyHostToDevice));
  return memory;
}

// In the order in which they are needed.
std::vector<FetchChunk> chunks_of(std::vector<ExpertPiece> const& pieces, std::vector<ExpertTensor> const& tensors,
                                  std::vector<size_t> const& order, SlotLayout const& layout) {
  std::vector<FetchChunk> chunks;
  for (size_t const i : order) {
    auto const& piece = pieces[i];
    for (uint64_t offset = 0; offset < piece.bytes(); offset += kChunkBytes) {
      auto const bytes = static_cast<uint32_t>(std::min(kChunkBytes, piece.bytes() - offset));
      chunks.push_back({piece.tensor, bytes, tensors[i].late, offset, layout.offsets[i] + offset});
    }
  }
  return chunks;
}

// Each tensor as one piece, in the order of the tensors.
bool lies_as_in_slots(std::vector<ExpertPiece> const& pieces, SlotLayout const& layout, DataType dtype) {
  if (pieces.size() != layout.offsets.size()) return false;
  for (size_t i = 0; i < pieces.size(); ++i) {
    auto const& piece = pieces[i];
    if (piece.tensor != static_cast<int32_t>(i) || piece.row_stride != 1 || piece.first_row != 0 ||
        piece.dtype != dtype) {
      return false;
    }
  }
  return true;
}

}  // namespace

FetchMode fetch_mode_from_environment() {
  char const* const text = std::getenv("MOE_INFER_FETCH");
  std::string const mode = text == nullptr ? "" : text;
  if (mode.empty() || mode == "auto") return FetchMode::kAuto;
  if (mode == "host") return FetchMode::kHost;
  if (mode == "device") return FetchMode::kDevice;
  throw invalid("MOE_INFER_FETCH must be auto, host or device, got '" + mode + "'");
}

std::string DeviceFetch::why_not(ExpertCache const& cache) {
  auto const& store = cache.store();
  for (int32_t expert = 0; expert < cache.tables().expert_count; ++expert) {
    auto const& pieces = store.pieces(expert);
    if (!lies_as_in_slots(pieces, cache.layout(), cache.dtype())) {
      return store.path() +
             " holds experts in another type or row order than the kernels read; write it with "
             "moe_infer.rewrite, in the model's type";
    }
    if (!store.is_pinned(expert)) {
      return "not all experts are in page-locked memory; raise MOE_INFER_PINNED_BYTES";
    }
    for (auto const& piece : pieces) {
      if (reinterpret_cast<uintptr_t>(piece.data) % kAlignment != 0) {
        return store.path() +
               " has tensors that do not begin at a multiple of 16 bytes; write it with "
               "moe_infer.rewrite";
      }
    }
  }
  return "";
}

DeviceFetch::DeviceFetch(ExpertCache const& cache, FetchMode mode, RouterParams const& router,
                         std::shared_ptr<DeviceMemory const> router_bias)
    : policy_(cache.policy()),
      experts_(cache.tables().expert_count),
      slots_(cache.tables().slot_count),
      device_(current_device()),
      recent_misses_(allocate_pinned(sizeof(float))) {
  size_t const bytes = FetchTables::layout(experts_, slots_, nullptr, &copy_.tables, &shared_bytes_);
  memory_ =
      std::make_shared<DeviceMemory>(allocate_device(bytes, "the tables of an expert cache", "free some GPU memory"));
  FetchTables::layout(experts_, slots_, memory_->bytes(), &copy_.tables, &shared_bytes_);
  MOE_CUDA_CHECK(cudaMemset(memory_->bytes(), 0, bytes));
  host_copy_ = std::make_unique<HostCopy>(list_sources(cache), slots_);
  copy_.blocks = blocks_from_environment();
  if (mode == FetchMode::kAuto) saved_ = seconds_saved_by_host();
  *recent_misses_.as<float>() = kMissesExpected;
  copy_.tables.recent_misses = recent_misses_.as<float>();  // page-locked memory has one address
  MOE_CUDA_CHECK(cudaMemset(memory_->bytes(), 0, bytes));   // what measuring left
  staging_ = allocate_pinned(shared_bytes_);
  target_ = std::make_shared<GuessTarget const>(
      GuessTarget{host_copy_->id(), device_, router, copy_.tables.slot_of_expert, std::move(router_bias), memory_});
  cudaStream_t const stream = nullptr;
  return_tables(cache, stream);
  MOE_CUDA_CHECK(cudaStreamSynchronize(stream));
}

// Fills copy_.source in.
CopySource DeviceFetch::list_sources(ExpertCache const& cache) {
  auto const& tensors = cache.store().tensors();
  auto const& layout = cache.layout();
  auto const& first = cache.store().pieces(0);
  CopySource found;
  std::vector<size_t> order;  // late tensors last
  for (bool const late : {false, true}) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].late != late) continue;
      order.push_back(i);
      found.parts.push_back({layout.offsets[i], first[i].bytes(), late});
    }
  }
  std::vector<void*> on_device;
  for (int32_t expert = 0; expert < experts_; ++expert) {
    auto const& pieces = cache.store().pieces(expert);
    for (size_t const i : order) found.addresses.push_back(pieces[i].data);
    for (auto const& piece : pieces) {
      void* address = nullptr;
      MOE_CUDA_CHECK(cudaHostGetDevicePointer(&address, const_cast<void*>(piece.data), 0));
      on_device.push_back(address);
    }
  }
  found.slots = const_cast<uint8_t*>(cache.slots());
  found.slot_bytes = cache.slot_bytes();
  found.there = copy_.tables.arrivals.there;

  auto const chunks = chunks_of(first, tensors, order, layout);
  sources_ = upload(on_device);
  chunks_ = upload(chunks);
  auto& source = copy_.source;
  source.tensors = sources_.as<uint8_t const*>();
  source.tensor_count = static_cast<int32_t>(tensors.size());
  source.chunks = chunks_.as<FetchChunk>();
  source.chunk_count = static_cast<int32_t>(chunks.size());
  source.late_count = static_cast<int32_t>(
      std::count_if(chunks.begin(), chunks.end(), [](FetchChunk const& chunk) { return chunk.late; }));
  for (auto const& chunk : chunks) {
    if (copy_.head_chunks == kHeadChunks || chunk.tensor != chunks[0].tensor) break;
    ++copy_.head_chunks;
    found.head_bytes += chunk.bytes;
  }
  source.slots = found.slots;
  source.slot_bytes = found.slot_bytes;
  return found;
}

double DeviceFetch::seconds_saved_by_host() const {
  auto const& source = host_copy_->source();
  auto const rates = copy_rates(copy_, source, experts_, slots_);
  bool const is_known = host_can_copy() && rates.engine > 0;
  return is_known ? static_cast<double>(source.expert_bytes()) * (rates.kernel - rates.engine) : 0.0;
}

Copier DeviceFetch::faster_copier() const {
  float misses = 0;  // kernels may write it meanwhile
  __atomic_load(recent_misses_.as<float>(), &misses, __ATOMIC_RELAXED);
  return misses * saved_ > kHostSeconds ? Copier::kHost : Copier::kKernels;
}

ExpertCopy DeviceFetch::copy(Copier copier) const {
  ExpertCopy copy = copy_;
  if (copier == Copier::kHost) copy.blocks = 0;
  return copy;
}

ExpertCopy DeviceFetch::head_of_call(Copier copier) const {
  ExpertCopy head = copy_;
  if (copier == Copier::kHost) {
    head.tables.orders = host_copy_->next_orders();
  } else {
    head.head_chunks = 0;
  }
  return head;
}

void DeviceFetch::enqueue(Copier copier, int32_t const* counts, bool overlap, cudaStream_t stream) const {
  plan_fetch(policy_, experts_, slots_, counts, head_of_call(copier), overlap, stream);
  if (copier == Copier::kHost) host_copy_->copy(0, stream);
  copy_experts(copy(copier), overlap, stream);
}

void DeviceFetch::select_and_plan(Copier copier, TokenRouter const& router, Routing const& routing,
                                  NextLogits const& next, cudaStream_t stream) const {
  auto const target = copier == Copier::kHost ? next_->get() : nullptr;
  auto const guess = guess_by(next, target.get());
  select_and_plan_fetch(router, routing, policy_, slots_, head_of_call(copier), guess, is_hopper(), stream);
  if (copier == Copier::kHost) host_copy_->copy(guess.router.scores == nullptr ? 0 : target->id, stream);
}

// Empty if there is nothing to guess by or for.
Guess DeviceFetch::guess_by(NextLogits const& next, GuessTarget const* target) const {
  Guess guess;
  bool const fits = target != nullptr && target->device == device_ && target->router.experts == next.experts &&
                    target->router.top_k <= kMostPlannedChoices;
  if (next.logits == nullptr || !fits) return guess;
  guess.router = {target->router, next.logits, next.dtype};
  guess.slot_of_expert = target->slot_of_expert;
  return guess;
}

void DeviceFetch::forget(cudaStream_t stream) const noexcept {
  try {
    host_copy_->order_before(stream);  // a copy on its way must not end in a slot that was given to another expert
    auto const experts = static_cast<size_t>(experts_);
    auto const slots = static_cast<size_t>(slots_);
    MOE_CUDA_CHECK(cudaMemsetAsync(copy_.tables.slot_of_expert, -1, sizeof(int32_t) * experts, stream));
    MOE_CUDA_CHECK(cudaMemsetAsync(copy_.tables.expert_of_slot, -1, sizeof(int32_t) * slots, stream));
  } catch (...) {
    cudaGetLastError();
  }
}

void DeviceFetch::begin_take(cudaStream_t stream) {
  MOE_CUDA_CHECK(cudaMemcpyAsync(staging_.bytes(), memory_->bytes(), shared_bytes_, cudaMemcpyDeviceToHost, stream));
}

void DeviceFetch::end_take(ExpertCache* cache, cudaStream_t stream) const { cache->set_tables(on_host(), stream); }

void DeviceFetch::return_tables(ExpertCache const& cache, cudaStream_t stream) {
  auto const& from = cache.tables();
  CacheTables const to = on_host();
  std::memcpy(to.histories, from.histories, sizeof(ExpertHistory) * static_cast<size_t>(experts_));
  std::memcpy(to.slot_of_expert, from.slot_of_expert, sizeof(int32_t) * static_cast<size_t>(experts_));
  std::memcpy(to.expert_of_slot, from.expert_of_slot, sizeof(int32_t) * static_cast<size_t>(slots_));
  std::memcpy(staging_.bytes(), &from.clock, sizeof(from.clock));
  MOE_CUDA_CHECK(cudaMemcpyAsync(memory_->bytes(), staging_.bytes(), shared_bytes_, cudaMemcpyHostToDevice, stream));
  // Whatever is in a slot by then is there: so many ones are more than kAllThere.
  MOE_CUDA_CHECK(
      cudaMemsetAsync(copy_.tables.arrivals.there, 1, sizeof(uint32_t) * static_cast<size_t>(slots_), stream));
}

void DeviceFetch::hand_over(ExpertCache* cache) noexcept {
  DeviceGuard const guard(device_);
  try {
    MOE_CUDA_CHECK(cudaDeviceSynchronize());  // the caller's streams are not known here
    cudaStream_t const stream = nullptr;
    begin_take(stream);
    MOE_CUDA_CHECK(cudaStreamSynchronize(stream));
    end_take(cache, stream);
  } catch (...) {
    cudaGetLastError();
  }
}

CacheTables DeviceFetch::on_host() const {
  FetchTables staged;
  size_t bytes = 0;
  FetchTables::layout(experts_, slots_, staging_.bytes(), &staged, &bytes);  // only what is shared is there
  CacheTables tables;
  tables.expert_count = experts_;
  tables.slot_count = slots_;
  tables.slot_of_expert = staged.slot_of_expert;
  tables.expert_of_slot = staged.expert_of_slot;
  tables.histories = staged.histories;
  tables.clock = *staged.clock;
  return tables;
}

void DeviceFetch::add_statistics(LayerStatistics* statistics) const {
  DeviceGuard const guard(device_);
  FetchCounters counters;
  std::vector<int64_t> uses(static_cast<size_t>(experts_));
  MOE_CUDA_CHECK(cudaDeviceSynchronize());  // the caller's streams are not known here
  MOE_CUDA_CHECK(cudaMemcpy(&counters, copy_.tables.counters, sizeof(counters), cudaMemcpyDeviceToHost));
  MOE_CUDA_CHECK(cudaMemcpy(uses.data(), copy_.tables.uses, sizeof(int64_t) * uses.size(), cudaMemcpyDeviceToHost));
  MOE_CUDA_CHECK(cudaMemcpy(statistics->slot_of_expert.data(), copy_.tables.slot_of_expert,
                            sizeof(int32_t) * uses.size(), cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < uses.size(); ++i) statistics->uses[i] += uses[i];
  uint64_t last_wait = 0;
  uint64_t planned = 0;
  MOE_CUDA_CHECK(cudaMemcpy(&last_wait, copy_.tables.arrivals.last_wait, sizeof(last_wait), cudaMemcpyDeviceToHost));
  MOE_CUDA_CHECK(cudaMemcpy(&planned, copy_.tables.planned, sizeof(planned), cudaMemcpyDeviceToHost));
  auto const last_stall = last_wait > planned ? static_cast<int64_t>(last_wait - planned) : 0;
  statistics->counters.stall_ns = counters.stall_ns + last_stall;
  statistics->counters.hits += counters.hits;
  statistics->counters.misses += counters.misses;
  statistics->counters.evictions += counters.evictions;
  auto const ahead = host_copy_->ahead_counters();
  statistics->counters.prefetches_used += ahead.used;
  statistics->counters.prefetches_wasted += ahead.wasted;
  statistics->counters.prefetch_bytes_used += ahead.bytes_used;
  statistics->counters.prefetch_bytes_wasted += ahead.bytes_wasted;
  // What came ahead and was needed is of a miss.
  statistics->counters.bytes_fetched +=
      counters.misses * static_cast<int64_t>(host_copy_->source().expert_bytes()) + ahead.bytes_wasted;
}

}  // namespace moe_infer
