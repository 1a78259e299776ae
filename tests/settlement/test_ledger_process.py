"""The ledger whose writer is a process of its own: the same promises, and what its loss means."""

import asyncio
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from attribution import receipt
from attribution.fees import Contribution, Payees, Price, SplitPolicy
from attribution.record import RecipeTerm
from node.errors import LedgerError, OverloadedError, RequestError
from node.settlement import ledger_client
from node.settlement.admission import Admission, Outcome, SignedVoucher
from node.settlement.keys import KeyDirectory
from node.settlement.ledger import Ledger

TRAINER, MAKER, PAYER = "0x" + "11" * 20, "0x" + "22" * 20, "0x" + "33" * 20
ADAPTER = "a" * 64
LARGE_WEI = 2**200  # beyond the integers of most encodings


@pytest.fixture(scope="module")
def keys_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "keys"
    KeyDirectory(directory, scrypt_n=2).open()
    return directory


@pytest.fixture
def make(tmp_path, keys_dir):
    def build(**options):
        values = {"clock_ms": lambda: time.time_ns() // 10**6, "chain_id": 31337, "group_commit_ms": 1.0, "retry_s": 0.01}
        values["signer"] = KeyDirectory(keys_dir).load("operator")
        return Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", keys_dir=keys_dir, **{**values, **options})

    return build


@pytest.fixture
async def ledger(make):
    opened = make()
    await opened.open()
    yield opened
    await opened.shutdown()


def admission(ledger, request_id, **changes):
    values = {
        "request_id": request_id,
        "tenant": "tenant",
        "base_id": "b" * 64,
        "prompts": [[1, 2, 3, 4]],
        "terms": (RecipeTerm(ADAPTER, "c" * 64, "1"),),
        "contributions": (Contribution(ADAPTER, TRAINER, ((MAKER, 1_000_000),)),),
        "price": Price("10", "100"),
        "policy": SplitPolicy(500_000, 200_000, 300_000),
        "payees": Payees(ledger.operator, ledger.operator),
    }
    return Admission(**{**values, **changes})


def voucher(ledger):
    signed = SignedVoucher(PAYER, ledger.operator, LARGE_WEI, 2**33, b"\x01" * 65)
    return {"voucher": signed, "voucher_digest": "d" * 64}


def ok(request_id):
    return Outcome(request_id=request_id, status="ok", finish_reason="stop", outputs=((5, 6),))


async def serve(ledger, request_id, **changes):
    await ledger.admit(admission(ledger, request_id, **changes))
    return await ledger.close(ok(request_id))


async def until_healthy(ledger):
    async with asyncio.timeout(30):
        while not ledger.is_healthy:
            await asyncio.sleep(0.01)


async def test_requests_at_once_keep_one_chain_and_get_receipts_that_verify(ledger):
    found = await asyncio.gather(*(serve(ledger, f"r{number}") for number in range(40)))
    assert sorted(item.sequence for item in found) == list(range(1, 41))
    for item in found:
        assert item.fee_wei == 240
        receipt.verify(item.bundle, {ledger.operator})
        receipt.verify_tokens(item.bundle, [[1, 2, 3, 4]], [[5, 6]])
        assert await ledger.receipt(item.request_id, "tenant") == item.bundle
        assert await ledger.receipt(item.request_id, "somebody else") is None
    assert await ledger.verify_chain() == 40


async def test_payers_are_known_as_soon_as_they_are_committed(ledger):
    await ledger.admit(admission(ledger, "paid", **voucher(ledger)))
    assert ledger.best_voucher(PAYER) == voucher(ledger)["voucher"]
    assert ledger.used_wei(PAYER) == 0
    await ledger.close(ok("paid"))
    assert ledger.used_wei(PAYER) == 240


async def test_opening_says_nothing_to_an_operator(make, caplog):
    with caplog.at_level(logging.INFO, "node"):
        ledger = make()
        await ledger.open()
        await ledger.shutdown()
    assert [record.getMessage() for record in caplog.records if record.name == "node.settlement.ledger_process"] == []


async def test_refusals_are_those_of_a_writer_here(ledger):
    with pytest.raises(RequestError, match="recipe"):
        await ledger.admit(admission(ledger, "r", terms=(RecipeTerm(ADAPTER, None, "0"),), contributions=()))
    with pytest.raises(LedgerError, match="not open"):
        await ledger.close(ok("never admitted"))
    await serve(ledger, "twice")
    with pytest.raises(LedgerError, match="admitted before"):
        await ledger.admit(admission(ledger, "twice"))
    assert ledger.is_healthy


async def test_more_calls_than_may_wait_are_overload(make):
    ledger = make(queue_limit=3)
    await ledger.open()
    calls = (ledger.admit(admission(ledger, f"r{number}")) for number in range(50))
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if result is not None]
    assert 0 < len(refused) < 50
    assert all(isinstance(result, OverloadedError) for result in refused)
    await ledger.shutdown()


