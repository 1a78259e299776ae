// The operations that read a linear's product and finish it on the way: sum of the GEMM's planes, bias, LoRA expand, all in
// float32, then what the model does with it, then one rounding. The product itself never goes through memory again.
//
// Followed by Follow::kWaitFirst they read before their wait what is not the product: pages, residual, norm weights, positions,
// kv_slots. Those must have been written before the kernel before this one began.
//
// Shape letters: T rows, N columns of the product, S planes, H hidden, I intermediate, D head size, B tokens of a KV block.
#pragma once

#include "lora_work.h"

namespace openlora {

// y = sum over s of planes[s] + bias + sum over the row's entries of v B.
struct Product {
  const void* y;       // [S, T, N] float32, or bfloat16 where the model is; contiguous, 16-byte aligned
  bool y_is_float;
  bool is_float;       // the model's type (bias, pages, norms, outputs): float32, else bfloat16
  int planes;          // S
  int rows;            // T
  int columns;         // N
  const void* bias;    // [N] of the model's type, or null
  const LoraWork* lora;  // null: no adapters, all T rows. Otherwise exactly the rows of the tiles are finished.
  Follow follow;
};

// out[t, i] = silu(y[t, i]) * y[t, I + i]. out: [T, I] of the model's type.
struct SiluMulArgs {
  Product product;
  void* out;
};
cudaError_t launch_fused_silu_mul(const SiluMulArgs& args, cudaStream_t stream);

// residual += y (rounded to its type), out = weight * residual / sqrt(mean(residual^2) + eps). All [T, H], H = N.
struct AddRmsNormArgs {
  Product product;
  void* residual;
  const void* weight;  // [H]
  float eps;
  void* out;
};
cudaError_t launch_fused_add_rms_norm(const AddRmsNormArgs& args, cudaStream_t stream);

// q and k of y, normed per head where asked, rotated half-split; k and v written into the cache, q to `q`.
struct RopeKvArgs {
  Product product;  // N = (heads + 2 groups) D
  const float* cos;  // [positions, D / 2]
  const float* sin;
  const int32_t* positions;  // [T]
  const int32_t* kv_slots;   // [T] block * B + offset; negative: nothing is written for the row (padding)
  void* key_cache;           // element (slot, group, d) at slot / B * block_stride + group * group_stride + slot % B * token_stride + d
  void* value_cache;
  int64_t block_stride;  // elements, of both caches; multiples of 8
  int64_t group_stride;
  int64_t token_stride;
  int block_size;  // B
  int heads;
  int groups;
  int head_size;        // D, even
  const void* q_norm;   // [D] or null
  const void* k_norm;   // [D] or null
  float eps;
  void* q;  // [T, heads D]
};
cudaError_t launch_fused_rope_kv_write(const RopeKvArgs& args, cudaStream_t stream);

// out[t, n] = y[t, n] in float32 or the model's type.
struct MaterializeArgs {
  Product product;
  void* out;
  bool out_is_float;
};
cudaError_t launch_materialize(const MaterializeArgs& args, cudaStream_t stream);

}  // namespace openlora
