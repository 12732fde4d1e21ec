// A step on a GPU: one launch for 60 rows of the same dtypes, 54 where one is a slice of columns, and as many
// before it to clip by the norm.
//
// A block works on one chunk, whose age and sum of squares it alone writes: no races, no atomics on floats,
// and two runs give the same bits. The tables travel in the arguments of the launch: nothing is allocated,
// uploaded or waited for.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "step.h"

namespace misa {
namespace {

constexpr std::int64_t CHUNK = 8192;
constexpr int THREADS = 256;
// Blocks that share a multiprocessor, at 64 registers a thread: half of the threads there can be.
constexpr int RESIDENT = 4;
// Elements from one vector of a thread to its next, and how many vectors it asks for before it uses any.
constexpr int STRIDE = 4 * THREADS;
constexpr int AHEAD = 2;

constexpr int GROUPS = 8;
constexpr int COLLECTED = 1000;

// What a kernel reads of a MisaRow.
struct Row {
  void* weight;
  const void* grad;
  std::int64_t numel, offset, start;
  std::uint32_t key;
  int group, first_chunk, first_block;
};

// And of one whose weight is in lines, with a gap from each to the next.
struct PitchedRow : Row {
  std::uint32_t width, gap;
};

template <bool PITCHED>
struct Tables {
  static constexpr int ROWS = PITCHED ? 54 : 60;

  MisaStep step;
  MisaHyper hyper[GROUPS];
  std::conditional_t<PITCHED, PitchedRow, Row> rows[ROWS];
  int row_count;
  int action;     // of all rows, when a round ends
  double* moved;  // see misa_cuda_close
};

// The chunks of row i are those from first_chunk[i] up to first_chunk[i + 1].
struct Chunks {
  const std::int32_t* age;
  const double* sq_sum;
  double* collected;
  int first_chunk[COLLECTED + 1];
};

static_assert(sizeof(Tables<false>) <= 4096 && sizeof(Tables<true>) <= 4096 && sizeof(Chunks) <= 4096,
              "what a launch takes on every architecture");

// Where the elements of a chunk are in a weight whose elements are neighbours: the first, and the others from
// it on.
template <bool PITCHED>
struct Place {
  std::int64_t first;

  __device__ std::int64_t operator()(int i) const { return i; }
  __device__ bool wide() const { return true; }
};

// And in one that is pitched. Of a row that is not, the gap is 0, and it is no matter what its lines are.
template <>
struct Place<true> {
  std::int64_t first;
  std::uint32_t width, gap, column, factor;
  int shift;

  __device__ void set(const PitchedRow& row, std::int64_t begin) {
    width = row.width == 0 ? 1 : row.width;
    gap = row.gap;
    const std::int64_t line = begin / width;
    first = begin + line * gap;
    column = static_cast<std::uint32_t>(begin - line * width);
    // n / width = n * 2^(31 + shift) / width / 2^(31 + shift), rounded up once: exact for n and widths below
    // 2^30, T. Granlund and P. L. Montgomery, https://dl.acm.org/doi/10.1145/178243.178249.
    for (shift = 0; width >> shift > 1;) ++shift;
    factor = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + shift)) + width - 1) / width);
  }
  __device__ std::int64_t operator()(int i) const {
    const std::uint32_t line = __umulhi(2 * (column + i), factor) >> shift;
    return static_cast<std::int64_t>(line) * gap + i;
  }
  // Whether each vector is within a line, on as many bytes as the first.
  __device__ bool wide() const { return gap == 0 || (width | gap) % 4 == 0; }
};

// What one thread has computed of a weight that is pitched; of others there is nothing to compute.
template <bool PITCHED>
__device__ Place<PITCHED> place_of(const Place<PITCHED>& shared, std::int64_t begin) {
  if constexpr (PITCHED) {
    return shared;
  } else {
    return {begin};
  }
}

