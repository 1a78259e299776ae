// How a skinny GEMM is cut into work: host arithmetic only, no CUDA header, so that it can be tested without a GPU.
//
// A work item is `tile_rows` rows of W times one plane's range of k, for all tokens. The planes of a shape depend on (N, K)
// alone (see gemm_sm90.h); everything else may follow T, because it does not change the order of any sum.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GEMM_ANYWHERE __host__ __device__
#else
#define GEMM_ANYWHERE
#endif

namespace openlora {

constexpr int kGemmBlockK = 64;          // inputs of a pipeline stage: 128 bytes of bf16, one swizzle row
constexpr int kGemmRowBytes = kGemmBlockK * 2;
constexpr int kGemmMaxTokens = 256;      // one wgmma n side
constexpr int kGemmTallTokens = 320;     // two of them (gemm_tall_sm90.cu)
constexpr int kGemmBroadRows = 192;      // rows of W of a tile of the broad form (gemm_tall_sm90.cu)
constexpr int kGemmMaxPlanes = 8;
constexpr int kGemmTileRows = 128;       // of the accumulators: an m64 block for each of two warpgroups
constexpr int kGemmSharedBytes = 232448;  // what a Hopper block can have
constexpr int kGemmWideRows = 224;        // rows of W of a tile of the wide form (gemm_wide_sm90.h)
constexpr int kGemmWideHeadRows = 200;    // and of its output projection
constexpr int kGemmUsedBytes = 212992;    // what it takes: 24 KB stay for a small kernel beside it, which runs early
constexpr int kGemmProcessors = 132;       // of every H100 and H200 SXM; a number, not the device's, so that bits travel
constexpr int kGemmBarrierBytes = 512;    // two mbarriers a stage, and a bit a token
constexpr int kGemmWantedOffset = 448;

enum class GemmForm : int {
  kNarrow = 0,  // gemm_narrow_sm90.cu, gemm_head_sm90.cu: all tokens are one wgmma n side
  kTall = 1,    // gemm_tall_sm90.cu: they are two, which a block has both
  kBroad = 2,   // the same, each a block's, and three warpgroups of rows of W
};

struct SkinnyGemmPlan {
  GemmForm form;
  int tile_rows;    // rows of W a block holds per stage; a multiple of 8, at most kGemmTileRows, of the broad form kGemmBroadRows
  int tile_tokens;  // wgmma n: 8, 16, 32, 64, 96, 128, 160, 192, 224 or 256; twice 112, 128, 144 or 160 in the other forms
  int planes;       // S
  int stages;       // pipeline depth
};

// Tokens of a wgmma, and of a block.
constexpr int gemm_side_tokens(const SkinnyGemmPlan& plan) { return plan.form == GemmForm::kNarrow ? plan.tile_tokens : plan.tile_tokens / 2; }
constexpr int gemm_block_tokens(const SkinnyGemmPlan& plan) { return plan.form == GemmForm::kBroad ? plan.tile_tokens / 2 : plan.tile_tokens; }

// Warpgroups with accumulators.
constexpr int gemm_groups(GemmForm form) { return form == GemmForm::kBroad ? kGemmBroadRows / 64 : kGemmTileRows / 64; }

// Bytes of one stage: a tile of W and a tile of x.
constexpr int gemm_stage_bytes(const SkinnyGemmPlan& plan) { return (plan.tile_rows + gemm_block_tokens(plan)) * kGemmRowBytes; }

// Of all stages. The last one's wgmma reads whole m64 blocks, past tile_rows: the slack keeps that inside.
constexpr int gemm_ring_bytes(const SkinnyGemmPlan& plan) {
  const int overrun = 64 * gemm_groups(plan.form) * kGemmRowBytes - gemm_stage_bytes(plan);
  return plan.stages * gemm_stage_bytes(plan) + (overrun > 0 ? overrun : 0);
}

// Where a warpgroup puts down a part of its block on the way to y: so many tokens of 64 columns at a time, rows padded.
GEMM_ANYWHERE constexpr int gemm_line_tokens(int tile_tokens, bool is_half) {
  const int most = !is_half ? 16 : tile_tokens < 32 || tile_tokens % 32 == 0 ? 32 : tile_tokens % 48 == 0 ? 48 : 16;
  return tile_tokens < most ? tile_tokens : most;
}
GEMM_ANYWHERE constexpr int gemm_line_pitch(int bytes) { return bytes + 16; }  // no two rows of a store in one bank
GEMM_ANYWHERE constexpr int gemm_line_bytes(int tile_tokens) {
  const int half = gemm_line_tokens(tile_tokens, true) * gemm_line_pitch(64 * 2);
  const int full = gemm_line_tokens(tile_tokens, false) * gemm_line_pitch(64 * 4);
  return half > full ? half : full;
}

// Dynamic shared memory: the ring begins at a multiple of 1024.
constexpr int gemm_shared_bytes(const SkinnyGemmPlan& plan) {
  return 1024 + gemm_ring_bytes(plan) + kGemmBarrierBytes + gemm_groups(plan.form) * gemm_line_bytes(gemm_side_tokens(plan));
}

// The smallest n of the kernel's templates that holds T tokens; 0 if none does.
constexpr int gemm_tile_tokens(int64_t tokens) {
  constexpr int kTiles[] = {8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320};
  for (const int tile : kTiles) {
    if (tokens >= 1 && tokens <= tile) return tile;
  }
  return 0;
}

constexpr int gemm_row_tiles(int64_t outputs, int tile_rows) { return static_cast<int>((outputs + tile_rows - 1) / tile_rows); }

// First k block of plane `plane`; plane S gives the end. K below 2^31 leaves the product of both below 2^29.
GEMM_ANYWHERE constexpr int gemm_plane_start(int k_blocks, int planes, int plane) { return k_blocks * plane / planes; }

constexpr bool gemm_can_run(int64_t tokens, int64_t outputs, int64_t inputs) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // elements of a matrix side; coordinates of the copy engine are 32 bits
  return tokens >= 1 && tokens <= kGemmTallTokens && inputs >= kGemmBlockK && inputs % kGemmBlockK == 0 && inputs < kLimit &&
         outputs >= 8 && outputs % 8 == 0 && outputs < kLimit;
}

