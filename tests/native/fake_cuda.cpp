// Streams and events as CUDA has them, on the host: work of a stream is done in its order, and never before the records
// that it waits for; among all that is allowed a seed chooses. So a missing dependency becomes a wrong result for some
// seed, where a GPU would nearly always be in time. "Device memory" is host memory, and a wait that can never end is
// told.
#include "fake_cuda.h"

#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace {

struct FakeEvent {
  uint64_t recorded = 0;       // times that a record was enqueued,
  std::set<uint64_t> reached;  // those of them that were reached: on several streams, in any order
  bool has_reached(uint64_t number) const { return number == 0 || reached.count(number) > 0; }
};

struct Operation {
  std::function<void()> work;  // or a record, or a wait:
  FakeEvent* record = nullptr;
  FakeEvent* wait = nullptr;
  uint64_t number = 0;  // of the record
};

struct FakeStream {
  std::deque<Operation> queue;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::mt19937_64 random{1};
  std::vector<FakeStream*> streams;
  FakeStream default_stream;
  std::string log;

  Runtime() { streams.push_back(&default_stream); }

  static bool can_go(Operation const& operation) {
    return operation.wait == nullptr || operation.wait->has_reached(operation.number);
  }

  // One operation of one stream; false if there is none that may be done.
  bool step() {
    std::vector<FakeStream*> ready;
    for (auto* stream : streams) {
      if (!stream->queue.empty() && can_go(stream->queue.front())) ready.push_back(stream);
    }
    if (ready.empty()) return false;
    auto* const stream = ready[random() % ready.size()];
    Operation const operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (operation.work) operation.work();
    if (operation.record != nullptr) operation.record->reached.insert(operation.number);
    return true;
  }

  // The device works on while the host enqueues; often it is far behind.
  void add(FakeStream* stream, Operation operation) {
    stream->queue.push_back(std::move(operation));
    if (random() % 4 != 0) return;
    for (uint64_t i = random() % 4; i > 0; --i) {
      if (!step()) return;
    }
  }

  template <class Done>
  void run_until(Done&& done) {
    while (!done()) {
      if (!step()) {
        std::fprintf(stderr, "fake_cuda: what is waited for is never reached\n");
        std::abort();
      }
    }
  }
};

Runtime& runtime() {
  static Runtime* const made = new Runtime;  // outlives every static object that frees something
  return *made;
}

FakeStream* stream_of(cudaStream_t stream) {
  return stream == nullptr ? &runtime().default_stream : reinterpret_cast<FakeStream*>(stream);
}
FakeEvent* event_of(cudaEvent_t event) { return reinterpret_cast<FakeEvent*>(event); }

using Lock = std::lock_guard<std::recursive_mutex>;

// The driver's cuMemcpyBatchAsync: in any order.
CUresult copy_batch(CUdeviceptr* destinations, CUdeviceptr* sources, size_t* sizes, size_t count, CUmemcpyAttributes*,
                    size_t*, size_t, size_t*, CUstream stream) {
  Lock const lock(runtime().mutex);
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), runtime().random);
  for (size_t const i : order) {
    cudaMemcpyAsync(reinterpret_cast<void*>(destinations[i]), reinterpret_cast<void*>(sources[i]), sizes[i],
                    cudaMemcpyHostToDevice, stream);
  }
  return CUDA_SUCCESS;
}

}  // namespace

namespace fake_cuda {

void seed(uint64_t number) {
  Lock const lock(runtime().mutex);
  runtime().random.seed(number);
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  Lock const lock(runtime().mutex);
  runtime().add(stream_of(stream), {std::move(work)});
}

void finish() {
  Lock const lock(runtime().mutex);
  runtime().run_until([] {
    for (auto const* stream : runtime().streams) {
      if (!stream->queue.empty()) return false;
    }
    return true;
  });
}

std::string take_log() {
  Lock const lock(runtime().mutex);
  return std::exchange(runtime().log, "");
}

void note(std::string const& text) {
  Lock const lock(runtime().mutex);
  runtime().log += text + " ";
}

}  // namespace fake_cuda

// The parts of the runtime's interface that the host side of the experts uses.
extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  Lock const lock(runtime().mutex);
  auto* const made = new FakeStream;
  runtime().streams.push_back(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock const lock(runtime().mutex);
  runtime().run_until([&] { return stream_of(stream)->queue.empty(); });
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock const lock(runtime().mutex);
  cudaStreamSynchronize(stream);
  auto& all = runtime().streams;
  for (auto at = all.begin(); at != all.end(); ++at) {
    if (*at != stream_of(stream)) continue;
    all.erase(at);
    break;
  }
  delete stream_of(stream);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new FakeEvent);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  fake_cuda::finish();  // a stream may still come to it
  delete event_of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Lock const lock(runtime().mutex);
  Operation record;
  record.record = event_of(event);
  record.number = ++event_of(event)->recorded;
  runtime().add(stream_of(stream), std::move(record));
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Lock const lock(runtime().mutex);
  Operation wait;
  wait.wait = event_of(event);
  wait.number = event_of(event)->recorded;  // what was recorded by now, and not later
  runtime().add(stream_of(stream), std::move(wait));
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock const lock(runtime().mutex);
  uint64_t const number = event_of(event)->recorded;
  runtime().run_until([&] { return event_of(event)->has_reached(number); });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock const lock(runtime().mutex);
  return event_of(event)->has_reached(event_of(event)->recorded) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  fake_cuda::note("copy");
  fake_cuda::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool const is_known = std::strcmp(name, "cuMemcpyBatchAsync") == 0;
  if (is_known) *function = reinterpret_cast<void*>(&copy_batch);
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind) {
  fake_cuda::finish();
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes > 0 ? bytes : 1);
  std::memset(*memory, 0xCD, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  fake_cuda::finish();
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t) { return "an error of fake_cuda"; }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = *total_bytes = size_t{1} << 30U;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

}  // extern "C"
