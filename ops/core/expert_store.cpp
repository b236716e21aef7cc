#include "core/expert_store.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/expert_names.h"
#include "core/expert_source.h"
#include "core/sub_layer_shape.h"

namespace moe_infer {
namespace {

// d_model is an input's dimension and not to be trusted: the sub-layer's sizes must not overflow. No tensor of a file
// has more elements than this.
constexpr int64_t kMaxDimension = int64_t{1} << 40U;

void check_digest(LayerConfig const& config, WeightFile const& file) {
  if (!config.weight_digest.empty() && config.weight_digest != file.digest()) {
    throw bad_file(file.path() + " has digest " + file.digest() + ", but attribute 'expert_weight_digest' is '" +
                   config.weight_digest +
                   "': the file has changed or is not the one for which the model was made; put that file back, or "
                   "rewrite the model and delete its engine cache");
  }
}

int64_t d_model_without_weights(LayerConfig const& config) {
  if (config.embedding_size != 0) {
    return config.embedding_size;
  }
  return config.centroids ? static_cast<int64_t>(config.centroids->size()) / config.expert_count : 0;
}

std::vector<ExpertTensor> tensors_of(LayerConfig const& config, int64_t d_model) {
  return make_sub_layer(config.sublayer_type, sub_layer_shape(config, d_model))->tensors();
}

// The pages of the first experts.
std::vector<HostRange> page_ranges(std::vector<std::vector<ExpertPiece>> const& pieces, size_t experts) {
  std::vector<HostRange> ranges;
  for (size_t expert = 0; expert < experts; ++expert) {
    for (auto const& piece : pieces[expert]) {
      auto const begin = reinterpret_cast<uintptr_t>(piece.data);
      ranges.push_back({begin, begin + piece.bytes()});
    }
  }
  return merge_pages(std::move(ranges));
}

}  // namespace

std::shared_ptr<ExpertStore> ExpertStore::open(LayerConfig const& config, int64_t d_model) {
  if (d_model < 0 || d_model > kMaxDimension) {
    throw invalid("MoELayer: the last dimension of hidden_states must be 1 to " + std::to_string(kMaxDimension) +
                  ", got " + std::to_string(d_model));
  }
  auto store = std::make_shared<ExpertStore>();
  store->pieces_.resize(static_cast<size_t>(config.expert_count));
  store->places_.resize(static_cast<size_t>(config.expert_count));
  auto const probe = tensors_of(config, std::max<int64_t>(d_model, 1));
  if (probe.empty()) {  // a sub-layer without weights has no file
    store->d_model_ = d_model != 0 ? d_model : d_model_without_weights(config);
    return store;
  }
  store->path_ = resolve_weight_path(config.weight_file);
  store->source_ = ExpertSource::open(store->path_);
  auto const& file = store->source_->file();
  store->digest_ = file.digest();
  check_digest(config, file);
  auto const form = check_names(config, file, probe);
  store->d_model_ = d_model != 0 ? d_model : infer_d_model(config, file, form);
  if (store->d_model_ > kMaxDimension) {
    throw bad_file(file.path() + ": the tensors' shapes mean a d_model of " + std::to_string(store->d_model_) +
                   "; at most " + std::to_string(kMaxDimension) + " is possible; write the file again");
  }
  store->tensors_ = tensors_of(config, store->d_model_);
  check_tensors(config, file, form, store->d_model_, store->tensors_);
  store->stacked_ = form == ExpertForm::kStacked;
  if (store->stacked_) {
    store->add_stacked(config);
  } else {
    store->add_separate(config);
  }
  return store;
}

void ExpertStore::add_piece(int32_t expert, ExpertPiece piece, Place place) {
  auto const* const data = source_->find(place.name);
  piece.data = data == nullptr ? nullptr : data + place.offset;
  piece.file_offset = source_->file().tensors().at(place.name).offset + place.offset;
  pieces_[static_cast<size_t>(expert)].push_back(piece);
  places_[static_cast<size_t>(expert)].push_back(std::move(place));
}

void ExpertStore::add_stacked(LayerConfig const& config) {
  for (int32_t expert = 0; expert < config.expert_count; ++expert) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      auto const name = stacked_name(config, tensors_[i]);
      ExpertPiece piece;
      piece.dtype = source_->file().tensors().at(name).dtype;
      piece.rows = tensors_[i].rows;
      piece.columns = tensors_[i].columns;
      piece.tensor = static_cast<int32_t>(i);
      add_piece(expert, piece, {name, static_cast<uint64_t>(expert) * piece.bytes()});
    }
  }
}

void ExpertStore::add_separate(LayerConfig const& config) {
  for (int32_t expert = 0; expert < config.expert_count; ++expert) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      auto const parts = static_cast<int32_t>(tensors_[i].parts.size());
      for (int32_t part = 0; part < parts; ++part) {
        auto const name = separate_name(config, expert, tensors_[i].parts[static_cast<size_t>(part)]);
        ExpertPiece piece;
        piece.dtype = source_->file().tensors().at(name).dtype;
        piece.rows = tensors_[i].rows / parts;
        piece.columns = tensors_[i].columns;
        piece.tensor = static_cast<int32_t>(i);
        piece.first_row = part;
        piece.row_stride = parts;
        add_piece(expert, piece, {name, 0});
      }
    }
  }
}

