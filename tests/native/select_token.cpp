// ops/route/select_token.cuh on the host: the 32 lanes of a warp are 32 contexts that take turns at every warp-wide
// operation. The same code as on a GPU, but for the exponential function's last bits.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Warp {
  std::array<ucontext_t, kLanes> starts;
  // Turns change by jumps: swapcontext calls the kernel each time, for signals' sake.
  jmp_buf scheduler;
  std::array<jmp_buf, kLanes> lanes;
  std::array<bool, kLanes> begun;
  std::array<std::array<uint64_t, kLanes>, 2> posted;  // in turn: a lane may be one operation ahead of another
  std::array<int, kLanes> operations;
  std::array<bool, kLanes> done;
  int lane = 0;  // that runs
};
Warp warp;

// Posts a value and lets all other lanes do so.
std::array<uint64_t, kLanes> const& exchange(uint64_t value) {
  int const lane = warp.lane;
  auto& all = warp.posted[static_cast<size_t>(warp.operations[static_cast<size_t>(lane)]++ % 2)];
  all[static_cast<size_t>(lane)] = value;
  if (_setjmp(warp.lanes[static_cast<size_t>(lane)]) == 0) _longjmp(warp.scheduler, 1);
  return all;
}

// Returns when the lane has posted a value or is done.
void take_turn(size_t lane) {
  warp.lane = static_cast<int>(lane);
  if (_setjmp(warp.scheduler) != 0) return;
  if (warp.begun[lane]) _longjmp(warp.lanes[lane], 1);
  warp.begun[lane] = true;
  setcontext(&warp.starts[lane]);
}

}  // namespace

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  auto const other = static_cast<size_t>(warp.lane ^ offset);
  bits = exchange(bits)[other];
  std::memcpy(&value, &bits, sizeof(value));
  return value;
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

inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  auto const& all = exchange(value);
  return static_cast<uint32_t>(*std::min_element(all.begin(), all.end()));
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

using std::isnan;
using std::max;

#include "route/select_token.cuh"

namespace {

// What the lanes of the token at hand are called with.
struct Token {
  moe_infer::RouterParams params;
  float const* scores;
  int32_t* chosen;
  float* weights;
} token;

template <int kItems>
void run_lane() {
  int const lane = warp.lane;
  moe_infer::select_token<kItems>(
      token.params, [](int32_t expert) { return token.scores[expert]; }, lane, token.chosen, token.weights);
  warp.done[static_cast<size_t>(lane)] = true;
  _longjmp(warp.scheduler, 1);
}

template <int kItems>
void run_warp(std::vector<std::vector<uint8_t>>* stacks) {
  warp.operations.fill(0);
  warp.begun.fill(false);
  warp.done.fill(false);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    auto& context = warp.starts[lane];
    getcontext(&context);
    context.uc_stack.ss_sp = (*stacks)[lane].data();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;  // run_lane does not return
    makecontext(&context, run_lane<kItems>, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (warp.done[lane]) continue;
      take_turn(lane);
      any = any || !warp.done[lane];
    }
    for (size_t lane = 1; lane < kLanes; ++lane) {
      // On a GPU this would hang or be undefined.
      if (warp.operations[lane] != warp.operations[0] || warp.done[lane] != warp.done[0]) {
        std::fprintf(stderr, "lane %zu left the warp\n", lane);
        std::abort();
      }
    }
  }
}

}  // namespace

extern "C" void select_tokens(int32_t router, int32_t normalize, int32_t experts, int32_t top_k, int32_t n_group,
                              int32_t topk_group, float scaling_factor, float jitter, float const* router_bias,
                              int64_t tokens, float const* scores, int32_t* chosen, float* weights) {
  std::vector<std::vector<uint8_t>> stacks(kLanes, std::vector<uint8_t>(kStackBytes));
  token.params.router = static_cast<moe_infer::Router>(router);
  token.params.normalize = normalize != 0;
  token.params.experts = experts;
  token.params.top_k = top_k;
  token.params.n_group = n_group;
  token.params.topk_group = topk_group;
  token.params.scaling_factor = scaling_factor;
  token.params.jitter = jitter;
  token.params.router_bias = router_bias;
  for (int64_t t = 0; t < tokens; ++t) {
    token.scores = scores + t * experts;
    token.chosen = chosen + t * top_k;
    token.weights = weights + t * top_k;
    moe_infer::with_select_items(experts, [&](auto items) { run_warp<decltype(items)::value>(&stacks); });
  }
}
