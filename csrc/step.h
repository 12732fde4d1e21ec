// What both libraries do once for a step or a chunk, on host and device: checks, scalars, noise, clipping.
//
// The arithmetic is float64 and must not be contracted: CMakeLists.txt turns that off for every compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "adamw.h"
#include "misa.h"

namespace misa {

// What all elements of a tensor share in one update.
struct Scalars {
  float decay, step_size, beta1, beta2, one_minus_beta1, one_minus_beta2, denom_scale, eps;
};

// Both to a power, by squaring, which gives the same bits in any language.
MISA_HOST_DEVICE void powers(double& base1, double& base2, int exponent) {
  double power1 = 1.0, power2 = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) {
      power1 *= base1;
      power2 *= base2;
    }
    base1 *= base1;
    base2 *= base2;
  }
  base1 = power1;
  base2 = power2;
}

// In float64 and rounded once: 1 - beta2^t in float32 is off by 1e-5 at small t.
MISA_HOST_DEVICE Scalars scalars(const MisaHyper& hyper, int age) {
  double beta1_t = hyper.beta1, beta2_t = hyper.beta2;
  powers(beta1_t, beta2_t, age + 1);
  Scalars s;
  s.decay = static_cast<float>(1.0 - hyper.lr * hyper.weight_decay);
  s.step_size = static_cast<float>(hyper.lr / (1.0 - beta1_t));
  s.beta1 = static_cast<float>(hyper.beta1);
  s.beta2 = static_cast<float>(hyper.beta2);
  s.one_minus_beta1 = static_cast<float>(1.0 - hyper.beta1);
  s.one_minus_beta2 = static_cast<float>(1.0 - hyper.beta2);
  s.denom_scale = static_cast<float>(1.0 / sqrt(1.0 - beta2_t));
  s.eps = static_cast<float>(hyper.eps);
  return s;
}

// What all elements of a tensor share when a round ends.
struct Closing {
  double step_size;
  float flush_size, denom_scale, eps;
};

// Of the last update, the `age`-th.
MISA_HOST_DEVICE Closing closing(const MisaHyper& hyper, int age) {
  double beta1_t = hyper.beta1, beta2_t = hyper.beta2;
  powers(beta1_t, beta2_t, age);
  Closing s;
  s.step_size = hyper.lr / (1.0 - beta1_t);
  s.flush_size = static_cast<float>(hyper.lr * hyper.beta1 / (1.0 - hyper.beta1) / (1.0 - beta1_t));
  s.denom_scale = static_cast<float>(1.0 / sqrt(1.0 - beta2_t));
  s.eps = static_cast<float>(hyper.eps);
  return s;
}

// `noise16` of the elements index, index + 1, ...: the upper half of their index is one of two numbers, whose
// keys are made once.
struct Noise {
  std::uint32_t first, here, beyond;
};

MISA_HOST_DEVICE Noise noise_from(std::uint64_t index, std::uint32_t key) {
  const std::uint32_t high = static_cast<std::uint32_t>(index >> 32);
  return {static_cast<std::uint32_t>(index), high != 0 ? lowbias32(high ^ key) : key,
          lowbias32((high + 1) ^ key)};
}

MISA_HOST_DEVICE std::uint32_t noise32(const Noise& noise, std::uint32_t i) {
  const std::uint32_t low = noise.first + i;
  return lowbias32(low ^ (low < noise.first ? noise.beyond : noise.here));
}

MISA_HOST_DEVICE std::uint32_t noise16(const Noise& noise, std::uint32_t i) {
  return noise32(noise, i) & 0xFFFFu;
}

// Clip coefficient, norm and whether the update must be skipped, from the sum of all squares.
MISA_HOST_DEVICE void write_control(float* control, double sq_norm, const MisaStep& step) {
  const double norm = sqrt(sq_norm);
  double ratio = 1.0;
  if (step.flags & MISA_CLIP) ratio = step.max_grad_norm / (norm + 1e-6);
  // Written so that NaN stays NaN.
  control[0] = static_cast<float>(ratio > 1.0 ? 1.0 : ratio);
  control[1] = static_cast<float>(norm);
  const bool nonfinite = !(sq_norm < HUGE_VAL) && (step.flags & MISA_SKIP_NONFINITE) != 0;
  control[2] = nonfinite || (step.found_inf != nullptr && *step.found_inf != 0.0f) ? 1.0f : 0.0f;
}

static inline std::int64_t chunks_of(const MisaRow& row, std::int64_t chunk) {
  return row.numel > chunk ? (row.numel - 1) / chunk + 1 : 1;
}

static inline std::int64_t bytes_of(std::int64_t dtype) { return dtype == MISA_FLOAT32 ? 4 : 2; }

// Elements that share a scale.
constexpr int GROUP = 128;

static inline std::int64_t code_bytes(std::int64_t format) {
  return format == MISA_STATE_FP32 ? 4 : format == MISA_STATE_BF16 ? 2 : 1;
}

static inline bool known(std::int64_t dtype) { return dtype >= 0 && dtype < MISA_DTYPES; }

static inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Whether the lines of a row's weight are such, and their bytes can be counted.
static inline bool is_lined(const MisaRow& row) {
  if ((row.width | row.pitch) == 0) return true;
  if (row.width <= 0 || row.pitch < row.width || row.numel % row.width != 0) return false;
  const std::int64_t most = INT64_MAX / 4;
  return row.width <= most && (row.numel / row.width - 1) <= (most - row.width) / row.pitch;
}

static inline int check_row(const MisaRow& row, const MisaStep& step) {
  if (!known(row.weight_dtype) || !known(row.grad_dtype)) return MISA_BAD_DTYPE;
  if (row.group < 0 || row.group >= step.group_count) return MISA_BAD_GROUP;
  const MisaState& state = step.state[row.weight_dtype];
  if (row.offset < 0 || row.numel > state.elements - row.offset) return MISA_BAD_SIZE;
  if (row.start < 0 || row.start > INT64_MAX - row.numel) return MISA_BAD_SIZE;
  if (!is_lined(row)) return MISA_BAD_WIDTH;
  if (step.format == MISA_STATE_INT8 && row.offset % GROUP != 0) return MISA_BAD_ALIGNMENT;
  if (row.numel == 0) return MISA_OK;
  if (row.weight == nullptr) return MISA_BAD_POINTER;
  if (!aligned(row.weight, bytes_of(row.weight_dtype)) || !aligned(row.grad, bytes_of(row.grad_dtype)))
    return MISA_BAD_ALIGNMENT;
  return MISA_OK;
}

static inline int check_state(const MisaState& state, std::int64_t format) {
  if (state.elements < 0) return MISA_BAD_SIZE;
  const bool scaled = format == MISA_STATE_INT8;
  if (state.master != nullptr && state.residual != nullptr) return MISA_BAD_POINTER;
  if (state.elements > 0 && (state.exp_avg == nullptr || state.exp_avg_sq == nullptr))
    return MISA_BAD_POINTER;
  if (state.elements > 0 && scaled && (state.exp_avg_scale == nullptr || state.exp_avg_sq_scale == nullptr))
    return MISA_BAD_POINTER;
  const std::size_t bytes = static_cast<std::size_t>(code_bytes(format));
  if (!aligned(state.exp_avg, bytes) || !aligned(state.exp_avg_sq, bytes) || !aligned(state.residual, 2))
    return MISA_BAD_ALIGNMENT;
  for (const float* buffer : {state.exp_avg_scale, state.exp_avg_sq_scale, state.master}) {
    if (!aligned(buffer, sizeof(float))) return MISA_BAD_ALIGNMENT;
  }
  return MISA_OK;
}

// One past the chunks of a table's rows, which may be a stretch of it.
static inline std::int64_t end_chunk(const MisaStep& step, std::int64_t chunk) {
  const MisaRow& last = step.rows[step.row_count - 1];
  return last.first_chunk + chunks_of(last, chunk);
}

// Whether they are all of them.
static inline bool is_whole(const MisaStep& step, std::int64_t chunk) {
  return step.rows[0].first_chunk == 0 && end_chunk(step, chunk) == step.chunk_count;
}

// What reading the table and the chunks needs; `chunk` is the elements of one. No sum in it can overflow.
static inline int check_tables(const MisaStep* step, std::int64_t chunk) {
  if (step == nullptr) return MISA_BAD_POINTER;
  if (!aligned(step, alignof(MisaStep))) return MISA_BAD_ALIGNMENT;
  if (step->bytes != static_cast<std::int64_t>(sizeof(MisaStep))) return MISA_BAD_VERSION;
  if (step->row_bytes != static_cast<std::int64_t>(sizeof(MisaRow))) return MISA_BAD_VERSION;
  if (step->row_count < 0 || step->group_count < 0) return MISA_BAD_SIZE;
  if (step->row_count == 0) return step->chunk_count == 0 ? MISA_OK : MISA_BAD_SIZE;
  if (step->rows == nullptr || step->age == nullptr || step->sq_sum == nullptr) return MISA_BAD_POINTER;
  if (!aligned(step->rows, alignof(MisaRow)) || !aligned(step->age, sizeof(std::int32_t)) ||
      !aligned(step->sq_sum, sizeof(double)))
    return MISA_BAD_ALIGNMENT;
  std::int64_t chunks = step->rows[0].first_chunk;
  if (chunks < 0) return MISA_BAD_SIZE;
  for (std::int64_t i = 0; i < step->row_count; ++i) {
    // Every row has a chunk: too large a count of rows is found before a row that is not there is read.
    if (chunks >= step->chunk_count) return MISA_BAD_SIZE;
    const MisaRow& row = step->rows[i];
    if (row.numel < 0 || row.first_chunk != chunks) return MISA_BAD_SIZE;
    if (chunks_of(row, chunk) > step->chunk_count - chunks) return MISA_BAD_SIZE;
    chunks += chunks_of(row, chunk);
  }
  return MISA_OK;
}