bool ExpertStore::unchanged() const { return source_ == nullptr || source_->file().unchanged(); }

void ExpertStore::load(bool pin) {
  std::lock_guard<std::mutex> const lock(mutex_);
  if (source_ == nullptr) {
    return;
  }
  if (!source_->file().unchanged()) {
    throw bad_file(path_ + " has changed since it was opened; make the session again");
  }
  std::set<std::string> names;
  for (auto const& places : places_) {
    for (auto const& place : places) {
      names.insert(place.name);
    }
  }
  source_->inflate({names.begin(), names.end()});
  for (size_t expert = 0; expert < pieces_.size(); ++expert) {
    for (size_t i = 0; i < pieces_[expert].size(); ++i) {
      // Written only the first time: others may be reading it.
      if (pieces_[expert][i].data == nullptr) {
        auto const& place = places_[expert][i];
        pieces_[expert][i].data = source_->find(place.name) + place.offset;
      }
    }
  }
  check_content();
  if (pin && !std::exchange(pinned_, true)) {
    pin_what_fits();
  }
}

void ExpertStore::check_content() {
  std::set<std::string> seen;
  std::vector<std::string> names;  // in the order of the experts
  for (auto const& places : places_) {
    for (auto const& place : places) {
      if (seen.insert(place.name).second) {
        names.push_back(place.name);
      }
    }
  }
  source_->check_content(names, stacked_);
}

void ExpertStore::read(ExpertPiece const& piece, uint64_t offset, void* out, uint64_t bytes) const {
  if (source_->is_in_file(piece.data)) {
    source_->file().read_at(piece.file_offset + offset, out, bytes);
  } else {
    std::memcpy(out, static_cast<uint8_t const*>(piece.data) + offset, bytes);
  }
}

void ExpertStore::pin_what_fits() {
  auto& pinned = source_->pinned();
  auto const missing_fit = [&](std::vector<HostRange> const& ranges) {
    auto const limit = pinned_bytes_limit();
    uint64_t bytes = 0;
    for (auto const& range : ranges) {
      bytes += pinned.missing_bytes(range);
    }
    return bytes <= limit - std::min(limit, pinned_bytes_now());
  };
  // The whole file as one region, when nothing of it is pinned and it fits: then no expert lies across the regions of
  // two layers, which a single copy cannot cross, and other layers find theirs done.
  bool const stored = source_->is_in_file(pieces_.front().front().data);
  auto const whole = merge_pages({source_->file_range()});
  if (stored && pinned.bytes() == 0 && missing_fit(whole)) {
    source_->pin_file_pages(whole.front());  // where CUDA refuses, it would refuse the parts as well
    return;
  }
  // Otherwise as many experts from the first on as the bound allows.
  size_t few = 0;
  size_t many = pieces_.size() + 1;
  while (many - few > 1) {
    auto const middle = few + (many - few) / 2;
    (missing_fit(page_ranges(pieces_, middle)) ? few : many) = middle;
  }
  for (auto const& range : page_ranges(pieces_, few)) {
    bool const in_file = source_->is_in_file(reinterpret_cast<void const*>(range.begin));  // NOLINT
    if (!(in_file ? source_->pin_file_pages(range) : pinned.pin(range, nullptr))) {
      return;
    }
  }
}

uint64_t ExpertStore::pinned_bytes() const { return source_ == nullptr ? 0 : source_->pinned().bytes(); }

bool ExpertStore::is_pinned(int32_t expert) const {
  auto const& pieces = pieces_[static_cast<size_t>(expert)];
  return std::all_of(pieces.begin(), pieces.end(), [&](ExpertPiece const& piece) {
    return piece.data != nullptr && source_->pinned().is_pinned(piece.data, piece.bytes());
  });
}

std::string ExpertStore::pinning_note() const {
  if (source_ == nullptr) {
    return "";
  }
  size_t pinned = 0;
  for (size_t expert = 0; expert < pieces_.size(); ++expert) {
    pinned += is_pinned(static_cast<int32_t>(expert)) ? 1 : 0;
  }
  std::lock_guard<std::mutex> const lock(mutex_);
  if (!pinned_ || pinned == pieces_.size()) {
    return "";
  }
  auto const reason = source_->pinned().note();
  return path_ + ": " + std::to_string(pieces_.size() - pinned) + " of " + std::to_string(pieces_.size()) +
         " experts are not page-locked and are copied more slowly" +
         (reason.empty() ? "; the bound of " + std::to_string(pinned_bytes_limit()) +
                               " page-locked bytes is reached, raise MOE_INFER_PINNED_BYTES"
                         : ": " + reason);
}

}  // namespace moe_infer
