// Hopper's instructions that the grouped product is made of, one function each: barriers in shared memory, the tensor
// copy engine (TMA), clusters of two blocks, matrix products of a warpgroup (wgmma) and the transposing matrix store.
// Source: PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor", "wgmma" and "stmatrix".
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace moe_infer::hopper {

__device__ inline uint32_t shared_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same shared-memory address in block `rank` of the cluster.
__device__ inline uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Barriers. A wait returns when the phase of the given parity is over.

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase end only when `bytes` more have been copied.
__device__ inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives on the barrier of block `rank` of the cluster. It says that this thread has read, not that others may read
// what it wrote: to order writes for another block costs a fence of the whole device.
__device__ inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(shared_address(barrier), rank))
               : "memory");
}

// The same, and what this thread wrote before is visible to who waits there with barrier_wait_cluster.
__device__ inline void barrier_publish_at(uint64_t* barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   cluster_address(shared_address(barrier), rank))
               : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

__device__ inline void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t over = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

// A barrier among `threads` threads of the block, numbered 1 to 15.
__device__ inline void named_barrier(uint32_t number, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- Copies. Coordinates are in elements, innermost first.

// How long a line should stay in the L2 cache, in the encoding of createpolicy.
enum class CachePolicy : uint64_t { kNormal = 0x1000000000000000, kReadOnce = 0x12F0000000000000 };

__device__ inline void prefetch_map(CUtensorMap const& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ inline void copy_5d(void* destination, CUtensorMap const& map, uint64_t* barrier, int32_t c0, int32_t c1,
                               int32_t c2, int32_t c3, int32_t c4, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}

__device__ inline void copy_2d(void* destination, CUtensorMap const& map, uint64_t* barrier, int32_t c0, int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// To the same place in every block of the cluster that `blocks` names by its bits; each block's barrier counts.
__device__ inline void copy_2d_to_all(void* destination, CUtensorMap const& map, uint64_t* barrier, int32_t c0,
                                      int32_t c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

// --- Registers of a warpgroup.

template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- Matrix products of a warpgroup: 64 rows of A times kN rows of B, 16 deep, both in shared memory, rows of 128
// bytes in the 128-byte swizzle. The sums of lane l of warp w: sums[4j + 2h + i] is row 16w + l / 4 + 8h, column
// 8j + 2(l % 4) + i.

template <class T, int kN>
struct Mma;

#define MOE_HOPPER_MMA(kN)                                                                                         \
  template <>                                                                                                      \
  struct Mma<__nv_bfloat16, kN> {                                                                                  \
    using Type =                                                                                                   \
        cute::SM90::GMMA::MMA_64x##kN##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    using FromRegisters =                                                                                          \
        cute::SM90::GMMA::MMA_64x##kN##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };                                                                                                               \
  template <>                                                                                                      \
  struct Mma<__half, kN> {                                                                                         \
    using Type =                                                                                                   \
        cute::SM90::GMMA::MMA_64x##kN##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;   \
    using FromRegisters =                                                                                          \
        cute::SM90::GMMA::MMA_64x##kN##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;   \
  };
MOE_HOPPER_MMA(8)
MOE_HOPPER_MMA(16)
MOE_HOPPER_MMA(32)
MOE_HOPPER_MMA(64)
MOE_HOPPER_MMA(96)
MOE_HOPPER_MMA(128)
MOE_HOPPER_MMA(192)
MOE_HOPPER_MMA(256)
#undef MOE_HOPPER_MMA

constexpr bool has_mma(int n) {
  return n == 8 || n == 16 || n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256;
}

template <class T, int kN, size_t... kIndex>
__device__ inline void mma_unpacked(uint64_t a, uint64_t b, float* sums, bool add, std::index_sequence<kIndex...>) {
  Mma<T, kN>::Type::fma(a, b, sums[kIndex]...,
                        add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// sums (kN / 2) = A @ B^T (+ sums, if `add`).
template <class T, int kN>
__device__ inline void mma(uint64_t a, uint64_t b, float* sums, bool add) {
  mma_unpacked<T, kN>(a, b, sums, add, std::make_index_sequence<kN / 2>{});
}

// The same with a thread's part of A in registers, as load_fragment leaves it.
template <class T, int kN, size_t... kIndex>
__device__ inline void mma_unpacked(uint32_t const (&a)[4], uint64_t b, float* sums, bool add,
                                    std::index_sequence<kIndex...>) {
  Mma<T, kN>::FromRegisters::fma(a[0], a[1], a[2], a[3], b, sums[kIndex]...,
                                 add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <class T, int kN>
__device__ inline void mma(uint32_t const (&a)[4], uint64_t b, float* sums, bool add) {
  mma_unpacked<T, kN>(a, b, sums, add, std::make_index_sequence<kN / 2>{});
}

// Describes a matrix in shared memory for mma; `address` a multiple of 1024 bytes. 16 elements further into the rows:
// add kDescriptorStep.
constexpr uint64_t kDescriptorStep = 32 >> 4;
__device__ inline uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kBytesOfEightRows = 1024;
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3FFFFU) >> 4) | kBytesOfEightRows >> 4 << 32 | kSwizzle128 << 62;
}

__device__ inline void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving registers of a product that is under way.
template <int kCount>
__device__ inline void hold(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) asm volatile("" : "+f"(value)::"memory");
}

// --- Loads 4 matrices of 8 x 8 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8; register m of
// lane l gets row l / 4, columns 2(l % 4) and 2(l % 4) + 1 of matrix m.
__device__ inline void load_matrices(uint32_t address, uint32_t (&values)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address)
               : "memory");
}

// --- Stores 1, 2 or 4 matrices of 8 x 8 16-bit values, transposed. Lane l gives the address of row l % 8 of matrix
// l / 8; register m of lane l holds column l / 4, rows 2(l % 4) and 2(l % 4) + 1 of matrix m as it is in memory.

template <int kMatrices>
__device__ inline void store_transposed(uint32_t address, uint32_t const (&values)[kMatrices]) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "what the instruction has");
  if constexpr (kMatrices == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared::cta.b16 [%0], {%1};" ::"r"(address), "r"(values[0])
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(address), "r"(values[0]),
                 "r"(values[1])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
                 : "memory");
  }
}

}  // namespace moe_infer::hopper
