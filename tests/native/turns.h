// The threads of a block or of a warp on the host: contexts that take turns at every operation that all of them do
// together.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

class Turns {
 public:
  static constexpr size_t kWarp = 32;
  using Work = void (*)();

  // Runs `work` as each of `count` threads, until all are done. `backwards`: the last one comes first. Aborts where a
  // GPU would hang or be undefined: when a thread does other operations than the rest of its warp or block.
  void run(size_t count, Work work, bool backwards = false) {
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    running_ = this;
    work_ = work;
    for (size_t i = 0; i < count; ++i) threads_[i]->begin();
    do {
      for (size_t i = 0; i < count; ++i) {
        size_t const thread = backwards ? count - 1 - i : i;
        if (threads_[thread]->state == State::kRuns) take(thread);
      }
    } while (release(count));
  }

  // For a thread: its number, and how many operations it has begun.
  size_t thread() const { return thread_; }
  size_t operations() const { return threads_[thread_]->operations; }
  // An operation of all threads, or of those of a warp: returns when each of them has come to it.
  void operate() { wait(State::kAtBlock); }
  void operate_in_warp() { wait(State::kAtWarp); }

 private:
  enum class State { kRuns, kAtWarp, kAtBlock, kDone };

  struct Thread {
    ucontext_t start;
    // Turns change by jumps: swapcontext calls the operating system each time, for signals' sake.
    jmp_buf here;
    bool begun;
    State state;
    size_t operations;
    std::vector<uint8_t> stack = std::vector<uint8_t>(128 << 10);

    void begin() {
      begun = false;
      state = State::kRuns;
      operations = 0;
      getcontext(&start);
      start.uc_stack.ss_sp = stack.data();
      start.uc_stack.ss_size = stack.size();
      start.uc_link = nullptr;  // enter does not return
      makecontext(&start, &Turns::enter, 0);
    }
  };

  static void enter() {
    running_->work_();
    running_->threads_[running_->thread_]->state = State::kDone;
    _longjmp(running_->scheduler_, 1);
  }

  void wait(State state) {
    Thread& own = *threads_[thread_];
    ++own.operations;
    own.state = state;
    if (_setjmp(own.here) == 0) _longjmp(scheduler_, 1);
  }

  // Lets threads go on that have all come to the same operation; false: all threads are done.
  bool release(size_t count) {
    bool released = false;
    for (size_t first = 0; first < count; first += kWarp) {
      if (threads_[first]->state != State::kAtWarp) continue;
      let_go(first, std::min(count, first + kWarp));
      released = true;
    }
    if (released) return true;
    bool const waits = threads_[0]->state == State::kAtBlock;
    let_go(0, count);
    return waits;
  }

  void let_go(size_t first, size_t end) {
    for (size_t i = first; i < end; ++i) {
      if (threads_[i]->state == threads_[first]->state) continue;
      std::fprintf(stderr, "thread %zu left the others\n", i);
      std::abort();
    }
    if (threads_[first]->state == State::kDone) return;
    for (size_t i = first; i < end; ++i) threads_[i]->state = State::kRuns;
  }

  // Returns when the thread has come to an operation or is done.
  void take(size_t thread) {
    thread_ = thread;
    if (_setjmp(scheduler_) != 0) return;
    Thread& own = *threads_[thread];
    if (own.begun) _longjmp(own.here, 1);
    own.begun = true;
    setcontext(&own.start);
  }

  static inline Turns* running_ = nullptr;
  Work work_ = nullptr;
  size_t thread_ = 0;  // whose turn it is
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Thread>> threads_;
};
