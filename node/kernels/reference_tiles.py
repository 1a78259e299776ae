"""What the CUDA LoRA kernels compute, in plain torch on the host, from the same tiles and pages. Speed is no goal here.

Shape letters: T rows (tokens), V (row, entry) pairs, G modules of one fused linear, K inputs, N columns of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from node.kernels.lora import LoraPool
from node.kernels.lora_tiles import ENTRY_INTS, ITEM_INTS, TILE_INTS, Ints


@dataclass(frozen=True, slots=True)
class ReadTile:
    """One tile as a kernel reads it: rows [R] and entries [E] of (page, slot, ordinal, weight)."""

    rows: list[int]
    entries: list[tuple[int, int, int, float]]
    first_pair: int


def read_tiles(block: Ints) -> list[ReadTile]:
    """Decode a block of tiles."""
    tile_count, _, _, _, tiles, rows, entries = (int(value) for value in block[:7])
    found = []
    for index in range(tile_count):
        place, packed, first_entry, first_pair = (int(value) for value in block[tiles + TILE_INTS * index :][:4])
        table = block[entries + ENTRY_INTS * first_entry :][: ENTRY_INTS * (packed >> 16)].reshape(-1, ENTRY_INTS)
        weights = table[:, 3].copy().view(np.float32)
        found.append(
            ReadTile(
                block[rows + place :][: packed & 0xFFFF].tolist(),
                [(int(e[0]), int(e[1]), int(e[2]) & 0xFFFF, float(w)) for e, w in zip(table, weights, strict=True)],
                first_pair,
            )
        )
    return found


def read_items(block: Ints) -> list[tuple[int, int, tuple[int, int, int, float]]]:
    """(first place, entry of the tile, the entry) of every item."""
    count, items = int(block[1]), int(block[7])
    found = block[items:][: ITEM_INTS * count].reshape(-1, ITEM_INTS)
    weights = found[:, 7].copy().view(np.float32)
    entries = [(int(i[4]), int(i[5]), int(i[6]) & 0xFFFF, float(w)) for i, w in zip(found, weights, strict=True)]
    return [(int(i[0]), int(i[3]), entry) for i, entry in zip(found, entries, strict=True)]


def read_tile_of(block: Ints) -> list[int]:
    """The tile of every place."""
    return [int(tile) for tile in block[block[9] :][: block[2]]]


def reference_shrink(x: Tensor, block: Ints, pool: LoraPool, spans: Sequence[Sequence[int]]) -> Tensor:
    """v[pair, g] = weight * scale * x A_g^T; zero beyond a module's rank. x: [T, K]; returns [V, G, page_rank] in x's dtype."""
    v = x.new_zeros((int(block[3]), len(spans), pool.page_rank))
    for tile in read_tiles(block):
        for entry, (page, slot, ordinal, weight) in enumerate(tile.entries):
            for g, (module, a_offset, _, inputs, _, _) in enumerate(spans):
                count = _ranks_in_page(pool, module, slot, ordinal)
                a = pool.pages[page, a_offset : a_offset + count * inputs].view(count, inputs).to(x.dtype)
                pairs = tile.first_pair + torch.arange(len(tile.rows)) * len(tile.entries) + entry
                v[pairs, g, :count] = (x[tile.rows] @ a.T) * (pool.scales[module, slot].to(x.dtype) * weight)
    return v


def reference_expand(v: Tensor, block: Ints, pool: LoraPool, spans: Sequence[Sequence[int]], rows: int, columns: int) -> Tensor:
    """Sum over a row's entries of v B, at each module's columns. v: [V, G, page_rank]; returns [rows, columns] in v's dtype."""
    delta = v.new_zeros((rows, columns))
    for row, pair, (page, slot, ordinal, _) in _pairs(block):
        for g, (module, _, b_offset, _, outputs, column) in enumerate(spans):
            count = _ranks_in_page(pool, module, slot, ordinal)
            b = pool.pages[page, b_offset : b_offset + count * outputs].view(count, outputs).to(v.dtype)
            delta[row, column : column + outputs] += v[pair, g, :count] @ b
    return delta


def _pairs(block: Ints) -> Iterator[tuple[int, int, tuple[int, int, int, float]]]:
    for tile in read_tiles(block):
        for place, row in enumerate(tile.rows):
            for entry, found in enumerate(tile.entries):
                yield row, tile.first_pair + place * len(tile.entries) + entry, found


def _ranks_in_page(pool: LoraPool, module: int, slot: int, ordinal: int) -> int:
    return max(0, min(pool.page_rank, int(pool.ranks[module, slot]) - ordinal * pool.page_rank))
