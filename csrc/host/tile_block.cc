// One pass each over recipes, tiles and processors; `csrc/cuda/lora_work.h` describes what it writes. Every number is what numpy computes in
// `lora_tiles.py` and `lora_deal.py`, which long steps use and the tests compare with.
#include "host/tile_block.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

namespace openlora {
namespace {

constexpr int64_t kHeaderInts = 32, kTileInts = 8, kEntryInts = 4, kItemInts = 8, kLineInts = 32, kSectionInts = 4;
constexpr int64_t kStreamInts = 32, kStreamTiles = 3, kNormInts = 16, kNormRows = 3;
constexpr int64_t kPageRank = 16, kMostEntries = (1 << 15) - 1, kMostWeighed = 16, kWeightSteps = 128;

struct Entry {
  int32_t page, slot, ranks, weight;
};

struct Tile {
  int64_t place, rows, recipe, first_pair;
};

int64_t aligned(int64_t ints, int64_t multiple) { return (ints + multiple - 1) / multiple * multiple; }

// Of each the sum of those before it; the sum of all at the end.
template <class Size>
std::vector<int64_t> starts_of(int64_t count, const Size& size) {
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + size(i);
  return starts;
}

class TileBlock {
 public:
  explicit TileBlock(const OpenloraTileWork& work) : work_(work) {}

  // False where the work is not for here.
  bool cut() { return group_rows() && find_entries() && (cut_tiles(), true); }

  int64_t tile_count() const { return static_cast<int64_t>(tiles_.size()); }
  int64_t item_count() const { return item_count_; }
  int64_t pair_count() const { return pair_count_; }

  int64_t write(int32_t* data, int64_t capacity) const {
    const int64_t rows = static_cast<int64_t>(places_.size()), deal_ints = work_.processors * (kStreamInts + kNormInts);
    const int64_t items_at = kHeaderInts + aligned(deal_ints, kSectionInts);
    const int64_t tiles_at = items_at + aligned(item_count_ * kItemInts, kSectionInts);
    const int64_t rows_at = tiles_at + aligned(tile_count() * kTileInts, kSectionInts);
    const int64_t entries_at = rows_at + aligned(rows, kSectionInts);
    const int64_t tile_of_at = entries_at + aligned(static_cast<int64_t>(entries_.size()) * kEntryInts, kSectionInts);
    const int64_t size = aligned(tile_of_at + aligned(rows, kSectionInts), kLineInts);
    if (size > capacity) return 0;
    memset(data, 0, size * sizeof(int32_t));
    int64_t most_rows = 0;
    for (const Tile& tile : tiles_) most_rows = std::max(most_rows, tile.rows);
    const int64_t header[] = {tile_count(), item_count_, rows, pair_count_, tiles_at, rows_at, entries_at, items_at, most_rows,
                              tile_of_at, work_.processors, 0, 0, 0, tiles_at, most_rows};
    std::copy(std::begin(header), std::end(header), data);
    write_tiles(data + tiles_at, data + items_at, data + tile_of_at);
    std::copy(places_.begin(), places_.end(), data + rows_at);
    if (!entries_.empty()) memcpy(data + entries_at, entries_.data(), entries_.size() * sizeof(Entry));
    deal_stream(data + tiles_at, data + kHeaderInts);
    deal_norm(data + tiles_at, data + kHeaderInts + work_.processors * kStreamInts);
    return size;
  }

 private:
  // The rows of one recipe after those of another.
  bool group_rows() {
    row_counts_.assign(work_.recipe_count, 0);
    int64_t total = 0;
    for (int64_t i = 0; i < work_.sequence_count; ++i) {
      if (work_.counts[i] == 0) continue;
      if (work_.recipes[i] < 0 || work_.recipes[i] >= work_.recipe_count || work_.counts[i] < 0) return false;
      row_counts_[work_.recipes[i]] += work_.counts[i];
      total += work_.counts[i];
    }
    std::vector<int64_t> next = starts_of(work_.recipe_count, [this](int64_t i) { return row_counts_[i]; });
    places_.resize(total);
    int64_t row = 0;
    for (int64_t i = 0; i < work_.sequence_count; ++i) {
      if (work_.counts[i] == 0) continue;
      int64_t& place = next[work_.recipes[i]];
      for (int32_t k = 0; k < work_.counts[i]; ++k) places_[place++] = static_cast<int32_t>(row++);
    }
    return total > 0;
  }

  bool find_entries() {
    first_entry_.assign(1, 0);
    int64_t term = 0;
    for (int64_t recipe = 0; recipe < work_.recipe_count; ++recipe) {
      for (const int64_t end = term + work_.term_counts[recipe]; term < end; ++term) {
        const int32_t slot = work_.slots[term];
        if (slot < 0 || slot >= work_.slot_count) return false;
        int32_t weight;
        memcpy(&weight, work_.weights + term, sizeof weight);
        for (int64_t ordinal = 0; ordinal < work_.most_pages; ++ordinal) {
          const int32_t page = work_.slot_pages[slot * work_.most_pages + ordinal];
          if (page < 0) continue;
          const int64_t ranks = std::clamp<int64_t>(work_.slot_ranks[slot] - ordinal * kPageRank, 0, kPageRank);
          entries_.push_back({page, slot, static_cast<int32_t>(ordinal | ranks << 16), weight});
        }
      }
      first_entry_.push_back(static_cast<int64_t>(entries_.size()));
      if (first_entry_[recipe + 1] - first_entry_[recipe] > kMostEntries) return false;
    }
    return true;
  }

