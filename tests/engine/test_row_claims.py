"""What tenants may take of a step's rows for their prompts."""

import pytest

from node.engine.fairness import FairQueue
from node.engine.row_claims import ABSENT_PARTS, CLAIM_STEPS, RowClaims


class Bench:
    def __init__(self, running, make_sequence):
        self.running = running
        self.make_sequence = make_sequence
        self.queue = FairQueue()
        self.claims = RowClaims(self.running, self.queue, row_count=60)
        self.count = 0

    def start(self, tenant, count, prompt_count=50):
        for _ in range(count):
            sequence = self.make_sequence(self.count, prompt_count=prompt_count, tenant=tenant)
            self.count += 1
            self.queue.join(sequence)
            self.queue.take(sequence)
            self.running.start(sequence, [])


@pytest.fixture
def bench(make_running, make_sequence):
    return Bench(make_running(block_count=256, place_count=8), make_sequence)


def test_tenant_alone_has_no_limit(bench):
    bench.start("a", 8)
    assert bench.claims.limits(0) == {}


def test_tenant_above_its_share_has_its_part_in_every_other_step(bench):
    bench.start("a", 7)
    bench.start("b", 1)
    assert [bench.claims.limits(step) for step in range(4)] == [{"a": 0}, {"a": 30}, {"a": 0}, {"a": 30}]


def test_tenant_that_left_a_moment_ago_is_expected_back(bench):
    bench.start("a", 7)
    bench.start("b", 1)
    bench.claims.limits(0)
    for sequence in list(bench.running):
        if sequence.tenant == "b":
            sequence.computed_count = sequence.token_count - 1
    assert bench.claims.limits(1) == {"a": 60 // (1 + ABSENT_PARTS)}
    assert bench.claims.limits(CLAIM_STEPS) == {}
