#include "fetch/fetch_ahead.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/cuda_check.h"

namespace moe_infer {
namespace {

// A needed expert waits for what is on its way: kMostOnTheirWay pieces, of about 10 us each.
constexpr uint64_t kPieceBytes = uint64_t{512} << 10U;
constexpr uint32_t kMostOnTheirWay = 2;

// Below this a guess costs more than it gives (docs/fetching-ahead.md).
constexpr double kLeastRight = 1.0 / 3;
// What a guess counts among all of a layer's.
constexpr double kNewest = 1.0 / 32;

uint64_t piece_bytes() {
  static uint64_t const bytes = [] {
    char const* const text = std::getenv("MOE_INFER_AHEAD_KIB");
    return text == nullptr ? kPieceBytes : static_cast<uint64_t>(std::atoi(text)) << 10U;
  }();
  return bytes;
}

}  // namespace

std::shared_ptr<FetchAhead> FetchAhead::of_device() {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<FetchAhead>> all;
  std::lock_guard<std::mutex> const lock(mutex);
  auto& known = all[current_device()];
  auto found = known.lock();
  if (found == nullptr) known = found = std::make_shared<FetchAhead>();
  return found;
}

FetchAhead::FetchAhead() : arrived_pieces_(allocate_pinned(sizeof(uint32_t))) {
  std::memset(arrived_pieces_.bytes(), 0, sizeof(uint32_t));
  // Page-locked memory has one address, on the host and on the device.
  works_ = flags_.works_for(copies_.get(), arrived_pieces_.as<uint32_t>());
}

int64_t FetchAhead::enter(CopySource const* source) {
  std::lock_guard<std::mutex> const lock(mutex_);
  layers_[++last_id_].source = source;
  return last_id_;
}

void FetchAhead::leave(int64_t layer) noexcept {
  std::lock_guard<std::mutex> const lock(mutex_);
  if (guessed_layer_ == layer) guessed_layer_ = 0;
  layers_.erase(layer);
  // Its memory goes next, and pieces may be on their way.
  if (cudaStreamSynchronize(copies_.get()) != cudaSuccess) cudaGetLastError();
}

AheadCounters FetchAhead::counters(int64_t layer) const {
  std::lock_guard<std::mutex> const lock(mutex_);
  auto const found = layers_.find(layer);
  return found == layers_.end() ? AheadCounters() : found->second.counters;
}

int32_t FetchAhead::end_guess(int64_t layer, FetchItem const* items, int32_t count) {
  std::lock_guard<std::mutex> const lock(mutex_);
  if (guessed_layer_ != layer) return -1;
  auto const* const found =
      std::find_if(items, items + count, [this](FetchItem const& item) { return item.expert == guessed_expert_; });
  bool const is_right = found != items + count;
  auto& own = layers_.at(layer);
  own.right += ((is_right ? 1.0 : 0.0) - own.right) * kNewest;
  if (!is_right || (part_ == 0 && offset_ == 0)) {
    drop_guess();
    return -1;
  }
  move_on(*own.source, *found);
  guessed_layer_ = 0;
  return static_cast<int32_t>(found - items);
}

void FetchAhead::begin_guess(int64_t layer, int32_t expert) {
  std::lock_guard<std::mutex> const lock(mutex_);
  drop_guess();
  auto const found = layers_.find(layer);
  if (expert < 0 || found == layers_.end()) return;
  auto const& own = found->second;
  guessed_layer_ = layer;
  guessed_expert_ = expert;
  fetches_ = own.right >= kLeastRight && make_place(own.source->slot_bytes);
  part_ = 0;
  offset_ = 0;
}

// Nobody needed it.
void FetchAhead::drop_guess() {
  auto const found = layers_.find(guessed_layer_);
  guessed_layer_ = 0;
  if (found == layers_.end()) return;
  auto& own = found->second;
  uint64_t bytes = offset_;
  for (size_t i = 0; i < part_; ++i) bytes += own.source->parts[i].bytes;
  if (bytes == 0) return;
  ++own.counters.wasted;
  own.counters.bytes_wasted += static_cast<int64_t>(bytes);
}

void FetchAhead::feed() {
  std::unique_lock<std::mutex> const lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || guessed_layer_ == 0 || !fetches_) return;
  for (;;) {
    uint32_t const come = __atomic_load_n(arrived_pieces_.as<uint32_t>(), __ATOMIC_RELAXED);
    bool const all_sent = part_ == layers_.at(guessed_layer_).source->parts.size();
    if (all_sent || sent_pieces_ - come >= kMostOnTheirWay) return;
    send_piece();
  }
}

void FetchAhead::send_piece() {
  auto const& source = *layers_.at(guessed_layer_).source;
  auto const& part = source.parts[part_];
  uint64_t const bytes = std::min(piece_bytes(), part.bytes - offset_);
  if (part_ == 0 && offset_ == 0) moved_.order_before(copies_.get());  // the expert before it has left the place
  MOE_CUDA_CHECK(cudaMemcpyAsync(place_.bytes() + part.offset_in_slot + offset_,
                                 source.address(guessed_expert_, part_) + offset_, bytes, cudaMemcpyHostToDevice,
                                 copies_.get()));
  flags_.write(copies_.get(), arrived_pieces_.as<uint32_t>(), ++sent_pieces_);
  offset_ += bytes;
  if (offset_ == part.bytes) {
    ++part_;
    offset_ = 0;
  }
}

void FetchAhead::move_on(CopySource const& source, FetchItem const& item) {
  uint8_t* const slot = source.slot(item.slot);
  auto& counters = layers_.at(guessed_layer_).counters;
  arrived_.record(copies_.get());
  arrived_.order_before(moves_.get());
  bool is_whole = true;
  for (size_t i = 0; i < source.parts.size(); ++i) {
    auto const& part = source.parts[i];
    uint64_t const here = i < part_ ? part.bytes : i == part_ ? offset_ : 0;
    if (here > 0) {
      MOE_CUDA_CHECK(cudaMemcpyAsync(slot + part.offset_in_slot, place_.bytes() + part.offset_in_slot, here,
                                     cudaMemcpyDeviceToDevice, moves_.get()));
      counters.bytes_used += static_cast<int64_t>(here);
    }
    if (here < part.bytes) {
      is_whole = false;
      MOE_CUDA_CHECK(cudaMemcpyAsync(slot + part.offset_in_slot + here, source.address(item.expert, i) + here,
                                     part.bytes - here, cudaMemcpyHostToDevice, copies_.get()));
    }
  }
  ++counters.used;
  moved_.record(moves_.get());
  if (!is_whole) {
    rest_arrived_.record(copies_.get());
    rest_arrived_.order_before(moves_.get());
  }
  flags_.write(moves_.get(), source.there + item.slot, kAllThere);
}

bool FetchAhead::make_place(uint64_t bytes) {
  if (bytes <= place_bytes_) return true;
  if (no_place_) return false;
  MOE_CUDA_CHECK(cudaStreamSynchronize(copies_.get()));
  MOE_CUDA_CHECK(cudaStreamSynchronize(moves_.get()));
  try {
    place_ = allocate_device(bytes, "an expert that is fetched ahead", "free some GPU memory");
  } catch (Error const&) {  // everything works without
    no_place_ = true;
    return false;
  }
  place_bytes_ = bytes;
  return true;
}

void FetchAhead::order_before(cudaStream_t stream) const {
  arrived_.record(copies_.get());
  arrived_.order_before(stream);
  arrived_.record(moves_.get());
  arrived_.order_before(stream);
}

}  // namespace moe_infer
