// As much of CUDA as csrc/adamw_cuda.cu uses, for a compiler of C++17 and memory of the host.
//
// The threads of a block take turns, from one barrier to the next; blocks run one after another, the last one
// first. So the kernels' own source runs where there is no GPU, and ThreadSanitizer, which is told of the
// barriers and of nothing else, finds those that are missing. Nothing is proven about memory order between
// blocks, or about what nvcc makes of the source.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

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
struct dim3 {
  unsigned x;
  dim3(unsigned count = 0) : x(count) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

namespace emulation {

constexpr std::size_t STACK_BYTES = 1 << 16;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  void* sanitized = __tsan_create_fiber(0);
  bool done = false;
};

inline std::function<void()> kernel;
inline ucontext_t scheduler;
inline void* scheduler_sanitized;
inline std::vector<Thread> threads;
inline dim3 thread, block;
inline double exchanged[1024];
inline char block_barrier, warp_barriers[32];

// Not seen by ThreadSanitizer: all threads of CUDA read these, each its own.
__attribute__((no_sanitize("thread"))) inline dim3 this_thread() { return thread; }
__attribute__((no_sanitize("thread"))) inline dim3 this_block() { return block; }

inline void wait(char* barrier) {
  Thread& own = threads[this_thread().x];
  __tsan_release(barrier);
  // Nothing that this thread did is known to the next.
  __tsan_switch_to_fiber(scheduler_sanitized, 1);
  swapcontext(&own.context, &scheduler);
  __tsan_acquire(barrier);
}

inline void run_thread() {
  kernel();
  Thread& own = threads[this_thread().x];
  own.done = true;
  __tsan_switch_to_fiber(scheduler_sanitized, 0);
  setcontext(&scheduler);
}

inline void prepare(Thread& own) {
  getcontext(&own.context);
  own.context.uc_stack.ss_sp = own.stack.get();
  own.context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&own.context, run_thread, 0);
}

__attribute__((no_sanitize("thread"))) inline void run_block(unsigned number, unsigned count) {
  block = number;
  scheduler_sanitized = __tsan_get_current_fiber();
  threads = std::vector<Thread>(count);
  for (Thread& own : threads) prepare(own);
  while (!threads[0].done) {
    for (unsigned i = 0; i < count; ++i) {
      thread = i;
      __tsan_switch_to_fiber(threads[i].sanitized, 0);
      swapcontext(&scheduler, &threads[i].context);
    }
  }
  for (Thread& own : threads) __tsan_destroy_fiber(own.sanitized);
}

inline int device = 0;

}  // namespace emulation

#define threadIdx (emulation::this_thread())
#define blockIdx (emulation::this_block())

inline void __syncthreads() { emulation::wait(&emulation::block_barrier); }
inline void __threadfence() {}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline int atomicAdd(int* to, int x) { return __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST); }
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline double __shfl_down_sync(unsigned, double x, unsigned lanes) {
  const unsigned own = threadIdx.x;
  emulation::exchanged[own] = x;
  emulation::wait(&emulation::warp_barriers[own / 32]);
  if (own % 32 + lanes < 32) x = emulation::exchanged[own + lanes];
  emulation::wait(&emulation::warp_barriers[own / 32]);
  return x;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  emulation::kernel = [=] { kernel(*static_cast<Arguments*>(arguments[0])); };
  for (unsigned number = grid.x; number-- > 0;) emulation::run_block(number, block.x);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulation::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
