"""What the development chain cannot show: a mempool, replacements and reorganisations. Needs contracts/node_modules."""

import subprocess
import time
from pathlib import Path

import pytest
from eth_utils.crypto import keccak
from sqlmodel import SQLModel

from node.errors import ChainError
from node.settlement import intents
from node.settlement.chain import Call, Chain
from node.settlement.deploy import DeploymentTerms, deploy
from node.settlement.ledger_database import make_engine, parse_url
from node.settlement.outbox import Outbox, OutboxLimits
from node.settlement.settlement_contracts import SettlementContracts
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

ANVIL = Path(__file__).parents[2] / "contracts" / "node_modules" / ".bin" / "anvil"
SENDER = LocalSigner(b"\x31" * 32)

pytestmark = [
    pytest.mark.contracts,
    pytest.mark.skipif(not ANVIL.exists(), reason="contracts/node_modules has no anvil; run npm ci in contracts"),
]


@pytest.fixture
def chain():
    process = subprocess.Popen([str(ANVIL), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = next(line.rsplit(" ", 1)[1].strip() for line in process.stdout if line.startswith("Listening on"))
    chain = Chain(f"http://{address}", 31_337)
    chain.connect()
    chain._request("anvil_setBalance", [SENDER.address, hex(10**20)])
    yield chain
    process.terminate()
    process.wait(20)
    process.stdout.close()


class AnvilWorld:
    """Contracts, a ledger and an outbox whose one intent kind is minting through `deposit`'s door: an approved deposit."""

    def __init__(self, chain, directory):
        wallet = Wallet(chain, SENDER, poll_s=0.01)
        self.chain = chain
        self.contracts = SettlementContracts(chain, deploy(chain, wallet, DeploymentTerms(SENDER.address, 1, 60)).addresses)
        wallet.send(self.contracts.mint(SENDER.address, 100), "mint")
        wallet.send(self.contracts.approve(self.contracts.addresses.escrow, 100), "approve")
        self.engine = make_engine(parse_url(f"sqlite:///{directory / 'ledger.sqlite'}"))
        with self.engine.begin() as connection:
            SQLModel.metadata.create_all(connection)
        self.now_ms = int(time.time() * 1000)
        limits = OutboxLimits(resend_ms=1_000, bump_ms=5_000)
        self.outbox = Outbox(self.engine, self.contracts, SENDER, lambda: self.now_ms, limits)

    def deposit(self, amount_wei):
        payload = {"payer": SENDER.address, "amount": str(amount_wei)}
        with self.engine.begin() as connection:
            intents.submit_intent(connection, "deposit", "deposit", payload, created_ms=self.now_ms)

    def state(self):
        with self.engine.begin() as connection:
            return intents.intent_state(connection, "deposit")

    def attempts(self):
        with self.engine.begin() as connection:
            return connection.execute(SQLModel.metadata.tables["chain_attempt"].select()).all()


@pytest.fixture
def world(chain, tmp_path):
    made = AnvilWorld(chain, tmp_path)
    yield made
    made.engine.dispose()


def test_anvil_waiting_transaction_is_replaced_and_pays_once(world):
    world.chain._request("evm_setAutomine", [False])
    world.deposit(7)
    world.outbox.run_once()
    world.now_ms += 5_000
    world.outbox.run_once()
    assert len(world.attempts()) == 2
    world.chain._request("evm_mine", [])
    world.outbox.run_once()

    assert world.state() == "done"
    assert world.contracts.escrow_balance_wei(SENDER.address) == 7
    first, second = world.attempts()
    assert world.chain.receipt(keccak(first.raw)) is None
    assert world.chain.receipt(keccak(second.raw)).has_succeeded


def test_anvil_reorganisation_takes_it_back_and_it_lands_again(world):
    world.deposit(7)
    world.outbox.run_once()
    world.outbox.run_once()
    assert world.state() == "done"

    world.chain._request("anvil_reorg", [1, []])
    assert world.contracts.escrow_balance_wei(SENDER.address) == 0
    world.outbox.run_once()
    assert world.contracts.escrow_balance_wei(SENDER.address) == 7
    world.outbox.run_once()

    assert world.state() == "done"
    assert len(world.attempts()) == 1


def test_anvil_wrong_chain_id_is_refused(chain):
    with pytest.raises(ChainError) as caught:
        Chain(chain._provider.endpoint_uri, 1).connect()
    assert caught.value.error_code == "chain_mismatch"


def test_anvil_call_and_estimate_agree_about_a_refusal(world):
    zero = world.contracts.deposit(SENDER.address, 0)
    assert world.contracts.named(world.chain.try_call(SENDER.address, zero)).name == "ZeroAmount"
    assert world.contracts.named(world.chain.estimate_gas(SENDER.address, zero)).name == "ZeroAmount"
    assert world.chain.estimate_gas(SENDER.address, Call("0x" + "11" * 20, b"", 1)) >= 21_000
