// The AdamW update of one element, and how its weight becomes bfloat16: no loops, no torch.
//
// misa_kernels/reference.py holds the same formula in Python. Every sum is an explicit fma, and square
// root and division are the correctly rounded ones, so that neither -ffp-contract nor nvcc's -fmad,
// -prec-div and -prec-sqrt can change a bit: host and device agree. Flags that drop subnormals or reorder
// arithmetic (-ffast-math, -ftz=true) break that promise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MISA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// A call left in a loop keeps it from becoming vectors.
#if defined(__GNUC__)
#define MISA_INLINE inline __attribute__((always_inline))
#else
#define MISA_INLINE inline
#endif
// Internal linkage: each instruction set that a library is built for compiles its own.
#define MISA_HOST_DEVICE static MISA_INLINE
#endif

namespace misa {

MISA_HOST_DEVICE float fma_nearest(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return fmaf(a, b, c);
#endif
}

MISA_HOST_DEVICE float sqrt_nearest(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return sqrtf(a);
#endif
}

MISA_HOST_DEVICE float divide_nearest(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// Updates theta, m and v in place. The caller computes, in float64 and rounded once, what all elements
// of a tensor share: decay = 1 - lr * weight_decay, step_size = lr / (1 - beta1^t) and
// denom_scale = 1 / sqrt(1 - beta2^t), for the t-th update since the tensor became active; 1 - beta too,
// because 1 - 0.999f is off by 1.3e-5 of its value.
MISA_HOST_DEVICE void adamw(float& theta, float g, float& m, float& v, float decay, float step_size,
                            float beta1, float beta2, float one_minus_beta1, float one_minus_beta2,
                            float denom_scale, float eps) {
  m = fma_nearest(beta1, m, one_minus_beta1 * g);
  v = fma_nearest(beta2, v, one_minus_beta2 * (g * g));
  const float denom = fma_nearest(denom_scale, sqrt_nearest(v), eps);
  theta = fma_nearest(-step_size, divide_nearest(m, denom), decay * theta);
}

// m / (sqrt(v) + eps) with bias corrections: the last update over its step size. Here and in `flush` each
// operation is rounded, as in misa_kernels/reference.py.
MISA_HOST_DEVICE float update_ratio(float m, float v, float denom_scale, float eps) {
  return divide_nearest(m, fma_nearest(1.0f, denom_scale * sqrt_nearest(v), eps));
}

// Returns theta after what is left in its momentum: flush_size = lr * beta1 / (1 - beta1) / (1 - beta1^t).
MISA_HOST_DEVICE float momentum_flush(float theta, float ratio, float flush_size) {
  return fma_nearest(-1.0f, flush_size * ratio, theta);
}

MISA_HOST_DEVICE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

MISA_HOST_DEVICE float bf16_to_float(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A NaN keeps its sign and becomes quiet: cut off, a payload in the low half alone would leave infinity.
MISA_HOST_DEVICE std::uint16_t bf16_nonfinite(std::uint32_t bits) {
  const bool nan = (bits & 0x007FFFFFu) != 0;
  return static_cast<std::uint16_t>((bits >> 16) | (nan ? 0x0040u : 0u));
}

// Round to nearest, ties to even.
MISA_HOST_DEVICE std::uint16_t bf16_nearest(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bf16_nonfinite(bits);
  const std::uint32_t odd = (bits >> 16) & 1u;
  return static_cast<std::uint16_t>((bits + 0x7FFFu + odd) >> 16);
}

// Round to one of the two neighbours: away from zero with the probability of the part that is cut off,
// hence unbiased for noise uniform in [0, 65536). Beyond the largest finite bfloat16 that is infinity.
MISA_HOST_DEVICE std::uint16_t bf16_stochastic(float x, std::uint32_t noise) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bf16_nonfinite(bits);
  return static_cast<std::uint16_t>((bits + (noise & 0xFFFFu)) >> 16);
}

// The exact two parts of a float32 weight: the nearest bfloat16, ties away from zero, and the 16 bits it
// lacks.
MISA_HOST_DEVICE void bf16_split(float x, std::uint16_t& upper, std::int16_t& residual) {
  const std::uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  upper = static_cast<std::uint16_t>(nan ? bits >> 16 | 0x0040u : (bits + 0x8000u) >> 16);
  residual = static_cast<std::int16_t>(nan ? 0u : bits & 0xFFFFu);
}

MISA_HOST_DEVICE float bf16_join(std::uint16_t upper, std::int16_t residual) {
  const std::uint32_t bits = (static_cast<std::uint32_t>(upper) << 16) + static_cast<std::uint32_t>(residual);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A 32-bit hash with low bias; C. Wellons' constants, https://nullprogram.com/blog/2018/07/31/.
MISA_HOST_DEVICE std::uint32_t lowbias32(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 16 bits of noise for one element, from its index in the whole parameter and a key of that parameter and
// step alone: the same for any launch, thread count and sharding. Philox would cost half of the memory
// time of the step.
MISA_HOST_DEVICE std::uint32_t noise16(std::uint64_t index, std::uint32_t key) {
  const std::uint32_t high = static_cast<std::uint32_t>(index >> 32);
  if (high != 0) key = lowbias32(key ^ high);
  return lowbias32(static_cast<std::uint32_t>(index) ^ key) & 0xFFFFu;
}

}  // namespace misa