template <int DTYPE>
using Stored = std::conditional_t<DTYPE == MISA_FLOAT32, float, std::uint16_t>;

// Four neighbours, which are one access. Those of bfloat16 stay in pairs until they are used: to take them
// apart is to wait for them.
template <class T>
struct Four;

template <>
struct alignas(16) Four<float> {
  float x[4];
  __device__ float get(int i) const { return x[i]; }
  __device__ void set(int i, float value) { x[i] = value; }
};

template <>
struct alignas(8) Four<std::uint16_t> {
  std::uint32_t pairs[2];
  __device__ float get(int i) const {
    return bf16_to_float(static_cast<std::uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
  }
  __device__ void set(int i, std::uint16_t value) {
    const int shift = i % 2 * 16;
    pairs[i / 2] = (pairs[i / 2] & ~(0xFFFFu << shift)) | static_cast<std::uint32_t>(value) << shift;
  }
};

template <class T>
__device__ Four<T>& four(T* at) {
  return *reinterpret_cast<Four<T>*>(at);
}

template <class T>
__device__ const Four<T>& four(const T* at) {
  return *reinterpret_cast<const Four<T>*>(at);
}

template <class T>
__device__ bool wide(const T* at) {
  return reinterpret_cast<std::uintptr_t>(at) % sizeof(Four<T>) == 0;
}

__device__ float to_float(float x) { return x; }
__device__ float to_float(std::uint16_t x) { return bf16_to_float(x); }

// What this library can work on.
bool float32_moments(const MisaStep& step) {
  return step.format == MISA_STATE_FP32 && step.state[MISA_BFLOAT16].residual == nullptr;
}

// What `Place` can divide by, and PitchedRow holds.
bool lines_fit(const MisaStep& step) {
  return std::all_of(step.rows, step.rows + step.row_count, [](const MisaRow& row) {
    return row.width < 1 << 29 && row.pitch - row.width <= UINT32_MAX;
  });
}

__host__ __device__ bool controlled(const MisaStep& step) {
  return (step.flags & (MISA_CLIP | MISA_SKIP_NONFINITE)) != 0;
}

__device__ float unscale_of(const MisaStep& step) {
  return step.grad_scale == nullptr ? 1.0f : divide_nearest(1.0f, *step.grad_scale);
}

// The row of this block.
template <class Tables>
__device__ const auto& find_row(const Tables& tables) {
  int row = 0, end = tables.row_count;
  while (end - row > 1) {
    const int middle = (row + end) / 2;
    if (static_cast<int>(blockIdx.x) < tables.rows[middle].first_block) {
      end = middle;
    } else {
      row = middle;
    }
  }
  return tables.rows[row];
}

// The sum over all threads, for thread 0. Between two of these there must be a barrier.
__device__ double block_sum(double x) {
  __shared__ double sums[THREADS / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
  }
  return total;
}

// The same over an array; the order of addition depends on `count` alone.
__device__ double array_sum(const double* x, int count) {
  double sum = 0.0;
  // .cg: other blocks wrote these, and the L1 cache may hold what was there before.
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += THREADS) sum += __ldcg(x + i);
  return block_sum(sum);
}

template <int WEIGHT, bool MASTER>
struct Update {
  Scalars s;
  Noise noise;
  float unscale, coefficient;

  // Updates one element and returns its unclipped gradient.
  __device__ float operator()(float& theta, float g, float& m, float& v) const {
    g *= unscale;
    adamw(theta, g * coefficient, m, v, s.decay, s.step_size, s.beta1, s.beta2, s.one_minus_beta1,
          s.one_minus_beta2, s.denom_scale, s.eps);
    return g;
  }

  __device__ Stored<WEIGHT> round(float theta, int i) const {
    if constexpr (WEIGHT == MISA_FLOAT32) return theta;
    if constexpr (MASTER) return bf16_nearest(theta);
    return bf16_stochastic(theta, noise16(noise, static_cast<std::uint32_t>(i)));
  }
};

