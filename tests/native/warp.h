// A warp's operations on the host: its lanes are threads of `turns`.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "turns.h"

inline Turns turns;

using Posted = std::array<uint64_t, Turns::kWarp>;

// Posts a value and lets all other lanes of the warp do so. Two arrays in turn: a lane may be one operation ahead of
// another.
inline Posted const& exchange(uint64_t value) {
  static std::array<std::array<Posted, 2>, 32> posted;  // of the warps of a block
  auto& all = posted[turns.thread() / Turns::kWarp][turns.operations() % 2];
  all[turns.thread() % Turns::kWarp] = value;
  turns.operate_in_warp();
  return all;
}

inline void __syncwarp() { exchange(0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = exchange(bits)[static_cast<size_t>(lane)];
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned all, T value, int offset) {
  return __shfl_sync(all, value, static_cast<int>(turns.thread() % Turns::kWarp) ^ offset);
}

inline bool __any_sync(unsigned, bool value) {
  for (uint64_t const one : exchange(value ? 1 : 0)) {
    if (one != 0) return true;
  }
  return false;
}

inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  auto const& all = exchange(value);
  return static_cast<uint32_t>(*std::max_element(all.begin(), all.end()));
}

inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  auto const& all = exchange(value ? 1 : 0);
  for (size_t lane = 0; lane < Turns::kWarp; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
