import asyncio
import json
import sqlite3

import pytest
from sqlalchemy import create_engine, select, text

from attribution import receipt
from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from attribution.signing import LocalSigner
from node.errors import LedgerError, OverloadedError, RequestError
from node.settlement import ledger_writer
from node.settlement.admission import Admission, Outcome, SignedVoucher
from node.settlement.ledger import Ledger
from node.settlement.ledger_reads import LedgerReads
from node.settlement.tables import REQUESTS

SIGNER = LocalSigner(b"\x07" * 32)
TRAINER, MAKER, PAYER = "0x" + "11" * 20, "0x" + "22" * 20, "0x" + "33" * 20
ADAPTER = "a" * 64


class Clock:
    """UTC milliseconds that a test moves by hand."""

    def __init__(self):
        self.now_ms = 1_700_000_000_000

    def __call__(self):
        self.now_ms += 1
        return self.now_ms


def admission(request_id, **changes):
    values = {
        "request_id": request_id,
        "tenant": "tenant",
        "base_id": "b" * 64,
        "prompts": [[1, 2, 3, 4]],
        "terms": (RecipeTerm(ADAPTER, "c" * 64, "1"),),
        "contributions": (Contribution(ADAPTER, TRAINER, ((MAKER, 1_000_000),)),),
        "price": Price("10", "100"),
        "policy": SplitPolicy(500_000, 200_000, 300_000),
        "payees": Payees(SIGNER.address, SIGNER.address),
    }
    return Admission(**{**values, **changes})


def voucher(cumulative_wei=10**9, deadline=2**33):
    return {"voucher": SignedVoucher(PAYER, SIGNER.address, cumulative_wei, deadline, b"\x01" * 65), "voucher_digest": "d" * 64}


def ok(request_id, output=((5, 6),), status="ok"):
    return Outcome(request_id=request_id, status=status, finish_reason="stop", outputs=output)


async def open_count(ledger):
    return len(await ledger.read(lambda reads: reads.rows(select(REQUESTS))))


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'ledger.sqlite'}"


@pytest.fixture
def make(url):
    def build(**options):
        values = {"clock_ms": Clock(), "signer": SIGNER, "chain_id": 31337, "group_commit_ms": 1.0, "retry_s": 0.01}
        return Ledger(options.pop("url", url), **{**values, **options})

    return build


@pytest.fixture
async def ledger(make):
    opened = make()
    await opened.open()
    yield opened
    await opened.shutdown()


async def serve(ledger, request_id, outcome=None, **changes):
    await ledger.admit(admission(request_id, **changes))
    return await ledger.close(outcome or ok(request_id))


async def test_close_returns_a_receipt_that_verifies_offline(ledger):
    signed = await serve(ledger, "r1")

    bundle = json.loads(json.dumps(signed.bundle))
    verified = receipt.verify(bundle, {SIGNER.address})
    receipt.verify_tokens(bundle, [[1, 2, 3, 4]], [[5, 6]])
    assert verified.record_hash == signed.record_hash
    assert signed.fee_wei == 4 * 10 + 2 * 100
    assert await ledger.receipt("r1") == bundle
    assert await ledger.receipt("r2") is None


async def test_close_under_concurrency_keeps_one_chain(ledger):
    await asyncio.gather(*(serve(ledger, f"r{index}") for index in range(100)))

    stored = await ledger.records(limit=1000)
    assert [item.sequence for item in stored] == list(range(1, 101))
    assert {item.record["request_id"] for item in stored} == {f"r{index}" for index in range(100)}
    assert await ledger.verify_chain() == 100
    assert (await ledger.totals()).recorded_wei == 100 * 240


async def test_records_pages_follow_the_sequence(ledger):
    for index in range(5):
        await serve(ledger, f"r{index}")

    assert [item.sequence for item in await ledger.records(after=2, limit=2)] == [3, 4]
    assert await ledger.records(after=5) == []


