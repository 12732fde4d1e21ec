// A step on the CPU: one parallel region over the chunks of all rows, whatever their number and sizes.
#include <atomic>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "chunk.h"

namespace misa {
namespace {

// 128 kB of float32: four of them stay in an L2 cache between `fill` and the update, and a row of the
// smallest matrices worth two threads has several.
constexpr std::int64_t CHUNK = 32768;
// Elements of a weight in lines that are gathered at a time: whole blocks of a sum, and few enough for an L1
// cache.
constexpr std::int64_t PIECE = 4096;
static_assert(PIECE % BLOCK == 0 && PIECE % GROUP == 0, "sums and scales would be others");
// Fewer elements than this take longer to hand out than to update.
constexpr std::int64_t ALONE = 32768;

#if defined(__GNUC__)
#define MISA_APART __attribute__((noinline))
#else
#define MISA_APART
#endif

struct Instructions {
  const char* name;
  const ChunkFunctions* functions;
  bool available;
};

#if defined(MISA_X86)
bool has(const char* name) {
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

const Instructions BUILT[] = {
#if defined(MISA_X86)
    {"avx512", &chunk_avx512, has("avx512")},
    {"avx2", &chunk_avx2, has("avx2")},
#endif
    {"baseline", &chunk_baseline, true},
};

const Instructions* best() {
  for (const Instructions& instructions : BUILT) {
    if (instructions.available) return &instructions;
  }
  return nullptr;
}

std::atomic<const Instructions*> in_use{best()};

// Walks through the chunks in ascending order and finds the row of each.
struct Cursor {
  const MisaStep& step;
  std::int64_t row;

  const MisaRow& to(std::int64_t chunk) {
    while (chunk >= step.rows[row].first_chunk + chunks_of(step.rows[row], CHUNK)) ++row;
    return step.rows[row];
  }
};

WeightKind kind_of(const MisaRow& row, const MisaState& state) {
  if (row.weight_dtype == MISA_FLOAT32) return FLOAT32;
  return state.master != nullptr ? MASTER : state.residual != nullptr ? SPLIT : STOCHASTIC;
}

// What else an update reads is for `update_chunk` to set: many small tensors would notice zeros written
// twice.
Chunk gradient_of(const MisaRow& row, std::int64_t begin, float unscale) {
  Chunk chunk;
  chunk.width = chunk.left = chunk.gap = 0;
  const std::int64_t left = row.numel - begin;
  chunk.numel = left < CHUNK ? left : CHUNK;
  chunk.grad = static_cast<const char*>(row.grad) + begin * bytes_of(row.grad_dtype);
  chunk.unscale = unscale;
  return chunk;
}

double sum_of(const double* sums) {
  double total = 0.0;
  for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
  return total;
}

double norm_chunk(const ChunkFunctions& functions, const MisaRow& row, std::int64_t index, float unscale) {
  if (row.grad == nullptr) return 0.0;
  double sums[LANES] = {};
  functions.sq_norm[row.grad_dtype](gradient_of(row, (index - row.first_chunk) * CHUNK, unscale), sums);
  return sum_of(sums);
}

// The scalars of the chunk before: they are those of many small tensors in a row, and take longer than 16
// elements.
struct LastScalars {
  std::int64_t group = -1;
  std::int32_t age = -1;
  Scalars value{};

  const Scalars& of(const MisaStep& step, std::int64_t wanted, std::int32_t at) {
    if (wanted != group || at != age) value = scalars(step.hyper[wanted], at);
    group = wanted;
    age = at;
    return value;
  }
};

// Where weight and state of a row without gaps are from an element on, and what that counts as in its noise.
void point(Chunk& chunk, const MisaStep& step, const MisaRow& row, std::int64_t begin) {
  const MisaState& state = step.state[row.weight_dtype];
  chunk.weight = static_cast<char*>(row.weight) + begin * bytes_of(row.weight_dtype);
  const std::int64_t at = row.offset + begin;
  chunk.m = static_cast<char*>(state.exp_avg) + at * code_bytes(step.format);
  chunk.v = static_cast<char*>(state.exp_avg_sq) + at * code_bytes(step.format);
  chunk.m_scale = state.exp_avg_scale == nullptr ? nullptr : state.exp_avg_scale + at / GROUP;
  chunk.v_scale = state.exp_avg_sq_scale == nullptr ? nullptr : state.exp_avg_sq_scale + at / GROUP;
  chunk.master = state.master == nullptr ? nullptr : state.master + at;
  chunk.residual = state.residual == nullptr ? nullptr : state.residual + at;
  chunk.first = static_cast<std::uint64_t>(row.start + begin);
}

// Where a weight in lines is from an element on.
void point_line(Chunk& chunk, const MisaRow& row, std::int64_t begin) {
  const std::int64_t column = begin % row.width, line = begin / row.width * row.pitch;
  chunk.weight = static_cast<char*>(row.weight) + (line + column) * bytes_of(row.weight_dtype);
  chunk.width = row.width;
  chunk.left = row.width - column;
  chunk.gap = row.pitch - row.width;
}

// The same of a chunk, and what holds for all of its elements.
void point(Chunk& chunk, const MisaStep& step, const MisaRow& row, std::int64_t begin, std::int64_t index) {
  point(chunk, step, row, begin);
  chunk.key = static_cast<std::uint32_t>(row.key);
  chunk.fresh = step.age[index] == 0;
}

// Copies the weight of a chunk, which is in lines, to or from memory without gaps.
template <bool GATHERS>
void move_lines(const Chunk& chunk, std::int64_t size, char* packed) {
  char* line = static_cast<char*>(chunk.weight);
  for (std::int64_t left = chunk.numel, n = chunk.left; left > 0; n = chunk.width) {
    const auto bytes = static_cast<std::size_t>((n < left ? n : left) * size);
    std::memcpy(GATHERS ? packed : line, GATHERS ? line : packed, bytes);
    packed += bytes;
    left -= n;
    if (left > 0) line += (n + chunk.gap) * size;
  }
}

// Calls `work` with a chunk whose weight is in lines, piece by piece: each gathered before it, and brought
// back after it where `work` writes.
template <class Work>
void in_pieces(const Chunk& chunk, const MisaStep& step, const MisaRow& row, std::int64_t begin, bool writes,
               Work work) {
  alignas(64) char packed[PIECE * sizeof(float)];
  const std::int64_t size = bytes_of(row.weight_dtype);
  Chunk piece = chunk;
  for (std::int64_t at = 0; at < chunk.numel; at += PIECE) {
    const std::int64_t left = chunk.numel - at;
    point(piece, step, row, begin + at);
    point_line(piece, row, begin + at);
    piece.numel = left < PIECE ? left : PIECE;
    if (chunk.grad != nullptr) {
      piece.grad = static_cast<const char*>(chunk.grad) + at * bytes_of(row.grad_dtype);
    }
    Chunk gathered = piece;
    gathered.weight = packed;
    move_lines<true>(piece, size, packed);
    work(gathered);
    if (writes) move_lines<false>(piece, size, packed);
  }
}

// Kept out of what every small tensor runs.
MISA_APART void update_lines(const UpdateFunction* updates, Chunk chunk, const MisaStep& step,
                             const MisaRow& row, std::int64_t begin, double* sums) {
  // One line alone has no gaps; `gap` would reach beyond it.
  if (row.width == row.numel) {
    updates[0](chunk, sums);
  } else if (row.width % LANES == 0 && !chunk.fresh) {
    point_line(chunk, row, begin);
    updates[1](chunk, sums);
  } else {
    in_pieces(chunk, step, row, begin, true, [&](const Chunk& piece) { updates[0](piece, sums); });
  }
}

void update_chunk(const ChunkFunctions& functions, const MisaStep& step, const MisaRow& row,
                  std::int64_t index, float unscale, bool controlled, LastScalars& last) {
  if (row.grad == nullptr) return;
  const std::int64_t begin = (index - row.first_chunk) * CHUNK;
  Chunk chunk = gradient_of(row, begin, unscale);
  point(chunk, step, row, begin, index);
  chunk.coefficient = controlled ? step.control[0] : 1.0f;
  chunk.scalars = last.of(step, row.group, step.age[index]);
  const auto& updates =
      functions.update[step.format][kind_of(row, step.state[row.weight_dtype])][row.grad_dtype];
  double sums[LANES] = {};
  if (row.width == 0) {
    updates[0](chunk, sums);
  } else {
    update_lines(updates, chunk, step, row, begin, sums);
  }
  step.sq_sum[index] += controlled ? step.partial[index] : sum_of(sums);
  ++step.age[index];
}

bool is_small(const MisaStep& step) {
  std::int64_t elements = 0;
  for (std::int64_t i = 0; i < step.row_count; ++i) elements += step.rows[i].numel;
  return elements < ALONE;
}

int run(const MisaStep& step, [[maybe_unused]] int threads) {
  const ChunkFunctions& functions = *in_use.load(std::memory_order_relaxed)->functions;
  const bool controlled = (step.flags & (MISA_CLIP | MISA_SKIP_NONFINITE)) != 0;
  const float unscale = step.grad_scale == nullptr ? 1.0f : divide_nearest(1.0f, *step.grad_scale);
  const bool takes_norms = controlled && (step.flags & MISA_UPDATE) == 0;
  const bool updates = (step.flags & MISA_NORMS) == 0;
  bool skip = step.found_inf != nullptr && *step.found_inf != 0.0f;
  if (skip && !controlled) return MISA_OK;
  if (controlled && !takes_norms) skip = step.control[2] != 0.0f;
  const std::int64_t first = step.rows[0].first_chunk, end = end_chunk(step, CHUNK);
  if (is_small(step)) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (takes_norms) {
      Cursor cursor{step, 0};
#pragma omp for schedule(static)
      for (std::int64_t i = first; i < end; ++i) {
        step.partial[i] = norm_chunk(functions, cursor.to(i), i, unscale);
      }
#pragma omp single
      {
        double sq_norm = 0.0;
        for (std::int64_t i = first; i < end; ++i) sq_norm += step.partial[i];
        write_control(step.control, sq_norm, step);
        skip = step.control[2] != 0.0f;
      }
    }
    if (updates && !skip) {
      Cursor cursor{step, 0};
      LastScalars last;
#pragma omp for schedule(static)
      for (std::int64_t i = first; i < end; ++i) {
        update_chunk(functions, step, cursor.to(i), i, unscale, controlled, last);
      }
    }
  }
  return MISA_OK;
}

void close_chunk(const ChunkFunctions& functions, const MisaStep& step, const MisaRow& row,
                 std::int64_t index, double* moved) {
  if (row.action == 0) return;
  const std::int64_t begin = (index - row.first_chunk) * CHUNK, left = row.numel - begin;
  Chunk chunk{};
  chunk.numel = left < CHUNK ? left : CHUNK;
  double updates[LANES] = {}, weights[LANES] = {}, step_size = 0.0;
  if (chunk.numel > 0) {
    point(chunk, step, row, begin, index);
    const auto close = functions.close[step.format][kind_of(row, step.state[row.weight_dtype])];
    const Closing shared = closing(step.hyper[row.group], step.age[index]);
    const auto work = [&](const Chunk& piece) { close(piece, row.action, shared, updates, weights); };
    if (row.width != 0) {
      in_pieces(chunk, step, row, begin, !chunk.fresh && (row.action & MISA_WRITE_BACK) != 0, work);
    } else {
      work(chunk);
    }
    if (!chunk.fresh) step_size = shared.step_size;
  }
  if ((row.action & MISA_MEASURE) == 0) return;
  moved[index] = step_size * step_size * sum_of(updates);
  moved[step.chunk_count + index] = sum_of(weights);
}

int close(const MisaStep& step, double* moved, [[maybe_unused]] int threads) {
  const ChunkFunctions& functions = *in_use.load(std::memory_order_relaxed)->functions;
  const std::int64_t first = step.rows[0].first_chunk, end = end_chunk(step, CHUNK);
  if (is_small(step)) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Cursor cursor{step, 0};
#pragma omp for schedule(static)
    for (std::int64_t i = first; i < end; ++i) close_chunk(functions, step, cursor.to(i), i, moved);
  }
  return MISA_OK;
}

}  // namespace
}  // namespace misa

