"""The run of int32 that a GPU's step reads: sections, padding, and tokens that are still being drawn."""

import numpy as np
import pytest
import torch

from node.engine.device_batch import pending_places, step_shape, write_decode, write_rows
from node.engine.messages import Submit
from node.engine.sequence import Sequence
from node.engine.step_block import BlockLayout, StepBlock
from node.engine.step_plan import Work
from node.request import Sampling


def make_work(name, prompt, start, count, blocks, pending=0, **sampling):
    submit = Submit(
        sequence_id=name, tenant="t", prompt_ids=tuple(prompt), terms=(), sampling=Sampling(max_new_tokens=5, **sampling)
    )
    sequence = Sequence(submit, 0, b"")
    sequence.blocks.extend(blocks)
    sequence.pending_count = pending
    return Work.of(sequence, start, count)


def test_layout_sections_are_aligned_and_do_not_overlap():
    layout = BlockLayout.of(rows=5, sequences=3, logit_rows=2, table_width=7)
    starts = [
        layout.tokens, layout.sources, layout.positions, layout.kv_slots,
        layout.query_start, layout.context_lens, layout.logits, layout.wanted, layout.tables, layout.tiles,
    ]  # fmt: skip
    assert all(start % 4 == 0 for start in starts)
    sizes = [5, 5, 5, 5, 4, 3, 2, 2, 21]
    assert all(start + size <= following for start, size, following in zip(starts, sizes, starts[1:], strict=False))


def test_decode_rows_and_padding():
    work = [make_work("a", range(10, 16), 5, 1, [3, 1]), make_work("b", range(20, 23), 3, 1, [7], pending=1)]
    layout = BlockLayout.of(4, 4, 0, 3)
    block = StepBlock(8, layout.tiles, torch.device("cpu"))
    block.drawn[:3] = torch.tensor([90, 91, 92], dtype=torch.int32)
    host = block.begin(layout.tiles)
    host[:] = 77
    pending = pending_places(work, {"b": 2})
    write_decode(host, layout, work, 4, pending, block.source_of_own(layout.tokens), [0, 1])
    block.send(layout.tiles)

    assert pending == {1: 2}
    assert block.tokens[block.view(layout.sources, 4)][:2].tolist() == [15, 92]
    assert block.view(layout.positions, 4).tolist() == [5, 3, 0, 0]
    assert block.view(layout.kv_slots, 4).tolist() == [1 * 4 + 1, 7 * 4 + 3, -1, -1]
    assert block.view(layout.context_lens, 4).tolist() == [6, 4, 0, 0]
    assert block.view(layout.wanted, 4).tolist() == [0, 1, 0, 0]
    tables = block.view(layout.tables, 12).view(4, 3)
    assert tables[0, :2].tolist() == [3, 1]
    assert tables[1, 0] == 7


def test_rows_of_chunks_and_of_a_decode_together():
    work = [make_work("a", range(10, 30), 4, 6, [3, 1, 2]), make_work("b", range(20, 23), 3, 1, [7], pending=1)]
    shape = step_shape(work)
    layout = BlockLayout.of(shape.rows, 2, len(shape.logit_rows), shape.table_width)
    block = StepBlock(4, layout.tiles, torch.device("cpu"))
    block.drawn[0] = 55
    host = block.begin(layout.tiles)
    write_rows(host, layout, work, shape, 4, {1: 0}, block.source_of_own(layout.tokens), [1])
    block.send(layout.tiles)

    assert (shape.rows, shape.max_query, shape.max_context, shape.is_decode) == (7, 6, 10, False)
    assert shape.logit_rows.tolist() == [6]
    assert block.tokens[block.view(layout.sources, 7)].tolist() == [14, 15, 16, 17, 18, 19, 55]
    assert block.view(layout.positions, 7).tolist() == [4, 5, 6, 7, 8, 9, 3]
    assert block.view(layout.kv_slots, 7).tolist() == [4, 5, 6, 7, 8, 9, 31]
    assert block.view(layout.query_start, 3).tolist() == [0, 6, 7]
    assert block.view(layout.context_lens, 2).tolist() == [10, 4]
    assert block.view(layout.logits, 1).tolist() == [6]
    assert block.view(layout.wanted, 1).tolist() == [1]


def test_single_rows_between_chunks_are_written_as_each_alone():
    work = [
        make_work("a", range(10, 16), 5, 1, [3, 1]),
        make_work("b", range(20, 23), 3, 1, [7], pending=1),
        make_work("c", range(30, 44), 2, 9, [9, 4, 8]),
        make_work("d", range(50, 59), 8, 1, [5, 2, 6]),
        make_work("e", range(60, 62), 1, 2, [11], pending=1),
        make_work("f", range(70, 72), 1, 1, [0]),
    ]
    pending = pending_places(work, {"b": 2, "e": 4})
    layout = BlockLayout.of(20, 8, 6, 3)
    host = np.full(layout.tiles, 77, np.int32)
    write_rows(host, layout, work, step_shape(work), 4, pending, 1000)
    row = 0
    for index, item in enumerate(work):
        alone = np.full(layout.tiles, 77, np.int32)
        places = {0: pending[index]} if index in pending else {}
        write_rows(alone, layout, [item], step_shape([item]), 4, places, 1000 + row)
        for at in (layout.positions, layout.kv_slots, layout.sources):
            assert host[at + row : at + row + item.count].tolist() == alone[at : at + item.count].tolist(), item.sequence.id
        known = item.count - (index in pending)
        start = layout.tokens + row
        assert host[start : start + known].tolist() == list(item.sequence.tokens[item.start : item.start + known])
        assert host[layout.context_lens + index] == item.start + item.count
        row += item.count
        assert host[layout.query_start + index + 1] == row
    assert host[layout.kv_slots + row : layout.kv_slots + 20].tolist() == [-1] * (20 - row)


def test_prompt_log_probabilities_want_every_row():
    shape = step_shape([make_work("a", range(10), 2, 1, [0, 1, 2], prompt_logprobs=True), make_work("b", range(3), 0, 3, [4])])
    assert shape.logit_rows.tolist() == [0, 3]


def test_rows_that_all_want_logits_are_not_named():
    decode = make_work("b", range(3), 2, 1, [4])
    shape = step_shape([make_work("a", range(10), 2, 3, [0, 1, 2], prompt_logprobs=True), decode])
    assert (shape.logit_rows, shape.is_decode) == (None, False)
    shape = step_shape([decode])
    assert (shape.logit_rows, shape.is_decode) == (None, True)


def test_one_row_of_a_prompt_that_goes_on_wants_no_logits():
    shape = step_shape([make_work("a", range(10), 2, 1, [0]), make_work("b", range(3), 2, 1, [4])])
    assert shape.is_decode
    assert shape.logit_rows.tolist() == [1]


def test_token_that_nobody_draws_is_an_error():
    with pytest.raises(ValueError, match="neither known nor being drawn"):
        pending_places([make_work("a", range(3), 3, 1, [0], pending=1)], {"b": 0})


def test_step_beyond_the_capacity_is_refused():
    block = StepBlock(4, 100, torch.device("cpu"))
    with pytest.raises(ValueError, match="100"):
        block.begin(101)


def test_host_copies_take_turns():
    block = StepBlock(4, 8, torch.device("cpu"))
    first = block.begin(8)
    second = block.begin(8)
    assert not np.shares_memory(first, second)
    assert np.shares_memory(block.begin(8), first)
