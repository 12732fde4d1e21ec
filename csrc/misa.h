// The C interface of the native libraries: one step over the rows of a table, on the CPU or on a GPU.
//
// No torch, no C++ and no Python: misa_kernels/kernels/native.py calls it through ctypes. Every function
// returns a status, 0 for success, and leaves everything as it was for any other below MISA_CUDA_ERROR, after
// which some launches of a step may have run; `misa_message` says what it means. Rows, hyperparameters and
// MisaStep are always in the memory of the host. What they point to is on the host for the CPU library and on
// the GPU for the CUDA library.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define MISA_API __declspec(dllexport)
#else
#define MISA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum MisaDtype { MISA_FLOAT32 = 0, MISA_BFLOAT16 = 1, MISA_DTYPES = 2 };

// How moments are stored, see misa_kernels/memory/codec.py. The CUDA library knows float32 alone.
enum MisaFormat { MISA_STATE_FP32 = 0, MISA_STATE_BF16 = 1, MISA_STATE_INT8 = 2, MISA_FORMATS = 3 };

// A step with one of the first two reads gradients twice: for `partial` and `control`, and for the update.
// Where norms are summed over several processes, two calls take these halves, MISA_NORMS and MISA_UPDATE, and
// the caller corrects `control` in between.
enum MisaFlag { MISA_CLIP = 1, MISA_SKIP_NONFINITE = 2, MISA_NORMS = 4, MISA_UPDATE = 8 };

// What `misa_*_close` does with a row; several together, and nothing that needs a state of age 0.
enum MisaAction {
  MISA_MEASURE = 1,     // sum up the squares of the last update, weight decay apart, and of the weight
  MISA_ADOPT = 2,       // where a weight is not its master rounded, somebody set it: into the master with it
  MISA_FLUSH = 4,       // before it is written back, apply what is left in the momentum
  MISA_WRITE_BACK = 8,  // leave in the weight what master or residual hold of it, rounded stochastically
};

enum MisaStatus {
  MISA_OK = 0,
  MISA_BAD_VERSION = 1,
  MISA_BAD_POINTER = 2,
  MISA_BAD_SIZE = 3,
  MISA_BAD_DTYPE = 4,
  MISA_BAD_GROUP = 5,
  MISA_BAD_FLAG = 6,
  MISA_BAD_ALIGNMENT = 7,
  MISA_BAD_INSTRUCTIONS = 8,
  MISA_BAD_NORM = 9,
  MISA_BAD_WIDTH = 10,
  // Plus the number that the CUDA runtime gave.
  MISA_CUDA_ERROR = 1000,
};

// One tensor, row block or slice of a matrix, a line of int64 in the caller's table.
//
// With a width, element k of the weight is `weight[k / width * pitch + k % width]`: a slice of the columns of
// a matrix. Gradient and state of a row lie without gaps. To the CUDA library a width is less than 2^29, and
// what is between lines at most 2^32 - 1.
typedef struct MisaRow {
  void* weight;          // its first element; NULL only with numel 0
  const void* grad;      // NULL: no gradient in this step; weight, state, age and sum stay
  int64_t numel;         // elements
  int64_t offset;        // of its state in the buffers of its weight dtype, in elements
  int64_t group;         // its line of `hyper`
  int64_t start;         // what its first element counts as in the rounding noise, its next as one more
  int64_t key;           // 32-bit key of that noise in this step
  int64_t first_chunk;   // chunks of all rows before it; a row has ceil(numel / misa_*_chunk()), at least one
  int64_t weight_dtype;  // a MisaDtype
  int64_t grad_dtype;    // a MisaDtype; need not be that of the weight
  int64_t action;        // of MisaAction; a step does not look at it
  int64_t width;         // 0, or elements of a line of the weight, of which `numel` is a multiple
  int64_t pitch;         // 0 without a width, or elements from one line to the next, at least `width`
} MisaRow;

