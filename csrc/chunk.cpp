// The loop over the elements of one chunk, written so that a compiler turns it into vectors of any width.
#include "chunk.h"

#include <cstring>
#include <type_traits>

#include "codec.h"

#if defined(__GNUC__)
#define MISA_PREFETCH(pointer, write) __builtin_prefetch(pointer, write, 3)
#else
#define MISA_PREFETCH(pointer, write)
#endif

namespace misa {
namespace {

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
  void open(std::int64_t, std::int64_t) const {}
  void close(std::int64_t) const {}
  void go_to(std::int64_t) const {}
  void prefetch(std::int64_t i) const { MISA_PREFETCH(grad + i, 0); }
};

// Moments in float32: worked on where they are.
struct PlainMoments {
  float* __restrict m;
  float* __restrict v;
  static constexpr std::int64_t begin = 0;

  explicit PlainMoments(const Chunk& chunk)
      : m(static_cast<float*>(chunk.m)), v(static_cast<float*>(chunk.v)) {}
  void open(std::int64_t, std::int64_t) {}
  void close(std::int64_t) {}
  void prefetch(std::int64_t i) const {
    MISA_PREFETCH(m + i, 1);
    MISA_PREFETCH(v + i, 1);
  }
  static void clear(const Chunk& chunk) {
    std::memset(chunk.m, 0, static_cast<std::size_t>(chunk.numel) * sizeof(float));
    std::memset(chunk.v, 0, static_cast<std::size_t>(chunk.numel) * sizeof(float));
  }
};

// Moments in another format: a block of them is decoded, worked on and encoded.
template <class M, class V>
struct StoredMoments {
  float m[BLOCK], v[BLOCK];
  std::int64_t begin = 0;
  typename M::Code* m_code;
  typename V::Code* v_code;
  float *m_scale, *v_scale;
  MomentNoise m_noise, v_noise;

  explicit StoredMoments(const Chunk& chunk)
      : m_code(static_cast<typename M::Code*>(chunk.m)),
        v_code(static_cast<typename V::Code*>(chunk.v)),
        m_scale(chunk.m_scale),
        v_scale(chunk.v_scale),
        m_noise{noise_from(chunk.first, lowbias32(chunk.key + 1)), 0},
        v_noise{noise_from(chunk.first, chunk.key), 16} {}

  void open(std::int64_t from, std::int64_t end) {
    begin = from;
    for (std::int64_t i = from; i < end; i += GROUP) {
      const int n = static_cast<int>(end - i < GROUP ? end - i : GROUP);
      M::decode(m_code + i, M::SCALED ? m_scale[i / GROUP] : 0.0f, n, m + (i - from));
      V::decode(v_code + i, V::SCALED ? v_scale[i / GROUP] : 0.0f, n, v + (i - from));
    }
  }
  void close(std::int64_t end) {
    for (std::int64_t i = begin; i < end; i += GROUP) {
      const int n = static_cast<int>(end - i < GROUP ? end - i : GROUP);
      const auto first = static_cast<std::uint32_t>(i);
      const float m_new = M::encode(m + (i - begin), n, m_code + i, m_noise, first);
      const float v_new = V::encode(v + (i - begin), n, v_code + i, v_noise, first);
      if constexpr (M::SCALED) m_scale[i / GROUP] = m_new;
      if constexpr (V::SCALED) v_scale[i / GROUP] = v_new;
    }
  }
  void prefetch(std::int64_t i) const {
    MISA_PREFETCH(m_code + i, 1);
    MISA_PREFETCH(v_code + i, 1);
  }
  static void clear(const Chunk& chunk) {
    const auto n = static_cast<std::size_t>(chunk.numel);
    const std::size_t groups = (n + GROUP - 1) / GROUP;
    std::memset(chunk.m, 0, n * sizeof(typename M::Code));
    std::memset(chunk.v, 0, n * sizeof(typename V::Code));
    if constexpr (M::SCALED) std::memset(chunk.m_scale, 0, groups * sizeof(float));
    if constexpr (V::SCALED) std::memset(chunk.v_scale, 0, groups * sizeof(float));
  }
};

// How much further than at i the element i of a weight in lines is.
struct Lines {
  std::int64_t end, width, gap, shift = 0;

  // For ascending i.
  MISA_INLINE std::int64_t to(std::int64_t i) {
    while (i >= end) {
      shift += gap;
      end += width;
    }
    return shift;
  }
};

template <class Moments, WeightKind KIND, class Grad, bool IN_LINES>
struct UpdateOf {
  using Weight = std::conditional_t<KIND == FLOAT32, Float32, BFloat16>;

  typename Weight::type* __restrict weight;
  const typename Grad::type* __restrict grad;
  float* __restrict master;
  std::int16_t* __restrict residual;
  Scalars s;
  Noise noise;
  float unscale, coefficient;
  Lines here, ahead;
  // 0 for a weight without gaps.
  std::int64_t shift = 0;
  // Not a member by value: compilers keep the rest of this in registers only without its arrays.
  Moments& moments;

