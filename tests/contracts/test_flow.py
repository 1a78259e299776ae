"""One payment from deposit to claim, over the committed bytecode on py-evm, signed by eth-account.

The forge tests sign with their own code and run forge's EVM; here a second signer and a second EVM do the same work.
"""

from __future__ import annotations

import ast
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_tester import EthereumTester, PyEVMBackend
from eth_tester.exceptions import TransactionFailed
from eth_utils import keccak
from web3 import EthereumTesterProvider, Web3
from web3.contract import Contract
from web3.utils.address import get_create_address

from attribution.merkle import Tree, TreeDomain
from attribution.registration import Registration, registry_domain
from attribution.signing import LocalSigner

CHALLENGE_DELAY_S = 60
THAW_SECONDS = 3600
DEADLINE = 2**64 - 1

PAYER: LocalAccount = Account.from_key(keccak(text="payer"))
OPERATOR: LocalAccount = Account.from_key(keccak(text="operator"))
TRAINER: LocalAccount = Account.from_key(keccak(text="trainer"))

VOUCHER = "Voucher(address payer,address operator,uint256 cumulative,uint64 deadline)"
COLLECTION = "Collection(address payer,address operator,uint256 cumulativeUsed)"
EPOCH = "Epoch(address operator,uint256 epochId,bytes32 root,bytes32 receiptsRoot,bytes32 leavesHash,uint256 totalCumulative)"
ADAPTER = "Adapter(bytes32 adapterId,bytes32 manifestHash,bytes32 baseId,address trainer,string uri)"


class Settlement:
    """The contracts on a fresh chain, and a sender with test tokens."""

    def __init__(self, artifacts: dict[str, dict[str, Any]]) -> None:
        self.tester = EthereumTester(PyEVMBackend())
        self.w3 = Web3(EthereumTesterProvider(self.tester))
        self._artifacts = artifacts
        self.sender = self.w3.eth.accounts[0]
        self.token = self.deploy("TestToken", self.sender)
        escrow_address = get_create_address(self.sender, self.w3.eth.get_transaction_count(self.sender) + 1)
        self.rewards = self.deploy("AttributionRewards", self.token.address, escrow_address, CHALLENGE_DELAY_S, self.sender)
        self.escrow = self.deploy("UsageEscrow", self.token.address, self.rewards.address, THAW_SECONDS)
        self.registry = self.deploy("AdapterRegistry", self.sender)
        self.send(self.token.functions.mint(self.sender, 10**24))
        self.send(self.token.functions.approve(self.escrow.address, 10**24))

    def deploy(self, name: str, *arguments: Any) -> Contract:
        factory = self.w3.eth.contract(abi=self._artifacts[name]["abi"], bytecode=self._artifacts[name]["bytecode"])
        receipt = self.w3.eth.wait_for_transaction_receipt(factory.constructor(*arguments).transact({"from": self.sender}))
        return self.w3.eth.contract(address=receipt["contractAddress"], abi=self._artifacts[name]["abi"])

    def send(self, call: Any) -> None:
        receipt = self.w3.eth.wait_for_transaction_receipt(call.transact({"from": self.sender}))
        assert receipt["status"] == 1

    def sign(self, key: LocalAccount, contract: Contract, name: str, kind: str, values: tuple[Any, ...]) -> bytes:
        """Sign `values` as the struct `kind` (`Name(type field,...)`) for the contract called OpenLoRA `name`."""
        type_name, _, members = kind.removesuffix(")").partition("(")
        fields = [dict(zip(("type", "name"), member.split(), strict=True)) for member in members.split(",")]
        domain = {
            "name": f"OpenLoRA {name}",
            "version": "1",
            "chainId": self.w3.eth.chain_id,
            "verifyingContract": contract.address,
        }
        message = {field["name"]: value for field, value in zip(fields, values, strict=True)}
        return bytes(key.sign_typed_data(domain, {type_name: fields}, message).signature)

    def pay(self, used_wei: int) -> None:
        self.send(self.escrow.functions.deposit(PAYER.address, used_wei))
        self.send(self.collect(used_wei))

    def collect(self, used_wei: int) -> Any:
        voucher = (PAYER.address, OPERATOR.address, used_wei, DEADLINE)
        payers = self.sign(PAYER, self.escrow, "UsageEscrow", VOUCHER, voucher)
        operators = self.sign(OPERATOR, self.escrow, "UsageEscrow", COLLECTION, (PAYER.address, OPERATOR.address, used_wei))
        return self.escrow.functions.collect(voucher, payers, used_wei, operators)

    def submit(self, tree: Tree) -> int:
        epoch_id = self.rewards.functions.epochCount(OPERATOR.address).call()
        epoch = (OPERATOR.address, epoch_id, tree.root, keccak(text="receipts"), tree.leaves_hash(), tree.total_wei)
        signature = self.sign(OPERATOR, self.rewards, "AttributionRewards", EPOCH, epoch)
        self.send(self.rewards.functions.submitEpoch(epoch, signature))
        return int(epoch_id)

    def activate(self) -> None:
        self.tester.time_travel(self.w3.eth.get_block("latest")["timestamp"] + CHALLENGE_DELAY_S)

    def domain(self) -> TreeDomain:
        return TreeDomain(self.w3.eth.chain_id, self.rewards.address, OPERATOR.address)


