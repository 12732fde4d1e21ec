// One chunk: a fixed number of elements of one row, what a thread of the CPU library works on at a time.
//
// chunk.cpp is compiled once per instruction set, each under a name of its own in `MISA_INSTRUCTIONS`.
// Nothing in it may have external linkage but its table of functions: the linker would take one set's code
// for all.
#pragma once

#include <cstdint>

#include "step.h"

namespace misa {

// Logical lanes of a sum of squares: the widest vector of float32 there is.
constexpr int LANES = 16;
// Elements that a lane sums in float32 before it goes on in float64: 32, for 1e-6 of the sum at worst.
constexpr int BLOCK = 32 * LANES;

// float32, or bfloat16 and how it keeps what is below its resolution.
enum WeightKind { FLOAT32 = 0, STOCHASTIC = 1, MASTER = 2, SPLIT = 3 };

struct Chunk {
  void* weight;
  const void* grad;
  void* m;
  void* v;
  float* m_scale;
  float* v_scale;
  float* master;
  std::int16_t* residual;
  std::int64_t numel;
  std::uint64_t first;  // index of the first element within the whole parameter
  std::uint32_t key;    // of the rounding noise
  float unscale;        // what gradients are multiplied by before their norm is taken
  float coefficient;    // and after it
  bool fresh;           // the state was never written
  // Of a weight in lines: elements of a line, of the first one from here on, and from the end of one to the
  // next.
  std::int64_t width, left, gap;
  Scalars scalars;
};

// Each adds squares to `sums`, one a lane; the lanes are fixed, so that vectors of any width give the same
// bits, and so do several calls instead of one for whole blocks and the rest.
using UpdateFunction = void (*)(const Chunk&, double* sums);
struct ChunkFunctions {
  // By MisaFormat, kind of weight, gradient dtype, and whether the weight is in lines: of whole lanes then,
  // and not fresh.
  UpdateFunction update[MISA_FORMATS][4][2][2];
  // By gradient dtype.
  void (*sq_norm[2])(const Chunk&, double* sums);
  // Does what `action` says, of MISA_MEASURE with the squares of update ratios and of weights. By MisaFormat
  // and kind of weight.
  void (*close[MISA_FORMATS][4])(const Chunk&, std::int64_t action, const Closing&, double* updates,
                                 double* weights);
};

extern const ChunkFunctions chunk_baseline;
extern const ChunkFunctions chunk_avx2;
extern const ChunkFunctions chunk_avx512;

}  // namespace misa
