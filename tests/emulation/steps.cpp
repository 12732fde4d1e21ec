// Steps with and without clipping for ThreadSanitizer, which looks at threads that Python did not start.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "misa.h"

int main() {
  const std::int64_t chunk = misa_cuda_chunk(), numel[] = {2 * chunk + 5, chunk, 100};
  std::vector<float> weight(4 * chunk, 1.0f), grad(4 * chunk, 0.5f), m(4 * chunk), v(4 * chunk);
  MisaRow rows[3] = {};
  std::int64_t chunks = 0, offset = 0;
  for (int i = 0; i < 3; ++i) {
    // The second row is unaligned.
    rows[i].weight = weight.data() + offset + (i == 1);
    rows[i].grad = grad.data() + offset;
    rows[i].numel = numel[i];
    rows[i].offset = offset;
    rows[i].first_chunk = chunks;
    offset += (numel[i] / 64 + 1) * 64;
    chunks += (numel[i] + chunk - 1) / chunk;
  }
  const MisaHyper hyper = {1e-3, 0.9, 0.999, 1e-8, 0.1};
  std::vector<std::int32_t> age(chunks);
  std::vector<double> sq_sum(chunks), partial(chunks), collected(6);
  std::int32_t arrived = 0;
  float control[3];
  MisaStep step = {};
  step.bytes = sizeof step;
  step.row_bytes = sizeof rows[0];
  step.rows = rows;
  step.row_count = 3;
  step.hyper = &hyper;
  step.group_count = 1;
  step.chunk_count = chunks;
  MisaState& state = step.state[MISA_FLOAT32];
  state.exp_avg = m.data();
  state.exp_avg_sq = v.data();
  state.elements = 4 * chunk;
  step.age = age.data();
  step.sq_sum = sq_sum.data();
  step.partial = partial.data();
  step.arrived = &arrived;
  step.control = control;
  step.max_grad_norm = 1.0;
  int status = 0;
  for (int t = 0; t < 3; ++t) {
    step.flags = t % 2 == 0 ? 0 : MISA_CLIP;
    status += misa_cuda_step(&step, 0, nullptr);
  }
  status += misa_cuda_collect(&step, collected.data(), 0, nullptr);
  std::vector<double> moved(2 * chunks);
  for (MisaRow& row : rows) row.action = MISA_MEASURE | MISA_FLUSH | MISA_WRITE_BACK;
  status += misa_cuda_close(&step, moved.data(), 0, nullptr);
  std::printf("%d %g %g\n", status, collected[0], collected[1]);
}
