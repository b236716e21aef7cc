/* The C entry of libmoe_infer: one MoE layer, without TensorRT.
 *
 * Tests, benchmarks and other hosts call this through ctypes or from C. Nothing here throws or ends
 * the process: functions return MOE_INFER_OK or an error code, and moe_infer_last_error() gives the
 * sentence for the calling thread.
 */
#ifndef MOE_INFER_H
#define MOE_INFER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_INFER_EXPORT __attribute__((visibility("default")))

typedef enum {
  MOE_INFER_OK = 0,
  MOE_INFER_INVALID = 1,
  MOE_INFER_FILE = 2,
  MOE_INFER_CUDA = 3,
  MOE_INFER_INTERNAL = 4
} moe_infer_status;

typedef enum { MOE_INFER_FLOAT32 = 0, MOE_INFER_FLOAT16 = 1, MOE_INFER_BFLOAT16 = 2 } moe_infer_dtype;

typedef enum {
  MOE_INFER_INT32 = 0,
  MOE_INFER_FLOATS = 1,
  MOE_INFER_STRING = 2,
  MOE_INFER_FLOAT = 3
} moe_infer_attribute_kind;

/* One attribute of the operator (see docs/operator.md). `count`: number of ints or floats, 1 but for
 * MOE_INFER_FLOATS; bytes of a string, with or without the final NUL. */
typedef struct {
  const char* name;
  int32_t kind; /* moe_infer_attribute_kind */
  int64_t count;
  const void* data;
} moe_infer_attribute;

/* What the layer is applied to. */
typedef struct {
  int64_t d_model;      /* last dimension of hidden_states */
  int32_t dtype;        /* moe_infer_dtype of hidden_states and of the output */
  int32_t has_logits;   /* 1: router_logits is given to run */
  int32_t logits_dtype; /* moe_infer_dtype; that of hidden_states or float32 */
} moe_infer_inputs;

/* What a layer did since it was made. */
typedef struct {
  int64_t runs;
  int64_t tokens;
  int64_t hits;   /* experts that were needed and lay in a slot */
  int64_t misses; /* experts that were needed and had to be fetched */
  int64_t evictions;
  int64_t bytes_fetched;       /* host to device, weights only */
  int64_t prefetches_used;     /* experts that were fetched ahead and then needed */
  int64_t prefetches_wasted;   /* experts that were fetched ahead, in part at least, and not needed */
  int64_t prefetch_bytes_used; /* that had come, or were on their way, when their expert was needed */
  int64_t prefetch_bytes_wasted;
  int64_t stall_ns; /* time that runs waited for experts on their way; -1 where it is not measured */
} moe_infer_stats;

/* One live layer. Everything that is pointed to is valid until the function that got it returns. */
typedef struct {
  int64_t id;              /* number of the layer in this process, never given twice */
  const char* weight_file; /* "" for a sub-layer without weights */
  const char* weight_prefix;
  const char* sublayer_type;
  int32_t device;
  int32_t streams; /* 1: experts are brought in during runs */
  int32_t expert_count;
  int32_t slots; /* experts in device memory at most; layers that keep all of the same file share them */
  uint64_t slot_bytes;
  moe_infer_stats stats;
  const int64_t* uses;           /* (expert_count) runs that needed the expert; NULL where nobody counts: a layer
                                    whose experts all stay keeps its choices on the device */
  const int32_t* slot_of_expert; /* (expert_count) the slot in which it lies, -1: in none; NULL without weights */
} moe_infer_layer_report;

typedef void (*moe_infer_report_visitor)(const moe_infer_layer_report* report, void* context);

typedef struct moe_infer_layer moe_infer_layer;

/* The sentence that explains the calling thread's last error; "" if there was none. */
MOE_INFER_EXPORT const char* moe_infer_last_error(void);
/* Before something that calls this library by way of others: what it says afterwards is of that. */
MOE_INFER_EXPORT void moe_infer_clear_last_error(void);

/* Package version, and the TensorRT version of the headers ("" when built without). */
MOE_INFER_EXPORT const char* moe_infer_version(void);
MOE_INFER_EXPORT const char* moe_infer_tensorrt_headers_version(void);

/* Checks attributes, weight file and inputs without a GPU. `inputs` may be NULL: then only what the
 * attributes and the file say is checked. With MOE_INFER_CHECK_FINITE=1 or MOE_INFER_CHECK_CRC=1 in the
 * environment the weights themselves are read and checked too, as when a layer is made. */
