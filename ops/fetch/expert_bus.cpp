#include "fetch/expert_bus.h"

#include <algorithm>
#include <cstring>

#include "core/cuda_check.h"

namespace moe_infer {
namespace {

// Of copies that are enqueued at once. Their flags rise together after them, so what came first waits for the last:
// for less than it takes to compute with these bytes once they have come.
constexpr uint64_t kBatchBytes = uint64_t{32} << 20U;
constexpr size_t kBatchRises = 128;  // the driver takes 255

// What is needed waits for what is on its way: kMostOnTheirWay pieces, of about 10 us each. Larger ones gained less.
constexpr uint64_t kPieceBytes = uint64_t{512} << 10U;
constexpr uint32_t kMostOnTheirWay = 2;

// Below this a guess costs more than it gives (docs/fetching-ahead.md).
constexpr double kLeastRight = 1.0 / 3;
// What a guess counts among all of a layer's.
constexpr double kNewest = 1.0 / 32;

}  // namespace

std::shared_ptr<ExpertBus> ExpertBus::of_device() {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<ExpertBus>> all;
  std::lock_guard<std::mutex> const lock(mutex);
  auto& known = all[current_device()];
  auto found = known.lock();
  if (found == nullptr) known = found = std::make_shared<ExpertBus>();
  return found;
}

ExpertBus::ExpertBus() : arrived_pieces_(allocate_pinned(sizeof(uint32_t))) {
  std::memset(arrived_pieces_.bytes(), 0, sizeof(uint32_t));
  // Page-locked memory has one address, on the host and on the device.
  works_ = flags_.works_for(copies_.get(), arrived_pieces_.as<uint32_t>());
}

int64_t ExpertBus::enter(CopySource const* source) {
  std::lock_guard<std::mutex> const lock(mutex_);
  layers_[++last_id_].source = source;
  return last_id_;
}

void ExpertBus::leave(int64_t layer) noexcept {
  RelaxedCapture const relaxed;  // another thread may capture a graph
  std::lock_guard<std::mutex> const lock(mutex_);
  if (guessed_layer_ == layer) guessed_layer_ = 0;
  layers_.erase(layer);
  // Its memory goes next, and pieces may be on their way.
  if (cudaStreamSynchronize(copies_.get()) != cudaSuccess) cudaGetLastError();
}

AheadCounters ExpertBus::counters(int64_t layer) const {
  std::lock_guard<std::mutex> const lock(mutex_);
  auto const found = layers_.find(layer);
  return found == layers_.end() ? AheadCounters() : found->second.counters;
}

void ExpertBus::bring(int64_t layer, FetchItem const* items, int32_t count, cudaStream_t stream) {
  std::lock_guard<std::mutex> const lock(mutex_);
  auto& own = layers_.at(layer);
  batch_.clear();  // after a call that failed
  flags_.clear();
  int32_t const guessed = find_guess(layer, items, count);
  if (guessed >= 0) {                // first what the bus waits for
    arrived_.record(copies_.get());  // what was sent
    copy(*own.source, items[guessed], sent_, count == 1);
  }
  int32_t const last = guessed == count - 1 ? count - 2 : count - 1;
  for (int32_t i = 0; i <= last; ++i) {
    if (i != guessed) copy(*own.source, items[i], {0, i == 0 ? own.source->head_bytes : 0}, i == last);
  }
  if (guessed >= 0) move(&own, items[guessed], stream);
}

// Adds the expert's parts, as from a place in one of them, to the batch, and ends a batch that is large enough. In
// between flags rise only for the last expert: a rise holds the bus up for more than a microsecond, and while another
// expert follows, nobody waits for the one before.
void ExpertBus::copy(CopySource const& source, FetchItem const& item, Place from, bool is_last) {
  uint8_t* const slot = source.slot(item.slot);
  uint32_t* const flag = source.there + item.slot;
  for (size_t i = from.part; i < source.parts.size(); ++i) {
    auto const& part = source.parts[i];
    if (is_last && part.late && i > 0 && !source.parts[i - 1].late) {
      flags_.add(flag, kFirstThere);
      end_batch();
    }
    uint64_t const skip = i == from.part ? from.offset : 0;
    batch_.add(slot + part.offset_in_slot + skip, source.address(item.expert, i) + skip, part.bytes - skip);
  }
  flags_.add(flag, kAllThere);
  if (is_last || batch_.bytes() >= kBatchBytes || flags_.added() >= kBatchRises) end_batch();
}

void ExpertBus::end_batch() {
  batch_.enqueue(copies_.get());
  flags_.write_added(copies_.get());
}

// --- The guess

void ExpertBus::guess(int64_t layer, int32_t expert) {
  std::lock_guard<std::mutex> const lock(mutex_);
  drop_guess();
  auto const found = layers_.find(layer);
  if (expert < 0 || found == layers_.end()) return;
  auto const& own = found->second;
  sent_ = {};
  fetches_ = own.right >= kLeastRight && make_place(own.source->slot_bytes);
  guessed_expert_ = expert;
  guessed_layer_ = layer;  // last: there is a guess when all of it stands
}

void ExpertBus::feed() {
  std::unique_lock<std::mutex> const lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || guessed_layer_ == 0 || !fetches_) return;
  auto const& source = *layers_.at(guessed_layer_).source;
  if (sent_of(source) == 0 && !place_is_free()) return;
  while (sent_.part < source.parts.size()) {
    uint32_t const come = __atomic_load_n(arrived_pieces_.as<uint32_t>(), __ATOMIC_RELAXED);
    if (sent_pieces_ - come >= kMostOnTheirWay) return;
    send_piece(source);
  }
}

