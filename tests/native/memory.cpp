// Steps of the CPU library on exactly sized buffers, and every wrong argument: for AddressSanitizer and
// UBSan.
//
// With the argument "overrun" or "overflow" the library is told what it cannot know to be wrong, to show that
// the sanitizers see it.
#include <cmath>
#include <functional>

#include "rows.h"

namespace {

constexpr int THREADS = 3;
constexpr std::int64_t LEAST = INT64_MIN, LARGEST = INT64_MAX;

// Steps of all kinds; returns all bytes written.
std::vector<char> walk(Table& table, std::int64_t flags, bool scaled) {
  MisaStep& step = table.step;
  step.flags = flags;
  if (scaled) {
    step.grad_scale = table.grad_scale.data();
    step.found_inf = table.found_inf.data();
  }
  for (int age = 0; age < 2; ++age) EXPECT(misa_cpu_step(&step, THREADS) == MISA_OK);
  table.rows[0].grad = nullptr;
  EXPECT(misa_cpu_step(&step, THREADS) == MISA_OK);
  EXPECT(misa_cpu_collect(&step, table.collected.data()) == MISA_OK);
  const bool empty = table.rows[1].numel == 0;
  EXPECT(table.collected[0] == (empty ? 0.0 : 2.0) && table.collected[2] == (empty ? 0.0 : 3.0));
  table.rows[0].action = MISA_MEASURE | MISA_ADOPT;
  table.rows[1].action = MISA_MEASURE | MISA_FLUSH | MISA_WRITE_BACK;
  EXPECT(misa_cpu_close(&step, table.moved.data(), THREADS) == MISA_OK);
  EXPECT(empty || table.moved[0] > 0.0);
  const std::vector<char> result = table.bytes();
  // NaN, of which no code may be made by a cast.
  if (flags == 0 && !scaled) {
    for (auto& grad : table.grads) std::fill(grad.begin(), grad.end(), '\xFF');
    EXPECT(misa_cpu_step(&step, THREADS) == MISA_OK);
  }

  // A step that is skipped leaves weights, state, ages and sums alone.
  if (scaled) table.found_inf[0] = 1.0f;
  if ((flags & MISA_SKIP_NONFINITE) && !empty) {
    // A NaN in both dtypes.
    std::memset(table.grads[1].data(), 0xFF, 4 / (1 + table.rows[1].grad_dtype));
  } else if (!scaled) {
    return result;
  }
  const auto weights = table.weights;
  const auto age = table.age;
  const auto sq_sum = table.sq_sum;
  const auto before = table.state_bytes();
  EXPECT(misa_cpu_step(&step, THREADS) == MISA_OK);
  EXPECT(weights == table.weights && age == table.age && sq_sum == table.sq_sum);
  EXPECT(before == table.state_bytes());
  return result;
}

int all_variants() {
  const std::vector<std::string> sets = available_instructions();
  int walks = 0;
  for (std::int64_t numel : {0, 1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 32767, 32768, 32769, 70003}) {
    for (int variant = 0; variant < 2 * (1 + PRECISIONS) * MISA_FORMATS; ++variant) {
      const int kind = variant / 2 % (1 + PRECISIONS), format = variant / 2 / (1 + PRECISIONS);
      const RowSpec spec{numel, kind > 0, variant % 2};
      const auto precision = static_cast<Precision>(kind > 0 ? kind - 1 : 0);
      // What flags and scaling do depends neither on the format nor on further chunks: none of them, and all.
      for (int option = 0; option < 8; option += format == MISA_STATE_FP32 && numel < 1000 ? 1 : 7) {
        std::vector<char> expected;
        for (const std::string& name : sets) {
          EXPECT(misa_cpu_use_instructions(name.c_str()) == MISA_OK);
          Table table({spec, spec}, precision, format);
          const std::vector<char> result = walk(table, option % 4, option / 4);
          if (expected.empty()) expected = result;
          EXPECT(result == expected);
          ++walks;
        }
      }
    }
  }
  return walks;
}

// The weight of a pitched row without its gaps, or with `gaps` what is in them.
std::vector<char> lines_of(const Table& table, std::size_t i, bool gaps) {
  const MisaRow& row = table.rows[i];
  const std::int64_t size = row.weight_dtype == MISA_FLOAT32 ? 4 : 2;
  std::vector<char> found;
  const char* line = table.weights[i].data();
  for (std::int64_t left = row.numel / row.width; left > 0; --left, line += row.pitch * size) {
    // There is no gap after the last one.
    const std::int64_t end = left > 1 ? row.pitch : row.width;
    found.insert(found.end(), line + (gaps ? row.width : 0) * size, line + (gaps ? end : row.width) * size);
    if (left == 1) break;
  }
  return found;
}

// Rows of lines in weights that end with their last element, beside copies without gaps: the same bits.
int all_pitched() {
  struct Lines {
    std::int64_t width, pitch, count;
  };
  int walks = 0;
  for (const Lines& lines : std::vector<Lines>{{1, 2, 1},
                                               {1, 7, 500},
                                               {3, 4, 1365},
                                               {16, 32, 2049},
                                               {48, 49, 90},
                                               {100, 100, 41},
                                               {4095, 5000, 2},
                                               {20001, 20003, 2}}) {
    for (int variant = 0; variant < 2 * (1 + PRECISIONS) * MISA_FORMATS; ++variant) {
      const int kind = variant / 2 % (1 + PRECISIONS), format = variant / 2 / (1 + PRECISIONS);
      const auto precision = static_cast<Precision>(kind > 0 ? kind - 1 : 0);
      const std::int64_t numel = lines.width * lines.count;
      const RowSpec packed{numel, kind > 0, variant % 2};
      RowSpec spec = packed;
      spec.width = lines.width, spec.pitch = lines.pitch;
      for (int option : {0, 7}) {
        Table table({spec, spec}, precision, format), copy({packed, packed}, precision, format);
        std::vector<std::vector<char>> gaps;
        for (std::size_t i = 0; i < 2; ++i) {
          std::copy_n(lines_of(table, i, false).begin(), copy.weights[i].size(), copy.weights[i].begin());
          copy.grads[i] = table.grads[i];
          copy.rows[i].grad = copy.grads[i].data();
          gaps.push_back(lines_of(table, i, true));
        }
        walk(table, option % 4, option / 4);
        walk(copy, option % 4, option / 4);
        for (std::size_t i = 0; i < 2; ++i) {
          EXPECT(lines_of(table, i, false) == copy.weights[i]);
          EXPECT(lines_of(table, i, true) == gaps[i]);
        }
        EXPECT(table.state_bytes() == copy.state_bytes());
        EXPECT(table.age == copy.age && table.moved == copy.moved);
        // NaN by then, in some.
        const std::size_t bytes = table.sq_sum.size() * sizeof(double);
        EXPECT(std::memcmp(table.sq_sum.data(), copy.sq_sum.data(), bytes) == 0);
        ++walks;
      }
    }
  }
  return walks;
}

// Plants something in a sound step, and expects to be refused with nothing changed.
int refusals = 0;
void refuse(int status, const std::function<void(Table&)>& plant, bool by_collect = false,
            Precision precision = WITH_MASTER, int format = MISA_STATE_FP32) {
  Table table({{100, MISA_FLOAT32, MISA_BFLOAT16}, {40000, MISA_BFLOAT16, MISA_FLOAT32}}, precision, format);
  table.step.flags = MISA_CLIP | MISA_SKIP_NONFINITE;
  EXPECT(misa_cpu_step(&table.step, 1) == MISA_OK);
  plant(table);
  const std::vector<char> before = table.bytes();
  EXPECT(misa_cpu_step(&table.step, THREADS) == status);
  if (by_collect) {
    EXPECT(misa_cpu_collect(&table.step, table.collected.data()) == status);
    EXPECT(misa_cpu_close(&table.step, table.moved.data(), THREADS) == status);
  }
  EXPECT(table.bytes() == before);
  ++refusals;
}

template <class T>
void move(T*& pointer, int bytes) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) + bytes);
}

