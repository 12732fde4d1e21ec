// How moments are stored on the CPU: misa_kernels/memory/codec.py, in loops that a compiler turns into
// vectors.
//
// For chunk.cpp alone, since everything here is compiled once per instruction set. A format is a class with
// the types of its codes, and `encode` and `decode` of at most GROUP elements, which share one scale.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "adamw.h"
#include "step.h"

// In front of a loop of which no turn reads what another wrote.
#if defined(__clang__)
#define MISA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#elif defined(__GNUC__)
#define MISA_INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define MISA_INDEPENDENT
#endif

namespace misa {

constexpr float SOFTNESS = 3.0f;

// To the nearest whole number, ties to even, below 2^22: rintf is a call where SSE4.1 is missing.
static inline float round_whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline float not_nan(float x) { return x == x ? x : 0.0f; }

// The largest magnitude. As whole numbers, because their order has NaN above infinity and vectors know it.
static inline float maximum(const float* x, int n) {
  std::int32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const auto size = static_cast<std::int32_t>(bits_of(x[i]) & 0x7FFFFFFFu);
    largest = size > largest ? size : largest;
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// 16 random bits an element. Those of v are the upper half of the hash whose lower half rounds the weight.
struct MomentNoise {
  Noise noise;
  int shift;

  std::uint32_t operator()(std::uint32_t i) const { return noise32(noise, i) >> shift & 0xFFFFu; }
};

// bfloat16, rounded stochastically.
struct RoundedMoment {
  using Code = std::uint16_t;
  static constexpr bool SCALED = false;

  static void decode(const Code* code, float, int n, float* x) {
    for (int i = 0; i < n; ++i) x[i] = bf16_to_float(code[i]);
  }
  static float encode(const float* x, int n, Code* code, const MomentNoise& noise, std::uint32_t first) {
    MISA_INDEPENDENT
    for (int i = 0; i < n; ++i) code[i] = bf16_stochastic(x[i], noise(first + i));
    return 0.0f;
  }
};

// Signed 8 bits: equal steps of (1 + a) y / (1 + a |y|), y = x / max |x|.
struct SoftSign {
  using Code = std::int8_t;
  static constexpr bool SCALED = true;

  static void decode(const Code* code, float scale, int n, float* x) {
    for (int i = 0; i < n; ++i) {
      const float f = static_cast<float>(code[i]) / 127.0f;
      x[i] = f / ((1.0f + SOFTNESS) - SOFTNESS * std::fabs(f)) * scale;
    }
  }
  static float encode(const float* x, int n, Code* code, const MomentNoise&, std::uint32_t) {
    const float scale = maximum(x, n), divisor = scale == 0.0f ? 1.0f : scale;
    for (int i = 0; i < n; ++i) {
      const float y = x[i] / divisor;
      const float f = round_whole(127.0f * ((1.0f + SOFTNESS) * y / (1.0f + SOFTNESS * std::fabs(y))));
      code[i] = static_cast<Code>(static_cast<int>(not_nan(f)));
    }
    return scale;
  }
};

// 8 bits of the root: equal steps from 1 / 256 to 1 of its maximum, without zero, rounded stochastically.
struct Root {
  using Code = std::uint8_t;
  static constexpr bool SCALED = true;

  static void decode(const Code* code, float scale, int n, float* x) {
    for (int i = 0; i < n; ++i) {
      const float root = (static_cast<float>(code[i]) + 1.0f) / 256.0f * scale;
      x[i] = root * root;
    }
  }
  static float encode(const float* x, int n, Code* code, const MomentNoise& noise, std::uint32_t first) {
    float root[GROUP];
    for (int i = 0; i < n; ++i) root[i] = sqrt_nearest(x[i]);
    const float scale = maximum(root, n), divisor = scale == 0.0f ? 1.0f : scale;
    for (int i = 0; i < n; ++i) {
      // Cut off, after noise below 1 was added: rounded stochastically.
      const float threshold = static_cast<float>(static_cast<int>(noise(first + i))) / 65536.0f;
      const int level = static_cast<int>(not_nan(256.0f * (root[i] / divisor) + threshold)) - 1;
      code[i] = static_cast<Code>(level < 0 ? 0 : level > 255 ? 255 : level);
    }
    return scale;
  }
};

}  // namespace misa
