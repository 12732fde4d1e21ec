// As much of CUDA as csrc/adamw_cuda.cu uses, for a compiler of C++20 and memory of the host.
//
// The threads of a block are threads and its barriers barriers; blocks run one after another, the last one
// first. So the kernels' own source runs where there is no GPU; what it proves nothing about is memory order
// between blocks, and what nvcc makes of the source.
#pragma once

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static
#define CUDART_VERSION 13000

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct dim3 {
  unsigned x;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>*block_barrier, *warp_barriers[32];
inline double exchanged[1024];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __threadfence() {}
inline int atomicAdd(int* to, int x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T x) {
  *to = x;
}
inline double __shfl_down_sync(unsigned, double x, unsigned lanes) {
  std::barrier<>& warp = *warp_barriers[threadIdx.x / 32];
  exchanged[threadIdx.x] = x;
  warp.arrive_and_wait();
  if (threadIdx.x % 32 + lanes < 32) x = exchanged[threadIdx.x + lanes];
  warp.arrive_and_wait();
  return x;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  std::barrier<> all(block.x);
  block_barrier = &all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  for (unsigned i = 0; i < block.x / 32; ++i) {
    warps.push_back(std::make_unique<std::barrier<>>(32));
    warp_barriers[i] = warps.back().get();
  }
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < block.x; ++i) {
    threads.emplace_back([=, &all] {
      for (unsigned number = grid.x; number-- > 0;) {
        threadIdx = {i};
        blockIdx = {number};
        kernel(*static_cast<Arguments*>(arguments[0]));
        all.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

inline int current_device = 0;
inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
