// A CUDA runtime in host memory, for tests of the order in which work is enqueued: fake_cuda.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

namespace fake_cuda {

// From here on, what the streams allow is done in an order that follows from this number.
void seed(uint64_t number);
// Work of a stream, as a kernel is.
void enqueue(cudaStream_t stream, std::function<void()> work);
// Does all that was enqueued.
void finish();
// What was enqueued since the last call of this: "copy", and what note() was given, each with a blank behind it.
std::string take_log();
void note(std::string const& text);

}  // namespace fake_cuda
