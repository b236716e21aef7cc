#include "fetch/run_order.h"

namespace moe_infer {

std::shared_ptr<GuessTarget const> NextLayer::get() const {
  std::lock_guard<std::mutex> const lock(mutex_);
  return target_;
}

void NextLayer::set(std::shared_ptr<GuessTarget const> const& target) {
  std::lock_guard<std::mutex> const lock(mutex_);
  target_ = target;
}

void note_run(std::shared_ptr<GuessTarget const> const& own, std::shared_ptr<NextLayer> const& next) {
  static thread_local std::weak_ptr<NextLayer> before;
  auto const waiting = before.lock();
  if (waiting != nullptr) waiting->set(own);
  before = next;
}

}  // namespace moe_infer
