// The kernels compiled for avx512. Nothing here may run before best_isa() said so.
#include <immintrin.h>

#include <initializer_list>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace openlora {
namespace avx512 {
#include "cpu/kernels.h"
}  // namespace avx512

const KernelTable& avx512_kernels() {
  static constexpr KernelTable table{avx512::linear, avx512::norm, avx512::silu_mul, avx512::rope_kv_write, avx512::attention};
  return table;
}

}  // namespace openlora
