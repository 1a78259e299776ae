"""Paid requests from the deposit to the claim, over the command line, across kill -9 and with the node stopped."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from attribution import receipt
from node.settlement.signer import LocalSigner

pytestmark = pytest.mark.e2e

PROMPT = "Fellow citizens, the state of our Union is"
ADAPTERS = ("lincoln", "reagan", "roosevelt")
DEPOSIT_WEI = 10**15
TOKENS = 12
DELAY_S = 1


@dataclass
class Story:
    """What the tests of this file, which follow one another, know of their node and its payer."""

    node: Any
    customer: Any
    epoch: dict[str, Any] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    interrupted_id: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """`rewards show`."""
        return json.loads(self.node.cli("rewards", "show", "--json").stdout)

    def epochs(self) -> list[dict[str, Any]]:
        """`epochs list`."""
        return json.loads(self.node.cli("epochs", "list", "--json").stdout)


@pytest.fixture(scope="module")
def story(kit, tmp_path_factory):
    """A node of its own: these tests count every wei."""
    environment = kit.environment(OPENLORA_CHAIN__CHALLENGE_DELAY_S=str(DELAY_S))
    running = kit.start_node(tmp_path_factory.mktemp("paid"), env=environment)
    story = Story(running, kit.new_customer(running, DEPOSIT_WEI))
    yield story
    if story.node.process.poll() is None:
        story.node.kill()


def _wait_for_chain_time(contracts, operator, epoch_id, kit):
    """Until the epoch's challenge delay is over by the wall clock, which the development chain follows."""
    epoch = contracts.epoch(operator, epoch_id)
    kit.wait_for(lambda: time.time() > epoch.activates_at_s, "the end of the challenge delay", 60)


