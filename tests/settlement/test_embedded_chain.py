import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests
from eth_utils.crypto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from node.errors import ChainError
from node.settlement.chain import Call, Chain
from node.settlement.embedded_chain import LOG_NAME, open_chain
from node.settlement.embedded_chain_evm import Evm, TransactionRefused
from node.settlement.embedded_chain_log import MAGIC, BlockLog, LoggedBlock
from node.settlement.embedded_chain_process import EmbeddedChainProcess
from node.settlement.embedded_chain_rpc import ChainRpc, RpcError
from node.settlement.genesis import EMBEDDED_CHAIN_ID, GAS_MONEY_WEI, Genesis
from node.settlement.signer import LocalSigner

SENDER = LocalSigner(b"\x09" * 32)
GENESIS = Genesis(EMBEDDED_CHAIN_ID, 1_000, {SENDER.address.lower(): GAS_MONEY_WEI})
# TIMESTAMP PUSH0 MSTORE PUSH1 32 PUSH0 RETURN, behind ten bytes that deploy it; and one that reverts whatever it is asked
CLOCK_CODE = bytes.fromhex("425f5260205ff3")
REVERT_CODE = bytes.fromhex("5f5ffd")


def deployment(code):
    return bytes([0x60, len(code), 0x60, 0x0A, 0x5F, 0x39, 0x60, len(code), 0x5F, 0xF3]) + code


def transfer(nonce, to="0x" + "11" * 20, data=b"", gas=100_000, **changes):
    fields = {"chainId": EMBEDDED_CHAIN_ID, "nonce": nonce, "to": to, "value": 0, "data": data, "gas": gas, "type": 2}
    return SENDER.sign_transaction({**fields, "maxFeePerGas": 10**10, "maxPriorityFeePerGas": 1, **changes})


@pytest.fixture
def started(tmp_path):
    process = EmbeddedChainProcess(tmp_path / "chain", [SENDER.address])
    ready = process.start()
    yield process, Chain(ready.rpc_url, ready.chain_id)
    process.close()


def kill(process):
    os.kill(process.process_id, signal.SIGKILL)
    process.close()
    ready = process.start()
    return Chain(ready.rpc_url, ready.chain_id)


def test_evm_same_transactions_reach_the_same_head_hash():
    first, second = Evm(GENESIS), Evm(GENESIS)
    for nonce in range(3):
        first.mine(transfer(nonce), 2_000 + nonce)
        second.mine(transfer(nonce), 2_000 + nonce)
    assert first.head.hash == second.head.hash


def test_evm_many_transactions_in_one_second_do_not_run_ahead_of_time():
    evm = Evm(GENESIS)
    for nonce in range(5):
        evm.mine(transfer(nonce), 2_000)
    assert (evm.head.block_number, evm.head.timestamp) == (5, 2_000)


def test_evm_clock_going_back_keeps_the_parents_time():
    evm = Evm(GENESIS)
    evm.mine(transfer(0), 2_000)
    assert evm.mine(transfer(1), 1_500).header.timestamp == 2_000


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "cannot decode"),
        (b"\x02\xc0", "cannot decode"),
        (b"\xff" * 50, "cannot decode"),
        (transfer(1), "nonce too high"),
        (transfer(0, chainId=1), "invalid chain id"),
        (transfer(0, gas=40_000_000), "exceeds block gas limit"),
        (transfer(0, gas=20_000), "intrinsic gas too low"),
        (transfer(0, maxFeePerGas=1, maxPriorityFeePerGas=1), "less than block base fee"),
        (transfer(0, value=GAS_MONEY_WEI), "insufficient funds"),
    ],
)
def test_evm_unminable_transaction_is_refused_in_known_words_and_changes_nothing(raw, reason):
    evm = Evm(GENESIS)
    head = evm.head.hash
    with pytest.raises(TransactionRefused, match=reason):
        evm.mine(raw, 2_000)
    assert evm.head.hash == head
    assert evm.mine(transfer(0), 2_000).number == 1


def test_evm_mined_transaction_sent_again_is_already_known_and_its_nonce_too_low():
    evm = Evm(GENESIS)
    evm.mine(transfer(0), 2_000)
    with pytest.raises(TransactionRefused, match="already known"):
        evm.mine(transfer(0), 2_001)
    with pytest.raises(TransactionRefused, match="nonce too low"):
        evm.mine(transfer(0, value=1), 2_001)