  int64_t entry_count(const Tile& tile) const { return first_entry_[tile.recipe + 1] - first_entry_[tile.recipe]; }

  void cut_tiles() {
    int64_t place = 0;
    for (int64_t recipe = 0; recipe < work_.recipe_count; ++recipe) {
      for (int64_t left = row_counts_[recipe]; left > 0; left -= work_.tile_rows) {
        const Tile tile{place, std::min<int64_t>(left, work_.tile_rows), recipe, pair_count_};
        tiles_.push_back(tile);
        place += tile.rows;
        pair_count_ += tile.rows * entry_count(tile);
        item_count_ += entry_count(tile);
      }
    }
  }

  void write_tiles(int32_t* record, int32_t* item, int32_t* tile_of) const {
    for (int64_t index = 0; index < tile_count(); ++index, record += kTileInts) {
      const Tile& tile = tiles_[index];
      const int64_t count = entry_count(tile), first = first_entry_[tile.recipe];
      record[0] = static_cast<int32_t>(tile.place);
      record[1] = static_cast<int32_t>(tile.rows | count << 16);
      record[2] = static_cast<int32_t>(first);
      record[3] = static_cast<int32_t>(tile.first_pair);
      if (count > 0) memcpy(record + 4, &entries_[first], sizeof(Entry));
      for (int64_t entry = 0; entry < count; ++entry, item += kItemInts) {
        item[0] = record[0], item[1] = record[1], item[2] = record[3], item[3] = static_cast<int32_t>(entry);
        memcpy(item + 4, &entries_[first + entry], sizeof(Entry));
      }
      tile_of = std::fill_n(tile_of, tile.rows, static_cast<int32_t>(index));
    }
  }

  int64_t weight_of(int64_t tile) const {
    return kWeightSteps * (8 * std::min(entry_count(tiles_[tile]), kMostWeighed) + tiles_[tile].rows + 2);
  }

  void deal_stream(const int32_t* records, int32_t* deal) const {
    const int64_t count = tile_count(), processors = work_.processors;
    const auto starts = starts_of(count, [this](int64_t i) { return weight_of(i); });
    const auto first_pair = [&](int64_t tile) { return tile < count ? tiles_[tile].first_pair : pair_count_; };
    int64_t tile = 0, bound = 0;
    for (int64_t block = 0; block < processors; ++block, deal += kStreamInts) {
      const int64_t from = tile, begin = bound;
      bound = (block + 1) * starts[count] / processors;
      while (tile < count && starts[tile + 1] <= bound) ++tile;
      const int64_t ends[2][2] = {{from, begin}, {tile, bound}};
      for (int end = 0; end < 2; ++end) {
        const int64_t at = ends[end][0];
        deal[3 * end] = static_cast<int32_t>(at);
        deal[3 * end + 1] = static_cast<int32_t>(ends[end][1] - starts[at]);
        deal[3 * end + 2] = static_cast<int32_t>(at < count ? weight_of(at) : 1);
      }
      const int64_t behind = bound > begin ? tile + (deal[4] > 0) : from;
      deal[6] = static_cast<int32_t>(first_pair(from));
      deal[7] = static_cast<int32_t>(first_pair(behind) - first_pair(from));
      const int64_t met = std::clamp<int64_t>(behind - from, 0, kStreamTiles);
      memcpy(deal + 8, records + from * kTileInts, met * kTileInts * sizeof(int32_t));
    }
  }

  int64_t units(int64_t size) const {
    int64_t total = 0;
    for (const Tile& tile : tiles_) total += (tile.rows + size - 1) / size;
    return total;
  }

  void deal_norm(const int32_t* records, int32_t* deal) const {
    const int64_t processors = work_.processors;
    int64_t size = 1;
    while (size < kNormRows && units(size) > processors) ++size;
    const int64_t total = units(size);
    const auto first_of = [&](int64_t block) { return total <= processors ? std::min(block, total) : total * block / processors; };
    int64_t tile = 0, before = 0;  // units before the tile
    for (int64_t block = 0; block < processors; ++block, deal += kNormInts) {
      const int64_t unit = first_of(block), count = first_of(block + 1) - unit;
      deal[2] = static_cast<int32_t>(size);
      deal[3] = static_cast<int32_t>(count);
      std::fill_n(deal + 12, kNormRows, -1);
      if (count == 0) continue;
      for (int64_t more; before + (more = (tiles_[tile].rows + size - 1) / size) <= unit; ++tile) before += more;
      const int64_t place = (unit - before) * size;
      deal[0] = static_cast<int32_t>(tile);
      deal[1] = static_cast<int32_t>(place);
      memcpy(deal + 4, records + tile * kTileInts, kTileInts * sizeof(int32_t));
      for (int64_t k = 0; k < size && place + k < tiles_[tile].rows; ++k) deal[12 + k] = places_[tiles_[tile].place + place + k];
    }
  }

  const OpenloraTileWork& work_;
  std::vector<int64_t> row_counts_, first_entry_;
  std::vector<int32_t> places_;
  std::vector<Entry> entries_;
  std::vector<Tile> tiles_;
  int64_t item_count_ = 0, pair_count_ = 0;
};

}  // namespace
}  // namespace openlora

int64_t openlora_tile_block(const OpenloraTileWork* work, int32_t* data, int64_t capacity, int64_t* counts) {
  try {
    openlora::TileBlock block(*work);
    if (!block.cut()) return 0;
    counts[0] = block.tile_count(), counts[1] = block.item_count(), counts[2] = block.pair_count();
    return block.write(data, capacity);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