MOE_INFER_EXPORT int moe_infer_check(const moe_infer_attribute* attributes, int32_t count,
                                     const moe_infer_inputs* inputs);

/* Digest of a weight file's index, as attribute expert_weight_digest holds it. `digest` has room for 64 bytes. */
MOE_INFER_EXPORT int moe_infer_weight_digest(const char* path, char* digest);

/* Makes a layer on the current CUDA device: checks everything, allocates the slots and, when all experts
 * fit (max_concurrency >= expert_count), loads them. */
MOE_INFER_EXPORT int moe_infer_layer_create(const moe_infer_attribute* attributes, int32_t count,
                                            const moe_infer_inputs* inputs, moe_infer_layer** layer);
MOE_INFER_EXPORT void moe_infer_layer_destroy(moe_infer_layer* layer);

/* Bytes of device scratch memory that run needs for up to `tokens` tokens. */
MOE_INFER_EXPORT int moe_infer_layer_workspace(const moe_infer_layer* layer, int64_t tokens, size_t* bytes);

/* A guess of what the layer that runs next will need, from what its router makes of this layer's hidden_states. */
typedef struct {
  const void* logits;   /* device pointer (tokens, expert_count) */
  int32_t expert_count; /* of that layer */
  int32_t dtype;        /* moe_infer_dtype */
} moe_infer_next_logits;

/* Enqueues the layer on `stream` (a cudaStream_t). All pointers are device pointers: hidden_states and
 * output (tokens, d_model), router_logits (tokens, expert_count) or NULL. Zero tokens is legal. output and workspace
 * overlap nothing that is read: while parts of it are written, others are still to read. */
MOE_INFER_EXPORT int moe_infer_layer_run(moe_infer_layer* layer, const void* hidden_states, const void* router_logits,
                                         void* output, int64_t tokens, void* workspace, size_t workspace_bytes,
                                         void* stream);

/* The same with next_router_logits (docs/operator.md), which change no result. `next` or its logits may be NULL. */
MOE_INFER_EXPORT int moe_infer_layer_run_ahead(moe_infer_layer* layer, const void* hidden_states,
                                               const void* router_logits, const moe_infer_next_logits* next,
                                               void* output, int64_t tokens, void* workspace, size_t workspace_bytes,
                                               void* stream);

MOE_INFER_EXPORT int moe_infer_layer_stats(const moe_infer_layer* layer, moe_infer_stats* stats);

/* Calls `visit` once with what this layer did. */
MOE_INFER_EXPORT int moe_infer_layer_visit(const moe_infer_layer* layer, moe_infer_report_visitor visit, void* context);

/* Calls `visit` for every live layer of the process, those inside of TensorRT's plugins too, in the order in which they
 * were made. Any thread, while others run layers; it may wait for the device. `visit` may call everything here. */
MOE_INFER_EXPORT int moe_infer_visit_layers(moe_infer_report_visitor visit, void* context);

/* A trace of one expert cache: the experts that each call needs. */
typedef struct {
  int32_t expert_count;
  int64_t calls;
  const int64_t* offsets; /* (calls + 1), from 0 on: call c needs experts[offsets[c]] to experts[offsets[c + 1] - 1] */
  const int32_t* experts; /* (offsets[calls]); in each call ascending, each once */
} moe_infer_trace;

/* What a call does about one expert, in the order in which it does it: hits first, then misses. */
typedef struct {
  int32_t expert;
  int32_t slot;
  int32_t evicted; /* expert that lost the slot, -1: none */
  int32_t hit;     /* 1: was in the slot when the call began */
} moe_infer_planned_expert;

/* Checks a policy (docs/scheduling.md; NULL: what MOE_INFER_POLICY says, else the default) and writes it with all its
 * numbers into `text`, which has room for 64 bytes. */
MOE_INFER_EXPORT int moe_infer_policy(const char* policy, char* text);

/* Replays a trace on an empty cache of `slots` slots: the decisions are those of a layer that streams its experts.
 * Needs no GPU. `hits` (calls): hits of each call; `plan` (offsets[calls]): the call's experts as it treats them.
 * Either may be NULL. */
MOE_INFER_EXPORT int moe_infer_simulate(const char* policy, const moe_infer_trace* trace, int32_t slots, int32_t* hits,
                                        moe_infer_planned_expert* plan);

/* Registers the plugin creators with the TensorRT that this process has loaded; idempotent. MOE_INFER_INVALID
 * with both versions and paths in the message when none is loaded or its major version is not the headers'. */
MOE_INFER_EXPORT int moe_infer_register(void);

#ifdef __cplusplus
}
#endif
#endif
