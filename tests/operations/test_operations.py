"""The operator's commands over a real ledger and a chain that is only what the test says it is."""

import threading
from types import SimpleNamespace

import pytest

from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from attribution.signing import LocalSigner
from attribution.voucher import Voucher, escrow_domain
from node.adapters.staging import Progress
from node.errors import AdapterNotFoundError, ChainError, RequestError
from node.operations import adapter_operations, settlement_operations
from node.settlement.admission import Admission, Outcome, SignedVoucher
from node.settlement.epochs import EpochCloser
from node.settlement.intents import DONE, FAILED, INTENTS, finish_intent, submit_intent
from node.settlement.ledger import Ledger
from node.settlement.ledger_epochs import SettlementPlace

OPERATOR, PAYER = LocalSigner(b"\x01" * 32), LocalSigner(b"\x02" * 32)
ESCROW, REWARDS, TRAINER = "0x" + "0e" * 20, "0x" + "0f" * 20, "0x" + "11" * 20
PLACE = SettlementPlace(31337, ESCROW, REWARDS, OPERATOR.address)
FEE = 1_000_000
NOW_MS = 1_800_000_000_000


class FakeContracts:
    """Escrow and rewards in memory; every question notes the thread it came on."""

    def __init__(self):
        self.chain = SimpleNamespace(chain_id=PLACE.chain_id)
        self.addresses = SimpleNamespace(escrow=ESCROW, rewards=REWARDS)
        self.epochs, self.claimed, self.threads = [], {}, set()
        self.is_down = False

    def _ask(self):
        self.threads.add(threading.current_thread())
        if self.is_down:
            raise ChainError("the chain endpoint does not answer")

    def escrow_balance_wei(self, payer):
        self._ask()
        return 10**30

    def collected_wei(self, payer, operator):
        self._ask()
        return 0

    def funded_wei(self, operator):
        self._ask()
        return 10**30

    def epoch_count(self, operator):
        self._ask()
        return len(self.epochs)

    def epoch(self, operator, epoch_id):
        self._ask()
        return self.epochs[epoch_id] if epoch_id < len(self.epochs) else None

    def claimed_wei(self, operator, account):
        self._ask()
        return self.claimed.get(account, 0)


class StubTreasury:
    """A treasury whose outbox carries out everything at once, but for the keys in `failing`."""

    def __init__(self, ledger):
        self.ledger, self.contracts, self.failing = ledger, FakeContracts(), lambda key: False
        self.keys = SimpleNamespace(operator=OPERATOR)
        self.closer = EpochCloser(
            ledger, signer=OPERATOR, contracts=self.contracts, place=PLACE, submit_intent=submit_intent, clock_ms=lambda: NOW_MS
        )
        self.waited, self.activates_at_s, self.is_void = [], 0, False

    def settled(self):
        return SimpleNamespace(closer=self.closer, rails=SimpleNamespace(contracts=self.contracts))

    async def wait_for_intents(self, keys, timeout_s):
        self.waited.append(list(keys))
        states = {key: FAILED if self.failing(key) else DONE for key in keys}
        for row in await self.ledger.read(lambda reads: reads.rows(INTENTS.select().where(INTENTS.c.state == "pending"))):
            state = states.get(row.key, DONE)
            await self.ledger.transact(lambda c, row=row, state=state: finish_intent(c, row.key, state))
        for summary in await self.closer.epochs(1):
            if summary.state == DONE and len(self.contracts.epochs) == summary.epoch_id:
                root = bytes.fromhex(summary.root)
                status = SimpleNamespace(root=root, activates_at_s=self.activates_at_s, is_void=self.is_void)
                self.contracts.epochs.append(status)
        return states

    async def serve(self, request_id, makers, is_paid=True):
        promise = Voucher(PAYER.address, OPERATOR.address, 100 * FEE, 2**40)
        domain = escrow_domain(PLACE.chain_id, ESCROW)
        signed = SignedVoucher(PAYER.address, OPERATOR.address, promise.cumulative, 2**40, promise.sign(domain, PAYER))
        share = 1_000_000 // len(makers)
        shares = [share] * (len(makers) - 1) + [1_000_000 - share * (len(makers) - 1)]
        admission = Admission(
            request_id=request_id,
            tenant="t",
            base_id="b" * 64,
            prompts=[[1]],
            terms=(RecipeTerm("a" * 64, "c" * 64, "1"),),
            contributions=(Contribution("a" * 64, TRAINER, tuple(zip(sorted(makers), shares, strict=True))),),
            price=Price("0", str(FEE)),
            policy=SplitPolicy(500_000, 200_000, 300_000),
            payees=Payees(OPERATOR.address, OPERATOR.address),
            voucher=signed if is_paid else None,
            voucher_digest=promise.digest(domain).hex() if is_paid else None,
        )
        await self.ledger.admit(admission)
        await self.ledger.close(Outcome(request_id=request_id, status="ok", finish_reason="stop", outputs=((1,),)))