async def test_admit_the_same_id_twice_is_refused(ledger):
    await serve(ledger, "r1")
    await ledger.admit(admission("r2"))

    for request_id in ("r1", "r2"):
        with pytest.raises(LedgerError, match="admitted before"):
            await ledger.admit(admission(request_id))
    assert ledger.is_healthy


async def test_admit_the_same_id_at_once_lets_one_through(ledger):
    results = await asyncio.gather(*(ledger.admit(admission("r1")) for _ in range(5)), return_exceptions=True)

    assert sum(result is None for result in results) == 1
    await ledger.close(ok("r1"))


async def test_close_twice_or_unknown_is_refused(ledger):
    await serve(ledger, "r1")

    for request_id in ("r1", "never"):
        with pytest.raises(LedgerError, match="not open"):
            await ledger.close(ok(request_id))
    assert await ledger.verify_chain() == 1


@pytest.mark.parametrize(
    ("status", "outputs", "fee"),
    [("ok", ((5,), (6, 7)), 340), ("cancelled", ((5,),), 140), ("cancelled", (), 0), ("failed", ((5,),), 0)],
)
async def test_close_fee_follows_the_outcome(ledger, status, outputs, fee):
    signed = await serve(ledger, "r1", ok("r1", outputs, status))

    assert signed.fee_wei == fee
    assert signed.bundle["record"]["status"] == status