// Stages that fit into `bytes` of shared memory, at least 2, at most 24.
constexpr int gemm_stages_that_fit(SkinnyGemmPlan plan, int bytes) {
  int stages = 2;
  for (plan.stages = 3; plan.stages <= 24 && gemm_shared_bytes(plan) <= bytes; ++plan.stages) stages = plan.stages;
  return stages;
}

// S: as many ranges of k as keep 128-row tiles on one SM each, none shorter than 4 stages. Llama-3.1-8B: 2, 4, 1, 4, 1 for
// qkv, o, gate_up, down, head.
constexpr int gemm_planes(int64_t outputs, int64_t inputs) {
  const int wanted = kGemmProcessors / gemm_row_tiles(outputs, 128);
  const int possible = static_cast<int>(inputs / kGemmBlockK / 4);
  const int planes = wanted < possible ? wanted : possible;
  return planes < 1 ? 1 : planes > kGemmMaxPlanes ? kGemmMaxPlanes : planes;
}

// Rows of a tile such that every SM has the same number of tiles, of at most 128 rows each; a multiple of 16, at least 32.
constexpr int gemm_fair_rows(int64_t outputs, int planes) {
  const int64_t tiles = static_cast<int64_t>(gemm_row_tiles(outputs, 128)) * planes;
  const int64_t all = (tiles + kGemmProcessors - 1) / kGemmProcessors * kGemmProcessors;
  const int64_t most = all / planes;  // tiles of a plane
  const int64_t rows = (outputs + most - 1) / most;
  return rows <= 32 ? 32 : rows > 112 ? 128 : static_cast<int>((rows + 15) / 16 * 16);
}

