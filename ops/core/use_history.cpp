#include "core/use_history.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/policy_settings.h"

namespace moe_infer {
namespace {

constexpr char const* kVariable = "MOE_INFER_STATISTICS_FILE";
constexpr char const* kHeader = "moe-infer expert use 1\n";
constexpr uint64_t kMostBytes = uint64_t{64} << 20U;
constexpr uint64_t kMostClock = uint64_t{1} << 48U;

// Layers of one process take turns, so that none writes a file in which another's line is missing.
std::mutex& file_mutex() {
  static auto* const instance = new std::mutex;  // never destroyed: layers may be destroyed at exit
  return *instance;
}

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
};

// All bytes of a file. False with the reason, "" if there is no such file.
bool read_file(std::string const& path, std::string* text, std::string* reason) {
  Descriptor const file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};  // a pipe must not make it wait
  if (file.number < 0) {
    *reason = errno == ENOENT ? "" : std::strerror(errno);
    return false;
  }
  struct stat status = {};
  if (::fstat(file.number, &status) != 0 || !S_ISREG(status.st_mode)) {
    *reason = "it is no regular file";
    return false;
  }
  if (status.st_size < 0 || static_cast<uint64_t>(status.st_size) > kMostBytes) {
    *reason = "it has " + std::to_string(status.st_size) + " bytes, more than " + std::to_string(kMostBytes);
    return false;
  }
  text->resize(static_cast<size_t>(status.st_size));
  size_t done = 0;
  while (done < text->size()) {
    auto const got = ::read(file.number, &(*text)[done], text->size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  text->resize(done);
  return true;
}

// One word without spaces or line ends.
std::string encoded(std::string const& text) {
  std::string word = "'";
  for (char const letter : text) {
    auto const byte = static_cast<unsigned char>(letter);
    if (byte > ' ' && byte < 0x7F && byte != '%') {
      word += letter;
    } else {
      char code[4];
      std::snprintf(code, sizeof(code), "%%%02X", byte);
      word += code;
    }
  }
  return word;
}

// Takes a decimal number of at most `most` and the letter that follows it.
bool take_number(char const** at, char const* end, uint64_t most, char follower, uint64_t* number) {
  char const* const begin = *at;
  uint64_t value = 0;
  char const* p = begin;
  for (; p != end && *p >= '0' && *p <= '9'; ++p) {
    auto const digit = static_cast<uint64_t>(*p - '0');
    if (value > (most - digit) / 10) return false;
    value = 10 * value + digit;
  }
  if (p == begin || p == end || *p != follower) return false;
  *number = value;
  *at = p + 1;
  return true;
}

// Lines by their key (the first three words); each line without its key, with its end.
using Lines = std::map<std::string, std::string>;

// False: the text is not whole.
bool split(std::string const& text, Lines* lines) {
  for (size_t begin = std::strlen(kHeader); begin < text.size();) {
    auto const end = text.find('\n', begin);
    size_t word = begin;
    for (int words = 0; words < 3 && word != std::string::npos && word != 0; ++words) {
      word = text.find(' ', word) + 1;
    }
    if (end == std::string::npos || word <= begin || word > end) {
      return false;
    }
    (*lines)[text.substr(begin, word - begin)] = text.substr(word, end + 1 - word);
    begin = end + 1;
  }
  return true;
}

// A count that no sequence of uses exceeds.
uint64_t most_count(PolicySettings const& settings) {
  return settings.kind == PolicyKind::kHalvedCounts ? 2ULL * settings.half_life
                                                    : kOneUse * (3ULL * settings.half_life / 2 + 1);
}

bool parse(std::string const& line, PolicySettings const& settings, CacheTables const& tables, uint64_t* clock,
           ExpertHistory* histories) {
  char const* at = line.data();
  char const* const end = at + line.size();
  uint64_t experts = 0;
  if (!take_number(&at, end, UINT32_MAX, ' ', &experts) || !take_number(&at, end, kMostClock, ' ', clock) ||
      experts != static_cast<uint64_t>(tables.expert_count)) {
    return false;
  }
  for (int32_t expert = 0; expert < tables.expert_count; ++expert) {
    uint64_t count = 0, last_use = 0;
    if (!take_number(&at, end, most_count(settings), ':', &count) ||
        !take_number(&at, end, *clock, expert + 1 < tables.expert_count ? ' ' : '\n', &last_use)) {
      return false;
    }
    histories[expert] = {last_use, static_cast<uint32_t>(count), 0};
  }
  return at == end;
}

std::string line_of(CacheTables const& tables) {
  std::string line = std::to_string(tables.expert_count) + " " + std::to_string(tables.clock);
  for (int32_t expert = 0; expert < tables.expert_count; ++expert) {
    auto const& history = tables.histories[expert];
    line += " " + std::to_string(history.count) + ":" + std::to_string(history.last_use);
  }
  return line + "\n";
}

bool write_file(std::string const& path, std::string const& text) {
  static std::atomic<unsigned> number{0};
  std::string const temporary = path + "." + std::to_string(::getpid()) + "." + std::to_string(number++) + ".partial";
  {
    Descriptor const file{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)};
    if (file.number < 0) return false;
    size_t done = 0;
    while (done < text.size()) {
      auto const put = ::write(file.number, text.data() + done, text.size() - done);
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) break;
      done += static_cast<size_t>(put);
    }
    if (done < text.size()) {
      ::unlink(temporary.c_str());
      return false;
    }
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    ::unlink(temporary.c_str());
    return false;
  }
  return true;
}

