"""One look at the configured chain, for `doctor`."""

from __future__ import annotations

from node.config import ChainSettings
from node.errors import ConfigError
from node.settlement.chain import Chain
from node.settlement.chain_profiles import resolve


def probe(settings: ChainSettings) -> str:
    """Connect and describe what answers.

    Raises:
        ChainError: chain_unreachable or chain_mismatch.
        ConfigError: The settings name no endpoint.
    """
    profile = resolve(settings)
    if profile is None or profile.rpc_url is None:
        raise ConfigError(f'chain.profile "{settings.profile}" has no endpoint to look at; choose another profile')
    chain = Chain(profile.rpc_url, profile.chain_id, settings.rpc_timeout_s)
    chain.connect()
    return f"{profile.name}: chain {profile.chain_id} answers, block {chain.head().number}"
