import json
from dataclasses import dataclass

import pytest
from sqlalchemy import select

from attribution import merkle
from attribution.epoch import EpochStatement, rewards_domain
from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from attribution.signing import LocalSigner, recover
from attribution.voucher import Collection, Voucher, escrow_domain
from node.errors import ChainError, LedgerError
from node.settlement.admission import Admission, Outcome, SignedVoucher
from node.settlement.epochs import EpochCloser
from node.settlement.intents import DONE, FAILED, INTENTS, finish_intent, submit_intent
from node.settlement.ledger import Ledger
from node.settlement.ledger_epochs import SettlementPlace
from node.settlement.ledger_reads import LedgerReads

OPERATOR, ANNA, BERT = (LocalSigner(bytes([number]) * 32) for number in (2, 3, 4))
TRAINER, MAKER = "0x" + "11" * 20, "0x" + "22" * 20
ESCROW, REWARDS = "0x" + "e5" * 20, "0x" + "a5" * 20
PLACE = SettlementPlace(31337, ESCROW, REWARDS, OPERATOR.address)
NOW_MS = 1_700_000_000_000
DEADLINE = NOW_MS // 1000 + 3600
FEE = 1000


@dataclass
class Status:
    root: bytes
    activates_at_s: int
    is_void: bool = False


