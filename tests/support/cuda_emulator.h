// Runs the kernels of csrc/cuda on a CPU: a fiber for each thread of a cluster of blocks, barriers,
// shuffles and tensor-core products by their definitions. Slow, and blind to memory orders and
// timing: it shows that the indices, masks, layouts and barriers are right. Takes the place of what
// device.cuh has for nvcc.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

namespace reft::cuda {

struct Index {
  int64_t x, y;
};

struct Fiber {
  Index thread, block;
  int in_cluster;  // the block's number in its cluster
  ucontext_t context;
  jmp_buf jump;
  bool started, done;
  int64_t came;  // the cluster's generation when this came to its barrier
};

struct Group {
  int size, gone;
  int64_t waiting, generation;
};

// What one warp exchanges: 32 lanes of up to 8 words.
struct Exchange {
  uint32_t words[32][8];
};

// Bytes on their way into a block's shared memory (cuda_emulator_async.h).
struct Delivery {
  int block, bytes;
  int64_t to, barrier;     // from the beginning of that memory
  const char* from;        // read when they arrive,
  std::vector<char> kept;  // or when they were sent
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<int> turns;  // who runs next, each until it waits for others
  std::vector<std::unique_ptr<char[]>> stacks, shared;
  std::vector<Exchange> exchanges;
  std::vector<Group> warps, blocks;
  Group cluster;
  int threads;
  int64_t shared_bytes;
  Fiber* now;
  std::vector<Delivery> deliveries;
  int64_t idle;       // turns in which nobody got further
  const char* fault;  // what the kernel did that it must not; it is left alone then
  jmp_buf scheduler;
  std::function<void()> body;
};
extern Machine machine;
extern volatile int emulated_prefetch;

#define threadIdx (::reft::cuda::machine.now->thread)
#define blockIdx (::reft::cuda::machine.now->block)

inline void leave() {
  if (!_setjmp(machine.now->jump)) _longjmp(machine.scheduler, 1);
}

inline void come(Group& group) {
  if (++group.waiting + group.gone < group.size) return;
  group.waiting = 0;
  ++group.generation;
  machine.idle = 0;
}
inline void meet(Group& group) {
  const int64_t generation = group.generation;
  come(group);
  while (group.generation == generation) leave();
}

inline Group& warp_group() { return machine.warps[(machine.now - machine.fibers.data()) / 32]; }
inline Exchange& exchange() {
  return machine.exchanges[(machine.now - machine.fibers.data()) / 32];
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_float(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  _Float16 half;
  memcpy(&half, &x, 2);
  return static_cast<float>(half);
}
inline void round_to(float x, float* out) { *out = x; }
inline void round_to(float x, Bf16* out) {
  const uint32_t bits = float_bits(x);
  out->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fff);
}
inline void round_to(float x, Half* out) {
  const _Float16 half = static_cast<_Float16>(x);
  memcpy(out, &half, 2);
}

inline void load16(const void* from, uint32_t* to) {
  if (reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("unaligned load of 16 bytes");
  memcpy(to, from, 16);
}
inline void store16(const uint32_t* from, void* to) {
  if (reinterpret_cast<uintptr_t>(to) % 16) throw std::runtime_error("unaligned store of 16 bytes");
  memcpy(to, from, 16);
}

inline void ask(int32_t) {}
inline int anew(int x) { return x; }
inline int32_t load_word_if(bool wanted, const int32_t* from) { return wanted ? *from : -1; }

inline void prefetch_l2(const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
    throw std::runtime_error("unaligned prefetch");
  emulated_prefetch = *static_cast<const volatile char*>(from) +
                      static_cast<const volatile char*>(from)[bytes - 1];  // is there
}

inline float shuffle_xor(float x, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  exchange().words[lane][0] = float_bits(x);
  meet(warp_group());
  const float other = bits_float(exchange().words[lane ^ lanes][0]);
  meet(warp_group());
  return other;
}

inline int shuffle_xor(int x, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  exchange().words[lane][0] = static_cast<uint32_t>(x);
  meet(warp_group());
  const uint32_t other = exchange().words[lane ^ lanes][0];
  meet(warp_group());
  return static_cast<int>(other);
}

inline int shuffle(int x, int from) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  exchange().words[lane][0] = static_cast<uint32_t>(x);
  meet(warp_group());
  const uint32_t other = exchange().words[from][0];
  meet(warp_group());
  return static_cast<int>(other);
}

template <class T>
float element(uint32_t word, int half) {
  T value;
  value.bits = static_cast<uint16_t>(word >> (16 * half));
  return to_float(value);
}

// c + Σ a b as the tensor cores of sm_80 have it, the least precise that the kernels run on, by the
// measurements of Fasi et al. 2021 (PeerJ CS 7:e330) and Khattak and Mikaitis 2025
// (arXiv 2512.07004): exact products, cut one bit below the last of a float32 of the largest term's
// size, added exactly, and the sum cut to float32.
inline float tensor_sum(float c, const float* a, const float* b, int n) {
  double terms[9] = {c}, most = fabs(c);
  for (int i = 0; i < n; ++i) {
    terms[i + 1] = static_cast<double>(a[i]) * b[i];
    most = fmax(most, fabs(terms[i + 1]));
  }
  double sum = 0;
  int exponent = 0;
  frexp(most, &exponent);
  const double last = ldexp(1.0, exponent - 25);
  for (int i = 0; i <= n; ++i) sum += isfinite(terms[i]) ? trunc(terms[i] / last) * last : terms[i];
  const float nearest = static_cast<float>(sum);
  return isfinite(nearest) && fabs(nearest) > fabs(sum) ? nextafterf(nearest, 0.0f) : nearest;
}

template <class T>
void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  const int self = static_cast<int>(threadIdx.x % 32);
  Exchange& all = exchange();
  for (int i = 0; i < 4; ++i) all.words[self][i] = a[i];
  for (int i = 0; i < 2; ++i) all.words[self][4 + i] = b[i];
  meet(warp_group());
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * (self % 4) + i % 2;
    for (int late = 0; late < 2; ++late) {
      float x[8], y[8];
      for (int k = 0; k < 8; ++k) {
        x[k] = element<T>(all.words[self / 4 * 4 + k / 2][upper + 2 * late], k % 2);
        y[k] = element<T>(all.words[column * 4 + k / 2][4 + late], k % 2);
      }
      c[i] = tensor_sum(c[i], x, y, 8);
    }
  }
  meet(warp_group());
}