template <int WEIGHT, int GRAD, bool MASTER, bool PITCHED>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    update_kernel(const __grid_constant__ Tables<PITCHED> tables) {
  const MisaStep& step = tables.step;
  const float* const skip = controlled(step) ? step.control + 2 : step.found_inf;
  if (skip != nullptr && *skip != 0.0f) return;
  const auto& row = find_row(tables);
  const int number = static_cast<int>(blockIdx.x) - row.first_block;
  const int chunk = row.first_chunk + number;
  const std::int64_t begin = number * CHUNK;

  // By one thread: some GPUs have 1/64 of their speed in float64.
  __shared__ Update<WEIGHT, MASTER> shared;
  __shared__ Place<PITCHED> shared_place;
  __shared__ int age;
  if (threadIdx.x == 0) {
    if constexpr (PITCHED) shared_place.set(row, begin);
    age = step.age[chunk];
    shared.s = scalars(tables.hyper[row.group], age);
    shared.noise = noise_from(static_cast<std::uint64_t>(row.start + begin), row.key);
    shared.unscale = unscale_of(step);
    shared.coefficient = controlled(step) ? step.control[0] : 1.0f;
  }
  __syncthreads();
  const Update<WEIGHT, MASTER> update = shared;
  // State of age 0 is not read.
  const bool fresh = age == 0;

  const MisaState& state = step.state[WEIGHT];
  const Place<PITCHED> place = place_of(shared_place, begin);
  auto* const weight = static_cast<Stored<WEIGHT>*>(row.weight) + place.first;
  const auto* const grad = static_cast<const Stored<GRAD>*>(row.grad) + begin;
  float* const exp_avg = static_cast<float*>(state.exp_avg) + row.offset + begin;
  float* const exp_avg_sq = static_cast<float*>(state.exp_avg_sq) + row.offset + begin;
  float* const master = MASTER ? state.master + row.offset + begin : nullptr;
  const int n = static_cast<int>(row.numel - begin < CHUNK ? row.numel - begin : CHUNK);
  const bool all_wide =
      place.wide() && wide(weight) && wide(grad) && wide(exp_avg) && wide(exp_avg_sq) && wide(master);
  const int vectors_end = all_wide ? n / 4 * 4 : 0;

  float squares = 0.0f;
#pragma unroll 1
  for (int first = 4 * threadIdx.x; first < vectors_end; first += AHEAD * STRIDE) {
    Four<Stored<WEIGHT>> w[AHEAD] = {};
    Four<Stored<GRAD>> g[AHEAD] = {};
    Four<float> theta[AHEAD] = {}, m[AHEAD] = {}, v[AHEAD] = {};
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int i = first + j * STRIDE;
      if (i >= vectors_end) continue;
      g[j] = four(grad + i);
      if (!MASTER || fresh) w[j] = four(weight + place(i));
      if (fresh) {
        for (int k = 0; k < 4; ++k) theta[j].x[k] = w[j].get(k);
      } else {
        m[j] = four(exp_avg + i);
        v[j] = four(exp_avg_sq + i);
        if (MASTER) theta[j] = four(master + i);
      }
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int i = first + j * STRIDE;
      if (i >= vectors_end) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& t = theta[j].x[k];
        if (!MASTER) t = w[j].get(k);
        const float unclipped = update(t, g[j].get(k), m[j].x[k], v[j].x[k]);
        squares = fma_nearest(unclipped, unclipped, squares);
        w[j].set(k, update.round(t, i + k));
      }
      four(exp_avg + i) = m[j];
      four(exp_avg_sq + i) = v[j];
      if (MASTER) four(master + i) = theta[j];
      four(weight + place(i)) = w[j];
    }
  }
