"""The chains a node can settle on, by the names of `chain.profile`. Data only: nothing here opens a connection."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from node.config import ChainSettings
from node.errors import ConfigError
from node.settlement.genesis import EMBEDDED_CHAIN_ID


@dataclass(frozen=True, slots=True)
class ChainProfile:
    """What is known about a chain before it is asked.

    Args:
        name: The value of `chain.profile`.
        chain_id: EIP-155 id.
        rpc_url: Endpoint; None for the embedded chain, whose port is known only once it runs.
        native_symbol: What gas is paid in.
        is_development: Contracts and test tokens are deployed by the node itself, and money has no value.
    """

    name: str
    chain_id: int
    rpc_url: str | None
    native_symbol: str
    is_development: bool


# 1612 and 161201 with their endpoints are as listed in ethereum-lists/chains (eip155-1612, eip155-161201).
PROFILES = {
    "embedded": ChainProfile("embedded", EMBEDDED_CHAIN_ID, None, "ETH", True),
    "anvil": ChainProfile("anvil", 31_337, "http://127.0.0.1:8545", "ETH", True),
    "openledger-testnet": ChainProfile("openledger-testnet", 161_201, "https://rpctn.openledger.xyz", "OPN", False),
    "openledger": ChainProfile("openledger", 1_612, "https://rpc.openledger.xyz", "OPEN", False),
}


def resolve(settings: ChainSettings) -> ChainProfile | None:
    """The chain the settings name, or None for `none`.

    Raises:
        ConfigError: `custom` without an endpoint and an id, or a setting that contradicts the profile.
    """
    if settings.profile == "none":
        return None
    if settings.profile == "custom":
        if settings.rpc_url is None or settings.chain_id is None:
            raise ConfigError('chain.profile "custom" needs chain.rpc_url and chain.chain_id; set both')
        return ChainProfile("custom", settings.chain_id, _checked_url(settings.rpc_url), "ETH", False)
    profile = PROFILES[settings.profile]
    if settings.chain_id not in (None, profile.chain_id):
        raise ConfigError(
            f'chain.chain_id is {settings.chain_id}, but profile "{profile.name}" is chain {profile.chain_id}; '
            'remove chain.chain_id or use profile "custom"'
        )
    if settings.rpc_url is None:
        return profile
    if profile.rpc_url is None:
        raise ConfigError('chain.rpc_url does not apply to profile "embedded", which runs its own chain; remove it')
    return ChainProfile(
        profile.name, profile.chain_id, _checked_url(settings.rpc_url), profile.native_symbol, profile.is_development
    )


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        is_usable = False
    if not is_usable:
        raise ConfigError("chain.rpc_url must be http:// or https:// with a host; other transports are not supported")
    return url
