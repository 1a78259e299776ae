import asyncio
import random
import time

import pytest

from node.errors import ChainError
from node.settlement.chain import Chain
from node.settlement.claims import active_epoch, claimable, submit_claims
from node.settlement.outbox_store import OutboxStore
from node.settlement.rpc_errors import SendOutcome
from node.settlement.settlement_contracts import ClaimEntry
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

OPERATOR = LocalSigner(b"\x01" * 32)
TRAINER, MAKER = "0x" + "11" * 20, "0x" + "22" * 20


class Crash(Exception):
    """The process dies here."""


class ScriptedChain(Chain):
    """The real chain with scripted answers to sends: an outcome instead of a send, or a crash before or after it."""

    def __init__(self, world, *script):
        super().__init__(world.ready.rpc_url, world.ready.chain_id)
        self.script, self.sent = list(script), []

    def send_raw(self, raw):
        self.sent.append(raw)
        step = self.script.pop(0) if self.script else "send"
        if step == "crash before":
            raise Crash
        if isinstance(step, SendOutcome):
            return step
        outcome = super().send_raw(raw)
        if step == "crash after":
            raise Crash
        return SendOutcome.UNKNOWN if step == "lose reply" else outcome


def run_until_quiet(outbox, limit=20):
    for _ in range(limit):
        if not outbox.run_once():
            return
    raise AssertionError("the outbox never came to rest")


def entries(tree, *accounts):
    totals = {account.lower(): cumulative for account, cumulative in tree.entries}
    return [ClaimEntry(account, totals[account.lower()], tuple(tree.proof(account))) for account in accounts]


