#include "core/expert_source.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <thread>

#include "core/error.h"

namespace moe_infer {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr unsigned kMostThreads = 8;

struct Registry {
  std::mutex mutex;
  std::map<FileIdentity, std::weak_ptr<ExpertSource>> sources;
};

// Never destroyed: sources may be opened and released while the process exits.
Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

// Runs work(0) .. work(count - 1) on a few threads; throws the first exception after all have ended.
void for_each_parallel(size_t count, std::function<void(size_t)> const& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto const worker = [&] {
    try {
      for (auto i = next++; i < count; i = next++) {
        work(i);
      }
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> const lock(mutex);
      error = error ? error : std::current_exception();
    }
  };
  auto const wanted = std::min<size_t>({count, kMostThreads, std::max(1U, std::thread::hardware_concurrency())});
  std::vector<std::thread> threads;
  try {
    while (threads.size() + 1 < wanted) {
      threads.emplace_back(worker);
    }
  } catch (std::exception const&) {  // no more threads to be had: with those that are there, it takes longer
  }
  worker();
  for (auto& thread : threads) {
    thread.join();
  }
  if (error) {
    std::rethrow_exception(error);
  }
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
    return file_->data() + entry.offset;
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

void ExpertSource::detach_from_file(HostRange const& pages) {
  constexpr uint64_t kPart = uint64_t{64} << 20U;  // for a thread
  auto const offset = pages.begin - reinterpret_cast<uintptr_t>(file_->data());
  auto const bytes = std::min<uint64_t>(pages.bytes(), file_->size() - offset);  // the last page goes on with zeros
  HostPages memory(pages.bytes());
  for_each_parallel((bytes + kPart - 1) / kPart, [&](size_t part) {
    auto const begin = part * kPart;
    file_->read_at(offset + begin, memory.data() + begin, std::min(kPart, bytes - begin));
  });
  memory.move_to(pages);
}

bool ExpertSource::is_mapped(void const* data) const {
  auto const* const byte = static_cast<uint8_t const*>(data);
  return byte >= file_->data() && byte < file_->data() + file_->size();
}

}  // namespace moe_infer