// Whether tiles of 192 rows, with half of the tokens each, do with one round what fair tiles do with a quarter of their products wasted.
constexpr bool gemm_is_broad(int64_t tokens, int64_t outputs, int64_t inputs) {
  const int planes = gemm_planes(outputs, inputs), blocks = 2 * planes * gemm_row_tiles(outputs, kGemmBroadRows);
  return tokens > 192 && tokens <= kGemmTallTokens && planes > 1 && gemm_fair_rows(outputs, planes) * 4 <= kGemmTileRows * 3 &&
         blocks <= kGemmProcessors && 2 * blocks > kGemmProcessors;
}

constexpr SkinnyGemmPlan gemm_plan(int64_t tokens, int64_t outputs, int64_t inputs) {
  SkinnyGemmPlan plan{};
  plan.form = gemm_is_broad(tokens, outputs, inputs) ? GemmForm::kBroad : tokens > kGemmMaxTokens ? GemmForm::kTall : GemmForm::kNarrow;
  plan.planes = gemm_planes(outputs, inputs);
  plan.tile_tokens = gemm_tile_tokens(tokens);
  plan.tile_rows = plan.form == GemmForm::kBroad ? kGemmBroadRows : gemm_fair_rows(outputs, plan.planes);
  plan.stages = gemm_stages_that_fit(plan, plan.form == GemmForm::kNarrow ? kGemmUsedBytes : kGemmSharedBytes);
  return plan;
}

// Clocks of a block's tensor cores for all rows of W in tiles of `tile_rows`, of which wgmma computes `rows`; of one plane.
constexpr int64_t gemm_rounds(int64_t outputs, int tile_rows, int rows) {
  return static_cast<int64_t>((gemm_row_tiles(outputs, tile_rows) + kGemmProcessors - 1) / kGemmProcessors) * rows;
}

// Whether the wide form (gemm_wide_sm90.h) takes fewer of them: its tiles are not rounded up to blocks of 64 rows of W.
constexpr bool gemm_is_wide(int64_t tokens, int64_t outputs, int64_t inputs, int wide_rows) {
  return tokens > 192 && tokens <= kGemmMaxTokens && gemm_planes(outputs, inputs) == 1 &&
         gemm_rounds(outputs, wide_rows, wide_rows) < gemm_rounds(outputs, gemm_fair_rows(outputs, 1), kGemmTileRows);
}

// The same of logits, whose blocks are as many as of the narrow form.
constexpr bool gemm_is_wide_head(int64_t tokens, int64_t outputs, int64_t inputs) {
  return gemm_is_wide(tokens, outputs, inputs, kGemmWideHeadRows) && inputs >= 3 * kGemmBlockK &&
         gemm_row_tiles(outputs, kGemmWideHeadRows) >= kGemmProcessors;
}

// Blocks that share the rows of W where each keeps what it finds: a fixed number, so that whoever reads it knows how many.
constexpr int gemm_parts(int64_t outputs, int64_t inputs) {
  const int tiles = gemm_row_tiles(outputs, gemm_fair_rows(outputs, gemm_planes(outputs, inputs)));
  return tiles < kGemmProcessors ? tiles : kGemmProcessors;
}

// From 193 to 256 tokens cuBLAS is faster where W is short and has more rows than columns (qkv), but not behind a shrink, beside which it
// cannot begin.
constexpr bool gemm_is_faster(int64_t tokens, int64_t outputs, int64_t inputs, bool has_adapters) {
  if (tokens > kGemmMaxTokens) return gemm_can_run(tokens, outputs, inputs) && outputs <= 65536;
  return gemm_can_run(tokens, outputs, inputs) && (tokens <= 192 || has_adapters || inputs >= outputs || outputs > 65536);
}

}  // namespace openlora