  UpdateOf(const Chunk& chunk, Moments& moments)
      : weight(static_cast<typename Weight::type*>(chunk.weight)),
        grad(static_cast<const typename Grad::type*>(chunk.grad)),
        master(chunk.master),
        residual(chunk.residual),
        s(chunk.scalars),
        noise(noise_from(chunk.first, chunk.key)),
        unscale(chunk.unscale),
        coefficient(chunk.coefficient),
        here{chunk.left, chunk.width, chunk.gap},
        ahead(here),
        moments(moments) {}

  // Updates one element and returns its unclipped gradient.
  MISA_INLINE float operator()(std::int64_t i) {
    const float g = Grad::load(grad + i) * unscale;
    const std::int64_t at = IN_LINES ? i + shift : i;
    float theta;
    if constexpr (KIND == MASTER) {
      theta = master[i];
    } else if constexpr (KIND == SPLIT) {
      theta = bf16_join(weight[at], residual[i]);
    } else {
      theta = Weight::load(weight + at);
    }
    float& m = moments.m[i - moments.begin];
    float& v = moments.v[i - moments.begin];
    adamw(theta, g * coefficient, m, v, s.decay, s.step_size, s.beta1, s.beta2, s.one_minus_beta1,
          s.one_minus_beta2, s.denom_scale, s.eps);
    if constexpr (KIND == FLOAT32) {
      weight[at] = theta;
    } else if constexpr (KIND == STOCHASTIC) {
      weight[at] = bf16_stochastic(theta, noise16(noise, static_cast<std::uint32_t>(i)));
    } else if constexpr (KIND == MASTER) {
      master[i] = theta;
      weight[at] = bf16_nearest(theta);
    } else {
      bf16_split(theta, weight[at], residual[i]);
    }
    return g;
  }

