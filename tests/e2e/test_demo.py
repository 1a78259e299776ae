"""`openlora-node demo`: the whole story in one command, with sums that are checked here again."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def story(kit):
    return kit.run_cli("demo").stdout


def _wei(text: str) -> int:
    return int(text.replace(",", ""))


def test_demo_runs_three_adapters_in_one_decode_step(story):
    assert re.search(r"3 requests for 3 adapters, submitted together", story)
    assert "one decode step held 3 adapters" in story
    texts = [re.search(rf"^   {name} +(\S.*)$", story, re.MULTILINE) for name in ("lincoln", "reagan", "roosevelt")]
    assert all(texts), story
    assert len({text[1] for text in texts}) == 3


def test_demo_verifies_a_receipt_for_every_answer_and_the_fees_are_what_the_epoch_collects(story):
    fees = [_wei(fee) for fee in re.findall(r"tokens, fee ([\d,]+) wei", story)]
    assert len(fees) == 3
    epoch = re.search(r"epoch \d+: 3 records, ([\d,]+) wei collected", story)
    assert epoch, story
    assert sum(fees) == _wei(epoch[1]) > 0


def test_demo_puts_the_root_on_the_chain(story):
    root = re.search(r"root 0x([0-9a-f]{64}) on chain 31611", story)
    assert root, story
    assert int(root[1], 16) != 0


def test_demo_pays_everybody_and_the_payments_add_up_to_the_fees(story):
    paid = [_wei(amount) for amount in re.findall(r"^   0x[0-9a-fA-F]{40} +([\d,]+) wei  \S", story, re.MULTILINE)]
    total = re.search(r"sum ([\d,]+) wei == ([\d,]+) wei paid", story)
    assert total, story
    payees = re.search(r"5\. (\d+) payees claim", story)
    assert payees, story
    assert len(paid) == int(payees[1]) > 4
    assert all(amount > 0 for amount in paid)
    assert sum(paid) == _wei(total[1]) == _wei(total[2])
