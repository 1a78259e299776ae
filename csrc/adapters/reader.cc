// Work is cut into leaves of the tree hash (1 MiB; most tensors are one leaf) and dealt out to the threads, longest first, like cards, so
// that all have the same bytes of each size. A thread goes through 16 of its leaves side by side in pieces of 32 KiB: each piece is read
// from the page cache into the thread's buffers, converted where the dtypes differ and written to the pages; then 16 pieces are hashed
// together, while all of it lies in the second-level cache (512 KiB a thread). A leaf that ends makes room for the next.
// Where placing and hashing are two calls, the bytes read lie in memory of the reader in between, a leaf behind the other.
// Bytes: file once, pages once. Bound: SHA-256, 1.1 GB/s a thread one by one, about 3.5 GB/s 16 side by side (Xeon, 3 GHz).
#include "adapters/reader.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "adapters/crew.h"
#include "adapters/placement.h"
#include "adapters/sha256.h"

namespace openlora {
namespace {

constexpr int64_t kLeafBytes = int64_t{1} << 20;
constexpr int kShortFile = -1;
constexpr int kDoesNotFit = -2;
constexpr int kMaxThreads = 64;
constexpr int64_t kPieceBytes = 32 << 10;
constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kMarginBytes = 64;  // before a piece: the byte of the message that the last piece left over, at the very end

struct Leaf {
  int64_t tensor, begin_bytes, size_bytes;
  int64_t kept_bytes;  // where its bytes are kept, behind a margin of its own
};

// The leaves a thread has in hand, side by side.
struct Lanes {
  HashLanes hash;
  int count = 0;
  int64_t leaf[kLanes];
  int64_t done_bytes[kLanes];
};

// What one thread reads into.
struct Buffers {
  alignas(64) uint8_t pieces[kLanes][kMarginBytes + kPieceBytes];
  alignas(64) uint8_t converted[2 * kPieceBytes];
};

struct Free {
  void operator()(uint8_t* bytes) const { free(bytes); }
};

// Threads and what each reads into; what was placed and is not hashed yet.
struct Reader {
  explicit Reader(int thread_count) : crew(thread_count), buffers(new Buffers[crew.size()]) {}

