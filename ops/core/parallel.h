// A loop on several threads.
#pragma once

#include <cstddef>
#include <functional>

namespace moe_infer {

// Runs work(0) .. work(count - 1) on a few threads; throws the first exception after all have ended.
void for_each_parallel(size_t count, std::function<void(size_t)> const& work);

}  // namespace moe_infer
