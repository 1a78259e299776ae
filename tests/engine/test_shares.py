from node.engine.messages import Submit
from node.engine.sequence import Sequence
from node.engine.shares import Shares
from node.request import Sampling


def running(*spec):
    """(tenant, blocks) of every running sequence, in order of arrival."""
    found = []
    for index, (tenant, blocks) in enumerate(spec):
        submit = Submit(sequence_id=str(index), tenant=tenant, prompt_ids=(1,), terms=(), sampling=Sampling(max_new_tokens=1))
        sequence = Sequence(submit, index, b"")
        sequence.blocks.extend(range(blocks))
        found.append(sequence)
    return found


def test_tenant_alone_may_hold_everything():
    sequences = running(*[("a", 1)] * 8)
    shares = Shares(sequences, {"a": 1}, 8, 8)
    assert shares.victim(sequences) is None


def test_latest_of_the_tenant_above_its_part_gives_back():
    sequences = running(("a", 1), ("a", 1), ("a", 1), ("b", 1))
    shares = Shares(sequences, {"a": 1, "b": 1}, 4, 100)
    assert shares.victim(sequences) is sequences[2]
    assert shares.allows("b", 1)
    assert not shares.allows("a", 1)


def test_weight_moves_the_border():
    sequences = running(("a", 1), ("a", 1), ("a", 1), ("b", 1))
    assert Shares(sequences, {"a": 3, "b": 1}, 4, 100).victim(sequences) is None


def test_blocks_count_like_places():
    sequences = running(("a", 40), ("a", 40), ("b", 1))
    shares = Shares(sequences, {"a": 1, "b": 1}, 100, 100)
    assert shares.victim(sequences) is sequences[1]
    assert shares.allows("b", 49)
    assert not shares.allows("b", 50)


def test_one_place_is_everybodys_own():
    sequences = running(("a", 90))
    shares = Shares(sequences, {"a": 1, "b": 1, "c": 1}, 2, 100)
    assert shares.victim(sequences) is None
    assert shares.allows("b", 99)