  // At least so many bytes in huge pages, kept for the next adapter; null when there is no memory.
  uint8_t* keep(int64_t size_bytes) {
    if (size_bytes > room_bytes) {
      kept.reset();
      room_bytes = (size_bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
      kept.reset(static_cast<uint8_t*>(aligned_alloc(kHugePageBytes, room_bytes)));
      if (kept == nullptr) room_bytes = 0;
      if (kept != nullptr) madvise(kept.get(), room_bytes, MADV_HUGEPAGE);
    }
    return kept.get();
  }

  Crew crew;
  std::unique_ptr<Buffers[]> buffers;
  std::unique_ptr<uint8_t[], Free> kept;
  int64_t room_bytes = 0;
};

int64_t tensor_bytes(const OpenloraTensor& t) { return t.rows * t.columns * item_bytes(static_cast<Dtype>(t.dtype)); }

bool is_inside(const OpenloraTensor& t, const OpenloraPlacement& place, const OpenloraPages& p) {
  if (place.first_row < 0 || place.row_count < 1 || place.first_row > t.rows - place.row_count) return false;
  const int64_t rank = place.is_transposed ? t.columns : place.row_count, width = place.is_transposed ? place.row_count : t.columns;
  if (rank > p.page_count * p.page_rank || place.page_offset < 0 || place.page_offset > p.page_elements) return false;
  return width <= (p.page_elements - place.page_offset) / std::min(rank, p.page_rank);
}

bool is_sound(const OpenloraTensor& t, const OpenloraPlacement* placements, int64_t placement_count, const OpenloraPages& p) {
  constexpr int64_t kMax = int64_t{1} << 40;
  if (t.rows < 1 || t.columns < 1 || t.rows > kMax / t.columns || t.dtype < 0 || t.dtype > 2 || t.file_offset < 0) return false;
  if (t.placement_count < 0 || t.first_placement < 0 || t.first_placement > placement_count - t.placement_count) return false;
  for (int64_t i = 0; i < t.placement_count; ++i) {
    if (!is_inside(t, placements[t.first_placement + i], p)) return false;
  }
  return true;
}

bool are_sound(const OpenloraTensor* tensors, int64_t tensor_count, const OpenloraPlacement* placements, int64_t placement_count,
               const OpenloraPages& p) {
  if ((p.dtype != 0 && p.dtype != 2) || p.page_rank < 1 || p.page_count < 1) return false;
  return std::all_of(tensors, tensors + tensor_count,
                     [&](const OpenloraTensor& t) { return is_sound(t, placements, placement_count, p); });
}

int read_exactly(int descriptor, uint8_t* target, int64_t size_bytes, int64_t offset) {
  while (size_bytes > 0) {
    const ssize_t got = pread(descriptor, target, size_bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kShortFile;
    target += got, offset += got, size_bytes -= got;
  }
  return 0;
}

class Reading {
 public:
  Reading(int thread_count, int descriptor, const OpenloraTensor* tensors, int64_t tensor_count, const OpenloraPlacement* placements,
          const OpenloraPages& pages)
      : thread_count_(thread_count), descriptor_(descriptor), tensors_(tensors), placements_(placements), pages_(pages) {
    int64_t end = 0;
    for (int64_t i = 0; i < tensor_count; ++i) {
      first_leaf_.push_back(static_cast<int64_t>(leaves_.size()));
      const int64_t size = tensor_bytes(tensors[i]);
      for (int64_t at = 0; at < size; at += kLeafBytes) {
        leaves_.push_back({i, at, std::min(kLeafBytes, size - at), end + kMarginBytes});
        end += kMarginBytes + (leaves_.back().size_bytes + kMarginBytes - 1) / kMarginBytes * kMarginBytes;
      }
    }
    first_leaf_.push_back(leaf_count());
    kept_bytes_ = end;
    digests_.resize(leaves_.size() * kDigestBytes);
    order_.resize(leaves_.size());
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [this](int64_t a, int64_t b) { return leaves_[a].size_bytes > leaves_[b].size_bytes; });
  }

  // Reads, writes to the pages and hashes.
  int run(Reader& reader) {
    return deal(reader, [this](int hand, Buffers& buffers) { return process(hand, buffers); });
  }

  // Reads, writes to the pages and keeps what was read.
  int place(Reader& reader) {
    kept_ = reader.keep(kept_bytes_);
    if (kept_ == nullptr) return ENOMEM;
    return deal(reader, [this](int hand, Buffers& buffers) { return place_leaves(hand, buffers); });
  }

  // Hashes what `place` of the same tensors kept.
  int hash(Reader& reader) {
    kept_ = reader.kept.get();
    if (kept_ == nullptr || reader.room_bytes < kept_bytes_) return kDoesNotFit;
    return deal(reader, [this](int hand, Buffers& buffers) { return process(hand, buffers); });
  }

  // Semantics: `attribution/treehash.py`.
  void root(int64_t tensor, uint8_t* digest) const {
    std::vector<uint8_t> level(digests_.begin() + first_leaf_[tensor] * kDigestBytes,
                               digests_.begin() + first_leaf_[tensor + 1] * kDigestBytes);
    while (level.size() > kDigestBytes) {
      const size_t count = level.size() / kDigestBytes;
      for (size_t i = 0; i + 1 < count; i += 2) {
        uint8_t node[kDigestBytes];
        sha256(0x01, level.data() + i * kDigestBytes, 2 * kDigestBytes, node);
        memcpy(level.data() + i / 2 * kDigestBytes, node, kDigestBytes);
      }
      if (count % 2 == 1) memmove(level.data() + count / 2 * kDigestBytes, level.data() + (count - 1) * kDigestBytes, kDigestBytes);
      level.resize((count + 1) / 2 * kDigestBytes);
    }
    uint8_t sealed[8 + kDigestBytes];
    const uint64_t size = tensor_bytes(tensors_[tensor]);
    for (int i = 0; i < 8; ++i) sealed[i] = static_cast<uint8_t>(size >> (56 - 8 * i));
    memcpy(sealed + 8, level.data(), kDigestBytes);
    sha256(0x02, sealed, sizeof sealed, digest);
  }

 private:
  int64_t leaf_count() const { return static_cast<int64_t>(leaves_.size()); }

  // Every thread goes through one hand of leaves.
  template <class Work>
  int deal(Reader& reader, const Work& work) {
    hands_ = static_cast<int>(std::clamp<int64_t>(std::min(reader.crew.size(), thread_count_), 1, leaf_count()));
    reader.crew.run([&](int member) {
      if (member >= hands_) return;
      const int fault = work(member, reader.buffers[member]);
      fence();
      if (fault != 0) fail(fault);
    });
    return fault_.load();
  }

  int place_leaves(int hand, Buffers& buffers) const {
    for (int64_t next = hand; next < leaf_count() && fault_.load() == 0; next += hands_) {
      const Leaf& leaf = leaves_[order_[next]];
      const OpenloraTensor& tensor = tensors_[leaf.tensor];
      uint8_t* kept = kept_ + leaf.kept_bytes;
      kept[-1] = 0x00;  // the prefix of a leaf
      for (int64_t at = 0; at < leaf.size_bytes; at += kPieceBytes) {
        const int64_t size = std::min(kPieceBytes, leaf.size_bytes - at), begin = leaf.begin_bytes + at;
        const int fault = read_exactly(descriptor_, kept + at, size, tensor.file_offset + begin);
        if (fault != 0) return fault;
        write(tensor, kept + at, buffers.converted, begin, size);
      }
    }
    return 0;
  }

  int process(int hand, Buffers& buffers) {
    Lanes lanes;
    for (int64_t next = hand;;) {
      for (; lanes.count < kLanes && next < leaf_count(); next += hands_) {
        lanes.leaf[lanes.count] = order_[next];
        lanes.done_bytes[lanes.count] = 0;
        if (kept_ == nullptr) buffers.pieces[lanes.count][kMarginBytes - 1] = 0x00;  // the prefix of a leaf
        lanes.hash.start(lanes.count++);
      }
      if (lanes.count == 0) return 0;
      if (kept_ != nullptr) fetch_pieces(lanes);
      const int fault = kept_ != nullptr ? 0 : read_pieces(lanes, buffers);
      if (fault != 0) return fault;
      hash_pieces(lanes, buffers);
      if (fault_.load() != 0) return 0;
    }
  }

  int read_pieces(const Lanes& lanes, Buffers& buffers) const {
    for (int lane = 0; lane < lanes.count; ++lane) {
      const Leaf& leaf = leaves_[lanes.leaf[lane]];
      const int64_t begin = leaf.begin_bytes + lanes.done_bytes[lane], size = piece_bytes(lanes, lane);
      uint8_t* piece = buffers.pieces[lane] + kMarginBytes;
      const int fault = read_exactly(descriptor_, piece, size, tensors_[leaf.tensor].file_offset + begin);
      if (fault != 0) return fault;
      write(tensors_[leaf.tensor], piece, buffers.converted, begin, size);
    }
    return 0;
  }

  int64_t piece_bytes(const Lanes& lanes, int lane) const {
    return std::min(kPieceBytes, leaves_[lanes.leaf[lane]].size_bytes - lanes.done_bytes[lane]);
  }

  // Sixteen streams side by side are more than a core follows by itself: they are sent for one by one.
  void fetch_pieces(const Lanes& lanes) const {
    for (int lane = 0; lane < lanes.count; ++lane) {
      const uint8_t* piece = kept_ + leaves_[lanes.leaf[lane]].kept_bytes + lanes.done_bytes[lane];
      for (int64_t at = 0; at < piece_bytes(lanes, lane); at += kMarginBytes) __builtin_prefetch(piece + at, 0, 2);
    }
  }

  // The message from the byte before a lane's piece on: the prefix, or what the piece before left over.
  const uint8_t* message(const Lanes& lanes, const Buffers& buffers, int lane) const {
    if (kept_ == nullptr) return buffers.pieces[lane] + kMarginBytes - 1;
    return kept_ + leaves_[lanes.leaf[lane]].kept_bytes + lanes.done_bytes[lane] - 1;
  }

  // Blocks that every lane has are hashed side by side, the rest of longer pieces alone. Lanes whose leaf ended are closed.
  void hash_pieces(Lanes& lanes, Buffers& buffers) {
    const uint8_t* blocks[kLanes];
    int64_t left[kLanes];  // bytes of the message at blocks[lane]: one left over, and the piece
    int64_t shared = kPieceBytes;
    for (int lane = 0; lane < lanes.count; ++lane) {
      blocks[lane] = message(lanes, buffers, lane);
      left[lane] = 1 + piece_bytes(lanes, lane);
      shared = std::min(shared, left[lane] / kBlockBytes);
    }
    if (shared > 0) lanes.hash.add(blocks, lanes.count, shared);
    for (int lane = 0; lane < lanes.count; ++lane) {
      left[lane] -= shared * kBlockBytes;
      if (const int64_t own = left[lane] / kBlockBytes; own > 0) {
        lanes.hash.add_one(lane, blocks[lane], own);
        blocks[lane] += own * kBlockBytes, left[lane] -= own * kBlockBytes;
      }
      lanes.done_bytes[lane] += piece_bytes(lanes, lane);
      if (kept_ == nullptr) buffers.pieces[lane][kMarginBytes - 1] = *blocks[lane];  // goes before the next piece
    }
    int kept = 0;
    for (int lane = 0; lane < lanes.count; ++lane) {
      const int64_t size = leaves_[lanes.leaf[lane]].size_bytes;
      if (lanes.done_bytes[lane] == size) {
        lanes.hash.finish(lane, blocks[lane], left[lane], size + 1, digests_.data() + lanes.leaf[lane] * kDigestBytes);
      } else {
        move_lane(lanes, buffers, lane, kept++);
      }
    }
    lanes.count = kept;
  }

  static void move_lane(Lanes& lanes, Buffers& buffers, int from, int to) {
    if (from == to) return;
    lanes.leaf[to] = lanes.leaf[from];
    lanes.done_bytes[to] = lanes.done_bytes[from];
    buffers.pieces[to][kMarginBytes - 1] = buffers.pieces[from][kMarginBytes - 1];
    for (auto& word : lanes.hash.words) word[to] = word[from];
  }

  // Bytes begin_bytes .. of a tensor into the pages.
  void write(const OpenloraTensor& t, const uint8_t* raw, uint8_t* converted, int64_t begin_bytes, int64_t size_bytes) const {
    if (t.placement_count == 0) return;
    const auto dtype = static_cast<Dtype>(t.dtype), page_dtype = static_cast<Dtype>(pages_.dtype);
    const int64_t begin = begin_bytes / item_bytes(dtype), count = size_bytes / item_bytes(dtype);
    if (dtype != page_dtype) {
      convert(raw, dtype, converted, page_dtype, count);
      raw = converted;
    }
    for (int64_t i = 0; i < t.placement_count; ++i) {
      const OpenloraPlacement& place = placements_[t.first_placement + i];
      if (page_dtype == Dtype::kFloat32) {
        put(t, place, reinterpret_cast<const uint32_t*>(raw), begin, count);
      } else {
        put(t, place, reinterpret_cast<const uint16_t*>(raw), begin, count);
      }
    }
  }

  // The part of elements begin .. begin + count - 1 that lies in the placement's rows.
  template <class T>
  void put(const OpenloraTensor& t, const OpenloraPlacement& place, const T* values, int64_t begin, int64_t count) const {
    const int64_t first = place.first_row * t.columns;
    const int64_t from = std::max(begin, first), to = std::min(begin + count, first + place.row_count * t.columns);
    if (from >= to) return;
    const Target target{place.is_transposed ? place.row_count : t.columns, place.page_offset, pages_.page_rank, pages_.pages};
    if (place.is_transposed) {
      place_columns(target, t.columns, values + (from - begin), from - first, to - from);
    } else {
      place_rows(target, values + (from - begin), from - first, to - from);
    }
  }

  void fail(int fault) {
    int expected = 0;
    fault_.compare_exchange_strong(expected, fault);
  }

  const int thread_count_;
  const int descriptor_;
  const OpenloraTensor* const tensors_;
  const OpenloraPlacement* const placements_;
  const OpenloraPages pages_;
  std::vector<Leaf> leaves_;
  std::vector<int64_t> first_leaf_;
  std::vector<int64_t> order_;  // leaves, longest first, so that those of one size lie side by side
  std::vector<uint8_t> digests_;
  int64_t kept_bytes_ = 0;
  uint8_t* kept_ = nullptr;  // null: what is read is hashed at once
  int hands_ = 1;
  std::atomic<int> fault_{0};
};

}  // namespace
}  // namespace openlora

void* openlora_reader_open(int thread_count) {
  try {
    return new openlora::Reader(std::clamp(thread_count, 1, openlora::kMaxThreads));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void openlora_reader_close(void* reader) { delete static_cast<openlora::Reader*>(reader); }

int openlora_read_adapter(void* reader, int thread_count, int descriptor, const OpenloraTensor* tensors, int64_t tensor_count,
                          const OpenloraPlacement* placements, int64_t placement_count, const OpenloraPages* pages, uint8_t* roots) {
  if (!openlora::are_sound(tensors, tensor_count, placements, placement_count, *pages)) return openlora::kDoesNotFit;
  try {
    openlora::Reading reading(thread_count, descriptor, tensors, tensor_count, placements, *pages);
    const int fault = reading.run(*static_cast<openlora::Reader*>(reader));
    for (int64_t i = 0; fault == 0 && i < tensor_count; ++i) reading.root(i, roots + i * openlora::kDigestBytes);
    return fault;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

int openlora_place_adapter(void* reader, int thread_count, int descriptor, const OpenloraTensor* tensors, int64_t tensor_count,
                           const OpenloraPlacement* placements, int64_t placement_count, const OpenloraPages* pages) {
  if (!openlora::are_sound(tensors, tensor_count, placements, placement_count, *pages)) return openlora::kDoesNotFit;
  try {
    openlora::Reading reading(thread_count, descriptor, tensors, tensor_count, placements, *pages);
    return reading.place(*static_cast<openlora::Reader*>(reader));
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

int openlora_hash_placed(void* reader, int thread_count, const OpenloraTensor* tensors, int64_t tensor_count, uint8_t* roots) {
  try {
    openlora::Reading reading(thread_count, -1, tensors, tensor_count, nullptr, OpenloraPages{});
    const int fault = reading.hash(*static_cast<openlora::Reader*>(reader));
    for (int64_t i = 0; fault == 0 && i < tensor_count; ++i) reading.root(i, roots + i * openlora::kDigestBytes);
    return fault;
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}

void openlora_sha256(uint8_t prefix, const uint8_t* data, int64_t size_bytes, int is_portable, uint8_t* digest) {
  (is_portable != 0 ? openlora::sha256_portable : openlora::sha256)(prefix, data, static_cast<size_t>(size_bytes), digest);
}
