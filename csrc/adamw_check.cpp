// Loops over adamw.h behind a C interface, for tests/kernels/test_formula.py alone.
#include "adamw.h"

#if defined(_WIN32)
#define MISA_EXPORT extern "C" __declspec(dllexport)
#else
#define MISA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

MISA_EXPORT void check_adamw(std::int64_t n, float* theta, const float* g, float* m, float* v, float decay,
                             float step_size, float beta1, float beta2, float one_minus_beta1,
                             float one_minus_beta2, float denom_scale, float eps) {
  for (std::int64_t i = 0; i < n; ++i) {
    misa::adamw(theta[i], g[i], m[i], v[i], decay, step_size, beta1, beta2, one_minus_beta1, one_minus_beta2,
                denom_scale, eps);
  }
}

MISA_EXPORT void check_bf16_nearest(std::int64_t n, const float* x, std::uint16_t* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = misa::bf16_nearest(x[i]);
}

MISA_EXPORT void check_bf16_stochastic(std::int64_t n, const float* x, const std::uint32_t* noise,
                                       std::uint16_t* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = misa::bf16_stochastic(x[i], noise[i]);
}

MISA_EXPORT void check_bf16_to_float(std::int64_t n, const std::uint16_t* x, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = misa::bf16_to_float(x[i]);
}

MISA_EXPORT void check_bf16_split(std::int64_t n, const float* x, std::uint16_t* upper,
                                  std::int16_t* residual) {
  for (std::int64_t i = 0; i < n; ++i) misa::bf16_split(x[i], upper[i], residual[i]);
}

MISA_EXPORT void check_bf16_join(std::int64_t n, const std::uint16_t* upper, const std::int16_t* residual,
                                 float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = misa::bf16_join(upper[i], residual[i]);
}

MISA_EXPORT void check_noise16(std::int64_t n, const std::uint64_t* index, std::uint32_t key,
                               std::uint32_t* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = misa::noise16(index[i], key);
}