// What is the same for a step and the end of a round; `wanted` says which rows are read.
template <class Wanted>
static inline int check_memory(const MisaStep& step, Wanted wanted) {
  if (step.format < 0 || step.format >= MISA_FORMATS) return MISA_BAD_DTYPE;
  if (step.hyper == nullptr) return MISA_BAD_POINTER;
  if (!aligned(step.hyper, alignof(MisaHyper))) return MISA_BAD_ALIGNMENT;
  const MisaState& plain = step.state[MISA_FLOAT32];
  if (plain.master != nullptr || plain.residual != nullptr) return MISA_BAD_POINTER;
  int status = MISA_OK;
  for (const MisaState& state : step.state) {
    status = check_state(state, step.format);
    if (status != MISA_OK) return status;
  }
  for (std::int64_t i = 0; i < step.row_count && status == MISA_OK; ++i) {
    if (wanted(step.rows[i])) status = check_row(step.rows[i], step);
  }
  return status;
}

// Everything that would otherwise be a crash.
static inline int check_step(const MisaStep* step, std::int64_t chunk) {
  int status = check_tables(step, chunk);
  if (status != MISA_OK) return status;
  constexpr std::int64_t controls = MISA_CLIP | MISA_SKIP_NONFINITE, halves = MISA_NORMS | MISA_UPDATE;
  if (step->flags & ~(controls | halves)) return MISA_BAD_FLAG;
  if ((step->flags & halves) == halves) return MISA_BAD_FLAG;
  if ((step->flags & halves) != 0 && (step->flags & controls) == 0) return MISA_BAD_FLAG;
  // Written so that NaN is refused.
  if ((step->flags & MISA_CLIP) && !(step->max_grad_norm > 0.0 && step->max_grad_norm < HUGE_VAL))
    return MISA_BAD_NORM;
  if (step->row_count == 0) return MISA_OK;
  // The norm is that of all rows.
  if ((step->flags & controls) != 0 && !is_whole(*step, chunk)) return MISA_BAD_SIZE;
  if (step->partial == nullptr || step->control == nullptr) return MISA_BAD_POINTER;
  if (!aligned(step->partial, sizeof(double))) return MISA_BAD_ALIGNMENT;
  for (const float* pointer : {static_cast<const float*>(step->control), step->grad_scale, step->found_inf}) {
    if (!aligned(pointer, sizeof(float))) return MISA_BAD_ALIGNMENT;
  }
  return check_memory(*step, [](const MisaRow&) { return true; });
}

static inline int check_collect(const MisaStep* step, const double* collected, std::int64_t chunk) {
  const int status = check_tables(step, chunk);
  if (status != MISA_OK || step->row_count == 0) return status;
  if (!is_whole(*step, chunk)) return MISA_BAD_SIZE;
  if (collected == nullptr) return MISA_BAD_POINTER;
  return aligned(collected, sizeof(double)) ? MISA_OK : MISA_BAD_ALIGNMENT;
}

static inline int check_close(const MisaStep* step, const double* moved, std::int64_t chunk) {
  const int status = check_tables(step, chunk);
  if (status != MISA_OK || step->row_count == 0) return status;
  if (!is_whole(*step, chunk)) return MISA_BAD_SIZE;
  if (!aligned(moved, sizeof(double))) return MISA_BAD_ALIGNMENT;
  for (std::int64_t i = 0; i < step->row_count; ++i) {
    const std::int64_t action = step->rows[i].action;
    constexpr std::int64_t known = MISA_MEASURE | MISA_ADOPT | MISA_FLUSH | MISA_WRITE_BACK;
    if ((action & ~known) != 0) return MISA_BAD_FLAG;
    if ((action & MISA_MEASURE) != 0 && moved == nullptr) return MISA_BAD_POINTER;
  }
  return check_memory(*step, [](const MisaRow& row) { return row.action != 0; });
}

static inline const char* message(int status) {
  switch (status) {
    case MISA_OK:
      return "success";
    case MISA_BAD_VERSION:
      return "the library and its caller are of different versions";
    case MISA_BAD_POINTER:
      return "a pointer is NULL that must not be, or a master or residual is there that must not be";
    case MISA_BAD_SIZE:
      return "a size is negative, a row reaches beyond its buffer, chunks do not add up, or threads < 1";
    case MISA_BAD_DTYPE:
      return "a dtype, or a format of the state, is one that this library does not know";
    case MISA_BAD_GROUP:
      return "a row names a group that is not there";
    case MISA_BAD_FLAG:
      return "an unknown flag is set, or a half of a step that has one half only";
    case MISA_BAD_ALIGNMENT:
      return "an address is not a multiple of the element's size";
    case MISA_BAD_INSTRUCTIONS:
      return "the instruction set is not built, or the processor does not have it";
    case MISA_BAD_NORM:
      return "max_grad_norm is not a finite number above 0";
    case MISA_BAD_WIDTH:
      return "a row is no whole number of lines, they overlap, or are longer than this library can tell";
    default:
      return "unknown status";
  }
}

}  // namespace misa
