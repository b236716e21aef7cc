// An epilogue for CUTLASS's 2.x kernels that turns the gate and up columns of a product, which alternate, into
// act(gate) * up, so that the product itself never goes to memory and is not rounded.
//
// CUTLASS's output iterators store as many elements as the product has columns, and here two columns become one
// element. So the output is told to consist of units of half an element: for a 16-bit type, bytes. Columns 2j and 2j+1
// of the product are then bytes 2j and 2j+1 of a row of the output, which are exactly element j. Row stride and column
// count in units are both n, and nothing else of the kernel changes.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include <cstdint>
#include <cstring>

#include "gemm/activation.cuh"

namespace moe_infer {

template <class Element, int Count>
class GatedCombination {
 public:
  static_assert(sizeof(Element) == 2 && Count % 8 == 0, "units are bytes, accesses are of 8 bytes");

  using ElementOutput = uint8_t;  // half an Element
  using ElementSource = ElementOutput;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementC = ElementOutput;
  using ElementD = ElementOutput;
  static int const kCount = Count;
  using FragmentOutput = cutlass::Array<ElementOutput, kCount>;
  using FragmentSource = FragmentOutput;
  using FragmentAccumulator = cutlass::Array<float, kCount>;
  using FragmentCompute = FragmentAccumulator;

  struct Params {
    Activation activation = Activation::gate(ActivationKind::kSilu);
  };

  __device__ explicit GatedCombination(Params const& params) : activation_(params.activation) {}

  __device__ bool is_source_needed() const { return false; }
  __device__ void set_k_partition(int, int) {}

  __device__ FragmentOutput operator()(FragmentAccumulator const& product) const {
    cutlass::Array<Element, kCount / 2> gated;
    cutlass::NumericConverter<Element, float> round;
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) gated[j] = round(apply_gated(activation_, product[2 * j], product[2 * j + 1]));
    FragmentOutput output;
    memcpy(&output, &gated, sizeof(output));
    return output;
  }
  __device__ FragmentOutput operator()(FragmentAccumulator const& product, FragmentSource const&) const {
    return (*this)(product);
  }

 private:
  Activation activation_;
};

}  // namespace moe_infer
