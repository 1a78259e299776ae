"""A development chain with the contracts on it, and what a test needs to pay, collect, close an epoch and claim."""

from __future__ import annotations

import os
import secrets
import signal
import time

import pytest
from sqlmodel import SQLModel

from attribution.epoch import EpochStatement, rewards_domain
from attribution.merkle import Tree, TreeDomain
from attribution.voucher import Collection, Voucher, escrow_domain
from node.settlement import intents
from node.settlement.chain import Call, Chain
from node.settlement.chain_profiles import PROFILES
from node.settlement.deploy import DeploymentTerms, deploy
from node.settlement.embedded_chain_process import EmbeddedChainProcess
from node.settlement.faucet import Faucet
from node.settlement.ledger_database import make_engine, parse_url
from node.settlement.outbox import Outbox, OutboxLimits
from node.settlement.settlement_contracts import SettlementContracts
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

OPERATOR, FUNDER = (LocalSigner(bytes([number]) * 32) for number in (1, 3))
TRAINER, MAKER = "0x" + "11" * 20, "0x" + "22" * 20


class ManualClock:
    """UTC milliseconds that move only when a test says so."""

    def __init__(self):
        self.now_ms = int(time.time() * 1000)

    def __call__(self):
        return self.now_ms


ready = []  # what the shared chain last announced


class ChainWorld:
    """One deployment with its own submitter, payer and ledger database, on a chain that tests share and may kill."""

    def __init__(self, process, directory, challenge_delay_s=1):
        self.process, self.directory = process, directory
        self.clock = ManualClock()
        self.submitter, self.payer = LocalSigner(secrets.token_bytes(32)), LocalSigner(secrets.token_bytes(32))
        self.connect()
        wallet = Wallet(self.chain, FUNDER, poll_s=0.01)
        wallet.send(Call(self.submitter.address, b"", 10**20), "give gas money")
        self.deployment = deploy(self.chain, wallet, DeploymentTerms(FUNDER.address, challenge_delay_s, 3600))
        self.contracts = SettlementContracts(self.chain, self.deployment.addresses)
        url = parse_url(f"sqlite:///{directory / 'ledger.sqlite'}")
        self.engine = make_engine(url)
        with self.engine.begin() as connection:
            SQLModel.metadata.create_all(connection)

    def connect(self):
        if self.process.process_id is None:
            self.process.close()
            ready.append(self.process.start())
        self.ready = ready[-1]
        self.chain = Chain(self.ready.rpc_url, self.ready.chain_id)
        self.chain.connect()

    def kill_and_restart(self):
        os.kill(self.process.process_id, signal.SIGKILL)
        self.process.close()
        self.connect()
        self.contracts = SettlementContracts(self.chain, self.deployment.addresses)

    def fund_payer(self, amount_wei):
        faucet = Faucet(PROFILES["embedded"], self.contracts, Wallet(self.chain, FUNDER, poll_s=0.01))
        faucet.fund_payer(Wallet(self.chain, self.payer, poll_s=0.01), amount_wei)

    def outbox(self, chain=None, **limits):
        contracts = SettlementContracts(chain or self.chain, self.deployment.addresses)
        return Outbox(self.engine, contracts, self.submitter, self.clock, OutboxLimits(**limits))

    def submit(self, kind, key, payload, after=()):
        with self.engine.begin() as connection:
            intents.submit_intent(connection, kind, key, payload, after=after, created_ms=self.clock())
        return key

    def state(self, key):
        with self.engine.begin() as connection:
            return intents.intent_state(connection, key)

    def rows(self, table):
        with self.engine.begin() as connection:
            return connection.execute(SQLModel.metadata.tables[table].select()).all()

    def collect(self, used_wei, key="collect:1", deadline_s=2**40):
        domain = escrow_domain(self.chain.chain_id, self.deployment.addresses.escrow)
        voucher = Voucher(self.payer.address, OPERATOR.address, used_wei, deadline_s)
        payload = {
            "payer": self.payer.address,
            "operator": OPERATOR.address,
            "cumulative": str(used_wei),
            "deadline": str(deadline_s),
            "payer_signature": "0x" + voucher.sign(domain, self.payer).hex(),
            "cumulative_used": str(used_wei),
            "operator_signature": "0x" + Collection(self.payer.address, OPERATOR.address, used_wei).sign(domain, OPERATOR).hex(),
        }
        return self.submit("collect", key, payload)

    def tree(self, totals):
        return Tree(TreeDomain(self.chain.chain_id, self.deployment.addresses.rewards, OPERATOR.address), totals)

    def submit_epoch(self, epoch_id, tree, after=(), key=None):
        statement = EpochStatement(OPERATOR.address, epoch_id, tree.root, b"\x05" * 32, tree.leaves_hash(), tree.total_wei)
        signature = statement.sign(rewards_domain(self.chain.chain_id, self.deployment.addresses.rewards), OPERATOR)
        payload = {
            "operator": OPERATOR.address,
            "epoch_id": str(epoch_id),
            "root": "0x" + tree.root.hex(),
            "receipts_root": "0x" + (b"\x05" * 32).hex(),
            "leaves_hash": "0x" + tree.leaves_hash().hex(),
            "total_cumulative": str(tree.total_wei),
            "operator_signature": "0x" + signature.hex(),
        }
        return self.submit("submit_epoch", key or f"submit_epoch:{epoch_id}", payload, after)

    def close(self):
        self.engine.dispose()


@pytest.fixture(scope="session")
def chain_process(tmp_path_factory):
    process = EmbeddedChainProcess(tmp_path_factory.mktemp("chain"), [FUNDER.address])
    yield process
    process.close()


@pytest.fixture
def new_chain_world(chain_process, tmp_path):
    worlds = []

    def make(**options):
        worlds.append(ChainWorld(chain_process, tmp_path, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def chain_world(new_chain_world):
    return new_chain_world()