async def test_other_transactions_commit_beside_the_process_or_not_at_all(ledger):
    def work(connection):
        connection.execute(text("INSERT INTO ledger_meta (key, value) VALUES ('x', 'y')"))
        raise OverloadedError("no")

    def count(connection):
        return connection.execute(text("SELECT count(*) FROM ledger_meta WHERE key = 'x'")).scalar()

    with pytest.raises(OverloadedError):
        await ledger.transact(work)
    assert await ledger.transact(count) == 0
    with pytest.raises(LedgerError):
        await ledger.transact(lambda connection: connection.execute(text("SELECT * FROM nowhere")))
    await asyncio.gather(*(serve(ledger, f"r{number}") for number in range(8)), ledger.transact(count))


async def test_loss_of_the_process_fails_who_waits_and_keeps_who_runs(ledger):
    await serve(ledger, "before")
    await ledger.admit(admission(ledger, "runs-on", **voucher(ledger)))
    await ledger.admit(admission(ledger, "ends-now"))
    os.kill(ledger._client.pid, signal.SIGSTOP)
    closing = asyncio.ensure_future(ledger.close(ok("ends-now")))
    await asyncio.sleep(0)
    os.kill(ledger._client.pid, signal.SIGKILL)
    with pytest.raises(LedgerError) as caught:
        await closing
    assert caught.value.error_code == "ledger_unavailable"
    assert not ledger.is_healthy
    with pytest.raises(LedgerError):
        await ledger.admit(admission(ledger, "refused"))
    await until_healthy(ledger)

    assert (await ledger.close(ok("runs-on"))).fee_wei == 240
    assert ledger.used_wei(PAYER) == 240
    await serve(ledger, "after")
    found = {item.record["request_id"]: item.record["status"] for item in await ledger.records()}
    assert found == {"before": "ok", "ends-now": "failed", "runs-on": "ok", "after": "ok"}
    assert await ledger.verify_chain() == 4


@pytest.fixture
def slow_begin(monkeypatch):
    """Each process from here on is begun once it may be; the first event says that one is asked for."""
    begins, goes_on, begin = asyncio.Event(), asyncio.Event(), ledger_client.begin

    async def begin_slowly():
        begins.set()
        await goes_on.wait()
        return await begin()

    monkeypatch.setattr(ledger_client, "begin", begin_slowly)
    return begins, goes_on


async def test_request_that_ends_while_another_process_is_begun_is_closed_by_that_one(ledger, slow_begin):
    begins, goes_on = slow_begin
    await ledger.admit(admission(ledger, "ends-between"))
    os.kill(ledger._client.pid, signal.SIGKILL)
    await begins.wait()
    with pytest.raises(LedgerError):
        await ledger.close(ok("ends-between"))
    goes_on.set()
    await until_healthy(ledger)

    assert [(item.record["request_id"], item.record["status"]) for item in await ledger.records()] == [("ends-between", "failed")]