typedef struct MisaHyper {
  double lr, beta1, beta2, eps, weight_decay;
} MisaHyper;

// The state of all rows of one weight dtype. Beyond a master or residual, which float32 weights do not have,
// bfloat16 weights are rounded stochastically. The CUDA library knows no residual.
typedef struct MisaState {
  void* exp_avg;
  float* exp_avg_scale;  // MISA_STATE_INT8: one a group of 128 elements; offsets are multiples of 128
  void* exp_avg_sq;
  float* exp_avg_sq_scale;  // as that of exp_avg
  float* master;            // the weights in float32, or NULL
  int16_t* residual;        // what the weights lack of float32, or NULL
  int64_t elements;         // of each buffer
} MisaState;

typedef struct MisaStep {
  int64_t bytes;      // sizeof(MisaStep), by which library and caller know each other
  int64_t row_bytes;  // sizeof(MisaRow), likewise
  const MisaRow* rows;
  int64_t row_count;
  const MisaHyper* hyper;
  int64_t group_count;
  MisaState state[MISA_DTYPES];  // by weight dtype
  int64_t format;                // a MisaFormat
  int64_t chunk_count;           // of all rows of the table, of which `rows` may be a stretch
  int32_t* age;                  // [chunk_count], updates so far; at 0, moments and master are not read
  double* sq_sum;                // [chunk_count], the sum of squares of each chunk's gradient is added to it
  double* partial;               // [chunk_count], workspace
  int32_t* arrived;              // CUDA: 1, workspace; 0 before the first step
  float* control;                // [3], with a flag: clip coefficient, norm, 1 if the step was skipped
  const float* grad_scale;       // 1, what gradients were multiplied by, or NULL
  const float* found_inf;        // 1, nonzero to skip the step, or NULL
  double max_grad_norm;          // above 0, with MISA_CLIP: scale gradients by min(1, it / (norm + 1e-6))
  int64_t flags;  // of MisaFlag; MISA_SKIP_NONFINITE: change nothing when the norm is not finite
} MisaStep;

MISA_API const char* misa_message(int status);

// Elements of a chunk.
MISA_API int64_t misa_cpu_chunk(void);
// Take a step with at most `threads` threads; their number changes no bit of the result.
MISA_API int misa_cpu_step(const MisaStep* step, int threads);
// Write age and sum of squares of each row to double[row_count][2].
MISA_API int misa_cpu_collect(const MisaStep* step, double* collected);
// Do what each row's action says. `moved` is double[2][chunk_count], where MISA_MEASURE puts the sums of a
// chunk: of the squares of the update and of the weight. NULL where no row is measured.
MISA_API int misa_cpu_close(const MisaStep* step, double* moved, int threads);
// The instruction sets this library was built for, best first, separated by spaces, and the one in use, which
// is the best that the processor has until `misa_cpu_use_instructions` names another. All give the same bits.
MISA_API const char* misa_cpu_built(void);
MISA_API const char* misa_cpu_instructions(void);
MISA_API int misa_cpu_use_instructions(const char* name);
// Whether steps use several threads.
MISA_API int misa_cpu_openmp(void);

MISA_API int64_t misa_cuda_chunk(void);
// Launch a step on a stream (a cudaStream_t) of a device; nothing waits for it.
MISA_API int misa_cuda_step(const MisaStep* step, int device, void* stream);
MISA_API int misa_cuda_collect(const MisaStep* step, double* collected, int device, void* stream);
MISA_API int misa_cuda_close(const MisaStep* step, double* moved, int device, void* stream);
// The architectures this library holds machine code for, such as "80 90 100", the version of the CUDA runtime
// in it and of what the driver supports, such as 13000; 0 for no driver.
MISA_API const char* misa_cuda_built(void);
MISA_API int misa_cuda_runtime_version(void);
MISA_API int misa_cuda_driver_version(void);

#ifdef __cplusplus
}
#endif