class FakeContracts:
    """Escrow and rewards as the contracts keep their books."""

    def __init__(self):
        self.balances = {ANNA.address: 10**6, BERT.address: 10**6}
        self.collected, self.queue = {}, []

    def escrow_balance_wei(self, payer):
        return self.balances[payer]

    def collected_wei(self, payer, operator):
        return self.collected.get(payer, 0)

    def funded_wei(self, operator):
        return sum(self.collected.values())

    def epoch_count(self, operator):
        return len(self.queue)

    def epoch(self, operator, epoch_id):
        return self.queue[epoch_id] if epoch_id < len(self.queue) else None

    def collect(self, payload):
        """What UsageEscrow.collect checks and does; False is a revert."""
        payer, used = payload["payer"], int(payload["cumulative_used"])
        before = self.collected.get(payer, 0)
        voucher = Voucher(payer, payload["operator"], int(payload["cumulative"]), payload["deadline"])
        domain = escrow_domain(PLACE.chain_id, ESCROW)
        assert voucher.signer_of(domain, bytes.fromhex(payload["payer_signature"][2:])) == payer
        digest = Collection(payer, payload["operator"], used).digest(domain)
        assert recover(digest, bytes.fromhex(payload["operator_signature"][2:])) == OPERATOR.address
        if not before < used <= voucher.cumulative or used - before > self.balances[payer]:
            return False
        self.balances[payer] -= used - before
        self.collected[payer] = used
        return True

    def submit(self, payload):
        """What AttributionRewards.submitEpoch checks and does; False is a revert."""
        hashes = [bytes.fromhex(payload[name][2:]) for name in ("root", "receipts_root", "leaves_hash")]
        total = int(payload["total_cumulative"])
        statement = EpochStatement(payload["operator"], payload["epoch_id"], *hashes, total)
        digest = statement.digest(rewards_domain(PLACE.chain_id, REWARDS))
        assert recover(digest, bytes.fromhex(payload["operator_signature"][2:])) == OPERATOR.address
        if payload["epoch_id"] != len(self.queue) or total > self.funded_wei(OPERATOR.address):
            return False
        self.queue.append(Status(hashes[0], NOW_MS // 1000))
        return True


class World:
    """A ledger, a closer and contracts, with an outbox that runs when told."""

    def __init__(self, ledger):
        self.ledger, self.contracts = ledger, FakeContracts()
        self.used = {}
        self.closer = EpochCloser(
            ledger, signer=OPERATOR, contracts=self.contracts, place=PLACE, submit_intent=submit_intent, clock_ms=lambda: NOW_MS
        )

    async def serve(self, request_id, payer=None, deadline=DEADLINE, outputs=((1,),)):
        """One request of FEE wei, paid by `payer` with a voucher for exactly everything so far."""
        voucher, digest = None, None
        if payer is not None:
            self.used[payer.address] = self.used.get(payer.address, 0) + FEE
            promise = Voucher(payer.address, OPERATOR.address, self.used[payer.address], deadline)
            domain = escrow_domain(PLACE.chain_id, ESCROW)
            signature = promise.sign(domain, payer)
            voucher = SignedVoucher(payer.address, OPERATOR.address, promise.cumulative, deadline, signature)
            digest = promise.digest(domain).hex()
        admission = Admission(
            request_id=request_id,
            tenant="t",
            base_id="b" * 64,
            prompts=[[1]],
            terms=(RecipeTerm("a" * 64, "c" * 64, "1"),),
            contributions=(Contribution("a" * 64, TRAINER, ((MAKER, 1_000_000),)),),
            price=Price("0", str(FEE)),
            policy=SplitPolicy(500_000, 200_000, 300_000),
            payees=Payees(OPERATOR.address, OPERATOR.address),
            voucher=voucher,
            voucher_digest=digest,
        )
        await self.ledger.admit(admission)
        await self.ledger.close(Outcome(request_id=request_id, status="ok", finish_reason="stop", outputs=outputs))

    async def intents(self):
        """Everything not yet at its end, oldest first."""
        query = select(INTENTS).where(INTENTS.c.state == "pending").order_by(INTENTS.c.id)
        return await self.ledger.read(lambda reads: reads.rows(query))

    async def run_outbox(self):
        """Send what is ready, in order, and write the ends back; an intent after a failed one fails."""
        failed = set()
        for intent in await self.intents():
            payload = json.loads(intent.payload)
            is_blocked = bool(failed & set(json.loads(intent.after)))
            act = self.contracts.collect if intent.kind == "collect" else self.contracts.submit
            is_done = not is_blocked and act(payload)
            if not is_done:
                failed.add(intent.key)
            state = DONE if is_done else FAILED
            await self.ledger.transact(lambda c, key=intent.key, state=state: finish_intent(c, key, state))

    async def close_and_mine(self):
        summary = await self.closer.close()
        await self.run_outbox()
        return summary


@pytest.fixture
async def world(tmp_path):
    ledger = Ledger(
        f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock_ms=lambda: NOW_MS, signer=OPERATOR, chain_id=31337, group_commit_ms=0
    )
    await ledger.open()
    yield World(ledger)
    await ledger.shutdown()


async def total_of(world):
    paying = await world.closer.paying_epoch()
    claims = [paying and paying.claim(account) for account in (OPERATOR.address, TRAINER, MAKER)]
    return [0 if claim is None else claim.cumulative_wei for claim in claims]


async def test_close_pays_exactly_what_was_paid(world):
    for index in range(3):
        await world.serve(f"a{index}", ANNA)
    await world.serve("b", BERT)
    summary = await world.close_and_mine()

    assert (summary.serial, summary.epoch_id, summary.record_count, summary.total_wei) == (1, 0, 4, 4 * FEE)
    assert world.contracts.collected == {ANNA.address: 3 * FEE, BERT.address: FEE}
    assert await total_of(world) == [2000, 800, 1200]
    assert [(item.state, item.epoch_id) for item in await world.closer.epochs()] == [(DONE, 0)]


async def test_close_usage_nobody_signed_for_never_enters(world):
    await world.serve("free")
    assert await world.closer.close() is None

    await world.serve("paid", ANNA)
    assert (await world.closer.close()).total_wei == FEE
    assert (await world.ledger.totals()).recorded_wei == 2 * FEE


async def test_close_with_nothing_new_is_none(world):
    assert await world.closer.close() is None
    await world.serve("a", ANNA)
    await world.close_and_mine()

    assert await world.closer.close() is None


async def test_close_a_request_that_cost_nothing_makes_no_epoch(world):
    await world.serve("a", ANNA, outputs=())

    assert await world.closer.close() is None


async def test_close_again_adds_to_the_totals(world):
    await world.serve("a0", ANNA)
    await world.close_and_mine()
    await world.serve("a1", ANNA)
    summary = await world.close_and_mine()

    assert (summary.epoch_id, summary.record_count, summary.total_wei) == (1, 1, 2 * FEE)
    assert await total_of(world) == [1000, 400, 600]


async def test_close_while_the_last_is_on_its_way_is_pending(world):
    await world.serve("a", ANNA)
    await world.closer.close()

    with pytest.raises(ChainError) as caught:
        await world.closer.close()
    assert caught.value.error_code == "epoch_pending"
    assert len(await world.intents()) == 2


async def test_close_after_a_failed_epoch_starts_from_the_last_that_landed(world):
    await world.serve("a0", ANNA)
    await world.close_and_mine()
    await world.serve("a1", ANNA)
    await world.closer.close()
    for intent in await world.intents():
        await world.ledger.transact(lambda c, key=intent.key: finish_intent(c, key, FAILED, "lost"))
    await world.serve("a2", ANNA)
    summary = await world.close_and_mine()

    assert (summary.serial, summary.epoch_id, summary.record_count, summary.total_wei) == (3, 1, 2, 3 * FEE)
    assert await total_of(world) == [1500, 600, 900]


async def test_close_a_payer_who_withdrew_delays_nobody_else(world):
    await world.serve("a", ANNA)
    await world.serve("b0", BERT)
    await world.serve("b1", BERT)
    world.contracts.balances[BERT.address] = FEE + FEE // 2
    summary = await world.close_and_mine()
    assert (summary.record_count, summary.total_wei) == (2, 2 * FEE)
    assert world.contracts.collected == {ANNA.address: FEE, BERT.address: FEE}

    assert await world.closer.close() is None
    world.contracts.balances[BERT.address] = FEE
    assert (await world.close_and_mine()).total_wei == 3 * FEE


async def test_close_when_a_collection_fails_heals_with_the_next(world):
    await world.serve("a", ANNA)
    await world.serve("b", BERT)
    await world.closer.close()
    world.contracts.balances[BERT.address] = 0  # withdrew between closing and collecting
    await world.run_outbox()
    assert [item.state for item in await world.closer.epochs()] == [FAILED]

    summary = await world.close_and_mine()
    assert (summary.total_wei, summary.epoch_id) == (FEE, 0)
    assert (await world.closer.epochs())[0].state == DONE


async def test_close_an_expired_voucher_collects_nothing_more(world):
    await world.serve("a", ANNA, deadline=NOW_MS // 1000)

    assert await world.closer.close() is None


async def test_close_refuses_totals_the_escrow_cannot_pay(world):
    await world.serve("a", ANNA)
    await world.close_and_mine()
    world.contracts.collected[ANNA.address] = 0
    world.contracts.balances[ANNA.address] = 0
    await world.serve("b", BERT)

    with pytest.raises(ChainError) as caught:
        await world.closer.close()
    assert caught.value.error_code == "epoch_unfunded"


async def test_close_for_another_contract_is_refused(world):
    await world.serve("a", ANNA)
    await world.close_and_mine()
    elsewhere = SettlementPlace(31337, ESCROW, "0x" + "a6" * 20, OPERATOR.address)
    closer = EpochCloser(
        world.ledger,
        signer=OPERATOR,
        contracts=world.contracts,
        place=elsewhere,
        submit_intent=submit_intent,
        clock_ms=lambda: NOW_MS,
    )

    with pytest.raises(LedgerError, match="data directory of its own"):
        await closer.close()


async def test_close_that_cannot_submit_writes_nothing(world):
    def refuse(*_, **__):
        raise ChainError("no outbox")

    await world.serve("a", ANNA)
    world.closer._submit_intent = refuse

    with pytest.raises(ChainError, match="no outbox"):
        await world.closer.close()
    assert await world.closer.epochs() == []
    assert await world.intents() == []


async def test_claims_prove_themselves_against_the_root_on_chain(world):
    for index in range(5):
        await world.serve(f"a{index}", ANNA)
    await world.close_and_mine()

    paying = await world.closer.paying_epoch()
    for account in (OPERATOR.address, TRAINER, MAKER):
        claim = paying.claim(account.lower())
        leaf = merkle.leaf_hash(PLACE.tree, claim.account, claim.cumulative_wei)
        assert merkle.verify(world.contracts.queue[0].root, leaf, claim.proof)
    assert paying.claim("0x" + "99" * 20) is None


async def test_claims_wait_for_the_delay_and_skip_void_epochs(world):
    await world.serve("a0", ANNA)
    await world.close_and_mine()
    await world.serve("a1", ANNA)
    await world.close_and_mine()
    world.contracts.queue[1].activates_at_s += 60
    assert (await world.closer.paying_epoch()).epoch_id == 0

    world.contracts.queue[1] = Status(world.contracts.queue[1].root, 0, is_void=True)
    assert (await world.closer.paying_epoch()).epoch_id == 0
    world.contracts.queue[0].root = bytes(32)
    assert await world.closer.paying_epoch() is None


async def test_receipts_root_covers_the_epochs_new_records(world):
    await world.serve("a0", ANNA)
    await world.serve("b0", BERT)
    await world.serve("a1", ANNA)
    summary = await world.close_and_mine()

    hashes = [item.record_hash for item in await world.ledger.records()]
    assert summary.receipts_root == merkle.records_root(hashes).hex()


async def test_epochs_survive_a_restart(world, tmp_path):
    await world.serve("a0", ANNA)
    await world.close_and_mine()
    reads = LedgerReads(world.ledger.url)
    assert reads.verify_chain() == 1
    reads.close()
    await world.ledger.shutdown()

    again = Ledger(world.ledger.url, clock_ms=lambda: NOW_MS, signer=OPERATOR, chain_id=31337, group_commit_ms=0)
    await again.open()
    reopened = World(again)
    reopened.contracts, reopened.used = world.contracts, world.used
    reopened.closer._contracts = world.contracts
    await reopened.serve("a1", ANNA)
    assert (await reopened.close_and_mine()).total_wei == 2 * FEE
    await again.shutdown()