extern "C" {

const char* misa_message(int status) { return misa::message(status); }

int64_t misa_cpu_chunk(void) { return misa::CHUNK; }

int misa_cpu_step(const MisaStep* step, int threads) {
  const int status = misa::check_step(step, misa::CHUNK);
  if (status != MISA_OK) return status;
  if (threads < 1) return MISA_BAD_SIZE;
  return step->row_count == 0 ? MISA_OK : misa::run(*step, threads);
}

int misa_cpu_close(const MisaStep* step, double* moved, int threads) {
  const int status = misa::check_close(step, moved, misa::CHUNK);
  if (status != MISA_OK) return status;
  if (threads < 1) return MISA_BAD_SIZE;
  return step->row_count == 0 ? MISA_OK : misa::close(*step, moved, threads);
}

int misa_cpu_collect(const MisaStep* step, double* collected) {
  const int status = misa::check_collect(step, collected, misa::CHUNK);
  if (status != MISA_OK) return status;
  for (std::int64_t i = 0; i < step->row_count; ++i) {
    const MisaRow& row = step->rows[i];
    double sq_sum = 0.0;
    const std::int64_t end = row.first_chunk + misa::chunks_of(row, misa::CHUNK);
    for (std::int64_t chunk = row.first_chunk; chunk < end; ++chunk) sq_sum += step->sq_sum[chunk];
    collected[2 * i] = step->age[row.first_chunk];
    collected[2 * i + 1] = sq_sum;
  }
  return MISA_OK;
}

const char* misa_cpu_built(void) {
#if defined(MISA_X86)
  return "avx512 avx2 baseline";
#else
  return "baseline";
#endif
}

const char* misa_cpu_instructions(void) { return misa::in_use.load()->name; }

int misa_cpu_use_instructions(const char* name) {
  if (name == nullptr) return MISA_BAD_POINTER;
  for (const misa::Instructions& instructions : misa::BUILT) {
    if (instructions.available && std::strcmp(name, instructions.name) == 0) {
      misa::in_use.store(&instructions);
      return MISA_OK;
    }
  }
  return MISA_BAD_INSTRUCTIONS;
}

int misa_cpu_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"
