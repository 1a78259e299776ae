"""Units between KV blocks and adapter pages: none has two owners, none is lost, what is held never moves."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.engine.blocks import BlockPool
from node.engine.border import Border

UNIT_BLOCKS, UNITS, KV_UNITS = 3, 6, 4


class Pages:
    """Adapter pages of which some are in use."""

    def __init__(self, pages):
        self.free, self.used = list(pages), []

    def take_page(self):
        return self.free.pop() if self.free else None

    def add_page(self, page):
        self.free.append(page)


class World:
    def __init__(self):
        self.blocks = BlockPool(KV_UNITS * UNIT_BLOCKS, 4, capacity=UNITS * UNIT_BLOCKS)
        self.pages = Pages(range(KV_UNITS, UNITS))
        self.border = Border(self.blocks, self.pages, UNIT_BLOCKS)
        self.blocks.borrow_from(self.border.lend_blocks)

    def kv_blocks(self):
        return set(self.blocks._empty) | set(self.blocks._cached) | {b for b, n in enumerate(self.blocks._holders) if n}


class Borders(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.world = World()
        self.held = []
        self.keys = 0

    @rule(count=st.integers(1, 7))
    def allocate(self, count):
        world = self.world
        before = world.blocks.free_count + UNIT_BLOCKS * len(world.pages.free)
        assert world.blocks.reserve(count) == (before >= count)
        if world.blocks.free_count >= count:
            self.held.append([world.blocks.allocate() for _ in range(count)])
            assert None not in self.held[-1]

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 20), is_published=st.booleans())
    def release(self, which, is_published):
        blocks = self.held.pop(which % len(self.held))
        for block in blocks if is_published else []:
            self.keys += 1
            self.world.blocks.publish(block, self.keys.to_bytes(4, "big"))
        self.world.blocks.release(blocks)

    @rule(count=st.integers(1, 3))
    def want_pages(self, count):
        blocks, free = self.world.blocks, len(self.world.pages.free)
        idle, room = len(blocks.idle_units(UNIT_BLOCKS)), 0
        while room < min(count, idle) and 4 * (blocks.free_count - (room + 1) * UNIT_BLOCKS) >= (
            blocks.block_count - room * UNIT_BLOCKS
        ):
            room += 1
        self.world.border.lend_pages(count)
        assert len(self.world.pages.free) == free + room

    @rule()
    def use_page(self):
        if self.world.pages.free:
            self.world.pages.used.append(self.world.pages.free.pop())

    @rule()
    def stop_using_page(self):
        if self.world.pages.used:
            self.world.pages.free.append(self.world.pages.used.pop())

    @invariant()
    def every_unit_has_one_owner(self):
        kv, pages = self.world.kv_blocks(), [*self.world.pages.free, *self.world.pages.used]
        paged = {block for page in pages for block in range(page * UNIT_BLOCKS, (page + 1) * UNIT_BLOCKS)}
        assert not kv & paged
        assert kv | paged == set(range(UNITS * UNIT_BLOCKS))
        assert self.world.blocks.block_count == len(kv)
        assert self.world.blocks.used_count == len({block for blocks in self.held for block in blocks})


TestBorders = Borders.TestCase
TestBorders.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.fixture
def world():
    return World()


def test_own_blocks_are_used_before_anything_is_borrowed(world):
    assert world.blocks.reserve(KV_UNITS * UNIT_BLOCKS)
    assert world.border.moved_to_blocks_total == 0
    assert world.blocks.reserve(KV_UNITS * UNIT_BLOCKS + 1)
    assert world.border.moved_to_blocks_total == 1


def test_unit_with_a_held_block_is_never_lent(world):
    held = [world.blocks.allocate() for _ in range(KV_UNITS * UNIT_BLOCKS)]
    world.blocks.release(held[1:])
    world.border.lend_pages(UNITS)
    assert held[0] // UNIT_BLOCKS not in world.pages.free
    assert world.border.moved_to_pages_total == KV_UNITS - 1


def test_quarter_of_the_blocks_stays_free(world):
    world.border.lend_pages(UNITS)
    assert world.blocks.free_count == UNIT_BLOCKS == world.blocks.block_count


def test_empty_units_are_lent_before_cached_prefixes_are_forgotten(world):
    first = [world.blocks.allocate() for _ in range(UNIT_BLOCKS)]
    for index, block in enumerate(first):
        world.blocks.publish(block, bytes([index]))
    world.blocks.release(first)
    world.border.lend_pages(KV_UNITS - 1)
    assert world.border.moved_to_pages_total == KV_UNITS - 1
    assert world.blocks.match([b"\x00"]) == first[:1]


def test_cached_prefixes_are_forgotten_with_their_blocks(world):
    blocks = [world.blocks.allocate() for _ in range(KV_UNITS * UNIT_BLOCKS)]
    for index, block in enumerate(blocks):
        world.blocks.publish(block, bytes([index]))
    world.blocks.release(blocks)
    world.border.lend_pages(1)
    lent = world.pages.free[-1]
    kept = [index for index, block in enumerate(blocks) if block // UNIT_BLOCKS != lent]
    assert [index for index in range(len(blocks)) if world.blocks.match([bytes([index])])] == kept


def test_blocks_of_another_are_not_withdrawn(world):
    block = world.blocks.allocate()
    assert not world.blocks.withdraw([block])
    assert not world.blocks.withdraw([UNITS * UNIT_BLOCKS - 1])
    assert world.blocks.block_count == KV_UNITS * UNIT_BLOCKS