def test_rpc_idle_chain_lets_a_call_see_time_pass(tmp_path):
    now_s = [2_000]
    log = BlockLog(tmp_path / LOG_NAME)
    rpc = ChainRpc(open_chain(log, lambda: GENESIS), log, lambda: now_s[0])
    transaction_hash = rpc.answer("eth_sendRawTransaction", ["0x" + transfer(0, to=b"", data=deployment(CLOCK_CODE)).hex()])
    address = rpc.answer("eth_getTransactionReceipt", [transaction_hash])["contractAddress"]
    now_s[0] = 9_999
    assert int(rpc.answer("eth_call", [{"to": address}, "latest"]), 16) == 9_999
    assert int(rpc.answer("eth_getBlockByNumber", ["pending", False])["timestamp"], 16) == 9_999
    assert int(rpc.answer("eth_getBlockByNumber", ["latest", False])["timestamp"], 16) == 2_000
    log.close()


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("eth_sendTransaction", [{}], -32601),
        ("eth_getBalance", [], -32602),
        ("eth_getBalance", ["0x12"], -32602),
        ("eth_getBalance", ["0x" + "11" * 20, "0x999"], -32000),
        ("eth_getBlockByNumber", ["-0x1"], -32602),
        ("eth_call", ["nothing"], -32602),
        ("eth_sendRawTransaction", ["0xzz"], -32602),
        ("eth_sendRawTransaction", ["0x" + "00" * 200_000], -32000),
        ("eth_getLogs", [{"blockHash": "0x" + "11" * 32}], -32000),
    ],
)
def test_rpc_bad_request_is_an_error_answer(tmp_path, method, params, code):
    log = BlockLog(tmp_path / LOG_NAME)
    rpc = ChainRpc(open_chain(log, lambda: GENESIS), log, lambda: 2_000)
    with pytest.raises(RpcError) as caught:
        rpc.answer(method, params)
    assert caught.value.code == code
    log.close()


def test_rpc_reverting_call_and_estimate_carry_code_3(tmp_path):
    log = BlockLog(tmp_path / LOG_NAME)
    rpc = ChainRpc(open_chain(log, lambda: GENESIS), log, lambda: 2_000)
    transaction_hash = rpc.answer("eth_sendRawTransaction", ["0x" + transfer(0, to=b"", data=deployment(REVERT_CODE)).hex()])
    address = rpc.answer("eth_getTransactionReceipt", [transaction_hash])["contractAddress"]
    for method in ("eth_call", "eth_estimateGas"):
        with pytest.raises(RpcError) as caught:
            rpc.answer(method, [{"to": address}])
        assert (caught.value.code, caught.value.message) == (3, "execution reverted")
    log.close()


def write_log(path, count=4):
    log = BlockLog(path)
    evm = open_chain(log, lambda: GENESIS)
    for nonce in range(count):
        block = evm.mine(transfer(nonce), 2_000 + nonce)
        log.append(LoggedBlock(block.header.timestamp, block.hash, transfer(nonce)).to_bytes())
    log.close()
    return evm.head.hash


def reopen(path):
    log = BlockLog(path)
    try:
        return log.read()
    finally:
        log.close()


def test_log_replays_to_the_same_head(tmp_path):
    head = write_log(tmp_path / LOG_NAME)
    log = BlockLog(tmp_path / LOG_NAME)
    assert open_chain(log, lambda: pytest.fail("a genesis was made")).head.hash == head
    log.close()


def test_log_torn_at_every_byte_of_its_last_record_keeps_all_before(tmp_path):
    path = tmp_path / LOG_NAME
    write_log(path, count=2)
    whole, last = path.read_bytes(), reopen(path)[-1]
    start = len(whole) - len(last) - 40
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert len(reopen(path)) == 2
        assert path.stat().st_size == start


