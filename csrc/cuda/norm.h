// The norms that no product precedes, and rows by their numbers.
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

// residual[t] = embedding[id of row t], out[t] = rms_norm(residual[t]). A negative token id leaves its row alone (padding).
struct EmbedRmsNormArgs {
  const void* token_ids;  // [id_count] int32 or int64
  bool ids_are_long;
  int64_t id_count;
  const int32_t* sources;  // [T]: where in token_ids the id of each row stands, and a row of none is left alone; null: at the row's own number
  const void* embedding;   // [vocabulary, H]
  int64_t vocabulary;      // an id at or beyond it leaves its row alone
  void* residual;          // [T, H]
  RmsNormArgs norm;        // x is not read
};
cudaError_t launch_embed_rms_norm(const EmbedRmsNormArgs& args, cudaStream_t stream);

// out[i] = x[rows[i]]; a row that x does not have is left alone.
struct TakeRowsArgs {
  const void* x;
  const int32_t* rows;  // [count]
  void* out;
  int count;
  int row_count;  // of x
  int row_bytes;  // a multiple of 16
  Follow follow;
};
cudaError_t launch_take_rows(const TakeRowsArgs& args, cudaStream_t stream);

}  // namespace openlora
