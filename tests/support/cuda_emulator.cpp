// The scheduler of the emulated threads, and the calls that Python makes through ctypes.
#include <fenv.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "async.cuh"
#include "device.cuh"
#include "scale_shift.h"

namespace reft::cuda {

Machine machine;
Chip emulated_chip;
int launched_cluster, launched_shared;
volatile int emulated_prefetch;

namespace {

constexpr int64_t kStack = 64 * 1024;

uint64_t order = 0;
std::mt19937_64 chance;

// Turns without progress after which all wait for what will not come.
constexpr int64_t kPatience = 100000;

// By schedules from kSlowFrom on, a warp hardly ever runs: others must wait for what they need of
// it.
constexpr uint64_t kSlowFrom = 64;
constexpr int kSlowness = 100;
int slow_warp = -1;

// Who runs next, each until it waits for others: all by their numbers, or one warp, which may get
// far ahead, its threads in any order, and now and then some of them further than others.
void fill_turns(std::vector<int>& turns, int threads) {
  turns.clear();
  if (order == 0) {
    turns.resize(threads);
    std::iota(turns.begin(), turns.end(), 0);
    return;
  }
  const int warps = threads / 32;
  int warp = static_cast<int>(chance() % warps);
  if (warp == slow_warp && chance() % kSlowness) warp = (warp + 1) % warps;
  const int first = warp * 32;
  for (int times = 1 + static_cast<int>(chance() % 16); times > 0; --times) {
    for (int lane = 0; lane < 32; ++lane) turns.push_back(first + lane);
    std::shuffle(turns.end() - 32, turns.end(), chance);
  }
  if (chance() % 4 == 0) turns.resize(turns.size() - chance() % 32);
}

// What is on its way arrives: at once and in order, or one at a time, in any order, seldom or
// often.
void fill_memory(std::vector<Delivery>& deliveries) {
  if (order == 0) {
    while (!deliveries.empty()) deliver(0);
  } else if (!deliveries.empty() && chance() % (1 + order % 7) == 0) {
    deliver(chance() % deliveries.size());
  }
}

// Signalling NaNs: nothing may count on the contents, and arithmetic that takes one in, even if its
// result is thrown away, leaves a mark in the CPU's flags (`emulated_invalid`).
void poison(char* shared) {
  const uint32_t nan = 0x7fa00001u;
  for (int64_t at = 0; at + 4 <= machine.shared_bytes; at += 4) memcpy(shared + at, &nan, 4);
}

void enter() {
  machine.body();
  Fiber* self = machine.now;
  self->done = true;
  // What a block leaves behind is not there for others to read.
  if (machine.blocks[self->in_cluster].gone + 1 == machine.threads) {
    poison(machine.shared[self->in_cluster].get());
  }
  // A thread that has returned no longer keeps the others from meeting.
  for (Group* group : {&warp_group(), &machine.blocks[self->in_cluster], &machine.cluster}) {
    ++group->gone;
    if (group->waiting > 0 && group->waiting + group->gone == group->size) {
      group->waiting = 0;
      ++group->generation;
    }
  }
  _longjmp(machine.scheduler, 1);
}

}  // namespace

void run_cluster(const Launch& how, int64_t first_block, int64_t column) {
  Machine& m = machine;
  const int count = how.cluster * how.threads;
  m.fault = nullptr, m.idle = 0;
  m.threads = how.threads;
  m.shared_bytes = how.shared;
  m.fibers.assign(count, Fiber{});
  while (static_cast<int>(m.stacks.size()) < count) m.stacks.emplace_back(new char[kStack]);
  m.shared.clear();
  for (int b = 0; b < how.cluster; ++b) {
    m.shared.emplace_back(new char[how.shared + 16]);
    poison(m.shared.back().get());
  }
  m.exchanges.resize(count / 32);
  m.warps.assign(count / 32, Group{32, 0, 0, 0});
  m.blocks.assign(how.cluster, Group{how.threads, 0, 0, 0});
  m.cluster = Group{count, 0, 0, 0};
  slow_warp = order < kSlowFrom ? -1 : static_cast<int>(chance() % (count / 32));
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.in_cluster = i / how.threads;
    fiber.thread = {i % how.threads, 0};
    fiber.block = {first_block + fiber.in_cluster, column};
  }
  for (volatile int left = count; left > 0;) {
    fill_turns(m.turns, count);
    fill_memory(m.deliveries);
    if (++m.idle > kPatience) m.fault = "all wait for what will not come";
    if (m.fault != nullptr) return;
    for (volatile size_t turn = 0; turn < m.turns.size(); ++turn) {
      const int i = m.turns[turn];
      Fiber& fiber = m.fibers[i];
      if (fiber.done) continue;
      m.now = &fiber;
      if (!_setjmp(m.scheduler)) {
        if (fiber.started) _longjmp(fiber.jump, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = m.stacks[i].get();
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, enter, 0);
        setcontext(&fiber.context);
      }
      if (m.fibers[m.turns[turn]].done) left = left - 1, m.idle = 0;
    }
  }
  if (!m.deliveries.empty()) m.fault = "something is on its way to blocks that have ended";
}

}  // namespace reft::cuda

using namespace reft;
using namespace reft::cuda;

struct Tables {
  const void *down, *up;
  const float* bias;
  const int32_t *kind, *rows, *tiles, *spans, *offsets;
  int64_t pool_dtype, pool_rows, tile_count, segments, positions;
};