void wrong_sizes() {
  for (std::int64_t n :
       {LEAST, std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}, std::int64_t{3}, LARGEST}) {
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.step.row_count = n; }, true);
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.step.chunk_count = n == 3 ? 4 : n; }, true);
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.rows[1].first_chunk = n == 1 ? 2 : n; }, true);
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.step.state[1].elements = n == LARGEST ? 39999 : n; });
  }
  for (std::int64_t n : {LEAST, std::int64_t{-1}, LARGEST}) {
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.rows[0].numel = n; }, true);
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.rows[1].numel = n; }, true);
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.rows[1].offset = n; });
    refuse(MISA_BAD_SIZE, [n](Table& t) { t.rows[1].start = n; });
    refuse(MISA_BAD_VERSION, [n](Table& t) { t.step.bytes = n; }, true);
    refuse(MISA_BAD_VERSION, [n](Table& t) { t.step.row_bytes = n; }, true);
  }
  refuse(MISA_BAD_SIZE, [](Table& t) { t.rows[1].numel = 40001; });
  refuse(MISA_BAD_SIZE, [](Table& t) { t.rows[1].offset = 1; });
  refuse(MISA_BAD_SIZE, [](Table& t) { t.step.group_count = LEAST; }, true);
  refuse(MISA_BAD_SIZE, [](Table& t) {
    t.rows[1].offset = LARGEST;
    t.step.state[1].elements = LEAST;
  });
  // So many chunks that their sum would overflow.
  refuse(
      MISA_BAD_SIZE,
      [](Table& t) {
        const std::int64_t chunks = LARGEST / misa_cpu_chunk() + 1;
        MisaRow row = t.rows[0];
        row.numel = LARGEST;
        t.rows.clear();
        for (std::int64_t i = 0; i <= LARGEST / chunks; ++i) {
          row.first_chunk = i * chunks;
          t.rows.push_back(row);
        }
        t.step.rows = t.rows.data();
        t.step.row_count = static_cast<std::int64_t>(t.rows.size());
        t.step.chunk_count = LARGEST;
      },
      true);
}