void ExpertBus::send_piece(CopySource const& source) {
  auto const& part = source.parts[sent_.part];
  uint64_t const bytes = std::min(kPieceBytes, part.bytes - sent_.offset);
  MOE_CUDA_CHECK(cudaMemcpyAsync(place_.bytes() + part.offset_in_slot + sent_.offset,
                                 source.address(guessed_expert_, sent_.part) + sent_.offset, bytes,
                                 cudaMemcpyHostToDevice, copies_.get()));
  flags_.write(copies_.get(), arrived_pieces_.as<uint32_t>(), sent_pieces_ + 1);
  ++sent_pieces_;
  sent_.offset += bytes;
  if (sent_.offset == part.bytes) sent_ = {sent_.part + 1, 0};
}

// The layer has chosen, so its guess is over. Place of the guessed expert in `items`; -1: it is not among them, or
// nothing of it has been sent.
int32_t ExpertBus::find_guess(int64_t layer, FetchItem const* items, int32_t count) {
  if (guessed_layer_ != layer) return -1;
  auto const* const found =
      std::find_if(items, items + count, [this](FetchItem const& item) { return item.expert == guessed_expert_; });
  bool const is_right = found != items + count;
  auto& own = layers_.at(layer);
  own.right += ((is_right ? 1.0 : 0.0) - own.right) * kNewest;
  if (is_right && sent_of(*own.source) > 0) return static_cast<int32_t>(found - items);
  drop_guess();
  return -1;
}

// What was sent, into the slot. The flag does not tell of it: the kernels that read it are enqueued behind.
void ExpertBus::move(Layer* own, FetchItem const& item, cudaStream_t stream) {
  auto const& source = *own->source;
  arrived_.order_before(stream);
  for (size_t i = 0; i < source.parts.size() && sent_of(source, i) > 0; ++i) {
    auto const at = source.parts[i].offset_in_slot;
    MOE_CUDA_CHECK(cudaMemcpyAsync(source.slot(item.slot) + at, place_.bytes() + at, sent_of(source, i),
                                   cudaMemcpyDeviceToDevice, stream));
  }
  moved_.record(stream);
  ++own->counters.used;
  own->counters.bytes_used += static_cast<int64_t>(sent_of(source));
  guessed_layer_ = 0;
}

// Nobody needed it.
void ExpertBus::drop_guess() {
  auto const found = layers_.find(guessed_layer_);
  guessed_layer_ = 0;
  if (found == layers_.end()) return;
  auto& own = found->second;
  uint64_t const bytes = sent_of(*own.source);
  if (bytes == 0) return;
  ++own.counters.wasted;
  own.counters.bytes_wasted += static_cast<int64_t>(bytes);
}

// Bytes of a part of the guessed expert that are in the place, or on their way there.
uint64_t ExpertBus::sent_of(CopySource const& source, size_t part) const {
  return part < sent_.part ? source.parts[part].bytes : part == sent_.part ? sent_.offset : 0;
}

uint64_t ExpertBus::sent_of(CopySource const& source) const {
  uint64_t bytes = 0;
  for (size_t i = 0; i < source.parts.size(); ++i) bytes += sent_of(source, i);
  return bytes;
}

bool ExpertBus::place_is_free() const {
  cudaError_t const status = moved_.query();
  if (status == cudaErrorNotReady) return false;
  MOE_CUDA_CHECK(status);
  return true;
}

bool ExpertBus::make_place(uint64_t bytes) {
  if (bytes <= place_bytes_) return true;
  if (has_no_room_) return false;
  MOE_CUDA_CHECK(cudaStreamSynchronize(copies_.get()));
  moved_.wait();
  try {
    place_ = allocate_device(bytes, "an expert that is fetched ahead", "free some GPU memory");
  } catch (Error const&) {  // all works without
    has_no_room_ = true;
    return false;
  }
  place_bytes_ = bytes;
  return true;
}

// Without the mutex: if another thread records the event anew meanwhile, more is waited for.
void ExpertBus::order_before(cudaStream_t stream) const {
  arrived_.record(copies_.get());
  arrived_.order_before(stream);
}

}  // namespace moe_infer