#pragma unroll 1
  for (int i = vectors_end + threadIdx.x; i < n; i += THREADS) {
    float m = fresh ? 0.0f : exp_avg[i], v = fresh ? 0.0f : exp_avg_sq[i];
    float theta = MASTER && !fresh ? master[i] : to_float(weight[place(i)]);
    const float unclipped = update(theta, to_float(grad[i]), m, v);
    squares = fma_nearest(unclipped, unclipped, squares);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (MASTER) master[i] = theta;
    weight[place(i)] = update.round(theta, i);
  }

  const double sq_norm = block_sum(squares);
  if (threadIdx.x == 0) {
    step.age[chunk] = age + 1;
    step.sq_sum[chunk] += controlled(step) ? step.partial[chunk] : sq_norm;
  }
}

// Sums the squares of a chunk; the last block of all launches goes on to sum those of all chunks.
template <int GRAD>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    norm_kernel(const __grid_constant__ Tables<false> tables) {
  const MisaStep& step = tables.step;
  const Row& row = find_row(tables);
  const int number = static_cast<int>(blockIdx.x) - row.first_block;
  const std::int64_t begin = number * CHUNK;
  const auto* const grad = static_cast<const Stored<GRAD>*>(row.grad) + begin;
  // A missing gradient is one without elements, whose block arrives too.
  const std::int64_t left = row.grad == nullptr ? 0 : row.numel - begin;
  const int n = static_cast<int>(left < CHUNK ? left : CHUNK);
  const int vectors_end = wide(grad) ? n / 4 * 4 : 0;
  const float unscale = unscale_of(step);

  float squares = 0.0f;
  const auto add = [&](float g) {
    g *= unscale;
    squares = fma_nearest(g, g, squares);
  };
#pragma unroll 8
  for (int i = 4 * threadIdx.x; i < vectors_end; i += STRIDE) {
    const Four<Stored<GRAD>> g = four(grad + i);
    for (int k = 0; k < 4; ++k) add(g.get(k));
  }
  for (int i = vectors_end + threadIdx.x; i < n; i += THREADS) add(to_float(grad[i]));

  const double sq_norm = block_sum(squares);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    step.partial[row.first_chunk + number] = sq_norm;
    // Release what was stored, acquire what the others stored.
    __threadfence();
    last = atomicAdd(step.arrived, 1) == step.chunk_count - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const double total = array_sum(step.partial, static_cast<int>(step.chunk_count));
  if (threadIdx.x == 0) {
    write_control(step.control, total, step);
    *step.arrived = 0;
  }
}

