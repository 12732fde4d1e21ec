// One step of each kind on one thread, for `valgrind --tool=callgrind --collect-atstart=no`: what is dumped
// under a name is what `misa_cpu_step` ran, and nothing else.
#include <valgrind/callgrind.h>

#include "rows.h"

namespace {

// Two whole chunks, and tensors so small that only what surrounds the loop counts.
constexpr std::int64_t LARGE = 2 * 32768, SMALL = 16, ROWS = 300;

void count(const std::string& name, Table& table, std::int64_t flags) {
  table.step.flags = flags;
  // The first step reads no state and finds no page.
  EXPECT(misa_cpu_step(&table.step, 1) == MISA_OK);
  CALLGRIND_TOGGLE_COLLECT;
  const int status = misa_cpu_step(&table.step, 1);
  CALLGRIND_TOGGLE_COLLECT;
  EXPECT(status == MISA_OK);
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  EXPECT(argc == 2);
  const char* formats[] = {"", " bf16 states", " int8 states"};
  const char* precisions[] = {"stochastic", "master", "split"};
  EXPECT(misa_cpu_use_instructions(argv[1]) == MISA_OK);
  for (int format = 0; format < MISA_FORMATS; ++format) {
    Table floats({{LARGE, MISA_FLOAT32, MISA_FLOAT32}}, WITH_MASTER, format);
    count(std::string("fp32") + formats[format], floats, 0);
    for (int precision = 0; precision < PRECISIONS; ++precision) {
      Table halves({{LARGE, MISA_BFLOAT16, MISA_BFLOAT16}}, static_cast<Precision>(precision), format);
      count(std::string("bf16 ") + precisions[precision] + formats[format], halves, 0);
    }
  }
  // As wide as many a slice of a down projection; and as narrow as they should not be.
  for (std::int64_t width : {256, 16}) {
    const std::string lines = " in lines of " + std::to_string(width);
    Table floats({{LARGE, MISA_FLOAT32, MISA_FLOAT32, width, 4 * width}}, WITH_MASTER);
    count("fp32" + lines, floats, 0);
    Table halves({{LARGE, MISA_BFLOAT16, MISA_BFLOAT16, width, 4 * width}}, STOCHASTIC_ROUNDING,
                 MISA_STATE_INT8);
    count("bf16 stochastic int8 states" + lines, halves, 0);
  }
  Table clipped({{LARGE, MISA_FLOAT32, MISA_FLOAT32}}, WITH_MASTER);
  count("fp32 clipped", clipped, MISA_CLIP);
  Table rows(std::vector<RowSpec>(ROWS, {SMALL, MISA_FLOAT32, MISA_FLOAT32}), WITH_MASTER);
  count("tensor of 16", rows, 0);
  return 0;
}
