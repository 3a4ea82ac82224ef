#include <cstdlib>
#include <cstring>

#include "intervene.h"

namespace reft {
namespace {

#ifdef __x86_64__
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

IsaChoice choose() {
  const char* wanted = std::getenv("REFT_KERNELS_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto named = [&](const char* name) { return !any && std::strcmp(wanted, name) == 0; };
#ifdef __x86_64__
  __builtin_cpu_init();
  if (named("avx512") && !has_avx512()) {
    return {nullptr, "REFT_KERNELS_CPU_ISA: this machine has no avx512 (F, BW, VL and DQ)"};
  }
  if (named("avx2") && !has_avx2()) {
    return {nullptr, "REFT_KERNELS_CPU_ISA: this machine has no avx2 (with FMA and F16C)"};
  }
  if (named("avx512") || (any && has_avx512())) return {&kAvx512, nullptr};
  if (named("avx2") || (any && has_avx2())) return {&kAvx2, nullptr};
  const char* unknown = "REFT_KERNELS_CPU_ISA: must be avx512, avx2 or scalar";
#else
  const char* unknown = "REFT_KERNELS_CPU_ISA: must be scalar on this architecture";
#endif
  if (any || named("scalar")) return {&kScalar, nullptr};
  return {nullptr, unknown};
}

}  // namespace

const IsaChoice& select_isa() {
  static const IsaChoice choice = choose();
  return choice;
}

}  // namespace reft
