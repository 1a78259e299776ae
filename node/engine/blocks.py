"""KV blocks: who holds which, and which free ones still hold a prefix worth reusing.

A block holds the keys and values of `block_size` consecutive tokens. A full block is published under a key that hashes its own
tokens and everything before them, so equal keys mean equal contents (vLLM calls it automatic prefix caching; the keys here start
from a namespace of tenant, base model and ordered recipe, so nobody can probe another tenant's prompts by timing).
Plain Python: block numbers only, no tensors.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from node.request import AdapterTerm


def namespace_key(tenant: str, base_id: str, terms: Seq[AdapterTerm]) -> bytes:
    """Return the 32-byte root of a hash chain: two sequences may share blocks only when this is equal.

    Weights count as well as adapters: the same tokens under another weight have other keys and values. Every field is preceded by
    its length, so that no two different tuples of fields give the same bytes.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"openlora-kv-v1")
    for text in (tenant, base_id):
        raw = text.encode()
        digest.update(struct.pack("<Q", len(raw)) + raw)
    for term in terms:
        raw = term.adapter_id.encode()
        digest.update(struct.pack("<Q", len(raw)) + raw + struct.pack("<d", term.weight))
    return digest.digest()


def extend_keys(keys: list[bytes], namespace: bytes, tokens: array[int], block_size: int, token_count: int) -> None:
    """Append the keys of every full block within the first `token_count` tokens that `keys` does not have yet, in place."""
    while (len(keys) + 1) * block_size <= token_count:
        start = len(keys) * block_size
        parent = keys[-1] if keys else namespace
        chunk = tokens[start : start + block_size].tobytes()
        keys.append(hashlib.blake2b(parent + chunk, digest_size=32).digest())


class BlockPool:
    """All KV blocks of one engine, each in exactly one state: empty, cached (free, contents reusable) or held by n sequences.

    Args:
        block_count: Blocks in the cache, at least 1.
        block_size: Tokens per block.
        has_prefix_cache: False: nothing is ever published, so nothing ever matches.
        capacity: Blocks that there can ever be, where `add` may bring more; None for `block_count`.

    Attributes:
        block_count: Blocks now. block_limit: those there were at first, which one sequence can always count on.
    """

    def __init__(self, block_count: int, block_size: int, has_prefix_cache: bool = True, *, capacity: int | None = None) -> None:
        if block_count < 1 or block_size < 1:
            raise ValueError(f"block_count is {block_count} and block_size is {block_size}; both must be at least 1")
        self.block_count = self.block_limit = block_count
        self.block_size = block_size
        self.capacity = block_count if capacity is None else capacity
        self._has_prefix_cache = has_prefix_cache
        self._borrow: Callable[[int], None] | None = None
        self._holders = [0] * self.capacity
        # A stack with block 0 on top: low numbers are handed out first, so memory that was never needed is never touched.
        self._empty = list(range(block_count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_by_key: dict[bytes, int] = {}
        self._key_by_block: dict[int, bytes] = {}

    @property
    def free_count(self) -> int:
        """Blocks that `allocate` can hand out: empty ones and cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def used_count(self) -> int:
        """Blocks held by at least one sequence."""
        return self.block_count - self.free_count

    def reserve(self, count: int) -> bool:
        """Whether `allocate` can hand out this many, blocks borrowed for it included."""
        if self.free_count < count and self._borrow is not None:
            self._borrow(count - self.free_count)
        return self.free_count >= count

    def borrow_from(self, lender: Callable[[int], None]) -> None:
        """Where to ask for more blocks: called with how many are missing, it may `add` some."""
        self._borrow = lender

    def add(self, blocks: Seq[int]) -> None:
        """Blocks that are ours from now on, empty ones."""
        self._empty.extend(reversed(blocks))
        self.block_count += len(blocks)

    def idle_units(self, unit_blocks: int) -> list[int]:
        """Runs of `unit_blocks` blocks (unit u begins at u * unit_blocks) that nobody holds, those with fewest contents first."""
        counts: dict[int, list[int]] = {}  # unit -> empty blocks, cached blocks
        for index, blocks in enumerate((self._empty, self._cached)):
            for block in blocks:
                counts.setdefault(block // unit_blocks, [0, 0])[index] += 1
        idle = [(cached, unit) for unit, (empty, cached) in counts.items() if empty + cached == unit_blocks]
        return [unit for _, unit in sorted(idle)]

    def withdraw(self, blocks: Seq[int]) -> bool:
        """Give up blocks, contents forgotten; False, and nothing happens, where one of them is held or not ours."""
        gone = set(blocks)
        empty = gone.intersection(self._empty)
        if any(block not in empty and block not in self._cached for block in blocks):
            return False
        for block in gone - empty:
            del self._cached[block]
            self._forget(block)
        self._empty = [block for block in self._empty if block not in gone]
        self.block_count -= len(gone)
        return True

    def blocks_for(self, token_count: int) -> int:
        """How many blocks `token_count` tokens need."""
        return -(-token_count // self.block_size)

    def allocate(self) -> int | None:
        """Take one block, forgetting the least recently used cached contents when none is empty; None when all are held."""
        if self._empty:
            block = self._empty.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of `keys`, without taking them."""
        blocks = []
        for key in keys:
            block = self._block_by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of matched blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Make the contents of a full, held block findable. When two sequences computed the same prefix, the first one stays."""
        if self._holders[block] < 1:
            raise ValueError(f"block {block} is not held; only a holder may publish it")
        if self._has_prefix_cache and key not in self._block_by_key and block not in self._key_by_block:
            self._block_by_key[key] = block
            self._key_by_block[block] = key

    def release(self, blocks: Seq[int]) -> None:
        """Stop holding a sequence's blocks, given in sequence order.

        They are let go last first: the end of a prefix is useless without its beginning, so it must be forgotten earlier.
        """
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_by_block:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def _forget(self, block: int) -> None:
        key = self._key_by_block.pop(block)
        del self._block_by_key[key]
