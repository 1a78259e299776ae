"""Put the contracts onto a chain once, and recognise them ever after."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import rlp  # type: ignore[import-untyped]
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from node.errors import ChainError
from node.settlement.artifacts import artifact
from node.settlement.chain import Call, Chain
from node.settlement.settlement_contracts import ContractAddresses
from node.settlement.wallet import Wallet

DEPLOYMENT_NAME = "deployment.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class DeploymentTerms:
    """What the constructors are told.

    Args:
        guardian: Who may void an epoch in its challenge delay and revoke adapters.
        challenge_delay_s: Between an epoch's submission and its first claim, at least 1.
        thaw_s: Notice period of a payer's withdrawal, at least 1.
        token: Existing payment token; None deploys the test token, owned by the deployer.
    """

    guardian: str
    challenge_delay_s: int
    thaw_s: int
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where the contracts of one chain are, and the keccak-256 of their code.

    Args:
        genesis_hash: Of the chain, since two chains may share an id.
    """

    chain_id: int
    genesis_hash: str
    addresses: ContractAddresses
    code_hashes: dict[str, str]

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> Deployment:
        """Read what `to_json` wrote.

        Raises:
            ChainError: contract_missing, another version or malformed.
        """
        try:
            fields = json.loads(data)
            if fields.pop("version") != VERSION:
                raise ValueError("version")
            return cls(**{**fields, "addresses": ContractAddresses(**fields["addresses"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChainError(
                f"{path} is not a deployment file of this version; restore it or remove it to deploy again",
                code="contract_missing",
            ) from error


def ensure_deployed(path: Path, chain: Chain, new_wallet: Callable[[], Wallet], terms: DeploymentTerms) -> Deployment:
    """The deployment in `path`, verified on the chain; without the file, a new one.

    Args:
        path: `<data_dir>/chain/deployment.json`.
        chain: Connected.
        new_wallet: Opens the account that pays for a deployment; not called when there is one.
        terms: Used only for a new deployment.

    Raises:
        ChainError: chain_mismatch or contract_missing when the file speaks of another chain or other code.
    """
    if path.exists():
        return load_deployment(path, chain)
    deployment = deploy(chain, new_wallet(), terms)
    _write_atomically(path, deployment.to_json())
    return deployment


def load_deployment(path: Path, chain: Chain) -> Deployment:
    """Read a deployment and check that its contracts are there, byte for byte.

    Raises:
        ChainError: As `ensure_deployed`.
    """
    try:
        deployment = Deployment.from_json(path.read_bytes(), path)
    except OSError as error:
        raise ChainError(f"{path} cannot be read; check its permissions or deploy again", code="contract_missing") from error
    if deployment.chain_id != chain.chain_id or deployment.genesis_hash != "0x" + chain.genesis_hash().hex():
        raise ChainError(
            f"{path} describes another chain than the one that answers; "
            "restore the chain's data, or remove the file to deploy again",
            code="chain_mismatch",
        )
    for name, address in asdict(deployment.addresses).items():
        if _code_hash(chain, address) != deployment.code_hashes.get(name):
            raise ChainError(
                f"the {name} contract at {address} is missing or has other code than was deployed; check chain.rpc_url",
                code="contract_missing",
            )
    return deployment


def describe(chain: Chain, addresses: ContractAddresses) -> Deployment:
    """The deployment at addresses that the settings name; remembers the code that is there now.

    Raises:
        ChainError: contract_missing when nothing is deployed at one of them.
    """
    named = asdict(addresses)
    for name, address in named.items():
        if not chain.code(address):
            raise ChainError(
                f"no contract at chain.{name}_address {address} on chain {chain.chain_id}; correct the setting",
                code="contract_missing",
            )
    hashes = {name: _code_hash(chain, address) for name, address in named.items()}
    return Deployment(chain.chain_id, "0x" + chain.genesis_hash().hex(), addresses, hashes)


def deploy(chain: Chain, wallet: Wallet, terms: DeploymentTerms) -> Deployment:
    """Deploy all contracts, four transactions at most.

    Rewards come before the escrow and name its address beforehand; the escrow's constructor checks that they agree.

    Raises:
        ChainError: transaction_failed, transaction_unknown, or an address that did not come out as computed.
    """
    token = terms.token or _create(wallet, "TestToken", wallet.address)
    escrow = contract_address(wallet.address, wallet.next_nonce() + 1)
    rewards = _create(wallet, "AttributionRewards", token, escrow, terms.challenge_delay_s, to_checksum_address(terms.guardian))
    created = _create(wallet, "UsageEscrow", token, rewards, terms.thaw_s)
    if created != escrow:
        raise ChainError(
            f"the escrow came out at {created} and not at {escrow}: {wallet.address} sent something else meanwhile; deploy again",
            code="transaction_failed",
        )
    registry = _create(wallet, "AdapterRegistry", to_checksum_address(terms.guardian))
    return describe(chain, ContractAddresses(token, rewards, escrow, registry))


def contract_address(sender: str, nonce: int) -> str:
    """The address of a contract that `sender` creates with that nonce."""
    encoded = rlp.encode([bytes.fromhex(sender.removeprefix("0x")), nonce])
    return str(to_checksum_address(keccak(encoded)[12:]))


def _create(wallet: Wallet, name: str, *arguments: object) -> str:
    source = artifact(name)
    data = wallet.chain.encode_deployment(source.abi, source.bytecode, arguments)
    receipt = wallet.send(Call("", data), f"deploy {name}")
    if receipt.contract_address is None:
        raise ChainError(f"the chain gave no address for {name}; use another endpoint", code="transaction_failed")
    return str(to_checksum_address(receipt.contract_address))


def _code_hash(chain: Chain, address: str) -> str:
    code = chain.code(address)
    return "0x" + keccak(code).hex() if code else ""


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