bool has_header(std::string const& text) { return text.compare(0, std::strlen(kHeader), kHeader) == 0; }

}  // namespace

UseHistoryFile::UseHistoryFile(std::string path, std::string const& digest, std::string const& prefix,
                               PolicySettings const& settings)
    : path_(std::move(path)),
      key_(encoded(digest) + " " + encoded(prefix) + " " + to_text(settings) + " "),
      settings_(settings) {}

std::string UseHistoryFile::path_from_environment() {
  char const* const text = std::getenv(kVariable);
  return text == nullptr ? "" : text;
}

void UseHistoryFile::load(CacheTables* tables) {
  if (path_.empty()) {
    return;
  }
  auto const slash = path_.rfind('/');
  std::string const folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    note_ = path_ + " (" + kVariable + ") cannot be written: " + std::strerror(errno);
  }
  std::lock_guard<std::mutex> const lock(file_mutex());
  std::string text, reason;
  Lines lines;
  if (!read_file(path_, &text, &reason)) {
    if (!reason.empty()) {
      note_ = path_ + " (" + kVariable + ") is not used: " + reason;
    }
    return;
  }
  if (text.empty()) {
    return;
  }
  if (!has_header(text)) {
    note_ = path_ + " (" + kVariable + ") is no file of expert statistics and is left alone; name another one";
    return;
  }
  auto const damaged = path_ + " (" + kVariable + ") is damaged; counting begins anew and will replace it";
  if (!split(text, &lines)) {
    note_ = damaged;
    return;
  }
  auto const line = lines.find(key_);
  if (line == lines.end()) {
    return;
  }
  uint64_t clock = 0;
  std::vector<ExpertHistory> found(static_cast<size_t>(tables->expert_count));
  if (!parse(line->second, settings_, *tables, &clock, found.data())) {
    note_ = damaged;
    return;
  }
  std::copy(found.begin(), found.end(), tables->histories);
  tables->clock = clock;
  loaded_clock_ = clock;
}

void UseHistoryFile::save(CacheTables const& tables) noexcept {
  if (path_.empty() || tables.clock == loaded_clock_ || tables.clock > kMostClock) {
    return;
  }
  try {
    std::lock_guard<std::mutex> const lock(file_mutex());
    std::string text, reason;
    Lines lines;
    if (read_file(path_, &text, &reason)) {
      if (!text.empty() && !has_header(text)) {
        return;
      }
      if (!split(text, &lines)) {
        lines.clear();
      }
    } else if (!reason.empty()) {
      return;
    }
    lines[key_] = line_of(tables);
    std::string written = kHeader;
    for (auto const& [key, line] : lines) {
      written += key + line;
    }
    if (written.size() <= kMostBytes) {
      write_file(path_, written);
    }
  } catch (...) {
    // Out of memory: the next process counts anew.
  }
}

}  // namespace moe_infer