// Does for a chunk what its row's action says.
template <int WEIGHT, bool MASTER, bool PITCHED>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    close_kernel(const __grid_constant__ Tables<PITCHED> tables) {
  const MisaStep& step = tables.step;
  const auto& row = find_row(tables);
  const int number = static_cast<int>(blockIdx.x) - row.first_block;
  const int chunk = row.first_chunk + number;
  const std::int64_t begin = number * CHUNK;
  const bool measures = (tables.action & MISA_MEASURE) != 0, writes = (tables.action & MISA_WRITE_BACK) != 0;
  const bool flushes = (tables.action & MISA_FLUSH) != 0, adopts = (tables.action & MISA_ADOPT) != 0;

  // By one thread: some GPUs have 1/64 of their speed in float64.
  __shared__ Closing shared;
  __shared__ Place<PITCHED> shared_place;
  __shared__ bool written;
  if (threadIdx.x == 0) {
    if constexpr (PITCHED) shared_place.set(row, begin);
    const int age = step.age[chunk];
    written = age > 0;
    shared = closing(tables.hyper[row.group], age);
  }
  __syncthreads();
  const Closing s = shared;

  const MisaState& state = step.state[WEIGHT];
  const Place<PITCHED> place = place_of(shared_place, begin);
  auto* const weight = static_cast<Stored<WEIGHT>*>(row.weight) + place.first;
  const float* const exp_avg = static_cast<const float*>(state.exp_avg) + row.offset + begin;
  const float* const exp_avg_sq = static_cast<const float*>(state.exp_avg_sq) + row.offset + begin;
  float* const master = MASTER ? state.master + row.offset + begin : nullptr;
  const Noise noise = noise_from(static_cast<std::uint64_t>(row.start + begin), row.key);
  const int n = static_cast<int>(row.numel - begin < CHUNK ? row.numel - begin : CHUNK);
  float updates = 0.0f, weights = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += THREADS) {
    Stored<WEIGHT>& stored = weight[place(i)];
    float theta = to_float(stored);
    if (measures) weights = fma_nearest(theta, theta, weights);
    if (!written) continue;
    float ratio = 0.0f;
    if (measures || flushes) ratio = update_ratio(exp_avg[i], exp_avg_sq[i], s.denom_scale, s.eps);
    updates = fma_nearest(ratio, ratio, updates);
    if constexpr (MASTER) {
      const float held = master[i];
      if (to_float(bf16_nearest(held)) == theta) {
        theta = held;
      } else if (adopts) {
        master[i] = theta;
      }
    }
    if (!writes) continue;
    if (flushes) theta = momentum_flush(theta, ratio, s.flush_size);
    if constexpr (WEIGHT == MISA_FLOAT32) {
      stored = theta;
    } else {
      stored = bf16_stochastic(theta, noise16(noise, static_cast<std::uint32_t>(i)));
    }
  }
  if (!measures) return;
  const double sq_update = block_sum(updates);
  __syncthreads();
  const double sq_weight = block_sum(weights);
  if (threadIdx.x == 0) {
    tables.moved[chunk] = written ? s.step_size * s.step_size * sq_update : 0.0;
    tables.moved[step.chunk_count + chunk] = sq_weight;
  }
}

__global__ void __launch_bounds__(THREADS) collect_kernel(const __grid_constant__ Chunks chunks) {
  const int first = chunks.first_chunk[blockIdx.x], end = chunks.first_chunk[blockIdx.x + 1];
  const double sq_sum = array_sum(chunks.sq_sum + first, end - first);
  if (threadIdx.x == 0) {
    chunks.collected[2 * blockIdx.x] = chunks.age[first];
    chunks.collected[2 * blockIdx.x + 1] = sq_sum;
  }
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int blocks, Arguments& arguments, cudaStream_t stream) {
  void* pointers[] = {&arguments};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(THREADS), pointers, 0, stream);
}

template <bool PITCHED>
using Kernel = void (*)(Tables<PITCHED>);

const Kernel<false> NORM[MISA_DTYPES] = {norm_kernel<0>, norm_kernel<1>};
// By weight dtype, gradient dtype, and whether there is a master: a float32 weight is its own.
template <bool PITCHED>
const Kernel<PITCHED> UPDATE[MISA_DTYPES][MISA_DTYPES][2] = {
    {{update_kernel<0, 0, false, PITCHED>, nullptr}, {update_kernel<0, 1, false, PITCHED>, nullptr}},
    {{update_kernel<1, 0, false, PITCHED>, update_kernel<1, 0, true, PITCHED>},
     {update_kernel<1, 1, false, PITCHED>, update_kernel<1, 1, true, PITCHED>}},
};
template <bool PITCHED>
const Kernel<PITCHED> CLOSE[MISA_DTYPES][2] = {
    {close_kernel<0, false, PITCHED>, nullptr},
    {close_kernel<1, false, PITCHED>, close_kernel<1, true, PITCHED>}};

