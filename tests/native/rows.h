// Rows for the drivers beside this file, in heap buffers that end with their last element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "misa.h"

#define EXPECT(condition)                                                      \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                            \
    }                                                                          \
  } while (false)

struct RowSpec {
  std::int64_t numel;
  int weight_dtype, grad_dtype;
};

inline std::vector<std::string> available_instructions() {
  std::vector<std::string> names;
  const std::string built = misa_cpu_built();
  for (std::size_t begin = 0, end; begin < built.size(); begin = end + 1) {
    end = std::min(built.find(' ', begin), built.size());
    const std::string name = built.substr(begin, end - begin);
    if (misa_cpu_use_instructions(name.c_str()) == MISA_OK) names.push_back(name);
  }
  return names;
}

// Rows that follow one another in the state without a gap, and a step over them.
struct Table {
  std::vector<MisaRow> rows;
  std::vector<std::vector<char>> weights, grads;
  std::vector<MisaHyper> hyper{{1e-2, 0.9, 0.99, 1e-8, 0.1}, {1e-3, 0.8, 0.999, 1e-6, 0.0}};
  std::vector<float> state[MISA_DTYPES][3];
  std::vector<std::int32_t> age;
  std::vector<double> sq_sum, partial, collected;
  std::vector<float> control = std::vector<float>(3), grad_scale{128.0f}, found_inf{0.0f};
  MisaStep step{};

  Table(const std::vector<RowSpec>& specs, bool master) : collected(2 * specs.size()) {
    std::int64_t chunks = 0, end[MISA_DTYPES] = {};
    for (const RowSpec& spec : specs) {
      weights.push_back(draw(spec.numel, spec.weight_dtype));
      grads.push_back(draw(spec.numel, spec.grad_dtype));
      MisaRow row{};
      row.weight = weights.back().data();
      row.grad = grads.back().data();
      row.numel = spec.numel;
      row.offset = end[spec.weight_dtype];
      row.group = static_cast<std::int64_t>(rows.size() % 2);
      // Within this row the upper half of the index changes.
      row.start = (std::int64_t{1} << 32) - 7;
      row.key = 12345;
      row.first_chunk = chunks;
      row.weight_dtype = spec.weight_dtype;
      row.grad_dtype = spec.grad_dtype;
      rows.push_back(row);
      end[spec.weight_dtype] += spec.numel;
      chunks += spec.numel == 0 ? 1 : (spec.numel - 1) / misa_cpu_chunk() + 1;
    }
    age.resize(chunks);
    sq_sum.resize(chunks);
    partial.resize(chunks);
    step.bytes = sizeof(MisaStep);
    step.rows = rows.data();
    step.row_count = static_cast<std::int64_t>(rows.size());
    step.hyper = hyper.data();
    step.group_count = static_cast<std::int64_t>(hyper.size());
    for (int dtype = 0; dtype < MISA_DTYPES; ++dtype) {
      const bool has_master = dtype == MISA_BFLOAT16 && master;
      for (int i = 0; i < 2 + has_master; ++i) {
        state[dtype][i].resize(end[dtype]);
        // NaN, which must not be read at age 0.
        if (end[dtype] > 0) std::memset(state[dtype][i].data(), 0xFF, end[dtype] * sizeof(float));
      }
      MisaState& buffers = step.state[dtype];
      buffers.exp_avg = state[dtype][0].data();
      buffers.exp_avg_sq = state[dtype][1].data();
      buffers.master = state[dtype][2].data();
      buffers.elements = end[dtype];
    }
    step.chunk_count = chunks;
    step.age = age.data();
    step.sq_sum = sq_sum.data();
    step.partial = partial.data();
    step.control = control.data();
    step.max_grad_norm = 1.0;
  }

  // `step` points into it.
  Table(const Table&) = delete;

  // Everything that a step or a collection can write.
  std::vector<char> bytes() const {
    std::vector<char> all;
    const auto add = [&all](const auto& buffer) {
      const char* begin = reinterpret_cast<const char*>(buffer.data());
      all.insert(all.end(), begin, begin + buffer.size() * sizeof(buffer[0]));
    };
    for (const auto& weight : weights) add(weight);
    for (const auto& buffers : state) {
      for (const auto& buffer : buffers) add(buffer);
    }
    add(age);
    add(sq_sum);
    add(partial);
    add(collected);
    add(control);
    return all;
  }

 private:
  std::uint32_t random = 1;

  // Numbers of either sign between 2^-3 and 2.
  std::vector<char> draw(std::int64_t numel, int dtype) {
    const std::size_t size = dtype == MISA_FLOAT32 ? 4 : 2;
    std::vector<char> buffer(numel * size);
    for (std::int64_t i = 0; i < numel; ++i) {
      random = random * 1664525u + 1013904223u;
      const std::uint32_t bits = (random & 0x81FFFFFFu) | 0x3E000000u;
      // The upper half of a float32 is a bfloat16; the machines are little-endian.
      std::memcpy(&buffer[i * size], reinterpret_cast<const char*>(&bits) + 4 - size, size);
    }
    return buffer;
  }
};