static Pool pool_of(const Tables& t) {
  return {t.down, t.up, t.bias, t.kind, static_cast<Dtype>(t.pool_dtype)};
}
static Plan plan_of(const Tables& t) {
  return {t.rows, reinterpret_cast<const Tile*>(t.tiles), reinterpret_cast<const Span*>(t.spans)};
}

// In which way the forward kernels run (`Way`).
static Way way = Way::usual;
extern "C" void emulated_way(int number) { way = static_cast<Way>(number); }

// Why the last call did not launch its kernel, or what that did which it must not; else null.
static const char* error;
extern "C" const char* emulated_error() { return error; }

// Whether arithmetic of the last call made a NaN of other numbers, or took in a signalling one.
static bool invalid;
extern "C" int emulated_invalid() { return invalid; }

// multiprocessors 0: of a chip without clusters.
static void emulate(int multiprocessors) {
  emulated_chip = {multiprocessors > 0 ? multiprocessors : 1, 228 * 1024, multiprocessors > 0};
  feclearexcept(FE_INVALID);
}

extern "C" void emulated_order(uint64_t seed) {
  order = seed;
  chance.seed(seed);
}

// Bytes of shared memory of a block in the last launch.
extern "C" int emulated_shared() { return launched_shared; }

// norm.out null: without the norm. Returns the blocks of a cluster.
extern "C" int emulated_forward(void* h, int64_t stride, int64_t rows, int64_t d, int64_t dtype,
                                const Tables* t, const NextNorm* norm, int multiprocessors) {
  emulate(multiprocessors);
  ForwardCall call;
  static_cast<Forward&>(call) = {
      {h, stride}, d, static_cast<Dtype>(dtype), pool_of(*t), plan_of(*t)};
  call.row_count = rows, call.tile_count = t->tile_count, call.pool_rows = t->pool_rows;
  call.positions = t->positions, call.norm = *norm, call.way = way;
  error = norm->out == nullptr ? launch_forward(call, nullptr) : launch_forward_norm(call, nullptr);
  invalid = fetestexcept(FE_INVALID) != 0;
  return launched_cluster;
}

// The sum that stands before an edit.
extern "C" void emulated_sum(void* h, void* addend, int64_t stride, int64_t other, int64_t rows,
                             int64_t d, int64_t dtype, const Tables* t) {
  emulate(1);
  if (t->pool_rows == 0) return;
  launch_fold({{h, stride},
               {addend, other},
               d,
               static_cast<Dtype>(dtype),
               plan_of(*t),
               rows,
               t->tile_count},
              nullptr);
  invalid = fetestexcept(FE_INVALID) != 0;
}

// Returns the blocks of the last kernel's cluster.
extern "C" int emulated_backward(const void* grad, int64_t stride, const void* hs, void* dh,
                                 int64_t rows, int64_t d, int64_t dtype, const Tables* t, float* p,
                                 float* v, void* ddown, void* dup, float* dbias,
                                 int multiprocessors) {
  emulate(multiprocessors);
  BackwardCall call;
  static_cast<Backward&>(call) = {{const_cast<void*>(grad), stride},
                                  {const_cast<void*>(hs), d},
                                  {dh, d},
                                  d,
                                  static_cast<Dtype>(dtype),
                                  pool_of(*t),
                                  plan_of(*t),
                                  p,
                                  v,
                                  kKept};
  call.row_count = rows, call.tile_count = t->tile_count, call.pool_rows = t->pool_rows;
  call.positions = t->positions, call.segments = t->segments, call.offsets = t->offsets;
  call.pool_grad = {ddown, dup}, call.bias_grad = dbias;
  launch_backward_rows(call, nullptr);
  if (ddown != nullptr) launch_backward_pool(call, nullptr);
  invalid = fetestexcept(FE_INVALID) != 0;
  return launched_cluster;
}

// scale_less_one, shift: [P, d].
static ScalePool scales_of(const Tables& t) {
  return {static_cast<const float*>(t.down), static_cast<const float*>(t.up)};
}

// Of the tables, down and up are the elementwise pool.
extern "C" void emulated_scale_shift(void* h, int64_t stride, int64_t rows, int64_t d,
                                     int64_t dtype, const Tables* t) {
  emulate(1);
  ScaleShiftCall call;
  static_cast<ScaleShift&>(call) = {
      {h, stride}, d, static_cast<Dtype>(dtype), scales_of(*t), plan_of(*t)};
  call.row_count = rows, call.tile_count = t->tile_count;
  launch_scale_shift(call, nullptr);
  invalid = fetestexcept(FE_INVALID) != 0;
}

extern "C" void emulated_scale_shift_backward(const void* grad, const void* hs, void* dh,
                                              int64_t rows, int64_t d, int64_t dtype,
                                              const Tables* t, float* ds, float* dv) {
  emulate(1);
  ScaleShiftBackwardCall call;
  static_cast<ScaleShiftBackward&>(call) = {{const_cast<void*>(grad), d},
                                            {const_cast<void*>(hs), d},
                                            {dh, d},
                                            d,
                                            static_cast<Dtype>(dtype),
                                            scales_of(*t),
                                            plan_of(*t)};
  call.row_count = rows, call.tile_count = t->tile_count, call.pool_rows = t->pool_rows;
  call.segments = t->segments, call.offsets = t->offsets;
  call.scale_grad = ds, call.shift_grad = dv;
  if (dh != nullptr) launch_scale_shift_rows(call, nullptr);
  if (ds != nullptr) launch_scale_shift_sums(call, nullptr);
  invalid = fetestexcept(FE_INVALID) != 0;
}