void wrong_lines() {
  const auto lines = [](std::int64_t width, std::int64_t pitch) {
    return [=](Table& t) {
      t.rows[1].width = width;
      t.rows[1].pitch = pitch;
    };
  };
  for (std::int64_t n : {LEAST, std::int64_t{-1}, std::int64_t{1}, LARGEST}) {
    // A pitch alone.
    refuse(MISA_BAD_WIDTH, lines(0, n));
    // Whatever the pitch, no width at all.
    refuse(MISA_BAD_WIDTH, lines(LEAST, n));
    refuse(MISA_BAD_WIDTH, lines(-40000, n));
    // No whole number of lines.
    refuse(MISA_BAD_WIDTH, lines(LARGEST, n));
    refuse(MISA_BAD_WIDTH, lines(7, n));
    refuse(MISA_BAD_WIDTH, lines(40001, n));
  }
  // Lines that overlap, and those that end beyond all memory.
  for (std::int64_t pitch : {LEAST, std::int64_t{-100}, std::int64_t{0}, std::int64_t{99}}) {
    refuse(MISA_BAD_WIDTH, lines(100, pitch));
  }
  refuse(MISA_BAD_WIDTH, lines(100, LARGEST));
  refuse(MISA_BAD_WIDTH, lines(100, LARGEST / 4 / 398));
  refuse(MISA_BAD_WIDTH, lines(20000, LARGEST / 4));
}

