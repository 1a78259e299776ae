// The LoRA work of a step as the CUDA kernels read it. `node/kernels/lora_tiles.py` writes the block of tiles, on the host.
//
// Shape letters: T rows (tokens), V (row, entry) pairs, M modules of the model, G modules of one fused linear (1 to 3),
// S slots, R = 16 ranks of a page, P processors of the GPU.
//
// The block of tiles is one run of int32 that begins at a line of 128 bytes, offsets in int32 from its start, every section 16-byte
// aligned. Deals and items stand at fixed places, so that nobody reads the header to find them; each load that waits for another costs a
// kernel two thirds of a microsecond before it has sent for its first byte.
//   header  [32]: tile count, item count, row count, V, offset of tiles, of rows, of entries, of items, rows of the largest tile,
//           offset of tile_of, P, offset of long items (0: none), wide and narrow ones of them, offset of streamed tiles, rows of the
//           largest of these; the rest 0
//   stream  [P][32]: what block b of a kernel that streams B does, a line each: equal shares of all tiles' weights (lora_deal.py)
//           [0] streamed tile where it begins, [1] place there in units of weight, [2] weight of that tile; [3..5] the same of its end
//           [6] first pair of tile [0], [7] pairs from there to the end of the last tile that it touches
//           [8..15] [16..23] [24..31] records of tile [0] and the two behind it, as in `streamed`; zero where its share does not go so far
//   norm    [P][16]: what block b of the norm does: a run of units, a unit being up to [2] neighbouring rows of a tile
//           [0] tile of the first unit, [1] its first place in the tile, [2] rows of a unit (1 to 3), [3] units (0: nothing)
//           [4..11] the tile's record, [12..14] rows of x and y of the first unit, -1 where there are fewer; [15] 0
//   items   [item count][8]: first place, row count | entry count << 16, first pair, entry counted from the tile's first, and that
//           entry: what a shrink computes
//   tiles   [tile count][8]: first place in `rows`, row count | entry count << 16, first entry, first pair, and that first entry
//   rows    [row count]: row of x and y at each place; every row of the step stands in exactly one tile
//   entries [...][4]: page, slot, ordinal of the page in its slot | uniform << 16, weight (float bits); shared by all tiles of a recipe.
//           uniform: 1 to 16 where every module that the step computes has so many ranks in this page, else 0: `ranks` knows
//   tile_of [row count]: the tile of each place
//   long    [wide + narrow][8]: of a step of more than kShortStepRows rows its items once more, cut at other places: neighbouring rows
//           of a recipe, tiles or not, wide ones of 17 to kWideRows rows, then narrow ones of at most 16; the most rows first
//   streamed [...][8]: what the stream deal counts and numbers: the tiles, or in long steps (lora_deal.py) tiles of up to 64 rows
// The pair of place i of a tile and its entry e is first pair + i * entry count + e. A tile without adapters has no entries.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace openlora {

constexpr int kPageRank = 16;
constexpr int kMaxLoraSpans = 3;
constexpr int kMaxRankPlanes = 8;
constexpr int kMostTileRows = 16;  // with 16 at most a row's bits are the same in a step of any size
constexpr int kTileHeader = 32;
constexpr int kShortStepRows = 2048;
constexpr int kWideRows = 72;  // prompts of 256 rows and the few that decode with their adapter: four items
constexpr int kStreamDealInts = 32;  // of a block
constexpr int kStreamDealTiles = 3;
constexpr int kNormDealInts = 16;

// One module of a fused linear. Offsets are elements inside a page: A is [16, inputs], B transposed is [16, outputs].
struct LoraSpan {
  int module;  // row of `ranks` and `scales`
  int64_t a_offset;
  int64_t b_offset;
  int inputs;
  int outputs;
  int column;  // its first output column in the fused linear
};

struct LoraWork {
  const void* pages;  // [pages, page_elements], element type of x and y's model
  int64_t page_elements;
  const int32_t* tiles;  // the block above; its counts are read on the device
  const int32_t* ranks;  // [M, S]; ranks beyond a module's are neither read nor added
  const float* scales;   // [M, S]; read by the shrink only
  int slots;             // S
  float* v;              // [C, V, G, 16], its sum over C: scale * weight * x A^T; zero beyond a module's rank
  int v_planes;          // C, at most kMaxRankPlanes
  int64_t v_stride;      // floats from one plane to the next
  int span_count;        // G
  LoraSpan spans[kMaxLoraSpans];
  int tile_rows;  // no tile has more; at most kMostTileRows
};

// How a kernel follows the one before it in its stream.
enum class Follow : int {
  kPlain = 0,  // after its end
  // Programmatic dependent launch: starts early, prefetches what no kernel writes, waits before it reads or writes the rest. What
  // follows a shrink that streams may begin with it, and must read nothing that a kernel of the step writes before its own wait.
  kWaitFirst = 1,
  // Shrink only, behind a GEMM that reads the same x and lets its dependents start only after its own wait: the shrink runs on the
  // processors that the GEMM leaves, then behind it, and waits for its end last, so that whoever waits for the shrink has both.
  kWaitLast = 2,
};

}  // namespace openlora