  void open(std::int64_t begin, std::int64_t end) { moments.open(begin, end); }
  void close(std::int64_t end) { moments.close(end); }
  // Before the lanes from i on.
  MISA_INLINE void go_to([[maybe_unused]] std::int64_t i) {
    if constexpr (IN_LINES) shift = here.to(i);
  }
  MISA_INLINE void prefetch(std::int64_t i) {
    MISA_PREFETCH(grad + i, 0);
    if constexpr (IN_LINES) {
      MISA_PREFETCH(weight + (i + ahead.to(i)), 1);
    } else {
      MISA_PREFETCH(weight + i, 1);
    }
    if constexpr (KIND == MASTER) MISA_PREFETCH(master + i, 1);
    if constexpr (KIND == SPLIT) MISA_PREFETCH(residual + i, 1);
    moments.prefetch(i);
  }
};

// Calls `element(i)` for all i below n and adds the squares of what it returned to `sums`.
template <class Element>
void sum_squares(std::int64_t n, Element element, double* sums) {
  for (std::int64_t begin = 0; begin < n; begin += BLOCK) {
    const std::int64_t end = n - begin < BLOCK ? n : begin + BLOCK;
    float squares[LANES] = {};
    std::int64_t i = begin;
    element.open(begin, end);
    for (; i + LANES <= end; i += LANES) {
      element.go_to(i);
      element.prefetch(i + AHEAD);
      MISA_INDEPENDENT
      for (int lane = 0; lane < LANES; ++lane) {
        const float g = element(i + lane);
        squares[lane] = fma_nearest(g, g, squares[lane]);
      }
    }
    for (int lane = 0; i < end; ++i, ++lane) {
      const float g = element(i);
      squares[lane] = fma_nearest(g, g, squares[lane]);
    }
    element.close(end);
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += static_cast<double>(squares[lane]);
  }
}

// State of age 0 is whatever the memory held. It is filled here, a chunk at a time, while it is in the cache.
template <class Moments, WeightKind KIND>
void fill(const Chunk& chunk) {
  Moments::clear(chunk);
  if constexpr (KIND == MASTER) {
    const auto* weight = static_cast<const std::uint16_t*>(chunk.weight);
    for (std::int64_t i = 0; i < chunk.numel; ++i) chunk.master[i] = bf16_to_float(weight[i]);
  }
  if constexpr (KIND == SPLIT) {
    std::memset(chunk.residual, 0, static_cast<std::size_t>(chunk.numel) * sizeof(std::int16_t));
  }
}

template <class Moments, WeightKind KIND, class Grad, bool IN_LINES>
void update(const Chunk& chunk, double* sums) {
  if (chunk.numel == 0) return;
  if constexpr (!IN_LINES) {
    if (chunk.fresh) fill<Moments, KIND>(chunk);
  }
  Moments moments(chunk);
  sum_squares(chunk.numel, UpdateOf<Moments, KIND, Grad, IN_LINES>(chunk, moments), sums);
}

template <class Grad>
void sq_norm(const Chunk& chunk, double* sums) {
  sum_squares(chunk.numel,
              SquaresOf<Grad>{static_cast<const typename Grad::type*>(chunk.grad), chunk.unscale}, sums);
}

// Adds the squares of a block to `sums`, each lane in float32 first.
void add_squares(const float* x, int n, double* sums) {
  float squares[LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    MISA_INDEPENDENT
    for (int lane = 0; lane < LANES; ++lane) {
      squares[lane] = fma_nearest(x[i + lane], x[i + lane], squares[lane]);
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) squares[lane] = fma_nearest(x[i], x[i], squares[lane]);
  for (int lane = 0; lane < LANES; ++lane) sums[lane] += static_cast<double>(squares[lane]);
}

template <class Moments, WeightKind KIND>
void close(const Chunk& chunk, std::int64_t action, const Closing& s, double* updates, double* weights) {
  using Weight = std::conditional_t<KIND == FLOAT32, Float32, BFloat16>;
  const bool written = !chunk.fresh;
  const bool moments_wanted = written && (action & (MISA_MEASURE | MISA_FLUSH)) != 0;
  const Noise noise = noise_from(chunk.first, chunk.key);
  Moments moments(chunk);
  for (std::int64_t begin = 0; begin < chunk.numel; begin += BLOCK) {
    const int n = static_cast<int>(chunk.numel - begin < BLOCK ? chunk.numel - begin : BLOCK);
    auto* __restrict weight = static_cast<typename Weight::type*>(chunk.weight) + begin;
    float theta[BLOCK], ratio[BLOCK];
    for (int i = 0; i < n; ++i) theta[i] = Weight::load(weight + i);
    if (action & MISA_MEASURE) add_squares(theta, n, weights);
    if (!written) continue;
    if (moments_wanted) {
      moments.open(begin, begin + n);
      const float* m = moments.m + (begin - moments.begin);
      const float* v = moments.v + (begin - moments.begin);
      for (int i = 0; i < n; ++i) ratio[i] = update_ratio(m[i], v[i], s.denom_scale, s.eps);
      if (action & MISA_MEASURE) add_squares(ratio, n, updates);
    }
    if constexpr (KIND == MASTER) {
      float* __restrict master = chunk.master + begin;
      for (int i = 0; i < n; ++i) {
        theta[i] = bf16_to_float(bf16_nearest(master[i])) == theta[i] ? master[i] : theta[i];
      }
      if (action & MISA_ADOPT) {
        for (int i = 0; i < n; ++i) master[i] = theta[i];
      }
    }
    if constexpr (KIND == SPLIT) {
      for (int i = 0; i < n; ++i) theta[i] = bf16_join(weight[i], chunk.residual[begin + i]);
    }
    if (!(action & MISA_WRITE_BACK)) continue;
    if (action & MISA_FLUSH) {
      for (int i = 0; i < n; ++i) theta[i] = momentum_flush(theta[i], ratio[i], s.flush_size);
    }
    const auto first = static_cast<std::uint32_t>(begin);
    MISA_INDEPENDENT
    for (int i = 0; i < n; ++i) {
      if constexpr (KIND == FLOAT32) {
        weight[i] = theta[i];
      } else {
        weight[i] = bf16_stochastic(theta[i], noise16(noise, first + static_cast<std::uint32_t>(i)));
      }
    }
  }
}

using BFloat16Moments = StoredMoments<RoundedMoment, RoundedMoment>;
using Int8Moments = StoredMoments<SoftSign, Root>;

#define MISA_LINES(MOMENTS, KIND, GRAD) \
  {update<MOMENTS, KIND, GRAD, false>, update<MOMENTS, KIND, GRAD, true>}
#define MISA_GRADS(MOMENTS, KIND) {MISA_LINES(MOMENTS, KIND, Float32), MISA_LINES(MOMENTS, KIND, BFloat16)}
#define MISA_KINDS(MOMENTS)                                                                    \
  {MISA_GRADS(MOMENTS, FLOAT32), MISA_GRADS(MOMENTS, STOCHASTIC), MISA_GRADS(MOMENTS, MASTER), \
   MISA_GRADS(MOMENTS, SPLIT)}
#define MISA_CLOSE(MOMENTS) \
  {close<MOMENTS, FLOAT32>, close<MOMENTS, STOCHASTIC>, close<MOMENTS, MASTER>, close<MOMENTS, SPLIT>}

}  // namespace

extern const ChunkFunctions MISA_INSTRUCTIONS = {
    {MISA_KINDS(PlainMoments), MISA_KINDS(BFloat16Moments), MISA_KINDS(Int8Moments)},
    {sq_norm<Float32>, sq_norm<BFloat16>},
    {MISA_CLOSE(PlainMoments), MISA_CLOSE(BFloat16Moments), MISA_CLOSE(Int8Moments)},
};

}  // namespace misa