async def test_request_that_a_full_disk_refused_is_closed_by_the_next_process(ledger):
    await ledger.admit(admission(ledger, "refused"))
    _, most = resource.prlimit(ledger._client.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(ledger._client.pid, resource.RLIMIT_FSIZE, (1, most))
    with pytest.raises(LedgerError):
        await ledger.close(ok("refused"))
    assert not ledger.is_healthy
    os.kill(ledger._client.pid, signal.SIGKILL)
    await until_healthy(ledger)

    assert [(item.record["request_id"], item.record["status"]) for item in await ledger.records()] == [("refused", "failed")]


async def test_shutdown_while_another_process_is_begun_ends_that_one(ledger, slow_begin, monkeypatch):
    monkeypatch.setattr(ledger_client, "STOP_TIMEOUT_S", None)  # as long as it takes
    begins, goes_on = slow_begin
    os.kill(ledger._client.pid, signal.SIGKILL)
    await begins.wait()
    ending = asyncio.create_task(ledger.shutdown())
    await asyncio.sleep(0)
    goes_on.set()
    async with asyncio.timeout(60):
        await ending

    assert ledger._client.pid is None


async def test_shutdown_commits_what_it_was_told(make):
    ledger = make()
    await ledger.open()
    for number in range(20):
        await ledger.admit(admission(ledger, f"r{number}"))
    closings = [asyncio.ensure_future(ledger.close(ok(f"r{number}"))) for number in range(20)]
    await asyncio.sleep(0)
    await ledger.shutdown()
    assert all(item.fee_wei == 240 for item in await asyncio.gather(*closings))
    with pytest.raises(LedgerError):
        await ledger.admit(admission(ledger, "late"))
    again = make()
    assert await again.open() == 0
    await again.shutdown()


async def test_open_twice_is_locked(ledger, make):
    with pytest.raises(LedgerError) as caught:
        await make().open()
    assert caught.value.error_code == "ledger_locked"
    await serve(ledger, "r1")


async def test_another_key_than_the_nodes_own_is_refused(make, keys_dir):
    with pytest.raises(LedgerError, match="signs for"):
        await make(signer=KeyDirectory(keys_dir).load("submitter")).open()


NODE = """
import asyncio, json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_ledger_process import admission, ok
from node.settlement.keys import KeyDirectory
from node.settlement.ledger import Ledger

async def client(ledger, name):
    for index in range(10**9):
        await ledger.admit(admission(ledger, f"{name}-{index}"))
        signed = await ledger.close(ok(f"{name}-{index}"))
        print(json.dumps(signed.bundle), flush=True)

async def main(url, keys_dir, _, name):
    signer = KeyDirectory(Path(keys_dir)).load("operator")
    ledger = Ledger(url, clock_ms=lambda: time.time_ns() // 10**6, signer=signer, chain_id=31337, keys_dir=Path(keys_dir))
    await ledger.open()
    await asyncio.gather(*(client(ledger, f"{name}-{number}") for number in range(16)))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.timeout(120)
async def test_kill_of_the_node_loses_no_receipt_and_leaves_nothing_open(make, keys_dir):
    seen, url = [], make().url
    root, here = str(Path(__file__).parents[2]), str(Path(__file__).parent)
    for number in range(2):
        command = [sys.executable, "-c", NODE, url, str(keys_dir), here, f"round{number}"]
        node = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
        lines = [node.stdout.readline() for _ in range(60)]
        node.send_signal(signal.SIGKILL)
        lines += node.stdout.read().splitlines(keepends=True)
        node.wait()
        seen += [json.loads(line) for line in lines if line.endswith(b"}\n")]
    ledger = make()
    await ledger.open()
    for bundle in seen:
        receipt.verify(bundle, {ledger.operator})
        assert await ledger.receipt(bundle["record"]["request_id"]) == bundle
    totals = await ledger.totals()
    assert await ledger.verify_chain() == totals.records
    assert set(totals.by_status) <= {"ok", "interrupted"}
    assert totals.by_status["ok"] >= len(seen) >= 120
    await ledger.shutdown()


async def test_admit_that_is_interrupted_leaves_nothing_open_once_it_is_closed(ledger):
    admitting = asyncio.create_task(ledger.admit(admission(ledger, "r1")))
    await asyncio.sleep(0)  # it is told to the ledger, and its answer is not here
    admitting.cancel()
    signed = await ledger.close(Outcome(request_id="r1", status="cancelled", finish_reason="cancelled"))

    assert admitting.cancelled()
    assert signed.bundle["record"]["status"] == "cancelled"
    with pytest.raises(LedgerError, match="not open"):
        await ledger.close(Outcome(request_id="r2", status="cancelled", finish_reason="cancelled"))