async def test_close_survives_a_cancelled_caller(ledger):
    await ledger.admit(admission("r1"))
    task = asyncio.create_task(ledger.close(ok("r1")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await serve(ledger, "r2")
    assert [item.record["request_id"] for item in await ledger.records()] == ["r1", "r2"]


async def test_earnings_tell_recorded_from_payable(ledger):
    await serve(ledger, "free")
    await serve(ledger, "paid", **voucher())

    rows = {row.role: row for row in await ledger.earnings()}
    assert {role: (row.recorded_wei, row.payable_wei) for role, row in rows.items()} == {
        "node": (240, 120),
        "trainer": (96, 48),
        "data": (144, 72),
    }
    assert [row.role for row in await ledger.earnings(account=MAKER.upper().replace("X", "x"))] == ["data"]
    assert {row.role for row in await ledger.earnings(adapter_id=ADAPTER)} == {"trainer", "data"}
    assert (await ledger.totals()).payable_wei == 240
    assert ledger.used_wei(PAYER) == 240


async def test_usage_by_tenant_and_day_is_what_was_delivered_also_after_a_restart(make):
    ledger = make()
    await ledger.open()
    await serve(ledger, "a", tenant="ann")
    await serve(ledger, "b", ok("b", ((5, 6, 7),), "cancelled"), tenant="ann")
    await serve(ledger, "c", ok("c", ((),), "cancelled"), tenant="ann")
    await serve(ledger, "d", ok("d", ((5,),), "failed"), tenant="ann")
    await serve(ledger, "e", tenant="bob")
    await ledger.shutdown()

    again = make()
    await again.open()
    rows = {row.tenant_digest: row for row in await again.usage("2023-11")}
    assert {row.day for row in rows.values()} == {"2023-11-14"}
    ann, bob = rows[again.tenant_digest("ann")], rows[again.tenant_digest("bob")]
    assert (ann.tokens, ann.wei) == (4 + 2 + 4 + 3, 2 * 40 + 500)
    assert (bob.tokens, bob.wei) == (6, 240)
    assert await again.usage("2023-12") == []
    await again.shutdown()


async def test_open_again_continues_the_chain_and_knows_every_payer(make):
    first = make()
    await first.open()
    await serve(first, "r1", **voucher(5000, 100))
    await serve(first, "r2", **voucher(4000, 200))
    await first.shutdown()

    second = make()
    assert await second.open() == 0
    signed = await serve(second, "r3", **voucher(6000, 50))
    assert signed.sequence == 3
    assert second.used_wei(PAYER) == 720
    assert await second.verify_chain() == 3
    kept = await second.transact(lambda connection: connection.execute(text("SELECT * FROM ledger_payer")).mappings().one())
    assert (int(kept["cumulative_wei"]), int(kept["deadline"])) == (6000, 50)
    await second.shutdown()


async def test_open_after_a_crash_closes_open_requests_as_interrupted(make):
    crashed = make()
    await crashed.open()
    await serve(crashed, "done")
    await crashed.admit(admission("lost", **voucher()))
    await crashed.shutdown()

    ledger = make()
    assert await ledger.open() == 1
    bundle = await ledger.receipt("lost")
    assert (bundle["record"]["status"], bundle["record"]["fee_wei"]) == ("interrupted", "0")
    assert ledger.used_wei(PAYER) == 0
    assert await ledger.verify_chain() == 2
    assert (await ledger.totals()).by_status == {"ok": 1, "interrupted": 1}
    await ledger.shutdown()


async def test_open_twice_is_locked(ledger, make):
    with pytest.raises(LedgerError) as caught:
        await make().open()

    assert caught.value.error_code == "ledger_locked"
    await serve(ledger, "r1")


async def test_open_a_newer_schema_is_refused_and_untouched(make, url):
    first = make()
    await first.open()
    await first.shutdown()
    with create_engine(url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(LedgerError) as caught:
        await make().open()
    assert caught.value.error_code == "ledger_schema_newer"
    assert "9999" in caught.value.message


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("sqlite:///{dir}", "is a directory"),
        ("sqlite:///{dir}/none/ledger.sqlite", "does not exist"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql://host/name", "runs on sqlite and postgresql"),
        ("not a url", "not a database URL"),
    ],
)
def test_ledger_at_an_impossible_place_says_why(tmp_path, make, bad, words):
    with pytest.raises(LedgerError, match=words):
        make(url=bad.format(dir=tmp_path))


async def test_open_a_file_that_is_no_database_is_corrupt_and_kept(tmp_path, make):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"these are notes, not a database\n" * 200)

    with pytest.raises(LedgerError) as caught:
        await make().open()
    assert caught.value.error_code == "ledger_corrupt"
    assert path.read_bytes().startswith(b"these are notes")


async def test_open_where_nothing_can_be_written_says_so(make):
    with pytest.raises(LedgerError, match="cannot be written"):
        await make(url="sqlite:////proc/ledger.sqlite").open()


async def test_failed_commit_ends_answers_refuses_admissions_and_heals(make, tmp_path):
    ledger = make(busy_timeout_ms=1)
    await ledger.open()
    await serve(ledger, "before")
    await ledger.admit(admission("during", **voucher()))
    blocker = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")

    with pytest.raises(LedgerError) as caught:
        await ledger.close(ok("during"))
    assert caught.value.error_code == "ledger_unavailable"
    assert caught.value.is_retryable
    assert not ledger.is_healthy
    with pytest.raises(LedgerError):
        await ledger.admit(admission("refused"))
    with pytest.raises(LedgerError):
        await ledger.transact(lambda connection: None)

    blocker.execute("ROLLBACK")
    blocker.close()
    async with asyncio.timeout(10):
        while not ledger.is_healthy:
            await asyncio.sleep(0.005)
    await serve(ledger, "after")
    found = {item.record["request_id"]: (item.record["status"], item.record["fee_wei"]) for item in await ledger.records()}
    assert found == {"before": ("ok", "240"), "during": ("failed", "0"), "after": ("ok", "240")}
    assert ledger.used_wei(PAYER) == 0
    assert await ledger.verify_chain() == 3
    await ledger.shutdown()


async def test_full_disk_ends_answers_and_heals_when_there_is_room(ledger):
    pages = await ledger.transact(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar())
    await ledger.transact(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}"))
    served = []

    async def serve_many():
        for number in range(200):
            await serve(ledger, f"request-{number}")
            served.append(number)

    with pytest.raises(LedgerError) as caught:
        await serve_many()
    assert caught.value.error_code == "ledger_unavailable"
    async with asyncio.timeout(10):  # the writer's next connection has no such limit
        while not ledger.is_healthy:
            await asyncio.sleep(0.005)
    await serve(ledger, "after")
    totals = await ledger.totals()
    assert totals.by_status["ok"] == len(served) + 1
    assert await ledger.verify_chain() == totals.records
    assert await open_count(ledger) == 0


@pytest.mark.parametrize("step", ["admit", "close"])
async def test_commit_that_landed_although_it_was_reported_lost_leaves_nothing_open(ledger, monkeypatch, step):
    if step == "close":
        await ledger.admit(admission("during"))

    def commit_then_fail(self, kind, *_):
        self._transaction.commit()
        raise OSError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_writer._Transaction, "__exit__", commit_then_fail)
        with pytest.raises(LedgerError):
            await (ledger.admit(admission("during")) if step == "admit" else ledger.close(ok("during")))
    async with asyncio.timeout(10):
        while not ledger.is_healthy:
            await asyncio.sleep(0.005)

    [found] = await ledger.records()
    assert found.record["status"] == ("failed" if step == "admit" else "ok")
    assert await open_count(ledger) == 0