// Launches a kernel over the rows that it is for, as many at a time as its tables hold.
template <bool PITCHED, class Wanted>
cudaError_t launch_rows(Kernel<PITCHED> kernel, const MisaStep& step, cudaStream_t stream, Wanted wanted,
                        int action = 0, double* moved = nullptr) {
  Tables<PITCHED> tables;
  tables.step = step;
  tables.action = action;
  tables.moved = moved;
  std::int64_t groups[GROUPS];
  int rows = 0, group_count = 0, blocks = 0;
  for (std::int64_t i = 0; i < step.row_count; ++i) {
    const MisaRow& row = step.rows[i];
    if (!wanted(row)) continue;
    int group = static_cast<int>(std::find(groups, groups + group_count, row.group) - groups);
    if (rows == tables.ROWS || group == GROUPS) {
      tables.row_count = rows;
      const cudaError_t error = launch(kernel, blocks, tables, stream);
      if (error != cudaSuccess) return error;
      rows = group_count = blocks = group = 0;
    }
    if (group == group_count) {
      groups[group_count++] = row.group;
      tables.hyper[group] = step.hyper[row.group];
    }
    const int first_chunk = static_cast<int>(row.first_chunk);
    const std::uint32_t key = static_cast<std::uint32_t>(row.key);
    auto& own = tables.rows[rows++];
    static_cast<Row&>(own) = {row.weight, row.grad, row.numel,   row.offset, row.start,
                              key,        group,    first_chunk, blocks};
    if constexpr (PITCHED) {
      own.width = static_cast<std::uint32_t>(row.width);
      own.gap = static_cast<std::uint32_t>(row.pitch - row.width);
    }
    blocks += static_cast<int>(chunks_of(row, CHUNK));
  }
  tables.row_count = rows;
  return rows == 0 ? cudaSuccess : launch(kernel, blocks, tables, stream);
}

// Launches one of two kernels over the rows that they are for: that of lines where one of them is in lines.
template <class Wanted>
cudaError_t launch_either(Kernel<false> plain, Kernel<true> pitched, const MisaStep& step,
                          cudaStream_t stream, Wanted wanted, int action = 0, double* moved = nullptr) {
  const bool any = std::any_of(step.rows, step.rows + step.row_count,
                               [=](const MisaRow& row) { return row.width != 0 && wanted(row); });
  return any ? launch_rows<true>(pitched, step, stream, wanted, action, moved)
             : launch_rows<false>(plain, step, stream, wanted, action, moved);
}

cudaError_t run(const MisaStep& step, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const bool takes_norms = controlled(step) && (step.flags & MISA_UPDATE) == 0;
  const bool updates = (step.flags & MISA_NORMS) == 0;
  for (int grad = 0; grad < MISA_DTYPES && error == cudaSuccess && takes_norms; ++grad) {
    const auto is_one = [=](const MisaRow& row) { return row.grad_dtype == grad; };
    error = launch_rows<false>(NORM[grad], step, stream, is_one);
  }
  for (int variant = 0; variant < MISA_DTYPES * MISA_DTYPES && error == cudaSuccess && updates; ++variant) {
    const int weight = variant / MISA_DTYPES, grad = variant % MISA_DTYPES;
    const bool master = step.state[weight].master != nullptr;
    const auto is_one = [=](const MisaRow& row) {
      return row.weight_dtype == weight && row.grad_dtype == grad && row.grad != nullptr;
    };
    error = launch_either(UPDATE<false>[weight][grad][master], UPDATE<true>[weight][grad][master], step,
                          stream, is_one);
  }
  return error;
}

cudaError_t close(const MisaStep& step, double* moved, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  constexpr int ACTIONS = 2 * MISA_WRITE_BACK;
  bool wanted[MISA_DTYPES][ACTIONS] = {};
  for (std::int64_t i = 0; i < step.row_count; ++i) {
    if (step.rows[i].action != 0) wanted[step.rows[i].weight_dtype][step.rows[i].action] = true;
  }
  for (int weight = 0; weight < MISA_DTYPES; ++weight) {
    const bool master = step.state[weight].master != nullptr;
    for (int action = 1; action < ACTIONS && error == cudaSuccess; ++action) {
      if (!wanted[weight][action]) continue;
      const auto is_one = [=](const MisaRow& row) {
        return row.weight_dtype == weight && row.action == action;
      };
      error = launch_either(CLOSE<false>[weight][master], CLOSE<true>[weight][master], step, stream, is_one,
                            action, moved);
    }
  }
  return error;
}

