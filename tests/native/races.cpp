// The chunks of a step handed out to std::threads as adamw_cpu.cpp hands them to OpenMP's: for
// ThreadSanitizer.
//
// OpenMP's runtime synchronises in ways that the sanitizer does not see, so this is built without it. With
// the argument "race" every thread takes all chunks, to show that the sanitizer sees it.
#include <algorithm>
#include <functional>
#include <thread>

#include "adamw_cpu.cpp"
#include "rows.h"

namespace {

// Calls `work` for each chunk, its row found by a cursor of its thread's own; returns when all are done.
void hand_out(const MisaStep& step, int threads, bool race,
              const std::function<void(const MisaRow&, std::int64_t)>& work) {
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&step, &work, threads, race, thread] {
      const std::int64_t share = race ? step.chunk_count : (step.chunk_count - 1) / threads + 1;
      const std::int64_t begin = race ? 0 : thread * share;
      misa::Cursor cursor{step, 0};
      for (std::int64_t i = begin; i < std::min(begin + share, step.chunk_count); ++i) work(cursor.to(i), i);
    });
  }
  for (std::thread& thread : running) thread.join();
}

void run(MisaStep& step, int threads, bool race) {
  const misa::ChunkFunctions& functions = *misa::in_use.load()->functions;
  const bool controlled = step.flags != 0;
  if (controlled) {
    hand_out(step, threads, race, [&](const MisaRow& row, std::int64_t i) {
      step.partial[i] = misa::norm_chunk(functions, row, i, 1.0f);
    });
    double sq_norm = 0.0;
    for (std::int64_t i = 0; i < step.chunk_count; ++i) sq_norm += step.partial[i];
    misa::write_control(step.control, sq_norm, step);
  }
  hand_out(step, threads, race, [&](const MisaRow& row, std::int64_t i) {
    thread_local misa::LastScalars last;
    misa::update_chunk(functions, step, row, i, 1.0f, controlled, last);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const bool race = argc > 1 && std::string(argv[1]) == "race";
  const std::vector<RowSpec> specs = {{70000, MISA_BFLOAT16, MISA_BFLOAT16},
                                      {0, MISA_FLOAT32, MISA_FLOAT32},
                                      {100003, MISA_FLOAT32, MISA_FLOAT32},
                                      {1, MISA_BFLOAT16, MISA_FLOAT32},
                                      {32769, MISA_BFLOAT16, MISA_FLOAT32},
                                      {40000, MISA_FLOAT32, MISA_BFLOAT16},
                                      // Lines of which two threads have a part each.
                                      {70000, MISA_BFLOAT16, MISA_FLOAT32, 20000 / 8, 3000},
                                      {3 * 30000, MISA_FLOAT32, MISA_FLOAT32, 30000, 30001}};
  int steps = 0;
  for (const std::string& name : available_instructions()) {
    EXPECT(misa_cpu_use_instructions(name.c_str()) == MISA_OK);
    for (int variant = 0; variant < 2 * MISA_FORMATS; ++variant) {
      const int format = variant % MISA_FORMATS, clipped = variant / MISA_FORMATS;
      const auto precision = static_cast<Precision>((format + clipped) % PRECISIONS);
      Table ours(specs, precision, format), expected(specs, precision, format);
      ours.step.flags = expected.step.flags = clipped * MISA_CLIP;
      for (int threads : {2, 3}) {
        run(ours.step, threads, race);
        EXPECT(misa_cpu_step(&expected.step, 1) == MISA_OK);
        EXPECT(race || ours.bytes() == expected.bytes());
        ++steps;
      }
    }
  }
  std::printf("%d steps\n", steps);
  return 0;
}