async def test_transact_rolls_back_what_its_work_refuses(ledger):
    def work(connection):
        connection.execute(text("INSERT INTO ledger_meta (key, value) VALUES ('x', 'y')"))
        raise OverloadedError("no")

    with pytest.raises(OverloadedError):
        await ledger.transact(work)
    assert await ledger.transact(lambda c: c.execute(text("SELECT count(*) FROM ledger_meta WHERE key = 'x'")).scalar()) == 0


async def test_admit_beyond_the_queue_is_overloaded(make):
    ledger = make(queue_limit=1)
    await ledger.open()
    results = await asyncio.gather(*(ledger.admit(admission(f"r{index}")) for index in range(200)), return_exceptions=True)

    refused = [result for result in results if result is not None]
    assert refused
    assert all(isinstance(result, OverloadedError) for result in refused)
    await ledger.shutdown()


@pytest.mark.parametrize("terms", [(RecipeTerm(ADAPTER, None, "0"),), (RecipeTerm(ADAPTER, None, "1"),) * 2])
async def test_admit_a_recipe_without_a_record_is_a_request_error(ledger, terms):
    with pytest.raises(RequestError, match="recipe"):
        await ledger.admit(admission("r1", terms=terms, contributions=()))


@pytest.mark.parametrize("request_id", ["", "two words", "x" * 129, "\ud800", "é"])
async def test_admit_a_malformed_id_is_a_request_error(ledger, request_id):
    with pytest.raises(RequestError, match="request id"):
        await ledger.admit(admission(request_id))


async def test_after_shutdown_everything_is_refused(make):
    ledger = make()
    await ledger.open()
    await ledger.shutdown()

    with pytest.raises(LedgerError):
        await ledger.admit(admission("r1"))
    with pytest.raises(LedgerError):
        await ledger.receipt("r1")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE ledger_record SET body = CAST(replace(body, '240', '241') AS BLOB) WHERE sequence = 2", "amount|fee_wei|split"),
        ("DELETE FROM ledger_record WHERE sequence = 2", "does not continue"),
        ("UPDATE ledger_record SET signature = zeroblob(65) WHERE sequence = 3", "signature"),
        ("UPDATE ledger_record SET body = CAST(replace(body, 'stop', 'halt') AS BLOB) WHERE sequence = 2", "bytes are not"),
    ],
)
async def test_verify_chain_finds_a_changed_ledger(make, url, statement, words):
    ledger = make()
    await ledger.open()
    for index in range(3):
        await serve(ledger, f"r{index}")
    await ledger.shutdown()
    with create_engine(url).begin() as connection:
        connection.execute(text(statement))

    reads = LedgerReads(url)
    with pytest.raises(LedgerError, match=words) as caught:
        reads.verify_chain()
    assert caught.value.error_code == "ledger_corrupt"
    reads.close()


async def test_reads_beside_a_running_node_see_what_is_committed(ledger, url):
    await serve(ledger, "r1")
    reads = LedgerReads(url)

    assert reads.receipt("r1") == await ledger.receipt("r1")
    assert reads.totals().records == 1
    reads.close()