@pytest.fixture
async def treasury(tmp_path):
    ledger = Ledger(
        f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock_ms=lambda: NOW_MS, signer=OPERATOR, chain_id=31337, group_commit_ms=0
    )
    await ledger.open()
    yield StubTreasury(ledger)
    await ledger.shutdown()


def makers(count):
    return ["0x" + f"{number:040x}" for number in range(0x1000, 0x1000 + count)]


async def test_claim_of_many_payees_takes_several_transactions_and_pays_the_whole_fee(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(60))
    epoch = await operations["epochs.close"]()

    claims = await operations["rewards.claim"](account=None)

    assert (epoch["state"], epoch["total_wei"]) == ("done", str(FEE))
    assert len(claims) == 62  # the makers, the trainer and the node
    assert sum(int(claim["paid_wei"]) for claim in claims) == FEE
    assert {claim["state"] for claim in claims} == {"done"}
    assert len(treasury.waited[-1]) == 2


async def test_claim_that_fails_for_some_says_for_whom(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(60))
    await operations["epochs.close"]()
    first = []
    treasury.failing = lambda key: first.append(key) is None and key == first[0]

    claims = await operations["rewards.claim"](account=None)

    assert [claim["state"] for claim in claims] == ["failed"] * 50 + ["done"] * 12


async def test_claim_of_one_account_leaves_the_others(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(2))
    await operations["epochs.close"]()

    [claim] = await operations["rewards.claim"](account=TRAINER)

    assert (claim["account"].lower(), claim["paid_wei"]) == (TRAINER, "200000")
    assert await operations["rewards.claim"](account="0x" + "77" * 20) == []


async def test_claim_pays_only_what_the_chain_has_not(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(1))
    await operations["epochs.close"]()
    treasury.contracts.claimed[TRAINER] = 150_000

    assert [claim["paid_wei"] for claim in await operations["rewards.claim"](account=TRAINER)] == ["50000"]
    treasury.contracts.claimed[TRAINER] = 200_000
    assert await operations["rewards.claim"](account=TRAINER) == []


async def test_claim_before_any_epoch_says_what_to_do(treasury):
    operations = settlement_operations(treasury)
    assert await operations["rewards.claim"](account=None) == []
    await treasury.serve("r1", makers(1))

    with pytest.raises(ChainError, match="epochs close") as caught:
        await operations["rewards.claim"](account=None)
    assert caught.value.error_code == "epoch_unknown"


@pytest.mark.parametrize(
    ("left_s", "is_void", "code"), [(10**10, False, "epoch_not_active"), (0, True, "epoch_void")], ids=["waiting", "void"]
)
async def test_claim_of_an_epoch_that_does_not_pay_says_why(treasury, left_s, is_void, code):
    operations = settlement_operations(treasury)
    treasury.activates_at_s, treasury.is_void = left_s, is_void
    await treasury.serve("r1", makers(1))
    await operations["epochs.close"]()

    with pytest.raises(ChainError) as caught:
        await operations["rewards.claim"](account=None)
    assert caught.value.error_code == code


@pytest.mark.parametrize("account", ["0x12", "lincoln", "0x" + "zz" * 20, ""])
async def test_rewards_of_a_malformed_account_are_a_request_error(treasury, account):
    operations = settlement_operations(treasury)
    for name in ("rewards.show", "rewards.claim"):
        with pytest.raises(RequestError, match="account"):
            await operations[name](account=account)