inline void mma8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  const auto tf32 = [](float x) { return float_bits(x) & 0xffffe000u; };
  const int self = static_cast<int>(threadIdx.x % 32);
  Exchange& all = exchange();
  for (int i = 0; i < 4; ++i) all.words[self][i] = tf32(a[i]);
  all.words[self][4] = tf32(b0), all.words[self][5] = tf32(b1);
  meet(warp_group());
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * (self % 4) + i % 2;
    for (int late = 0; late < 2; ++late) {
      float x[4], y[4];
      for (int k = 0; k < 4; ++k) {
        x[k] = bits_float(all.words[self / 4 * 4 + k][upper + 2 * late]);
        y[k] = bits_float(all.words[column * 4 + k][4 + late]);
      }
      c[i] = tensor_sum(c[i], x, y, 4);
    }
  }
  meet(warp_group());
}

inline float* shared_memory() {
  return reinterpret_cast<float*>(machine.shared[machine.now->in_cluster].get());
}
inline void sync_block() { meet(machine.blocks[machine.now->in_cluster]); }
inline void sync_cluster(int) { meet(machine.cluster); }
inline void leave_cluster(int) { meet(machine.cluster); }
inline float load_cluster(const float* mine, int block) {
  const int64_t offset = mine - shared_memory();
  return reinterpret_cast<float*>(machine.shared[block].get())[offset];
}
struct Launch {
  int64_t blocks;
  int64_t columns;
  int threads;
  int cluster;
  int64_t shared;
  cudaStream_t stream;
};

struct Chip {
  int multiprocessors, shared;
  bool clusters;
};
extern Chip emulated_chip;
extern int launched_cluster, launched_shared;  // of the last launch
inline Chip current_chip() { return emulated_chip; }

void run_cluster(const Launch& how, int64_t first_block, int64_t column);

template <class... Arguments>
const char* launch(void (*kernel)(Arguments...), const Launch& how, Arguments... arguments) {
  launched_cluster = how.cluster, launched_shared = static_cast<int>(how.shared);
  machine.body = [=] { kernel(arguments...); };
  for (int64_t column = 0; column < how.columns; ++column) {
    for (int64_t block = 0; block < how.blocks; block += how.cluster) {
      run_cluster(how, block, column);
      if (machine.fault != nullptr) {
        machine.deliveries.clear();
        return machine.fault;
      }
    }
  }
  return nullptr;
}

}  // namespace reft::cuda
