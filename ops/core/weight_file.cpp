#include "core/weight_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "core/error.h"
#include "core/npz_file.h"
#include "core/safetensors_file.h"

namespace moe_infer {
namespace {

constexpr char const* kWeightDirectory = "MOE_INFER_WEIGHT_DIR";
constexpr uint64_t kLargestRead = 1ULL << 30U;  // pread and crc32 take less than 2 GiB at once

std::string system_error(int number) { return std::error_code(number, std::generic_category()).message(); }

FileIdentity identity_of(struct stat const& status) {
  return {status.st_dev, status.st_ino, static_cast<uint64_t>(status.st_size),
          static_cast<int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec};
}

bool exists(std::string const& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0;
}

}  // namespace

std::string resolve_weight_path(std::string const& path) {
  namespace fs = std::filesystem;
  if (path.empty() || path.find('\0') != std::string::npos) {
    throw bad_file("weight file: the path must be a non-empty text without NUL; set attribute 'expert_weight_file'");
  }
  std::vector<std::string> candidates;
  std::error_code failed;  // a working directory that was removed: its path stays empty, and is then not tried
  auto const working = fs::current_path(failed);
  char const* const folder = std::getenv(kWeightDirectory);
  if (fs::path(path).is_absolute()) {
    candidates.push_back(path);
  } else {
    if (folder != nullptr && *folder != '\0') {
      auto const absolute = (working / fs::path(folder)).lexically_normal();
      candidates.push_back((absolute / path).string());
    }
    if (!failed) {
      candidates.push_back((working / path).string());
    }
  }
  std::string tried;
  for (auto const& candidate : candidates) {
    if (exists(candidate)) {
      return candidate;
    }
    tried += (tried.empty() ? "" : ", ") + candidate;
  }
  throw bad_file("weight file '" + path + "' not found; tried " + tried + "; set " + kWeightDirectory +
                 " to its folder, or give an absolute path");
}

bool find_identity(std::string const& path, FileIdentity* identity) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    return false;
  }
  *identity = identity_of(status);
  return true;
}

WeightFile::Descriptor::Descriptor(std::string const& path)
    // O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
    : number_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (number_ < 0) {
    throw bad_file(path + ": cannot open the weight file: " + system_error(errno) +
                   "; check attribute 'expert_weight_file' and the file's permissions");
  }
}

WeightFile::Descriptor::~Descriptor() { ::close(number_); }

WeightFile::WeightFile(std::string const& path) : path_(path), descriptor_(path) {
  struct stat status{};
  if (::fstat(descriptor_.number(), &status) != 0) {
    throw bad_file(path + ": cannot read the weight file's size: " + system_error(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw bad_file(path + " is not a regular file; expected an .npz or .safetensors file");
  }
  if (status.st_size == 0) {
    throw bad_file(path + " is empty (0 bytes); copy or write it again");
  }
  identity_ = identity_of(status);
  size_ = static_cast<uint64_t>(status.st_size);
}

std::shared_ptr<WeightFile> WeightFile::open(std::string const& path) {
  // By the name's end, not by content: a safetensors file may begin with the same bytes as a zip.
  auto const suffix = std::filesystem::path(path).extension().string();
  if (suffix == ".npz") {
    return std::make_shared<NpzFile>(path);
  }
  if (suffix == ".safetensors") {
    return std::make_shared<SafetensorsFile>(path);
  }
  throw bad_file(path + ": the name of a weight file must end in .npz or .safetensors, got '" + suffix +
                 "'; rename or convert the file");
}

bool WeightFile::unchanged() const {
  FileIdentity found;
  return find_identity(path_, &found) && found == identity_;
}

void WeightFile::read_at(uint64_t offset, void* out, uint64_t bytes) const {
  auto* to = static_cast<uint8_t*>(out);
  while (bytes > 0) {
    auto const count = ::pread(descriptor_.number(), to, std::min(bytes, kLargestRead), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count <= 0) {
      throw bad_file(
          path_ + ": " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " cannot be read: " +
          (count < 0 ? system_error(errno) : "the file has shrunk since it was opened") + "; copy or write it again");
    }
    to += count;
    offset += static_cast<uint64_t>(count);
    bytes -= static_cast<uint64_t>(count);
  }
}

void WeightFile::check_crc(TensorEntry const& /*entry*/, uint32_t /*crc*/) const {}  // safetensors has none

void WeightFile::set_digest(uint8_t const* index, uint64_t bytes) {
  uLong crc = ::crc32(0, nullptr, 0);
  for (uint64_t done = 0; done < bytes; done += kLargestRead) {
    crc = ::crc32(crc, index + done, static_cast<uInt>(std::min(bytes - done, kLargestRead)));
  }
  std::array<char, 9> hexadecimal{};
  std::snprintf(hexadecimal.data(), hexadecimal.size(), "%08lx", crc);
  digest_ = std::string(hexadecimal.data()) + "-" + std::to_string(size_);
}

}  // namespace moe_infer