async def test_rewards_tell_earned_from_covered_and_claimed_and_leave_out_unpaid_usage(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("paid", makers(1))
    await treasury.serve("free", makers(3), is_paid=False)
    before = await operations["rewards.show"](account=None)
    await operations["epochs.close"]()
    treasury.contracts.claimed[OPERATOR.address] = 1

    after = await operations["rewards.show"](account=None)

    assert [row["earned_wei"] for row in after] == ["500000", "300000", "200000"]
    assert {row["in_epoch_wei"] for row in before} == {"0"}
    assert all(row["in_epoch_wei"] == row["earned_wei"] for row in after)
    assert [row["claimed_wei"] for row in after] == ["1", "0", "0"]


async def test_chain_is_never_asked_on_the_event_loop(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(2))
    await operations["epochs.close"]()
    await operations["rewards.show"](account=None)
    await operations["rewards.claim"](account=None)

    assert treasury.contracts.threads
    assert threading.current_thread() not in treasury.contracts.threads


async def test_close_with_the_chain_down_writes_nothing_and_can_be_repeated(treasury):
    operations = settlement_operations(treasury)
    await treasury.serve("r1", makers(1))
    treasury.contracts.is_down = True
    with pytest.raises(ChainError):
        await operations["epochs.close"]()
    assert await operations["epochs.list"]() == []

    treasury.contracts.is_down = False
    assert (await operations["epochs.close"]())["records"] == 1
    assert await operations["epochs.close"]() is None
    [listed] = await operations["epochs.list"]()
    assert listed["state"] == "done"


async def test_receipt_that_is_not_there_is_named(treasury):
    with pytest.raises(RequestError) as caught:
        await settlement_operations(treasury)["receipts.show"](request_id="nobody")
    assert caught.value.error_code == "receipt_not_found"


async def test_adapters_are_described_with_and_without_a_manifest():
    entry = SimpleNamespace(
        name="plain",
        source="local",
        adapter_id="a" * 64,
        rank=8,
        size_bytes=5,
        manifest=None,
        manifest_hash=None,
        directory="/d",
        coverage=(),
    )
    added = []

    async def add(directory, name):
        added.append((str(directory), name))
        return entry

    async def resolve(name):
        return entry

    async def fetching():
        return [Progress("org/large", 3, None)]

    removed = []

    async def remove(name):
        removed.append(name)

    catalog = SimpleNamespace(
        entries=lambda: [entry],
        add=add,
        remove=remove,
        resolve=resolve,
        fetching=fetching,
        is_known=lambda name: name == "plain",
    )
    restricted = []

    async def restrict(adapter):
        restricted.append((adapter.name, adapter.owner, adapter.allowed, list(added)))

    store = SimpleNamespace(private_adapter=lambda name: None, restrict_adapter=restrict)
    operations = adapter_operations(catalog, store, lambda: {entry.adapter_id: "resident"}.get)

    [listed] = await operations["adapters.list"]()
    shown = await operations["adapters.show"](name="plain")
    await operations["adapters.add"](directory="/d", name=None)
    await operations["adapters.add"](directory="/e", name=None, owner="acme", allowed=["beta"])
    await operations["adapters.remove"](name="plain")

    assert await operations["adapters.fetching"]() == [{"name": "org/large", "done_bytes": 3, "total_bytes": None}]
    assert listed["state"] == "resident"
    assert restricted == [("e", "acme", frozenset({"beta"}), [("/d", None)])]  # before anybody can see it
    assert (listed["name"], listed["trainer"], listed["size"], listed["owner"]) == ("plain", "unknown", 5, None)
    assert (shown["manifest"], shown["manifest_hash"], shown["coverage"]) == (None, None, [])
    assert added == [("/d", None), ("/e", None)]
    assert removed == ["plain"]


async def test_restrict_of_a_name_nobody_knows_is_refused_unless_it_comes_ahead():
    restricted = []

    async def restrict(adapter):
        restricted.append(adapter.name)

    catalog = SimpleNamespace(is_known=lambda name: name == "org/known")
    operations = adapter_operations(catalog, SimpleNamespace(restrict_adapter=restrict), lambda: {}.get)

    with pytest.raises(AdapterNotFoundError, match="--ahead"):
        await operations["adapters.restrict"](name="org/knwon", owner="acme", allowed=[])
    await operations["adapters.restrict"](name="org/known@v2", owner="acme", allowed=[])
    await operations["adapters.restrict"](name="org/later", owner="acme", allowed=[], ahead=True)

    assert restricted == ["org/known", "org/later"]  # in all revisions


async def test_release_of_a_name_that_is_not_restricted_is_refused():
    released = []

    async def release(name):
        released.append(name)

    store = SimpleNamespace(private_adapter=lambda name: {"secret": object()}.get(name), release_adapter=release)
    operations = adapter_operations(SimpleNamespace(), store, lambda: {}.get)

    await operations["adapters.release"](name="secret")
    with pytest.raises(AdapterNotFoundError, match="not restricted"):
        await operations["adapters.release"](name="secrt")

    assert released == ["secret"]
