from array import array

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.engine.blocks import BlockPool, extend_keys, namespace_key
from node.request import AdapterTerm


def keys_of(tokens, namespace=b"n" * 32, block_size=4):
    keys: list[bytes] = []
    extend_keys(keys, namespace, array("q", tokens), block_size, len(tokens))
    return keys


def test_keys_of_equal_blocks_after_different_prefixes_differ():
    first, second = keys_of([1, 2, 3, 4, 9, 9, 9, 9]), keys_of([5, 6, 7, 8, 9, 9, 9, 9])
    assert first[1] != second[1]


def test_keys_of_partial_block_are_not_made():
    assert len(keys_of([1, 2, 3, 4, 5])) == 1


@pytest.mark.parametrize(
    "other",
    [
        ("t2", "base", (AdapterTerm("a", "/a", 1.0),)),
        ("t", "base2", (AdapterTerm("a", "/a", 1.0),)),
        ("t", "base", ()),
        ("t", "base", (AdapterTerm("a", "/a", 0.5),)),
        ("t", "base", (AdapterTerm("a", "/a", 1.0), AdapterTerm("b", "/b", 1.0))),
        ("tb", "ase", (AdapterTerm("a", "/a", 1.0),)),
    ],
)
def test_namespace_of_other_tenant_base_or_recipe_differs(other):
    assert namespace_key("t", "base", (AdapterTerm("a", "/a", 1.0),)) != namespace_key(*other)


def test_namespace_of_reordered_recipe_differs():
    a, b = AdapterTerm("a", "/a", 1.0), AdapterTerm("b", "/b", 1.0)
    assert namespace_key("t", "base", (a, b)) != namespace_key("t", "base", (b, a))


def test_release_of_published_prefix_forgets_its_end_first():
    pool = BlockPool(2, 4)
    keys = keys_of(range(8))
    blocks = [pool.allocate(), pool.allocate()]
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    pool.allocate()
    assert pool.match(keys) == [blocks[0]]


def test_match_without_prefix_cache_finds_nothing():
    pool = BlockPool(1, 4, has_prefix_cache=False)
    block = pool.allocate()
    pool.publish(block, b"k")
    pool.release([block])
    assert pool.match([b"k"]) == []


def test_release_twice_is_refused():
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([block])


class BlockPoolMachine(RuleBasedStateMachine):
    """Random sequences take, publish, share and release blocks; no block is ever lost, doubled or wrong."""

    @initialize(count=st.integers(1, 12))
    def start(self, count):
        self.pool = BlockPool(count, 2)
        self.held: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what each block would hold, by a model that never forgets

    @rule(name=st.integers(0, 3), wanted=st.integers(1, 4))
    def grow(self, name, wanted):
        keys = [bytes([name, depth]) for depth in range(wanted)]
        blocks = self.pool.match(keys)
        assert [self.contents[block] for block in blocks] == keys[: len(blocks)]
        self.pool.share(blocks)
        for key in keys[len(blocks) :]:
            free_before = self.pool.free_count
            block = self.pool.allocate()
            assert (block is None) == (free_before == 0)
            if block is None:
                break
            assert all(block not in sequence for sequence in self.held)
            assert block not in blocks
            self.contents[block] = key
            self.pool.publish(block, key)
            blocks = [*blocks, block]
        self.held.append(blocks)

    @precondition(lambda self: getattr(self, "held", None))
    @rule(index=st.integers(0, 100))
    def finish(self, index):
        self.pool.release(self.held.pop(index % len(self.held)))

    @invariant()
    def counts_add_up(self):
        if hasattr(self, "pool"):
            assert self.pool.used_count == len({block for sequence in self.held for block in sequence})
            assert self.pool.used_count + self.pool.free_count == self.pool.block_count


TestBlockPoolMachine = BlockPoolMachine.TestCase