def _covered(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows, once an epoch that pays covers all of them; nothing while its root can still be challenged."""
    return rows if all(int(row["in_epoch_wei"]) for row in rows) else []


def _claimed(text: str) -> dict[str, int]:
    """Account and amount of every line that `rewards claim` prints."""
    lines = [line.split() for line in text.splitlines() if line.startswith("0x")]
    assert all(line[2] == "done" for line in lines), text
    return {line[0]: int(line[1]) for line in lines}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        ("too small", "voucher_too_small"),
        ("wrong signer", "voucher_invalid"),
        ("another operator", "voucher_invalid"),
        ("ends too soon", "voucher_invalid"),
        ("not base64", "voucher_invalid"),
        ("beyond the deposit", "deposit_too_small"),
    ],
)
def test_voucher_that_does_not_cover_the_request_is_refused_with_402(story, spoil, code):
    customer, day = story.customer, int(time.time()) + 86400
    stranger = LocalSigner(b"\x07" * 32)
    header = {
        "too small": lambda: customer.another_payer().header(1, day),
        "wrong signer": lambda: customer.another_payer(_Impostor(customer.signer.address, stranger)).header(10**12, day),
        "another operator": lambda: customer.another_payer(operator=stranger.address).header(10**12, day),
        "ends too soon": lambda: customer.another_payer().header(10**12, int(time.time()) + 5),
        "not base64": lambda: "{}",
        "beyond the deposit": lambda: customer.another_payer(stranger).header(10**12, day),
    }[spoil]()
    body = {"model": "lincoln", "prompt": PROMPT, "max_tokens": TOKENS}
    answer = story.node.post("/v1/completions", body, **{"x-openlora-voucher": header})
    assert (answer.status, answer.body["error"]["code"]) == (402, code)
    assert answer.body["error"]["type"] == "insufficient_quota"
    assert story.node.get(f"/v1/receipts/{answer.headers['x-request-id']}").status == 404
    assert customer.payer.used_wei == 0


class _Impostor:
    """Signs with its own key and says that it is somebody else."""

    def __init__(self, address, signer):
        self.address, self._signer = address, signer

    def sign_hash(self, digest):
        return self._signer.sign_hash(digest)


def test_usage_without_a_voucher_earns_nothing_and_enters_no_epoch(story):
    answer = story.node.post("/v1/completions", {"model": "lincoln", "prompt": PROMPT, "max_tokens": 4})
    assert answer.bundle["record"]["payer"] is None
    assert answer.fee_wei > 0
    assert "nothing to close" in story.node.cli("epochs", "close").stdout
    assert story.epochs() == []
    assert story.rows() == []


def test_paid_usage_is_closed_into_an_epoch_whose_root_is_on_the_chain(story, kit):
    node, contracts = story.node, kit.contracts_of(story.node)
    max_fee_wei = story.customer.max_fee_wei(PROMPT, TOKENS)
    signed = [(adapter, story.customer.voucher(max_fee_wei)) for adapter in ADAPTERS]
    answers = [story.customer.ask(node, adapter, PROMPT, TOKENS, header) for adapter, header in reversed(signed)]
    assert {answer.bundle["record"]["payer"] for answer in answers} == {story.customer.payer.address}
    story.epoch = json.loads(node.cli("epochs", "close").stdout)
    paid_wei = sum(answer.fee_wei for answer in answers)
    assert (story.epoch["records"], int(story.epoch["total_wei"]), story.epoch["state"]) == (3, paid_wei, "done")
    assert story.customer.payer.used_wei == paid_wei
    on_chain = contracts.epoch(node.operator, story.epoch["epoch_id"])
    assert "0x" + on_chain.root.hex() == story.epoch["root"]
    assert on_chain.total_cumulative_wei == paid_wei
    assert contracts.collected_wei(story.customer.payer.address, node.operator) == paid_wei
    assert contracts.escrow_balance_wei(story.customer.payer.address) == DEPOSIT_WEI - paid_wei
    by_account: dict[str, int] = {}
    for answer in answers:
        for line in answer.bundle["record"]["split"]:
            by_account[line["account"]] = by_account.get(line["account"], 0) + int(line["amount_wei"])
    story.rewards = kit.wait_for(lambda: _covered(story.rows()), "the end of the challenge delay", 60)
    assert {row["account"]: int(row["earned_wei"]) for row in story.rewards} == by_account
    assert {row["account"]: int(row["in_epoch_wei"]) for row in story.rewards} == by_account
    assert all(row["claimed_wei"] == "0" for row in story.rewards)
    assert sum(by_account.values()) == paid_wei


def test_claim_for_one_account_pays_that_account_alone(story, kit):
    contracts = kit.contracts_of(story.node)
    _wait_for_chain_time(contracts, story.node.operator, story.epoch["epoch_id"], kit)
    first = story.rewards[0]
    claimed = _claimed(story.node.cli("rewards", "claim", "--account", first["account"]).stdout)
    assert claimed == {first["account"]: int(first["earned_wei"])}
    assert contracts.token_balance_wei(first["account"]) == int(first["earned_wei"])
    others = [contracts.token_balance_wei(row["account"]) for row in story.rewards[1:]]
    assert others == [0] * len(others)
    assert "nothing to claim" in story.node.cli("rewards", "claim", "--account", first["account"]).stdout


def test_killed_node_comes_back_with_its_chain_its_root_and_its_claims(story, kit):
    node, payer = story.node, story.customer.payer
    before = _state(story, kit)
    max_fee_wei = story.customer.max_fee_wei(PROMPT, 500)
    body = {"model": "lincoln", "prompt": PROMPT, "max_tokens": 500, "stream": True, "temperature": 0}
    with node.stream("/v1/completions", body, **story.customer.voucher(max_fee_wei)) as stream:
        next(iter(stream))
        story.interrupted_id = {name.lower(): value for name, value in stream.headers.items()}["x-openlora-receipt"]
        node.kill()
    story.node = kit.start_node(node.data_dir, env=node.env)
    payer.charge(max_fee_wei, 0)
    assert story.node.operator == node.operator
    assert _state(story, kit) == before
    bundle = story.node.receipt(story.interrupted_id)
    record = receipt.verify(bundle, [node.operator]).record
    assert (record.status, record.fee_wei, record.split) == ("interrupted", "0", ())
    assert story.rows() == [{**story.rewards[0], "claimed_wei": story.rewards[0]["earned_wei"]}, *story.rewards[1:]]


def _state(story: Story, kit: Any) -> dict[str, Any]:
    """Everything of the chain that a crash must not change."""
    contracts = kit.contracts_of(story.node)
    chain, operator = contracts.chain, story.node.operator
    keys = story.node.data_dir / "keys"
    accounts = [
        "0x" + json.loads((keys / f"{role}.json").read_text())["address"].removeprefix("0x") for role in ("submitter", "funder")
    ]
    return {
        "genesis": chain.block(0),
        "head": chain.block("latest"),
        "nonces": [chain.nonce(account) for account in [*accounts, story.customer.payer.address]],
        "contracts": contracts.addresses,
        "epoch": contracts.epoch(operator, story.epoch["epoch_id"]),
        "claims": [contracts.claimed_wei(operator, row["account"]) for row in story.rewards],
        "balances": [contracts.token_balance_wei(row["account"]) for row in story.rewards],
        "epochs": story.epochs(),
    }


def test_used_total_survives_so_what_was_promised_covers_only_what_is_left(story):
    """The largest promise was what was used, and one answer of 500 tokens: 540 fit into it only if the used part is forgotten."""
    customer, used_wei = story.customer, story.customer.payer.used_wei
    promised_wei, needed_wei = used_wei + customer.max_fee_wei(PROMPT, 500), 540 * customer.output_wei
    assert needed_wei < promised_wei < used_wei + needed_wei
    header = customer.another_payer().header(used_wei, int(time.time()) + 86400)
    body = {"model": "lincoln", "prompt": PROMPT, "max_tokens": 540}
    answer = story.node.post("/v1/completions", body, **{"x-openlora-voucher": header})
    assert (answer.status, answer.body["error"]["code"]) == (402, "voucher_too_small")


def test_second_epoch_is_cumulative_and_everybody_claims_with_the_node_stopped(story, kit):
    node = story.node
    story.customer.ask(node, "roosevelt", PROMPT, TOKENS)
    paid_wei = story.customer.payer.used_wei
    assert node.stop(signal.SIGTERM) == 0

    epoch = json.loads(node.cli("epochs", "close").stdout)
    assert (epoch["epoch_id"], epoch["state"], int(epoch["total_wei"])) == (story.epoch["epoch_id"] + 1, "done", paid_wei)
    kit.wait_for(lambda: time.time() > epoch["closed_ms"] / 1000 + DELAY_S + 3, "the end of the challenge delay", 60)
    claimed = _claimed(node.cli("rewards", "claim").stdout)
    assert sum(claimed.values()) == paid_wei - int(story.rewards[0]["earned_wei"])
    rows = story.rows()
    assert sum(int(row["claimed_wei"]) for row in rows) == paid_wei
    assert all(row["earned_wei"] == row["in_epoch_wei"] == row["claimed_wei"] for row in rows)

    story.node = kit.start_node(node.data_dir, env=node.env)
    assert [row["epoch_id"] for row in story.epochs()] == [epoch["epoch_id"], story.epoch["epoch_id"]]
    assert "nothing to claim" in story.node.cli("rewards", "claim").stdout
    contracts = kit.contracts_of(story.node)
    balances = [contracts.token_balance_wei(row["account"]) for row in rows]
    assert balances == [int(row["claimed_wei"]) for row in rows]
    assert contracts.token_balance_wei(contracts.addresses.rewards) == 0
    assert sum(balances) == paid_wei == DEPOSIT_WEI - contracts.escrow_balance_wei(story.customer.payer.address)
    assert story.node.stop() == 0
