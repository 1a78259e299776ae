from itertools import pairwise

import pytest
import torch

from node.engine.batch import build_inputs
from node.engine.messages import Submit
from node.engine.runner import sample
from node.engine.sequence import Sequence
from node.engine.step_plan import Work
from node.request import AdapterTerm, DrawnToken, Sampling

SLOTS = {"x": 3, "y": 0}


def work(prompt_count, start, count, blocks, adapters=(), **sampling):
    terms = tuple(AdapterTerm(name, "/", weight) for name, weight in adapters)
    submit = Submit(
        sequence_id="s",
        tenant="t",
        prompt_ids=tuple(range(100, 100 + prompt_count)),
        terms=terms,
        sampling=Sampling(**{"max_new_tokens": 4, **sampling}),
    )
    sequence = Sequence(submit, 0, b"")
    sequence.blocks.extend(blocks)
    sequence.computed_count = start
    return Work.of(sequence, start, count)


def test_rows_of_a_decode_and_a_chunk():
    inputs = build_inputs([work(6, 5, 1, [7, 2]), work(12, 3, 6, [5, 1, 9])], 4, SLOTS.__getitem__)
    assert inputs.token_ids.tolist() == [105, 103, 104, 105, 106, 107, 108]
    assert inputs.positions.tolist() == [5, 3, 4, 5, 6, 7, 8]
    assert inputs.kv_slots.tolist() == [2 * 4 + 1, 5 * 4 + 3, 4, 5, 6, 7, 9 * 4]
    assert inputs.query_start.tolist() == [0, 1, 7]
    assert inputs.context_lens.tolist() == [6, 9]
    assert inputs.block_tables.tolist() == [[7, 2, 0], [5, 1, 9]]
    assert inputs.logit_rows.tolist() == [0]  # the chunk does not end its prompt
    assert inputs.lora is None


def test_dtypes_are_those_of_step_inputs():
    inputs = build_inputs([work(6, 4, 2, [7, 2], [("x", 1.0)])], 4, SLOTS.__getitem__)
    wide = (inputs.token_ids, inputs.positions, inputs.kv_slots, inputs.logit_rows)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    narrow = (inputs.query_start, inputs.context_lens, inputs.block_tables, inputs.lora.row_start, inputs.lora.slot)
    assert {tensor.dtype for tensor in narrow} == {torch.int32}
    assert inputs.lora.weight.dtype == torch.float32


def test_prompt_logprobs_want_every_row():
    items = [work(9, 2, 3, [0, 1, 2], prompt_logprobs=True), work(3, 2, 1, [3]), work(9, 0, 1, [4])]
    assert build_inputs(items, 4, SLOTS.__getitem__).logit_rows.tolist() == [0, 1, 2, 3]


def test_rows_that_all_want_logits_are_not_named():
    items = [work(9, 2, 3, [0, 1, 2], prompt_logprobs=True), work(3, 2, 1, [3])]
    assert build_inputs(items, 4, SLOTS.__getitem__).logit_rows is None


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 2)])
def test_every_row_has_the_slots_and_weights_of_its_sequence_in_recipe_order(counts):
    recipes = ([("x", 0.5), ("y", 2.0)], [], [("y", 1.0)])
    items = [work(6, 0, count, [0, 1], recipe) for count, recipe in zip(counts, recipes, strict=True)]
    found = build_inputs(items, 4, SLOTS.__getitem__).lora
    starts = found.row_start.tolist()
    row_terms = [list(zip(found.slot.tolist(), found.weight.tolist(), strict=True))[a:b] for a, b in pairwise(starts)]
    expected = [[(SLOTS[name], weight) for name, weight in recipe] for recipe in recipes]
    assert row_terms == [terms for terms, count in zip(expected, counts, strict=True) for _ in range(count)]


def test_results_go_to_the_work_they_belong_to():
    items = [
        work(6, 0, 3, [0, 1]),  # neither draws nor wants log-probabilities
        work(6, 0, 6, [2, 3], prompt_logprobs=True),
        work(3, 2, 1, [4]),
    ]
    logits = torch.randn(7, 200, generator=torch.Generator().manual_seed(0))
    chunk, scored, decode = sample(items, logits)
    assert (chunk.drawn, chunk.prompt_logprobs) == (None, ())
    assert len(scored.prompt_logprobs) == 5
    assert scored.prompt_logprobs[0] == DrawnToken(101, logits[0].log_softmax(-1)[101].item())
    assert scored.drawn.token_id == int(logits[5].argmax())
    assert decode.drawn.token_id == int(logits[6].argmax())
