#include <cstdlib>
#include <cstring>

#include "intervene.h"

namespace reft {
namespace {

struct Level {
  const Isa* isa;
  bool present;
  const char* missing;
};

IsaChoice choose() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const Level levels[] = {
      {&kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16"),
       "REFT_KERNELS_CPU_ISA: this machine has no avx512_bf16"},
      {&kAvx512, avx512, "REFT_KERNELS_CPU_ISA: this machine has no avx512 (F, BW, VL and DQ)"},
      {&kAvx2, avx2, "REFT_KERNELS_CPU_ISA: this machine has no avx2 (with FMA and F16C)"},
      {&kScalar, true, nullptr},
  };
  const char* unknown = "REFT_KERNELS_CPU_ISA: must be avx512_bf16, avx512, avx2 or scalar";
#else
  const Level levels[] = {{&kScalar, true, nullptr}};
  const char* unknown = "REFT_KERNELS_CPU_ISA: must be scalar on this architecture";
#endif
  const char* wanted = std::getenv("REFT_KERNELS_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Level& level : levels) {
    if (any && level.present) return {level.isa, nullptr};
    if (!any && std::strcmp(wanted, level.isa->name) == 0) {
      return level.present ? IsaChoice{level.isa, nullptr} : IsaChoice{nullptr, level.missing};
    }
  }
  return {nullptr, unknown};
}

}  // namespace

const IsaChoice& select_isa() {
  static const IsaChoice choice = choose();
  return choice;
}

}  // namespace reft
