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

// How bfloat16 weights keep what is below their resolution.
enum Precision { STOCHASTIC_ROUNDING, WITH_MASTER, WITH_RESIDUAL, PRECISIONS };

// Elements that share a scale, and elements so many of which have a state in this format.
constexpr std::int64_t SHARE = 128;
inline std::int64_t padded(std::int64_t numel, int format) {
  return format == MISA_STATE_INT8 ? (numel + SHARE - 1) / SHARE * SHARE : numel;
}

struct RowSpec {
  std::int64_t numel;
  int weight_dtype, grad_dtype;
  // Of a slice of columns.
  std::int64_t width = 0, pitch = 0;

  // Elements from the first to the last.
  std::int64_t extent() const {
    return width == 0 || numel == 0 ? numel : (numel / width - 1) * pitch + width;
  }
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
  // In the order of MisaState.
  std::vector<char> state[MISA_DTYPES][6];
  std::vector<std::int32_t> age;
  std::vector<double> sq_sum, partial, collected, moved;
  std::vector<float> control = std::vector<float>(3), grad_scale{128.0f}, found_inf{0.0f};
  MisaStep step{};

  Table(const std::vector<RowSpec>& specs, Precision precision, int format = MISA_STATE_FP32)
      : collected(2 * specs.size()) {
    std::int64_t chunks = 0, end[MISA_DTYPES] = {};
    for (const RowSpec& spec : specs) {
      weights.push_back(draw(spec.extent(), spec.weight_dtype));
      grads.push_back(draw(spec.numel, spec.grad_dtype));
      MisaRow row{};
      row.weight = weights.back().data();
      row.grad = grads.back().data();
      row.numel = spec.numel;
      row.offset = padded(end[spec.weight_dtype], format);
      row.group = static_cast<std::int64_t>(rows.size() % 2);
      // Within this row the upper half of the index changes.
      row.start = (std::int64_t{1} << 32) - 7;
      row.key = 12345;
      row.first_chunk = chunks;
      row.weight_dtype = spec.weight_dtype;
      row.grad_dtype = spec.grad_dtype;
      row.width = spec.width;
      row.pitch = spec.pitch;
      rows.push_back(row);
      end[spec.weight_dtype] = row.offset + spec.numel;
      chunks += spec.numel == 0 ? 1 : (spec.numel - 1) / misa_cpu_chunk() + 1;
    }
    age.resize(chunks);
    sq_sum.resize(chunks);
    partial.resize(chunks);
    moved.resize(2 * chunks);
    step.bytes = sizeof(MisaStep);
    step.row_bytes = sizeof(MisaRow);
    step.rows = rows.data();
    step.row_count = static_cast<std::int64_t>(rows.size());
    step.hyper = hyper.data();
    step.group_count = static_cast<std::int64_t>(hyper.size());
    step.format = format;
    const std::int64_t code = format == MISA_STATE_FP32 ? 4 : format == MISA_STATE_BF16 ? 2 : 1;
    for (int dtype = 0; dtype < MISA_DTYPES; ++dtype) {
      const std::int64_t elements = end[dtype], halves = dtype == MISA_BFLOAT16 ? elements : 0;
      const std::int64_t scales = format == MISA_STATE_INT8 ? 4 * ((elements + SHARE - 1) / SHARE) : 0;
      const std::int64_t bytes[6] = {code * elements,
                                     scales,
                                     code * elements,
                                     scales,
                                     precision == WITH_MASTER ? 4 * halves : 0,
                                     precision == WITH_RESIDUAL ? 2 * halves : 0};
      // NaN or -1, which must not be read at age 0.
      for (int i = 0; i < 6; ++i) state[dtype][i].assign(bytes[i], '\xFF');
      step.state[dtype] = {state[dtype][0].data(),
                           at<float>(state[dtype][1]),
                           state[dtype][2].data(),
                           at<float>(state[dtype][3]),
                           at<float>(state[dtype][4]),
                           at<std::int16_t>(state[dtype][5]),
                           elements};
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

  std::vector<char> state_bytes() const {
    std::vector<char> all;
    for (const auto& buffers : state) {
      for (const auto& buffer : buffers) all.insert(all.end(), buffer.begin(), buffer.end());
    }
    return all;
  }

  // Everything that a step or a collection can write.
  std::vector<char> bytes() const {
    std::vector<char> all = state_bytes();
    const auto add = [&all](const auto& buffer) {
      const char* begin = reinterpret_cast<const char*>(buffer.data());
      all.insert(all.end(), begin, begin + buffer.size() * sizeof(buffer[0]));
    };
    for (const auto& weight : weights) add(weight);
    add(age);
    add(sq_sum);
    add(partial);
    add(collected);
    add(moved);
    add(control);
    return all;
  }

 private:
  std::uint32_t random = 1;

  template <class T>
  static T* at(std::vector<char>& buffer) {
    return buffer.empty() ? nullptr : reinterpret_cast<T*>(buffer.data());
  }

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
