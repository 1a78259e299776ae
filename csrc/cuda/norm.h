// The norms that no product precedes.
#pragma once

#include "lora_work.h"

namespace openlora {

// out = weight * x / sqrt(mean(x^2) + eps) over each row of x [T, H].
struct RmsNormArgs {
  const void* x;
  const void* weight;  // [H]
  void* out;           // [T, H]
  int rows;
  int size;  // H
  float eps;
  bool is_float;
  Follow follow;
};
cudaError_t launch_rms_norm(const RmsNormArgs& args, cudaStream_t stream);

// residual[t] = embedding[token_ids[t]], out[t] = rms_norm(residual[t]). A negative token id leaves its row alone (padding).
struct EmbedRmsNormArgs {
  const void* token_ids;  // [T] int32 or int64
  bool ids_are_long;
  const void* embedding;  // [vocabulary, H]
  int64_t vocabulary;     // an id at or beyond it leaves its row alone
  void* residual;         // [T, H]
  RmsNormArgs norm;       // x is not read
};
cudaError_t launch_embed_rms_norm(const EmbedRmsNormArgs& args, cudaStream_t stream);

}  // namespace openlora