cudaError_t collect(const MisaStep& step, double* collected, cudaStream_t stream) {
  Chunks chunks;
  chunks.age = step.age;
  chunks.sq_sum = step.sq_sum;
  cudaError_t error = cudaSuccess;
  for (std::int64_t begin = 0; begin < step.row_count && error == cudaSuccess; begin += COLLECTED) {
    const int rows = static_cast<int>(std::min<std::int64_t>(step.row_count - begin, COLLECTED));
    chunks.collected = collected + 2 * begin;
    for (int i = 0; i < rows; ++i) {
      const MisaRow& row = step.rows[begin + i];
      chunks.first_chunk[i] = static_cast<int>(row.first_chunk);
      chunks.first_chunk[i + 1] = static_cast<int>(row.first_chunk + chunks_of(row, CHUNK));
    }
    error = launch(collect_kernel, rows, chunks, stream);
  }
  return error;
}

// Calls `work` with a device current, and makes the one before current again.
template <class Work>
int on_device(int device, Work work) {
  int before = device;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = work();
    if (before != device) {
      const cudaError_t restored = cudaSetDevice(before);
      if (error == cudaSuccess) error = restored;
    }
  }
  return error == cudaSuccess ? MISA_OK : MISA_CUDA_ERROR + static_cast<int>(error);
}

}  // namespace
}  // namespace misa

extern "C" {

const char* misa_message(int status) {
  if (status < MISA_CUDA_ERROR) return misa::message(status);
  return cudaGetErrorString(static_cast<cudaError_t>(status - MISA_CUDA_ERROR));
}

int64_t misa_cuda_chunk(void) { return misa::CHUNK; }

int misa_cuda_step(const MisaStep* step, int device, void* stream) {
  const int status = misa::check_step(step, misa::CHUNK);
  if (status != MISA_OK || step->row_count == 0) return status;
  if (!misa::float32_moments(*step)) return MISA_BAD_DTYPE;
  if (!misa::lines_fit(*step)) return MISA_BAD_WIDTH;
  if (step->chunk_count > INT32_MAX) return MISA_BAD_SIZE;
  if (step->arrived == nullptr && misa::controlled(*step)) return MISA_BAD_POINTER;
  return misa::on_device(device, [=] { return misa::run(*step, static_cast<cudaStream_t>(stream)); });
}

int misa_cuda_collect(const MisaStep* step, double* collected, int device, void* stream) {
  const int status = misa::check_collect(step, collected, misa::CHUNK);
  if (status != MISA_OK || step->row_count == 0) return status;
  if (step->chunk_count > INT32_MAX) return MISA_BAD_SIZE;
  return misa::on_device(device,
                         [=] { return misa::collect(*step, collected, static_cast<cudaStream_t>(stream)); });
}

int misa_cuda_close(const MisaStep* step, double* moved, int device, void* stream) {
  const int status = misa::check_close(step, moved, misa::CHUNK);
  if (status != MISA_OK || step->row_count == 0) return status;
  if (!misa::float32_moments(*step)) return MISA_BAD_DTYPE;
  if (!misa::lines_fit(*step)) return MISA_BAD_WIDTH;
  if (step->chunk_count > INT32_MAX) return MISA_BAD_SIZE;
  return misa::on_device(device,
                         [=] { return misa::close(*step, moved, static_cast<cudaStream_t>(stream)); });
}

const char* misa_cuda_built(void) { return MISA_CUDA_ARCHITECTURES; }

int misa_cuda_runtime_version(void) { return CUDART_VERSION; }

int misa_cuda_driver_version(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // extern "C"