void wrong_numbers() {
  for (std::int64_t n : {LEAST, std::int64_t{-1}, std::int64_t{2}, LARGEST}) {
    refuse(MISA_BAD_GROUP, [n](Table& t) { t.rows[1].group = n; });
    refuse(MISA_BAD_DTYPE, [n](Table& t) { t.rows[1].weight_dtype = n; });
    refuse(MISA_BAD_DTYPE, [n](Table& t) { t.rows[1].grad_dtype = n; });
    refuse(MISA_BAD_FLAG, [n](Table& t) { t.step.flags = n == 2 ? 16 : n - (n == LARGEST ? 3 : 0); });
  }
  refuse(MISA_BAD_GROUP, [](Table& t) { t.step.group_count = 1; });
  for (double norm : {0.0, -1.0, HUGE_VAL, -HUGE_VAL, std::nan("")}) {
    refuse(MISA_BAD_NORM, [norm](Table& t) { t.step.max_grad_norm = norm; });
  }
}

void wrong_pointers() {
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.rows = nullptr; }, true);
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.age = nullptr; }, true);
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.sq_sum = nullptr; }, true);
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.hyper = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.partial = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.control = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.rows[1].weight = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.state[0].exp_avg = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.state[1].exp_avg_sq = nullptr; });
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.state[0].master = t.control.data(); });

  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.rows, 4); }, true);
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.age, 2); }, true);
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.sq_sum, 4); }, true);
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.hyper, 4); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.partial, 4); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.control, 2); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.rows[0].weight, 2); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.rows[0].grad, 1); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.rows[1].weight, 1); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.rows[1].grad, 2); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.state[0].exp_avg, 1); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.state[1].exp_avg_sq, 2); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.state[1].master, 3); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.grad_scale = t.grad_scale.data(), 2); });
  refuse(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.found_inf = t.found_inf.data(), 2); });
}

void wrong_storage() {
  for (std::int64_t n : {LEAST, std::int64_t{-1}, std::int64_t{3}, LARGEST}) {
    refuse(MISA_BAD_DTYPE, [n](Table& t) { t.step.format = n; });
  }
  refuse(MISA_BAD_POINTER, [](Table& t) { t.step.format = MISA_STATE_INT8; });
  const auto residual = [](Table& t) { return reinterpret_cast<std::int16_t*>(t.control.data()); };
  refuse(MISA_BAD_POINTER, [&](Table& t) { t.step.state[0].residual = residual(t); });
  refuse(MISA_BAD_POINTER, [&](Table& t) { t.step.state[1].residual = residual(t); });

  const auto refuse_int8 = [](int status, const std::function<void(Table&)>& plant) {
    refuse(status, plant, false, WITH_RESIDUAL, MISA_STATE_INT8);
  };
  refuse_int8(MISA_BAD_POINTER, [](Table& t) { t.step.state[1].master = t.control.data(); });
  refuse_int8(MISA_BAD_ALIGNMENT, [](Table& t) { move(t.step.state[1].residual, 1); });
  for (int dtype = 0; dtype < MISA_DTYPES; ++dtype) {
    refuse_int8(MISA_BAD_POINTER, [dtype](Table& t) { t.step.state[dtype].exp_avg_scale = nullptr; });
    refuse_int8(MISA_BAD_POINTER, [dtype](Table& t) { t.step.state[dtype].exp_avg_sq_scale = nullptr; });
    refuse_int8(MISA_BAD_ALIGNMENT, [dtype](Table& t) { move(t.step.state[dtype].exp_avg_scale, 2); });
    refuse_int8(MISA_BAD_ALIGNMENT, [dtype](Table& t) { move(t.step.state[dtype].exp_avg_sq_scale, 1); });
    for (int shift : {1, 64, 127}) {
      refuse_int8(MISA_BAD_ALIGNMENT, [dtype, shift](Table& t) {
        t.rows[dtype].offset = shift;
        t.step.state[dtype].elements += shift;
      });
    }
  }
}

