// One chunk: a fixed number of elements of one row, what a thread of the CPU library works on at a time.
//
// chunk.cpp is compiled once per instruction set, each under a name of its own in `MISA_INSTRUCTIONS`.
// Nothing in it may have external linkage but its table of functions: the linker would take one set's code
// for all.
#pragma once

#include <cstdint>

#include "step.h"

namespace misa {

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
  Scalars scalars;
};

// Each returns the chunk's sum of squares; the lanes it is summed in are fixed, so that vectors of any width
// give the same bits.
struct ChunkFunctions {
  // By MisaFormat, kind of weight and gradient dtype.
  double (*update[MISA_FORMATS][4][2])(const Chunk&);
  // By gradient dtype.
  double (*sq_norm[2])(const Chunk&);
  // Does what `action` says, and puts the sums of MISA_MEASURE into `moved`. By MisaFormat and kind of
  // weight.
  void (*close[MISA_FORMATS][4])(const Chunk&, std::int64_t action, const Closing&, double moved[2]);
};

extern const ChunkFunctions chunk_baseline;
extern const ChunkFunctions chunk_avx2;
extern const ChunkFunctions chunk_avx512;

}  // namespace misa
