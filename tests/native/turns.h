// The threads of a block or of a warp on the host: contexts that take turns at every operation that all of them do
// together.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

class Turns {
 public:
  using Work = void (*)();

  // Runs `work` as each of `count` threads, until all are done. `backwards`: the last one comes first. Aborts where a
  // GPU would hang or be undefined: when a thread does other operations than the rest.
  void run(size_t count, Work work, bool backwards = false) {
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    running_ = this;
    work_ = work;
    for (size_t i = 0; i < count; ++i) threads_[i]->begin();
    for (bool any = true; any;) {
      any = false;
      for (size_t i = 0; i < count; ++i) {
        size_t const thread = backwards ? count - 1 - i : i;
        if (threads_[thread]->done) continue;
        take(thread);
        any = any || !threads_[thread]->done;
      }
      for (size_t i = 1; i < count; ++i) {
        if (threads_[i]->operations == threads_[0]->operations && threads_[i]->done == threads_[0]->done) continue;
        std::fprintf(stderr, "thread %zu left the others\n", i);
        std::abort();
      }
    }
  }

  // For a thread: its number, and how many operations it has begun.
  size_t thread() const { return thread_; }
  size_t operations() const { return threads_[thread_]->operations; }
  // An operation of all threads: returns when each has come to it.
  void operate() {
    Thread& own = *threads_[thread_];
    ++own.operations;
    if (_setjmp(own.here) == 0) _longjmp(scheduler_, 1);
  }

 private:
  struct Thread {
    ucontext_t start;
    // Turns change by jumps: swapcontext calls the operating system each time, for signals' sake.
    jmp_buf here;
    bool begun;
    bool done;
    size_t operations;
    std::vector<uint8_t> stack = std::vector<uint8_t>(128 << 10);

    void begin() {
      begun = false;
      done = false;
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
    running_->threads_[running_->thread_]->done = true;
    _longjmp(running_->scheduler_, 1);
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