void wrong_arguments() {
  Table table({{100, MISA_FLOAT32, MISA_FLOAT32}}, WITH_MASTER);
  const std::vector<char> before = table.bytes();
  const MisaStep* odd = &table.step;
  move(odd, 4);
  for (int threads : {0, -1, INT32_MIN}) EXPECT(misa_cpu_step(&table.step, threads) == MISA_BAD_SIZE);
  EXPECT(misa_cpu_step(nullptr, 1) == MISA_BAD_POINTER);
  EXPECT(misa_cpu_step(odd, 1) == MISA_BAD_ALIGNMENT);
  double* collected = table.collected.data();
  EXPECT(misa_cpu_collect(nullptr, collected) == MISA_BAD_POINTER);
  EXPECT(misa_cpu_collect(odd, collected) == MISA_BAD_ALIGNMENT);
  EXPECT(misa_cpu_collect(&table.step, nullptr) == MISA_BAD_POINTER);
  move(collected, 4);
  EXPECT(misa_cpu_collect(&table.step, collected) == MISA_BAD_ALIGNMENT);
  double* moved = table.moved.data();
  EXPECT(misa_cpu_close(&table.step, moved, 0) == MISA_BAD_SIZE);
  EXPECT(misa_cpu_close(nullptr, moved, 1) == MISA_BAD_POINTER);
  for (std::int64_t action : {LEAST, std::int64_t{-1}, std::int64_t{16}, LARGEST}) {
    table.rows[0].action = action;
    EXPECT(misa_cpu_close(&table.step, moved, 1) == MISA_BAD_FLAG);
  }
  table.rows[0].action = MISA_MEASURE;
  EXPECT(misa_cpu_close(&table.step, nullptr, 1) == MISA_BAD_POINTER);
  table.rows[0].weight_dtype = 7;
  EXPECT(misa_cpu_close(&table.step, moved, 1) == MISA_BAD_DTYPE);
  // A row without an action is not looked at.
  table.rows[0].action = 0;
  EXPECT(misa_cpu_close(&table.step, nullptr, 1) == MISA_OK);
  table.rows[0].weight_dtype = MISA_FLOAT32;
  move(moved, 4);
  EXPECT(misa_cpu_close(&table.step, moved, 1) == MISA_BAD_ALIGNMENT);
  EXPECT(misa_cpu_use_instructions(nullptr) == MISA_BAD_POINTER);
  EXPECT(misa_cpu_use_instructions("avx51") == MISA_BAD_INSTRUCTIONS);
  EXPECT(table.bytes() == before);

  MisaStep nothing{};
  nothing.bytes = sizeof(MisaStep);
  nothing.row_bytes = sizeof(MisaRow);
  EXPECT(misa_cpu_step(&nothing, 1) == MISA_OK && misa_cpu_collect(&nothing, nullptr) == MISA_OK);
  nothing.flags = 16;
  EXPECT(misa_cpu_step(&nothing, 1) == MISA_BAD_FLAG);
  nothing.row_count = -1;
  EXPECT(misa_cpu_step(&nothing, 1) == MISA_BAD_SIZE && misa_cpu_collect(&nothing, nullptr) == MISA_BAD_SIZE);

  for (int status : {-1, 0, static_cast<int>(MISA_BAD_WIDTH), 12345, INT32_MAX, INT32_MIN}) {
    EXPECT(std::strlen(misa_message(status)) > 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string planted = argc > 1 ? argv[1] : "";
  if (!planted.empty()) {
    Table table({{100, MISA_FLOAT32, MISA_FLOAT32}}, WITH_MASTER);
    if (planted == "overrun") ++table.rows[0].numel, ++table.step.state[0].elements;
    if (planted == "overflow") table.age[0] = INT32_MAX;
    return misa_cpu_step(&table.step, 1);
  }
  const int walks = all_variants();
  const int pitched = all_pitched();
  wrong_sizes();
  wrong_lines();
  wrong_numbers();
  wrong_pointers();
  wrong_storage();
  wrong_arguments();
  std::printf("%d walks, %d pitched, %d refusals, openmp %d\n", walks, pitched, refusals, misa_cpu_openmp());
  return 0;
}
