#include "core/expert_source.h"

#include <algorithm>
#include <utility>

#include "core/content_check.h"
#include "core/parallel.h"

namespace moe_infer {
namespace {

constexpr uint64_t kAlignment = 256;

struct Registry {
  std::mutex mutex;
  std::map<FileIdentity, std::weak_ptr<ExpertSource>> sources;
};

// Never destroyed: sources may be opened and released while the process exits.
Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

}  // namespace

std::shared_ptr<ExpertSource> ExpertSource::open(std::string const& path) {
  auto& all = registry();
  std::lock_guard<std::mutex> const lock(all.mutex);
  FileIdentity identity;
  if (find_identity(path, &identity)) {
    auto const found = all.sources.find(identity);
    if (auto source = found == all.sources.end() ? nullptr : found->second.lock()) {
      return source;
    }
  }
  auto source = std::make_shared<ExpertSource>(WeightFile::open(path));
  for (auto other = all.sources.begin(); other != all.sources.end();) {
    other = other->second.expired() ? all.sources.erase(other) : std::next(other);
  }
  all.sources[source->file().identity()] = source;
  return source;
}

uint8_t const* ExpertSource::find(std::string const& name) const {
  auto const& entry = file_->tensors().at(name);
  if (entry.compressed == 0) {
    return reserved_.data() + entry.offset;
  }
  std::lock_guard<std::mutex> const lock(mutex_);
  auto const found = inflated_.find(name);
  return found == inflated_.end() ? nullptr : found->second;
}

void ExpertSource::inflate(std::vector<std::string> const& names) {
  std::lock_guard<std::mutex> const lock(mutex_);
  std::vector<std::pair<std::string, uint64_t>> missing;  // name, offset in the new pages
  uint64_t bytes = 0;
  for (auto const& name : names) {
    auto const& entry = file_->tensors().at(name);
    if (entry.compressed != 0 && inflated_.count(name) == 0) {
      missing.emplace_back(name, bytes);
      bytes += (entry.bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
  }
  if (missing.empty()) {
    return;
  }
  auto pages = std::make_unique<HostPages>(bytes);
  for_each_parallel(missing.size(), [&](size_t i) {
    file_->inflate(file_->tensors().at(missing[i].first), pages->data() + missing[i].second);
  });
  pages_.push_back(std::move(pages));
  for (auto const& [name, offset] : missing) {
    inflated_[name] = pages_.back()->data() + offset;
  }
}

HostRange ExpertSource::file_range() const {
  auto const begin = reinterpret_cast<uintptr_t>(reserved_.data());
  return {begin, begin + file_->size()};
}

bool ExpertSource::pin_file_pages(HostRange const& pages) {
  constexpr uint64_t kPart = uint64_t{64} << 20U;  // for a thread
  auto const fill = [&](HostRange const& gap) {
    auto* const memory = reserved_.commit(gap);
    auto const offset = gap.begin - file_range().begin;
    auto const bytes = std::min<uint64_t>(gap.bytes(), file_->size() - offset);  // the last page goes on with zeros
    for_each_parallel((bytes + kPart - 1) / kPart, [&](size_t part) {
      auto const begin = part * kPart;
      file_->read_at(offset + begin, memory + begin, std::min(kPart, bytes - begin));
    });
  };
  PinnedRanges::Backing const backing{fill, [&](HostRange const& gap) { reserved_.discard(gap); }};
  return pinned_.pin(pages, &backing);
}

void ExpertSource::check_content(std::vector<std::string> const& names, bool stacked) {
  auto const checks = content_checks();
  if (!checks.finite && !checks.crc) {
    return;
  }
  std::lock_guard<std::mutex> const lock(checking_);
  std::vector<CheckedTensor> tensors;
  for (auto const& name : names) {
    if (checked_.count(name) == 0) {
      auto const& entry = file_->tensors().at(name);
      tensors.push_back({name, &entry, entry.compressed == 0 ? nullptr : find(name), stacked});
    }
  }
  moe_infer::check_content(*file_, tensors, checks);
  checked_.insert(names.begin(), names.end());
}

}  // namespace moe_infer
