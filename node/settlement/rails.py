"""The chain a node settles on, ready for use: connected, with contracts that are verified or, in development, deployed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from node.config import ChainSettings, Settings
from node.errors import ChainError, ConfigError
from node.settlement.chain import Call, Chain
from node.settlement.chain_profiles import ChainProfile, resolve
from node.settlement.deploy import DEPLOYMENT_NAME, DeploymentTerms, describe, ensure_deployed, load_deployment
from node.settlement.embedded_chain_process import EmbeddedChainProcess
from node.settlement.embedded_chain_watch import EmbeddedChainWatch
from node.settlement.faucet import Faucet
from node.settlement.keys import KeyDirectory
from node.settlement.settlement_contracts import ContractAddresses, SettlementContracts
from node.settlement.signer import LocalSigner
from node.settlement.wallet import Wallet

FUNDER = "funder"  # development chains only: deploys, owns the test token, gives gas
DEVELOPMENT_THAW_S = 7 * 24 * 3600
GAS_MONEY_WEI = 10**20
# anvil's first account, printed by anvil itself at every start.
ANVIL_KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")


@dataclass(frozen=True, slots=True)
class Rails:
    """One chain and the contracts on it. `faucet` exists on development chains only."""

    profile: ChainProfile
    rpc_url: str
    chain: Chain
    contracts: SettlementContracts
    faucet: Faucet | None


@asynccontextmanager
async def open_rails(
    settings: Settings, keys: KeyDirectory, submitter: str, logger: FilteringBoundLogger
) -> AsyncIterator[Rails | None]:
    """Connect to the configured chain; start it first when it is the embedded one. None for profile "none".

    Raises:
        ConfigError: The profile needs settings it does not have.
        ChainError: The chain does not answer, is another chain, or has no contracts.
    """
    profile = resolve(settings.chain)
    if profile is None:
        yield None
        return
    directory = settings.data_dir / "chain"
    if profile.rpc_url is not None:
        yield await asyncio.to_thread(_connect, profile, settings.chain, directory, keys, submitter)
        return
    process = EmbeddedChainProcess(directory, fund=(await asyncio.to_thread(_funder_address, keys), submitter))
    watch = EmbeddedChainWatch(process, logger)
    try:
        ready = await asyncio.to_thread(process.start)
        watch.open()
        yield await asyncio.to_thread(
            _connect, replace(profile, rpc_url=ready.rpc_url), settings.chain, directory, keys, submitter
        )
    finally:
        await watch.close()


def _connect(profile: ChainProfile, settings: ChainSettings, directory: Path, keys: KeyDirectory, submitter: str) -> Rails:
    if profile.rpc_url is None:
        raise ConfigError(f'chain.profile "{profile.name}" has no endpoint; set chain.rpc_url')
    chain = Chain(profile.rpc_url, profile.chain_id, settings.rpc_timeout_s)
    chain.connect()
    named = _named_contracts(settings)
    if named is not None:
        contracts = SettlementContracts(chain, describe(chain, named).addresses)
        return Rails(profile, profile.rpc_url, chain, contracts, None)
    path = directory / DEPLOYMENT_NAME
    if not profile.is_development:
        if not path.exists():
            raise ConfigError(
                f'chain.profile "{profile.name}" needs chain.token_address, rewards_address, escrow_address and registry_address'
            )
        return Rails(profile, profile.rpc_url, chain, SettlementContracts(chain, load_deployment(path, chain).addresses), None)
    _funder_address(keys)
    funder = Wallet(chain, keys.load(FUNDER))
    if profile.name == "anvil":
        _take_anvil_money(chain, (funder.address, submitter))
    terms = DeploymentTerms(funder.address, settings.challenge_delay_s, DEVELOPMENT_THAW_S)
    contracts = SettlementContracts(chain, ensure_deployed(path, chain, lambda: funder, terms).addresses)
    return Rails(profile, profile.rpc_url, chain, contracts, Faucet(profile, contracts, funder))


def _named_contracts(settings: ChainSettings) -> ContractAddresses | None:
    """The contracts that the settings name: all four or none."""
    given = {
        "token": settings.token_address,
        "rewards": settings.rewards_address,
        "escrow": settings.escrow_address,
        "registry": settings.registry_address,
    }
    missing = [f"chain.{name}_address" for name, address in given.items() if address is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ConfigError(f"the contracts are named in part; also set {', '.join(missing)}")
    return ContractAddresses(**{name: str(address) for name, address in given.items()})


def _funder_address(keys: KeyDirectory) -> str:
    if not keys.has(FUNDER):
        return keys.create(FUNDER).address
    return keys.address(FUNDER)


def _take_anvil_money(chain: Chain, accounts: tuple[str, ...]) -> None:
    """Give gas to our accounts from anvil's first one, which is rich on every anvil and on no real chain."""
    rich = Wallet(chain, LocalSigner(ANVIL_KEY))
    for account in accounts:
        if chain.balance_wei(account) >= GAS_MONEY_WEI:
            continue
        if chain.balance_wei(rich.address) <= GAS_MONEY_WEI:
            raise ChainError(f"anvil's first account {rich.address} has no money; start anvil with its default accounts")
        rich.send(Call(account, b"", GAS_MONEY_WEI), "give gas money")
