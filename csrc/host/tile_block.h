// The LoRA work of a short step, as `node/kernels/lora_tiles.py` cuts and deals it: the same run of int32, in a tenth of the time. Plain C,
// called through ctypes: the step loop is between two steps of a GPU.
#pragma once

#include <cstdint>

extern "C" {

// Q sequences, R recipes, S slots, P processors. Keep `node/kernels/tile_builder.py` equal.
struct OpenloraTileWork {
  const int32_t* recipes;      // [Q] number of each sequence's recipe, in the order of their first rows; any where it has no rows
  const int32_t* counts;       // [Q] consecutive rows of each
  const int32_t* term_counts;  // [R]
  const int32_t* slots;        // [terms] of all recipes, one behind the other
  const float* weights;        // [terms]
  const int32_t* slot_pages;   // [S, most_pages], -1 where there is none
  const int32_t* slot_ranks;   // [S] ranks of every module, else 0
  int64_t sequence_count;
  int64_t recipe_count;
  int64_t slot_count;
  int64_t most_pages;
  int32_t tile_rows;  // at most, of a tile
  int32_t processors;
};

// Writes the run to data [capacity] and tiles, items and pairs to counts [3]. Returns its length, 0 where this work is not for here: no
// rows, a slot that is none, a recipe of too many pages, or a run that does not fit.
__attribute__((visibility("default"))) int64_t openlora_tile_block(const OpenloraTileWork* work, int32_t* data, int64_t capacity,
                                                                   int64_t* counts);
}
