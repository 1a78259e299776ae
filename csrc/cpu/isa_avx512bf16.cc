// The kernels compiled for avx512bf16. Nothing here may run before best_isa() said so.
#include <immintrin.h>

#include <initializer_list>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace openlora {
namespace avx512bf16 {
#include "cpu/kernels.h"
}  // namespace avx512bf16

const KernelTable& avx512bf16_kernels() {
  static constexpr KernelTable table{avx512bf16::linear, avx512bf16::norm, avx512bf16::silu_mul, avx512bf16::rope_kv_write, avx512bf16::attention};
  return table;
}

}  // namespace openlora
