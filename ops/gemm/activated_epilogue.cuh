// An epilogue for CUTLASS's 2.x kernels: act(product + source), in float32, rounded once. The source is a bias, whose
// one row all rows share, or what is added to a product without an activation.
#pragma once

#include <cutlass/array.h>
#include <cutlass/numeric_conversion.h>

#include "gemm/activation.cuh"

namespace moe_infer {

template <class Element, int Count>
class ActivatedCombination {
 public:
  using ElementOutput = Element;
  using ElementSource = Element;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementC = Element;
  using ElementD = Element;
  static int const kCount = Count;
  using FragmentOutput = cutlass::Array<Element, kCount>;
  using FragmentSource = FragmentOutput;
  using FragmentAccumulator = cutlass::Array<float, kCount>;
  using FragmentCompute = FragmentAccumulator;

  struct Params {
    Activation activation;  // plain, or none
    bool has_source = false;
  };

  __device__ explicit ActivatedCombination(Params const& params) : params_(params) {}

  __device__ bool is_source_needed() const { return params_.has_source; }
  __device__ void set_k_partition(int, int) {}

  __device__ FragmentOutput operator()(FragmentAccumulator const& product) const {
    FragmentOutput output;
    cutlass::NumericConverter<Element, float> round;
#pragma unroll
    for (int i = 0; i < kCount; ++i) output[i] = round(apply_plain(params_.activation, product[i]));
    return output;
  }
  __device__ FragmentOutput operator()(FragmentAccumulator const& product, FragmentSource const& source) const {
    FragmentAccumulator sum;
    cutlass::NumericConverter<float, Element> widen;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = product[i] + widen(source[i]);
    return (*this)(sum);
  }

 private:
  Params params_;
};

}  // namespace moe_infer
