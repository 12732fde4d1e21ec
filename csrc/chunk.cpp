// The loop over the elements of one chunk, written so that a compiler turns it into vectors of any width.
#include "chunk.h"

#include <cstring>

#if defined(__GNUC__)
#define MISA_PREFETCH(pointer, write) __builtin_prefetch(pointer, write, 3)
#else
#define MISA_PREFETCH(pointer, write)
#endif

namespace misa {
namespace {

// Logical lanes of the sum: the widest vector of float32 there is.
constexpr int LANES = 16;
// Elements that a lane sums in float32 before it goes on in float64: 32, for 1e-6 of the sum at worst.
constexpr int BLOCK = 32 * LANES;
// Elements ahead of their use at which cache lines are asked for: worth 10 to 20 % of the time.
constexpr int AHEAD = 256;

struct Float32 {
  using type = float;
  static float load(const float* x) { return *x; }
};

struct BFloat16 {
  using type = std::uint16_t;
  static float load(const std::uint16_t* x) { return bf16_to_float(*x); }
};

template <class Grad>
struct SquaresOf {
  const typename Grad::type* __restrict grad;
  float unscale;

  float operator()(std::int64_t i) const { return Grad::load(grad + i) * unscale; }
  void prefetch(std::int64_t i) const { MISA_PREFETCH(grad + i, 0); }
};

template <class Weight, class Grad, bool MASTER>
struct UpdateOf {
  typename Weight::type* __restrict weight;
  const typename Grad::type* __restrict grad;
  float* __restrict exp_avg;
  float* __restrict exp_avg_sq;
  float* __restrict master;
  Scalars s;
  Noise noise;
  float unscale, coefficient;

  // Updates one element and returns its unclipped gradient.
  float operator()(std::int64_t i) const {
    const float g = Grad::load(grad + i) * unscale;
    float theta = MASTER ? master[i] : Weight::load(weight + i);
    float m = exp_avg[i], v = exp_avg_sq[i];
    adamw(theta, g * coefficient, m, v, s.decay, s.step_size, s.beta1, s.beta2, s.one_minus_beta1,
          s.one_minus_beta2, s.denom_scale, s.eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (MASTER) master[i] = theta;
    if constexpr (sizeof(typename Weight::type) == 4) {
      weight[i] = theta;
    } else {
      weight[i] = MASTER ? bf16_nearest(theta)
                         : bf16_stochastic(theta, noise16(noise, static_cast<std::uint32_t>(i)));
    }
    return g;
  }

  void prefetch(std::int64_t i) const {
    MISA_PREFETCH(grad + i, 0);
    MISA_PREFETCH(weight + i, 1);
    MISA_PREFETCH(exp_avg + i, 1);
    MISA_PREFETCH(exp_avg_sq + i, 1);
    if constexpr (MASTER) MISA_PREFETCH(master + i, 1);
  }
};

// Calls `element(i)` for all i below n and returns the sum of the squares of what it returned.
template <class Element>
double sum_of_squares(std::int64_t n, const Element& element) {
  double sums[LANES] = {};
  for (std::int64_t begin = 0; begin < n; begin += BLOCK) {
    const std::int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
    float squares[LANES] = {};
    std::int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
      element.prefetch(i + AHEAD);
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int lane = 0; lane < LANES; ++lane) {
        const float g = element(i + lane);
        squares[lane] = fma_nearest(g, g, squares[lane]);
      }
    }
    for (int lane = 0; i < end; ++i, ++lane) {
      const float g = element(i);
      squares[lane] = fma_nearest(g, g, squares[lane]);
    }
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += static_cast<double>(squares[lane]);
  }
  double total = 0.0;
  for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
  return total;
}

// State of age 0 is whatever the memory held. It is filled here, a chunk at a time, while it is in the cache.
template <class Weight, bool MASTER>
void fill(const Chunk& chunk) {
  const std::size_t bytes = static_cast<std::size_t>(chunk.numel) * sizeof(float);
  std::memset(chunk.m, 0, bytes);
  std::memset(chunk.v, 0, bytes);
  if constexpr (MASTER) {
    const auto* weight = static_cast<const typename Weight::type*>(chunk.weight);
    for (std::int64_t i = 0; i < chunk.numel; ++i) chunk.master[i] = Weight::load(weight + i);
  }
}

template <class Weight, class Grad, bool MASTER>
double update(const Chunk& chunk) {
  if (chunk.numel == 0) return 0.0;
  if (chunk.fresh) fill<Weight, MASTER>(chunk);
  const UpdateOf<Weight, Grad, MASTER> element{static_cast<typename Weight::type*>(chunk.weight),
                                               static_cast<const typename Grad::type*>(chunk.grad),
                                               chunk.m,
                                               chunk.v,
                                               chunk.master,
                                               chunk.scalars,
                                               noise_from(chunk.first, chunk.key),
                                               chunk.unscale,
                                               chunk.coefficient};
  return sum_of_squares(chunk.numel, element);
}

template <class Grad>
double sq_norm(const Chunk& chunk) {
  return sum_of_squares(chunk.numel,
                        SquaresOf<Grad>{static_cast<const typename Grad::type*>(chunk.grad), chunk.unscale});
}

}  // namespace

// A float32 weight is its own master.
extern const ChunkFunctions MISA_INSTRUCTIONS = {
    {{{update<Float32, Float32, false>, nullptr}, {update<Float32, BFloat16, false>, nullptr}},
     {{update<BFloat16, Float32, false>, update<BFloat16, Float32, true>},
      {update<BFloat16, BFloat16, false>, update<BFloat16, BFloat16, true>}}},
    {sq_norm<Float32>, sq_norm<BFloat16>},
};

}  // namespace misa
