// Rules and texts are those of moe_infer/weights/npz_file.py.
#include "core/npz_file.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/file_index.h"
#include "core/npy_header.h"

namespace moe_infer {
namespace {

constexpr uint64_t kChunk = 1ULL << 18U;          // of compressed data, read at once
constexpr uint64_t kLargestOutput = 1ULL << 30U;  // zlib counts in 32 bits
constexpr std::string_view kSuffix = ".npy";

Error damaged(std::string const& where, std::string const& member, std::string const& reason) {
  return bad_file(where + ": the data of member " + shown(member) + " are damaged (" + reason +
                  "); copy or write the file again");
}

// Inflates one member from the file in the pieces that are asked for.
class Inflater {
 public:
  Inflater(WeightFile const& file, std::string const& member, uint64_t offset, uint64_t compressed)
      : file_(file), member_(member), position_(offset), end_(offset + compressed) {
    if (::inflateInit2(&stream_, -MAX_WBITS) != Z_OK) {  // negative: without zlib's own header
      throw Error(MOE_INFER_INTERNAL, "zlib: not enough host memory");
    }
  }
  ~Inflater() { ::inflateEnd(&stream_); }
  Inflater(Inflater const&) = delete;
  Inflater& operator=(Inflater const&) = delete;

  // Inflates up to `bytes` into `out`; returns how many came out, fewer only at the member's end.
  uint64_t read(uint8_t* out, uint64_t bytes) {
    uint64_t done = 0;
    while (done < bytes && !ended_) {
      if (stream_.avail_in == 0 && position_ < end_) {
        refill();
      }
      auto const room = static_cast<uInt>(std::min(bytes - done, kLargestOutput));
      stream_.next_out = out + done;
      stream_.avail_out = room;
      auto const status = ::inflate(&stream_, Z_NO_FLUSH);
      done += room - stream_.avail_out;
      if (status == Z_STREAM_END) {
        ended_ = true;
      } else if (status == Z_BUF_ERROR && stream_.avail_in == 0 && position_ == end_) {
        break;  // the compressed data end early
      } else if (status != Z_OK && status != Z_BUF_ERROR) {
        throw damaged(file_.path(), member_, stream_.msg != nullptr ? stream_.msg : "not deflated");
      }
    }
    return done;
  }

  // Whether nothing more comes out and all compressed bytes were used.
  bool finished() {
    uint8_t more = 0;
    return read(&more, 1) == 0 && ended_ && stream_.avail_in == 0 && position_ == end_;
  }

 private:
  void refill() {
    auto const bytes = std::min(kChunk, end_ - position_);
    input_.resize(bytes);
    file_.read_at(position_, input_.data(), bytes);
    position_ += bytes;
    stream_.next_in = input_.data();
    stream_.avail_in = static_cast<uInt>(bytes);
  }

  WeightFile const& file_;
  std::string const member_;
  uint64_t position_, end_;
  std::vector<uint8_t> input_;
  z_stream stream_{};
  bool ended_ = false;
};

uLong crc_of(uLong crc, uint8_t const* bytes, uint64_t count) {
  for (uint64_t done = 0; done < count; done += kLargestOutput) {
    crc = ::crc32(crc, bytes + done, static_cast<uInt>(std::min(count - done, kLargestOutput)));
  }
  return crc;
}

std::string hexadecimal(uLong number) {
  std::array<char, 9> text{};
  std::snprintf(text.data(), text.size(), "%08lx", number & 0xFFFFFFFFUL);
  return text.data();
}

std::string tensor_name(std::string const& path, std::string const& member) {
  if (member.size() <= kSuffix.size() || member.compare(member.size() - kSuffix.size(), kSuffix.size(), kSuffix) != 0) {
    throw bad_file(path + ": member " + shown(member) +
                   " is no .npy array; an .npz weight file holds nothing else, write it with numpy.savez");
  }
  return member.substr(0, member.size() - kSuffix.size());
}

}  // namespace

NpzFile::NpzFile(std::string const& path) : WeightFile(path) {
  auto const index = read_zip_index(*this);
  set_digest(index.directory.data(), index.directory.size());
  for (auto const& member : index.members) {
    auto const name = tensor_name(path, member.name);
    tensors_.emplace(name, describe(member));
  }
}

std::vector<uint8_t> NpzFile::read_start(ZipMember const& member, uint64_t bytes) const {
  std::vector<uint8_t> start(std::min(bytes, member.size));
  if (member.deflated) {
    start.resize(Inflater(*this, member.name, member.offset, member.compressed).read(start.data(), start.size()));
  } else {
    read_at(member.offset, start.data(), start.size());
  }
  return start;
}

TensorEntry NpzFile::describe(ZipMember const& member) const {
  auto const header_bytes = npy_header_bytes(path(), member.name, read_start(member, kNpyStartBytes));
  auto const header = read_start(member, header_bytes);
  auto const what = path() + ": member " + shown(member.name);
  if (header.size() < header_bytes) {
    throw bad_file(what + " ends inside its .npy header (" + std::to_string(header.size()) + " of " +
                   std::to_string(header_bytes) + " bytes); the file is damaged, copy or write it again");
  }
  auto parsed = parse_npy_header(path(), member.name, header);
  TensorEntry entry;
  entry.dtype = parsed.dtype;
  entry.shape = std::move(parsed.shape);
  entry.bytes = tensor_bytes(path(), member.name, entry.dtype, entry.shape);
  if (member.size - header_bytes != entry.bytes) {
    throw bad_file(what + " has " + std::to_string(member.size - header_bytes) +
                   " bytes of data by the zip directory, but shape " + shape_text(entry.shape) + " of " +
                   name_of(entry.dtype) + " needs " + std::to_string(entry.bytes) +
                   "; the file is damaged, copy or write it again");
  }
  entry.crc = member.crc;
  entry.header = header_bytes;
  if (member.deflated) {
    entry.offset = member.offset;
    entry.compressed = member.compressed;
  } else {
    entry.offset = member.offset + header_bytes;
  }
  return entry;
}

std::string NpzFile::name_of_entry(TensorEntry const& entry) const {
  auto const found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](auto const& tensor) { return tensor.second.offset == entry.offset; });
  return (found == tensors_.end() ? std::string("?") : found->first) + std::string(kSuffix);
}

void NpzFile::inflate(TensorEntry const& entry, void* out) const {
  auto const member = name_of_entry(entry);
  Inflater inflater(*this, member, entry.offset, entry.compressed);
  std::vector<uint8_t> header(entry.header);
  auto* const data = static_cast<uint8_t*>(out);
  auto done = inflater.read(header.data(), header.size());
  auto crc = crc_of(::crc32(0, nullptr, 0), header.data(), done);
  if (done == header.size()) {
    auto const bytes = inflater.read(data, entry.bytes);
    crc = crc_of(crc, data, bytes);
    done += bytes;
  }
  auto const expected = entry.header + entry.bytes;
  if (done != expected || !inflater.finished()) {
    auto const count = done == expected
                           ? "more than " + std::to_string(expected) + " bytes come out"
                           : std::to_string(done) + " bytes come out, " + std::to_string(expected) + " were expected";
    throw damaged(path(), member, count);
  }
  check_crc(entry, static_cast<uint32_t>(crc));
}

void NpzFile::check_crc(TensorEntry const& entry, uint32_t crc) const {
  if (crc != entry.crc) {
    throw damaged(path(), name_of_entry(entry), "CRC " + hexadecimal(crc) + ", expected " + hexadecimal(entry.crc));
  }
}

}  // namespace moe_infer
