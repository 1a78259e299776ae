// The kernels compiled for avx2. Nothing here may run before best_isa() said so.
#include <immintrin.h>

#include <initializer_list>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace openlora {
namespace avx2 {
#include "cpu/kernels.h"
}  // namespace avx2

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table{avx2::linear, avx2::norm, avx2::silu_mul, avx2::rope_kv_write, avx2::attention};
  return table;
}

}  // namespace openlora