def test_outbox_whole_life_collects_submits_and_pays_exactly(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    collected = world.collect(900)
    tree = world.tree({TRAINER: 333, MAKER: 567})
    submitted = world.submit_epoch(0, tree, after=[collected])
    outbox = world.outbox()

    run_until_quiet(outbox)

    assert [world.state(collected), world.state(submitted)] == ["done", "done"]
    assert world.contracts.escrow_balance_wei(world.payer.address) == 100
    assert world.contracts.funded_wei(OPERATOR.address) == 900
    status = world.contracts.epoch(OPERATOR.address, 0)
    assert (status.root, status.total_cumulative_wei) == (tree.root, 900)

    payable = claimable(world.contracts, OPERATOR.address, entries(tree, TRAINER, MAKER))
    assert sum(amount for _, amount in payable) == 900
    with world.engine.begin() as connection:
        keys = submit_claims(connection, world.contracts, OPERATOR.address, 0, [entry for entry, _ in payable], 0)
    deadline = time.monotonic() + 20
    while world.state(keys[0]) == "pending" and time.monotonic() < deadline:
        world.clock.now_ms += 2_000
        outbox.run_once()
    assert world.state(keys[0]) == "done"
    assert [world.contracts.token_balance_wei(account) for account in (TRAINER, MAKER)] == [333, 567]
    assert claimable(world.contracts, OPERATOR.address, entries(tree, TRAINER, MAKER)) == []


@pytest.mark.parametrize("crash", ["crash before", "crash after"])
def test_outbox_crash_around_the_send_lands_the_same_bytes_once(chain_world, crash):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    chain = ScriptedChain(world, crash)
    with pytest.raises(Crash):
        world.outbox(chain).run_once()
    assert [row.state for row in world.rows("chain_tx")] == ["in_progress"]

    world.kill_and_restart()
    run_until_quiet(world.outbox())

    assert world.state(key) == "done"
    assert world.contracts.collected_wei(world.payer.address, OPERATOR.address) == 10
    assert world.chain.nonce(world.submitter.address) == 1
    [attempt] = world.rows("chain_attempt")
    assert attempt.raw == chain.sent[0]


def test_outbox_crash_before_the_commit_plans_again_with_the_same_nonce(chain_world, monkeypatch):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)

    def die(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(OutboxStore, "add", die)
        with pytest.raises(Crash):
            world.outbox().run_once()
    assert world.rows("chain_tx") == []

    run_until_quiet(world.outbox())

    assert world.state(key) == "done"
    assert [row.nonce for row in world.rows("chain_tx")] == [0]


def test_outbox_crash_after_mining_finds_the_receipt(chain_world, monkeypatch):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)

    def die(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(OutboxStore, "mark_confirmed", die)
        with pytest.raises(Crash):
            run_until_quiet(world.outbox())
    assert world.state(key) == "pending"

    run_until_quiet(world.outbox())

    assert world.state(key) == "done"
    assert world.chain.nonce(world.submitter.address) == 1


def test_outbox_lost_reply_never_takes_a_new_nonce(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    chain = ScriptedChain(world, "lose reply")

    run_until_quiet(world.outbox(chain))

    assert world.state(key) == "done"
    assert len(chain.sent) == 1
    assert world.chain.nonce(world.submitter.address) == 1


def test_outbox_restored_database_sees_done_intents_on_the_chain(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    collected = world.collect(10)
    run_until_quiet(world.outbox())
    with world.engine.begin() as connection:
        for table in ("chain_receipt", "chain_attempt", "chain_tx", "chain_intent"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    world.collect(10)
    later = world.collect(25, key="collect:2")

    run_until_quiet(world.outbox())

    assert [world.state(collected), world.state(later)] == ["done", "done"]
    assert [row.nonce for row in world.rows("chain_tx")] == [1]
    assert world.contracts.collected_wei(world.payer.address, OPERATOR.address) == 25


def test_outbox_preflight_refusal_fails_with_the_contracts_own_name(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    expired = world.collect(10, deadline_s=1)
    overdrawn = world.collect(2_000, key="collect:2")
    dependent = world.submit_epoch(0, world.tree({TRAINER: 1}), after=[expired])

    run_until_quiet(world.outbox())

    reasons = {row.key: row.reason for row in world.rows("chain_intent")}
    assert reasons == {
        expired: "reverted:VoucherExpired",
        overdrawn: "reverted:InsufficientBalance",
        dependent: "predecessor_failed",
    }
    assert world.chain.nonce(world.submitter.address) == 0


def test_outbox_other_root_under_the_same_epoch_is_a_conflict(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    world.submit_epoch(0, world.tree({TRAINER: 5}), after=[world.collect(10)])
    run_until_quiet(world.outbox())
    other = world.submit_epoch(0, world.tree({MAKER: 5}), key="submit_epoch:other")

    run_until_quiet(world.outbox())

    [reason] = [row.reason for row in world.rows("chain_intent") if row.key == other]
    assert reason == "conflict"


def test_outbox_nonce_used_by_another_sender_is_planned_again(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    chain = ScriptedChain(world, SendOutcome.ACCEPTED, SendOutcome.NONCE_TOO_LOW)
    outbox = world.outbox(chain, foreign_ms=60_000)
    outbox.run_once()
    Wallet(world.chain, world.submitter, poll_s=0.01).send(world.contracts.approve(MAKER, 1), "use the nonce elsewhere")

    run_until_quiet(outbox)
    assert [row.state for row in world.rows("chain_tx")] == ["unconfirmed"]
    world.clock.now_ms += 60_000
    run_until_quiet(outbox)

    assert world.state(key) == "done"
    assert [(row.nonce, row.state) for row in world.rows("chain_tx")] == [(0, "lost"), (1, "finalized")]
    assert world.contracts.collected_wei(world.payer.address, OPERATOR.address) == 10


@pytest.mark.parametrize("outcome", [SendOutcome.UNDERPRICED, SendOutcome.FEE_BELOW_BASE])
def test_outbox_price_refusal_raises_both_fees_by_an_eighth(chain_world, outcome):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)

    run_until_quiet(world.outbox(ScriptedChain(world, outcome)))

    first, second = world.rows("chain_attempt")
    assert int(second.max_fee_wei) * 8 >= int(first.max_fee_wei) * 9
    assert int(second.priority_fee_wei) * 8 >= int(first.priority_fee_wei) * 9
    assert world.state(key) == "done"
    assert world.chain.nonce(world.submitter.address) == 1


def test_outbox_waiting_transaction_is_sent_again_then_bumped(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    chain = ScriptedChain(world, SendOutcome.ACCEPTED, SendOutcome.ALREADY_KNOWN)
    outbox = world.outbox(chain, resend_ms=1_000, bump_ms=5_000)
    outbox.run_once()
    assert not outbox.run_once()

    world.clock.now_ms += 1_000
    outbox.run_once()
    assert chain.sent[0] == chain.sent[1]
    world.clock.now_ms += 5_000
    run_until_quiet(outbox)

    assert chain.sent[2] != chain.sent[0]
    assert world.state(key) == "done"
    assert len(world.rows("chain_attempt")) == 2


def test_outbox_without_gas_money_waits_and_goes_on_when_it_comes(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)
    chain = ScriptedChain(world, SendOutcome.INSUFFICIENT_FUNDS)
    outbox = world.outbox(chain, resend_ms=1_000)

    run_until_quiet(outbox)
    assert world.state(key) == "pending"
    world.clock.now_ms += 1_000
    run_until_quiet(outbox)

    assert world.state(key) == "done"
    assert chain.sent[0] == chain.sent[1]


def test_outbox_rejected_bytes_free_the_nonce(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    rejected, following = world.collect(10), world.collect(20, key="collect:2")

    run_until_quiet(world.outbox(ScriptedChain(world, SendOutcome.REJECTED)))

    assert [world.state(rejected), world.state(following)] == ["failed", "done"]
    assert [(row.nonce, row.state) for row in world.rows("chain_tx")] == [(None, "abandoned"), (0, "finalized")]


def test_outbox_gas_over_the_budget_waits_without_a_nonce(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    key = world.collect(10)

    assert not world.outbox(max_fee_wei=1).run_once()

    assert world.state(key) == "pending"
    assert world.rows("chain_tx") == []


def test_outbox_malformed_payload_fails_and_others_go_on(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    bad = world.submit("collect", "bad", {"payer": "nobody"})
    unknown = world.submit("dance", "unknown", {})
    good = world.collect(10)

    run_until_quiet(world.outbox())

    assert [world.state(key) for key in (bad, unknown, good)] == ["failed", "failed", "done"]


def test_outbox_kills_at_random_moments_lose_and_repeat_nothing(new_chain_world):
    world = new_chain_world()
    world.fund_payer(10_000)
    genesis = world.chain.genesis_hash()
    chance = random.Random(7)
    keys = []
    for number in range(1, 5):
        keys.append(world.collect(number * 10, key=f"collect:{number}"))
        script = [chance.choice(["send", "crash before", "crash after", "lose reply"]) for _ in range(2)]
        try:
            run_until_quiet(world.outbox(ScriptedChain(world, *script), resend_ms=0))
        except Crash:
            world.kill_and_restart()
    for _ in range(20):
        world.clock.now_ms += 1
        world.outbox(resend_ms=0).run_once()
    assert [world.state(key) for key in keys] == ["done"] * 4
    assert world.contracts.collected_wei(world.payer.address, OPERATOR.address) == 40
    nonces = sorted(row.nonce for row in world.rows("chain_tx"))
    assert nonces == list(range(world.chain.nonce(world.submitter.address)))
    assert world.chain.genesis_hash() == genesis


async def test_outbox_task_sends_what_wakes_it_and_stops_when_told(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    outbox, stop, wake = world.outbox(), asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(outbox.run(stop, wake, poll_s=0.05))
    key = world.collect(10)
    wake.set()

    async with asyncio.timeout(20):
        while world.state(key) != "done":
            await asyncio.sleep(0.01)
        stop.set()
        await task


async def test_outbox_task_outlives_a_chain_that_is_down(chain_world):
    world = chain_world
    world.fund_payer(1_000)
    outbox, stop, wake = world.outbox(), asyncio.Event(), asyncio.Event()
    world.process.close()
    with pytest.raises(ChainError):
        outbox.run_once()
    task = asyncio.create_task(outbox.run(stop, wake, poll_s=0.01))
    await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(task, 20)


def test_claim_before_the_challenge_delay_says_how_long(new_chain_world):
    world = new_chain_world(challenge_delay_s=3600)
    world.fund_payer(1_000)
    world.submit_epoch(0, world.tree({TRAINER: 5}), after=[world.collect(10)])
    run_until_quiet(world.outbox())
    with pytest.raises(ChainError) as caught:
        active_epoch(world.contracts, OPERATOR.address, 0, int(time.time()))
    assert caught.value.error_code == "epoch_not_active"
    with pytest.raises(ChainError) as caught:
        active_epoch(world.contracts, OPERATOR.address, 1, int(time.time()))
    assert caught.value.error_code == "epoch_unknown"
