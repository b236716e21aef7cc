#include "core/expert_loader.h"

#include <algorithm>
#include <utility>

#include "core/cuda_check.h"
#include "core/pack.h"

namespace moe_infer {
namespace {

// Half of the staging buffer on the device: from 16 MiB on the copy engine runs at the bus's full speed.
constexpr uint64_t kStagingBytes = uint64_t{16} << 20U;
constexpr uint64_t kUnlimited = UINT64_MAX;

}  // namespace

ExpertLoader::ExpertLoader(std::shared_ptr<ExpertStore> store, int32_t expert_count, SlotLayout layout, DataType dtype)
    : store_(std::move(store)), layout_(std::move(layout)), dtype_(dtype), device_(current_device()) {
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

ExpertLoader::~ExpertLoader() {
  DeviceGuard const guard(device_);
  wait();  // copies read the store's memory, which may go now
}

void ExpertLoader::order_behind(cudaStream_t stream) const {
  before_.record(stream);
  before_.order_before(copy_stream_.get());
}

void ExpertLoader::finish() const {
  MOE_CUDA_CHECK(cudaStreamSynchronize(copy_stream_.get()));
  MOE_CUDA_CHECK(cudaStreamSynchronize(pack_stream_.get()));
}

void ExpertLoader::wait() const noexcept {
  cudaStreamSynchronize(copy_stream_.get());
  cudaStreamSynchronize(pack_stream_.get());
}

void ExpertLoader::list_transfers(int32_t expert, uint64_t most_direct_bytes, uint64_t most_staged_bytes,
                                  std::vector<Transfer>* transfers) const {
  for (auto const& piece : store_->pieces(expert)) {
    bool const direct = is_direct(piece);
    uint64_t const most_bytes = direct ? most_direct_bytes : most_staged_bytes;
    int64_t const elements = piece.rows * piece.columns;
    auto const most = static_cast<int64_t>(
        std::min(most_bytes / size_of(piece.dtype), static_cast<uint64_t>(std::max<int64_t>(elements, 1))));
    for (int64_t first = 0; first < elements; first += most) {
      transfers->push_back({&piece, expert, first, std::min(most, elements - first), direct});
    }
  }
}

void ExpertLoader::send(Transfer const& transfer, void const* source, uint8_t* slot) {
  auto const& piece = *transfer.piece;
  uint8_t* const tensor = slot + layout_.offsets[static_cast<size_t>(piece.tensor)];
  cudaStream_t const copies = copy_stream_.get();
  if (transfer.direct) {
    auto const element = piece.first_row * piece.columns + transfer.first;
    batch_.add(tensor + static_cast<uint64_t>(element) * size_of(dtype_), source, transfer.bytes());
    return;
  }
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

// --- The loads of one call

ExpertLoader::Loads::Loads(ExpertLoader& loader, std::vector<int32_t> const& experts) : loader_(loader) {
  auto const most_staged = std::min(loader.staging_bytes_, HostRing::kChunkBytes);
  loader.reads_.clear();
  if (loader.ring_ == nullptr) return;
  for (int32_t const expert : experts) {
    if (loader.store_->is_pinned(expert)) continue;
    loader.list_transfers(expert, HostRing::kChunkBytes, most_staged, &loader.reads_);
  }
  if (loader.reads_.empty()) return;
  session_.emplace(*loader.ring_);
  submit_reads();
}

bool ExpertLoader::Loads::is_read(int32_t expert) const {
  auto const& reads = loader_.reads_;
  return taken_ < reads.size() && reads[taken_].expert == expert;
}

// As many as the ring takes.
void ExpertLoader::Loads::submit_reads() {
  auto const& reads = loader_.reads_;
  for (; submitted_ < reads.size() && submitted_ < taken_ + HostRing::kChunks; ++submitted_) {
    // Two pointers: small enough for std::function to hold without allocating.
    session_->submit([store = loader_.store_.get(), read = &reads[submitted_]](void* chunk) {
      store->read(*read->piece, read->offset(), chunk, read->bytes());
    });
  }
}

uint64_t ExpertLoader::Loads::load(int32_t expert, uint8_t* slot, Event const& free, Event const& ready) {
  auto& loader = loader_;
  // A file that was written to would give weights that nobody checked.
  if (!loader.store_->unchanged()) {
    throw bad_file(loader.store_->path() + " has changed since the layer was made; make the session again");
  }
  try {
    free.order_before(loader.copy_stream_.get());
    loader.batch_.clear();  // after a load that failed
    uint64_t const bytes = is_read(expert) ? copy_read(expert, slot) : loader.copy_pinned(expert, slot);
    // Packing of this expert comes after its copies, so the pack stream's end is the expert's. The copy stream goes on
    // with the next expert meanwhile.
    loader.copied_.record(loader.copy_stream_.get());
    loader.copied_.order_before(loader.pack_stream_.get());
    ready.record(loader.pack_stream_.get());
    return bytes;
  } catch (...) {
    loader.wait();  // neither the slot's next load nor the ring's next user may meet what this one left on its way
    throw;
  }
}

uint64_t ExpertLoader::Loads::copy_read(int32_t expert, uint8_t* slot) {
  cudaStream_t const copies = loader_.copy_stream_.get();
  uint64_t bytes = 0;
  for (; is_read(expert); ++taken_) {
    submit_reads();
    auto const& read = loader_.reads_[taken_];
    loader_.send(read, session_->take(), slot);
    loader_.batch_.enqueue(copies);
    session_->release(copies);
    bytes += read.bytes();
  }
  if (taken_ == loader_.reads_.size()) session_.reset();
  return bytes;
}

uint64_t ExpertLoader::copy_pinned(int32_t expert, uint8_t* slot) {
  uint64_t bytes = 0;
  transfers_.clear();
  list_transfers(expert, kUnlimited, staging_bytes_, &transfers_);
  for (auto const& transfer : transfers_) {
    send(transfer, static_cast<uint8_t const*>(transfer.piece->data) + transfer.offset(), slot);
    bytes += transfer.bytes();
  }
  batch_.enqueue(copy_stream_.get());
  return bytes;
}

}  // namespace moe_infer
