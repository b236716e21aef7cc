// Rules and texts are those of moe_infer/weights/zip_index.py.
#include "core/zip_index.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "core/error.h"
#include "core/file_index.h"

namespace moe_infer {
namespace {

constexpr uint64_t kEndBytes = 22, kEnd64LocatorBytes = 20, kEnd64Bytes = 56, kCentralBytes = 46, kLocalBytes = 30;
constexpr uint64_t kLongestComment = 0xFFFF;
constexpr uint32_t kEndSignature = 0x06054B50, kEnd64LocatorSignature = 0x07064B50, kEnd64Signature = 0x06064B50,
                   kCentralSignature = 0x02014B50, kLocalSignature = 0x04034B50;
constexpr uint32_t kEncrypted = 1U << 0U, kDescriptor = 1U << 3U, kStrong = 1U << 6U, kUtf8 = 1U << 11U,
                   kMasked = 1U << 13U;
constexpr uint32_t kStored = 0, kDeflated = 8;
constexpr uint64_t kWide = 0xFFFFFFFF;    // a 32-bit field whose value is in the zip64 extra field
constexpr uint64_t kDeflateLimit = 1032;  // deflate gives at most this many bytes for one
constexpr char const* kDamaged = "the file is truncated or damaged, copy or write it again";

using Bytes = std::vector<uint8_t>;

uint64_t little(uint8_t const* bytes, size_t width) {
  uint64_t value = 0;
  for (size_t i = width; i-- > 0;) {
    value = value << 8U | bytes[i];
  }
  return value;
}
uint32_t u16(uint8_t const* bytes) { return static_cast<uint32_t>(little(bytes, 2)); }
uint32_t u32(uint8_t const* bytes) { return static_cast<uint32_t>(little(bytes, 4)); }
uint64_t u64(uint8_t const* bytes) { return little(bytes, 8); }

std::string text_of(uint64_t number) { return std::to_string(number); }

// a + b, which may need 65 bits.
std::string sum_text(uint64_t a, uint64_t b) {
  auto sum = static_cast<unsigned __int128>(a) + b;
  std::string digits;
  do {
    digits.insert(digits.begin(), static_cast<char>('0' + static_cast<int>(sum % 10)));
    sum /= 10;
  } while (sum != 0);
  return digits;
}

Bytes read_bytes(WeightFile const& file, uint64_t begin, uint64_t count) {
  Bytes bytes(count);
  file.read_at(begin, bytes.data(), count);
  return bytes;
}

// Whether `count` bytes from `begin` on end at or before `end`, without overflow.
bool fits(uint64_t begin, uint64_t count, uint64_t end) { return begin <= end && count <= end - begin; }

std::string text_at(uint8_t const* bytes, uint64_t count) {
  return {reinterpret_cast<char const*>(bytes), static_cast<size_t>(count)};
}

// --- The end records: where the central directory is.

struct Directory {
  uint64_t disk = 0, directory_disk = 0, here = 0, count = 0, size = 0, begin = 0;
  uint64_t end = 0;  // of the directory: where the first end record is
};

uint64_t find_end(WeightFile const& file) {
  auto const tail_begin = file.size() - std::min(file.size(), kEndBytes + kLongestComment);
  auto const tail = read_bytes(file, tail_begin, file.size() - tail_begin);
  for (uint64_t position = tail.size() < kEndBytes ? 0 : tail.size() - kEndBytes + 1; position-- > 0;) {
    auto const* const at = tail.data() + position;
    if (u32(at) == kEndSignature && position + kEndBytes + u16(at + 20) == tail.size()) {
      return tail_begin + position;
    }
  }
  throw bad_file(file.path() + ": no end of a zip directory in the last " + text_of(tail.size()) + " of " +
                 text_of(file.size()) +
                 " bytes; an .npz file is a zip archive, this one is truncated or something else, copy or write it "
                 "again");
}

Directory read_end64(WeightFile const& file, uint64_t end) {
  if (end >= kEnd64LocatorBytes) {
    auto const locator_begin = end - kEnd64LocatorBytes;
    auto const locator = read_bytes(file, locator_begin, kEnd64LocatorBytes);
    auto const position = u64(locator.data() + 8);
    if (u32(locator.data()) == kEnd64LocatorSignature && u32(locator.data() + 4) == 0 &&
        u32(locator.data() + 16) <= 1 && fits(position, kEnd64Bytes, locator_begin)) {
      auto const record = read_bytes(file, position, kEnd64Bytes);
      auto const* const at = record.data();
      if (u32(at) == kEnd64Signature && u64(at + 4) == locator_begin - position - 12) {
        return {u32(at + 16), u32(at + 20), u64(at + 24), u64(at + 32), u64(at + 40), u64(at + 48), position};
      }
    }
  }
  throw bad_file(file.path() + ": the zip archive's end record refers to a zip64 one, but none is before byte " +
                 text_of(end) + "; " + kDamaged);
}

Directory find_directory(WeightFile const& file) {
  auto const end = find_end(file);
  auto const record = read_bytes(file, end, kEndBytes);
  auto const* const at = record.data();
  Directory directory{u16(at + 4), u16(at + 6), u16(at + 8), u16(at + 10), u32(at + 12), u32(at + 16), end};
  if (directory.here == 0xFFFF || directory.count == 0xFFFF || directory.size == kWide || directory.begin == kWide) {
    directory = read_end64(file, end);
  }
  if (directory.disk != 0 || directory.directory_disk != 0 || directory.here != directory.count) {
    throw bad_file(file.path() + ": the zip archive is one of several parts; expected a single file, write it again");
  }
  if (!fits(directory.begin, directory.size, directory.end) || directory.begin + directory.size != directory.end) {
    throw bad_file(file.path() + ": the zip directory should end at byte " + sum_text(directory.begin, directory.size) +
                   " (" + text_of(directory.size) + " bytes from " + text_of(directory.begin) +
                   "), but its end record is at " + text_of(directory.end) + "; " + kDamaged);
  }
  if (directory.size > kMaxIndexBytes) {
    throw bad_file(file.path() + ": the zip directory has " + text_of(directory.size) + " bytes; at most " +
                   text_of(kMaxIndexBytes) + " are allowed; split the file");
  }
  if (directory.count > directory.size / kCentralBytes) {
    throw bad_file(file.path() + ": the zip directory of " + text_of(directory.size) + " bytes cannot hold " +
                   text_of(directory.count) + " entries; " + kDamaged);
  }
  return directory;
}

// --- One member.

void check_name(WeightFile const& file, std::string const& name, uint32_t flags) {
  bool const ascii = std::all_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  bool const known = ascii || ((flags & kUtf8) != 0 && is_utf8(name));
  if (!known || name.empty() || name.find('\0') != std::string::npos) {
    throw bad_file(file.path() + ": the zip directory has the name " + shown(name) +
                   "; expected ASCII, or UTF-8 with its flag; write the file with numpy.savez");
  }
}

// Replaces fields that are all ones by those of the zip64 extra field, in their order.
void read_zip64(WeightFile const& file, std::string const& name, uint8_t const* extra, uint64_t extra_bytes,
                std::vector<uint64_t*> const& fields) {
  auto const wide = static_cast<uint64_t>(
      std::count_if(fields.begin(), fields.end(), [](uint64_t const* field) { return *field == kWide; }));
  if (wide == 0) {
    return;
  }
  for (uint64_t position = 0; fits(position, 4, extra_bytes);) {
    auto const kind = u16(extra + position);
    auto const bytes = u16(extra + position + 2);
    auto const* body = extra + position + 4;
    bool const whole = fits(position + 4, bytes, extra_bytes);
    position += 4 + bytes;
    if (kind != 1 || !whole || bytes < wide * 8) {
      continue;
    }
    for (auto* const field : fields) {
      if (*field == kWide) {
        *field = u64(body);
        body += 8;
      }
    }
    return;
  }
  throw bad_file(file.path() + ": member " + shown(name) +
                 " is over 4 GiB by its entry, but its zip64 sizes are missing; " + kDamaged);
}

void must_agree(WeightFile const& file, std::string const& name, char const* what, std::string const& local,
                std::string const& central) {
  if (local != central) {
    throw bad_file(file.path() + ": member " + shown(name) + " has " + what + " " + local +
                   " in its local header, but " + central + " in the zip directory; they must agree, " + kDamaged);
  }
}

// Checks the local header against the directory's entry; returns where the data begin.
uint64_t check_local(WeightFile const& file, uint64_t data_end, ZipMember const& member, uint32_t flags,
                     uint32_t method) {
  Bytes header;
  if (fits(member.header_offset, kLocalBytes, data_end)) {
    header = read_bytes(file, member.header_offset, kLocalBytes);
  }
  if (header.empty() || u32(header.data()) != kLocalSignature) {
    throw bad_file(file.path() + ": member " + shown(member.name) + " should begin at byte " +
                   text_of(member.header_offset) + ", but there is no zip header; " + kDamaged);
  }
  auto const* const at = header.data();
  auto const name_begin = member.header_offset + kLocalBytes;
  uint64_t const name_bytes = u16(at + 26);
  uint64_t const extra_bytes = u16(at + 28);
  // Only what lies before the end; that the member does too is checked below.
  auto const rest = read_bytes(file, name_begin, std::min(name_bytes + extra_bytes, data_end - name_begin));
  auto const name_end = std::min<uint64_t>(name_bytes, rest.size());
  uint64_t compressed = u32(at + 18);
  uint64_t size = u32(at + 22);
  read_zip64(file, member.name, rest.data() + name_end, rest.size() - name_end, {&size, &compressed});

  auto const local_flags = u16(at + 6);
  must_agree(file, member.name, "name", shown(text_at(rest.data(), name_end)), shown(member.name));
  must_agree(file, member.name, "flags", text_of(local_flags & (kEncrypted | kDescriptor)),
             text_of(flags & (kEncrypted | kDescriptor)));
  must_agree(file, member.name, "method", text_of(u16(at + 8)), text_of(method));
  auto const crc = u32(at + 14);
  // With a data descriptor the local header was written before these were known.
  if ((local_flags & kDescriptor) == 0 || crc != 0 || compressed != 0 || size != 0) {
    must_agree(file, member.name, "crc", text_of(crc), text_of(member.crc));
    must_agree(file, member.name, "compressed size", text_of(compressed), text_of(member.compressed));
    must_agree(file, member.name, "size", text_of(size), text_of(member.size));
  }
  auto const offset = name_begin + name_bytes + extra_bytes;
  if (!fits(offset, member.compressed, data_end)) {
    throw bad_file(file.path() + ": member " + shown(member.name) + " ends at byte " +
                   sum_text(offset, member.compressed) + ", but the data end at " + text_of(data_end) + "; " +
                   kDamaged);
  }
  return offset;
}

void check_method(WeightFile const& file, ZipMember const& member, uint32_t flags, uint32_t method) {
  if ((flags & (kEncrypted | kStrong | kMasked)) != 0) {
    throw bad_file(file.path() + ": member " + shown(member.name) +
                   " is encrypted; weight files must not be, write the file again without a password");
  }
  if (method != kStored && method != kDeflated) {
    throw bad_file(file.path() + ": member " + shown(member.name) + " has compression method " + text_of(method) +
                   "; expected 0 (stored) or 8 (deflated); write the file with numpy.savez or "
                   "numpy.savez_compressed");
  }
}

void check_sizes(WeightFile const& file, ZipMember const& member) {
  if (!member.deflated && member.compressed != member.size) {
    throw bad_file(file.path() + ": member " + shown(member.name) + " is stored, but takes " +
                   text_of(member.compressed) + " bytes of the file for " + text_of(member.size) +
                   " bytes of data; expected the same, " + kDamaged);
  }
  // A larger claim is a lie, and would cost memory. The member lies in the file, so the product does not overflow.
  auto const most = kDeflateLimit * member.compressed;
  if (member.size > most + 64) {
    throw bad_file(file.path() + ": member " + shown(member.name) + " claims " + text_of(member.size) + " bytes from " +
                   text_of(member.compressed) + " deflated ones; deflate gives at most " + text_of(most) + "; " +
                   kDamaged);
  }
}

// The directory's entry at `position`, which is moved behind it.
ZipMember read_entry(WeightFile const& file, Bytes const& directory, uint64_t data_end, uint64_t* position) {
  if (!fits(*position, kCentralBytes, directory.size())) {
    throw bad_file(file.path() + ": the zip directory ends inside an entry, at byte " + text_of(directory.size()) +
                   "; " + kDamaged);
  }
  auto const* const at = directory.data() + *position;
  uint64_t const name_bytes = u16(at + 28);
  uint64_t const extra_bytes = u16(at + 30);
  uint64_t const entry_bytes = kCentralBytes + name_bytes + extra_bytes + u16(at + 32);
  auto const disk = u16(at + 34);
  if (u32(at) != kCentralSignature || !fits(*position, entry_bytes, directory.size()) ||
      (disk != 0 && disk != 0xFFFF)) {
    throw bad_file(file.path() + ": byte " + text_of(*position) + " of the zip directory is no entry; " + kDamaged);
  }
  auto const flags = u16(at + 8);
  auto const method = u16(at + 10);
  ZipMember member;
  member.name = text_at(at + kCentralBytes, name_bytes);
  member.deflated = method == kDeflated;
  member.crc = u32(at + 16);
  member.compressed = u32(at + 20);
  member.size = u32(at + 24);
  member.header_offset = u32(at + 42);
  check_name(file, member.name, flags);
  check_method(file, member, flags, method);
  read_zip64(file, member.name, at + kCentralBytes + name_bytes, extra_bytes,
             {&member.size, &member.compressed, &member.header_offset});
  member.offset = check_local(file, data_end, member, flags, method);
  check_sizes(file, member);
  *position += entry_bytes;
  return member;
}

}  // namespace

ZipIndex read_zip_index(WeightFile const& file) {
  auto const directory = find_directory(file);
  ZipIndex index;
  index.directory = read_bytes(file, directory.begin, directory.size);
  std::set<std::string> names;
  std::vector<Span> spans;
  uint64_t position = 0;
  for (uint64_t i = 0; i < directory.count; ++i) {
    auto member = read_entry(file, index.directory, directory.begin, &position);
    if (!names.insert(member.name).second) {
      throw bad_file(file.path() + ": member " + shown(member.name) +
                     " is twice in the zip directory; names must be unique, write the file again");
    }
    spans.push_back({member.header_offset, member.offset + member.compressed, member.name});
    index.members.push_back(std::move(member));
  }
  if (position != directory.size) {
    throw bad_file(file.path() + ": the zip directory has " + text_of(directory.size) + " bytes, but its " +
                   text_of(directory.count) + " entries take " + text_of(position) + "; " + kDamaged);
  }
  check_layout(file.path(), std::move(spans), 0, directory.begin, /*holes=*/true);
  return index;
}

}  // namespace moe_infer