def test_log_zeros_after_the_end_are_cut_off(tmp_path):
    path = tmp_path / LOG_NAME
    write_log(path, count=1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert len(reopen(path)) == 2
    assert path.stat().st_size == size


@settings(max_examples=60, deadline=None)
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_log_flipped_bit_before_the_last_record_is_refused(tmp_path_factory, position, bit):
    path = tmp_path_factory.mktemp("log") / LOG_NAME
    log = BlockLog(path)
    log.read()
    for payload in (b"first" * 9, b"second" * 9, b"last" * 9):
        log.append(payload)
    log.close()
    damaged = bytearray(path.read_bytes())
    damaged[position % (len(damaged) - 36 - 40)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(ChainError) as caught:
        reopen(path)
    assert caught.value.error_code == "chain_corrupt"


def test_log_of_other_rules_is_refused(tmp_path):
    path = tmp_path / LOG_NAME
    log = BlockLog(path)
    open_chain(log, lambda: GENESIS)
    log.append(LoggedBlock(2_000, b"\x00" * 32, transfer(0)).to_bytes())
    with pytest.raises(ChainError) as caught:
        open_chain(log, lambda: GENESIS)
    assert caught.value.error_code == "chain_corrupt"
    log.close()


def test_log_of_something_else_is_refused_and_untouched(tmp_path):
    path = tmp_path / LOG_NAME
    path.write_bytes(b"not a chain at all")
    with pytest.raises(ChainError):
        reopen(path)
    assert path.read_bytes() == b"not a chain at all"
    assert not path.read_bytes().startswith(MAGIC)


def test_process_killed_comes_back_with_everything(started):
    process, chain = started
    deployed = transfer(0, to=b"", data=deployment(CLOCK_CODE))
    chain.send_raw(deployed)
    address = chain.receipt(keccak(deployed)).contract_address
    chain.send_raw(transfer(1, value=7))
    before = (
        chain.genesis_hash(),
        chain.head(),
        chain.code(address),
        chain.nonce(SENDER.address),
        chain.balance_wei("0x" + "11" * 20),
    )

    chain = kill(process)

    after = (
        chain.genesis_hash(),
        chain.head(),
        chain.code(address),
        chain.nonce(SENDER.address),
        chain.balance_wei("0x" + "11" * 20),
    )
    assert after == before
    assert chain.try_call(None, Call(address, b"")) != b""


def test_process_killed_at_random_moments_keeps_every_answered_transaction(started):
    process, chain = started
    chance, answered, nonce = random.Random(3), [], 0
    for _ in range(3):
        killer = threading.Timer(chance.uniform(0.05, 0.4), os.kill, (process.process_id, signal.SIGKILL))
        killer.start()
        while True:
            raw = transfer(nonce)
            if chain.send_raw(raw).value != "accepted":
                break
            answered.append(keccak(raw))
            nonce += 1
        killer.join()
        chain = kill_finished(process)
        assert all(chain.receipt(item) is not None for item in answered[-20:])
        nonce = chain.nonce(SENDER.address)
        assert nonce in (len(answered), len(answered) + 1)  # the last one may be on disk without its answer having left
        answered += [keccak(transfer(number)) for number in range(len(answered), nonce)]


def kill_finished(process):
    process.close()
    ready = process.start()
    return Chain(ready.rpc_url, ready.chain_id)


def test_process_second_instance_on_the_same_directory_is_refused(started, tmp_path):
    command = [
        sys.executable,
        "-m",
        "node.settlement.embedded_chain",
        "--data-dir",
        str(tmp_path / "chain"),
        "--lock-wait-s",
        "0",
    ]
    second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert second.returncode == 1
    assert json.loads(second.stdout)["code"] == "chain_locked"


def test_process_ends_with_its_parent_however_that_dies(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom node.settlement.embedded_chain_process import EmbeddedChainProcess\n"
        "process = EmbeddedChainProcess(Path(sys.argv[1]))\nprocess.start()\n"
        "print(process.process_id, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "chain")], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child)


def test_process_is_not_in_the_group_that_ctrl_c_reaches(started):
    process, _ = started
    assert os.getpgid(process.process_id) != os.getpgrp()


def is_running(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_process_answers_strange_bodies_and_stays_up(started):
    _, chain = started
    url = chain._provider.endpoint_uri
    assert requests.post(url, data=b"{}", headers={"Content-Type": "text/plain"}, timeout=10).status_code == 415
    for body in (b"", b"[]", b"{", b"null", b'{"method": 1}', b"[" * 1_000_000):
        answer = requests.post(url, data=body, headers={"Content-Type": "application/json"}, timeout=10).json()
        assert answer["error"]["code"] == -32600
    with contextlib.suppress(requests.ConnectionError):  # the answer may be cut off by the rest of the body
        oversized = requests.post(url, data=b"x" * (2 << 20), headers={"Content-Type": "application/json"}, timeout=10)
        assert oversized.status_code == 413
    chain.connect()