@pytest.fixture(scope="module")
def deployed(artifacts: dict[str, dict[str, Any]]) -> Settlement:
    return Settlement(artifacts)


@pytest.fixture
def settlement(deployed: Settlement) -> Any:
    snapshot = deployed.tester.take_snapshot()
    yield deployed
    deployed.tester.revert_to_snapshot(snapshot)


def revert_of(call: Any, contract: Contract) -> str:
    """Name of the contract's own error that `call` ends with."""
    with pytest.raises(TransactionFailed) as raised:
        call.call()
    data = ast.literal_eval(str(raised.value).removeprefix("execution reverted: "))
    for entry in contract.abi:
        if entry["type"] == "error":
            signature = f"{entry['name']}({','.join(item['type'] for item in entry['inputs'])})"
            if keccak(text=signature)[:4] == data[:4]:
                return str(entry["name"])
    return f"unknown error {data[:4].hex()}"


def test_flow_deposit_to_claim_pays_out_exactly_what_was_paid_in(settlement: Settlement) -> None:
    totals = {f"0x{index + 0x1001:040x}": 10**15 + index for index in range(7)}
    tree = Tree(settlement.domain(), totals)
    settlement.pay(tree.total_wei)

    epoch_id = settlement.submit(tree)
    settlement.activate()
    claims = [(account, wei, tree.proof(account)) for account, wei in tree.entries]
    settlement.send(settlement.rewards.functions.claimMany(OPERATOR.address, epoch_id, claims))

    received = {account: settlement.token.functions.balanceOf(account).call() for account, _ in tree.entries}
    assert received == dict(tree.entries)
    assert settlement.token.functions.balanceOf(settlement.rewards.address).call() == 0
    assert settlement.token.functions.balanceOf(settlement.escrow.address).call() == 0


def test_flow_second_epoch_pays_only_the_difference(settlement: Settlement) -> None:
    account = Web3.to_checksum_address(f"0x{0x2001:040x}")
    for epoch_id, total in enumerate((400, 1000)):
        settlement.send(settlement.escrow.functions.deposit(PAYER.address, 600))
        settlement.send(settlement.collect(total))
        tree = Tree(settlement.domain(), {account: total})
        assert settlement.submit(tree) == epoch_id
        settlement.activate()
        settlement.send(settlement.rewards.functions.claim(OPERATOR.address, epoch_id, account, total, tree.proof(account)))
        assert settlement.token.functions.balanceOf(account).call() == total


def test_flow_claim_before_the_delay_is_refused(settlement: Settlement) -> None:
    account = Web3.to_checksum_address(f"0x{0x2001:040x}")
    tree = Tree(settlement.domain(), {account: 100})
    settlement.pay(100)
    epoch_id = settlement.submit(tree)

    claim = settlement.rewards.functions.claim(OPERATOR.address, epoch_id, account, 100, tree.proof(account))
    assert revert_of(claim, settlement.rewards) == "EpochNotActive"


def test_flow_collect_twice_is_refused(settlement: Settlement) -> None:
    settlement.pay(100)

    assert revert_of(settlement.collect(100), settlement.escrow) == "NothingToCollect"


def test_flow_leaf_on_chain_equals_the_trees(settlement: Settlement) -> None:
    account = Web3.to_checksum_address(f"0x{0x2001:040x}")
    tree = Tree(settlement.domain(), {account: 2**255})

    assert settlement.rewards.functions.leafOf(OPERATOR.address, account, 2**255).call() == tree.leaves[0]


def test_flow_registration_signed_by_trainer_is_accepted_from_anyone(settlement: Settlement) -> None:
    values = (keccak(text="adapter"), keccak(text="manifest"), keccak(text="base"), TRAINER.address, "https://example.org/m")
    signature = settlement.sign(TRAINER, settlement.registry, "AdapterRegistry", ADAPTER, values)
    adapter, manifest, base = (value.hex() for value in values[:3])
    domain = registry_domain(settlement.w3.eth.chain_id, settlement.registry.address)
    assert Registration(adapter, manifest, base, *values[3:]).sign(domain, LocalSigner(bytes(TRAINER.key))) == signature

    settlement.send(settlement.registry.functions.register(*values, signature))

    manifest, base, trainer, version, _, status = settlement.registry.functions.adapterOf(values[0]).call()
    assert (manifest, base, trainer, version, status) == (values[1], values[2], TRAINER.address, 1, 1)
