// Which instruction sets may be used here. GCC's probe also asks the operating system whether it saves the wide registers.
#include "cpu/dispatch.h"

namespace openlora {

int best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return -1;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!has_avx512) return 0;
  return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
}

}  // namespace openlora
